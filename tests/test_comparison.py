"""The report of protocols: tables with intervals, a figure with every member, all cells."""

import copy
import json
import re
import statistics

import pytest
from conftest import ROOT
from scipy import stats
from short_runs import command, refused

import visualize
from command_line.errors import UserError
from genotypes import DARTS_V1, DARTS_V2, PRIMITIVES, resolve
from report import comparison, figures
from run.folder import write_json

SEARCHED, CHANCE = [0.91, 0.93, 0.90, 0.94, 0.92], [0.89, 0.92, 0.90, 0.93]
DARTS_SPACE = {"space": "darts", "nodes": "4", "primitives": ",".join(PRIMITIVES)}
TRAINING = {"dataset": "digits", "layers": 3, "init_channels": 4, "epochs": 3, "hold_out": 0.1, "select_epochs": 2}
ORIGIN = {"seconds": 1800.0, "version": "0123456789ab", "machine": "x86_64", "fingerprints": {}}
SEARCH = {"epochs": 50, "valid_top1": 0.8, "verdict": "settled: for 9 epochs", "eigenvalue": 0.25} | ORIGIN


def final(tests):
    """The final trainings of a member with these test accuracies, of seeds 1, 2, ..."""
    return [{"seed": seed, "test_top1": test} | ORIGIN for seed, test in enumerate(tests, 1)]


def member(kind, i, top1, genotype, tests=()):
    """A member as in results.json."""
    content = {"name": f"{kind}-{i}", "kind": kind, "seed": i, "genotype": str(genotype)}
    content |= {"skip_connections": {"normal": 2, "reduce": 3}, "parameters_M": 3.5, "multiply_adds_M": 520.0}
    content |= {"held_out_top1": top1, "selection": ORIGIN, "final": final(tests)}
    return content | ({"search": SEARCH} if kind == "search" else {})


def made_up(label="searched", searched=SEARCHED, chance=CHANCE):
    members = [member("search", i, top1, DARTS_V1) for i, top1 in enumerate(searched, 1)]
    members += [member("random", i, top1, resolve(f"random:{i}")) for i, top1 in enumerate(chance, 1)]
    names = {"format": 2, "label": label, "command": f"python protocol.py --label '{label}'"}
    options = {"search_options": {"order": "first"} if searched else None, "training_options": TRAINING}
    return names | options | {"finals": "best", "search_space": DARTS_SPACE, "members": members}


def rows_of(all_results, images="held-out"):
    rows = comparison.accuracy_rows(comparison.methods_of(all_results), images)
    return {name: cells for name, *cells in rows}


def test_a_row_holds_n_mean_sd_interval_and_the_difference_to_chance():
    n, mean, sd, interval, selected, less, of_difference = rows_of([made_up()])["searched"]
    searched, chance = ([100 * top1 for top1 in sample] for sample in (SEARCHED, CHANCE))
    low, high = stats.ttest_1samp(searched, 0).confidence_interval(0.95)
    assert (n, mean, selected) == (5, "92.00", "94.00")
    assert sd == f"{statistics.stdev(searched):.2f}"
    assert interval == f"{low:.2f} to {high:.2f}"
    low, high = stats.ttest_ind(searched, chance, equal_var=False).confidence_interval(0.95)
    assert less == f"{92 - statistics.fmean(chance):+.2f}"
    assert of_difference == f"{low:+.2f} to {high:+.2f}"
    assert rows_of([made_up()])["random cells"][-2:] == ["-", "-"]


def test_the_selected_cell_is_the_best_on_held_out_images():
    results = made_up(searched=[], chance=[]) | {"finals": "all"}
    for i, top1, tests in ((1, 0.7, [0.9, 0.9]), (2, 0.8, [0.6, 0.5]), (3, 0.8, [0.9, 0.9])):
        results["members"].append(member("search", i, top1, DARTS_V1, tests))
    assert rows_of([results])["searched"][4] == "80.00"
    assert rows_of([results], "test")["searched"][4] == "55.00"  # the first of equal ones, its mean over seeds


def test_test_accuracies_are_over_seeds_of_one_cell_or_over_cells():
    results = made_up(searched=[0.9, 0.8], chance=[]) | {"finals": "all"}
    results["members"][0] = member("search", 1, 0.9, DARTS_V1, tests=[0.5, 0.6, 0.7])
    assert rows_of([results], "test")["searched"][:2] == [3, "60.00"]  # seeds
    results["members"][1] = member("search", 2, 0.8, DARTS_V2, tests=[0.8, 0.8, 0.8])
    assert rows_of([results], "test")["searched"][:2] == [2, "70.00"]  # cells, of their means over seeds


def test_chance_may_be_in_one_of_several_results_and_counts_once():
    first, second = made_up("first"), made_up("second", chance=[])
    alone, together = rows_of([first]), rows_of([first, second, copy.deepcopy(first)])
    assert list(together) == ["first", "random cells", "second"]
    assert together["random cells"][0] == len(CHANCE)
    assert together["first"] == alone["first"]
    assert together["second"][-1] == alone["first"][-1]


def test_searches_of_other_options_need_other_labels():
    other = made_up() | {"search_options": {"order": "second"}}
    with pytest.raises(UserError, match="both called 'searched'"):
        comparison.methods_of([made_up(), other])
    other = made_up()
    other["members"][0]["genotype"] = "of other images"
    with pytest.raises(UserError, match="two results of 'searched' with the seed 1 differ"):
        comparison.methods_of([made_up(), other])


def page_of(all_results, tmp_path):
    comparison.write(all_results, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def assert_not_compared(all_results, what):
    with pytest.raises(UserError, match=f"they have other {what}"):
        comparison.methods_of(all_results)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"training_options": TRAINING | {"epochs": 600}}, "options of trainings"),
        ({"search_space": DARTS_SPACE | {"nodes": 2}}, "--nodes"),
        ({"search_space": DARTS_SPACE | {"primitives": "skip_connect,sep_conv_3x3"}}, "--primitives"),
        ({"finals": "all"}, "--finals"),
    ],
)
def test_results_of_other_conditions_are_not_compared(change, what):
    assert_not_compared([made_up("a"), made_up("b", chance=[]) | change], what)


def test_results_of_other_images_are_not_compared():
    all_results = [made_up("a"), made_up("b", chance=[])]
    for results, fingerprint in zip(all_results, ("0123456789abcdef", "fedcba9876543210")):
        results["members"][0]["selection"] = ORIGIN | {"fingerprints": {"training": fingerprint}}
    assert_not_compared(all_results, "images")
    all_results[1]["members"][0]["selection"] = all_results[0]["members"][0]["selection"]
    assert list(rows_of(all_results)) == ["a", "random cells", "b"]


def test_a_page_shows_every_cell_and_every_command(tmp_path, monkeypatch):
    monkeypatch.setattr("report.html.render", lambda *arguments: b"<svg/>")  # as graphviz's dot, where there is one
    page = page_of([made_up("a <b>"), made_up("c", chance=[])], tmp_path)
    assert page.count('alt="normal cell: ') == page.count('alt="reduce cell: ') == 2 * len(SEARCHED) + len(CHANCE)
    assert "python protocol.py --label &#39;a &lt;b&gt;&#39;" in page
    assert "a <b>" not in page
    assert "settled: for 9 epochs" in page


@pytest.mark.parametrize(("searched", "chance"), [([], []), ([0.9], CHANCE)])
def test_any_number_of_members_of_which_some_are_not_over_makes_a_page(searched, chance, tmp_path):
    results = made_up(searched=searched, chance=chance)
    results["members"].append({"name": "search-2", "kind": "search", "seed": 2, "genotype": None})
    assert "search-2" in page_of([results], tmp_path)
    comparison.write([results], tmp_path / "tables.md")
    comparison.write([results], tmp_path / "figure.svg")
    if searched:  # neither standard deviation nor interval
        assert rows_of([results])["searched"][:5] == [1, "90.00", "-", "-", "90.00"]


def test_the_figure_has_a_point_for_every_member():
    methods = comparison.methods_of([made_up("a"), made_up("b", searched=[0.5], chance=[])])
    (held_out,) = figures.members(methods, comparison.CHANCE).axes  # nothing was trained in full
    points = [line.get_xdata().tolist() for line in held_out.lines if line.get_marker() == "o"]
    assert points == [[100 * top1 for top1 in sample] for sample in (SEARCHED, CHANCE, [0.5])]
    assert [label.get_text() for label in held_out.get_yticklabels()] == ["a", "random cells", "b"]


def test_visualize_writes_several_results_side_by_side(tmp_path, capsys):
    paths = [tmp_path / name / "results.json" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        write_json(path, made_up(path.parent.name))
    assert command(visualize.main, [*paths, "--output", tmp_path / "both.html"]) == 0
    assert "<h1>a, b</h1>" in (tmp_path / "both.html").read_text()
    assert command(visualize.main, paths[:1]) == 0
    assert (tmp_path / "a/report.html").is_file()
    write_json(paths[1], {"members": [{}]})
    refused(capsys, visualize.main, paths[1:], "b/results.json is not as this program writes it")


def test_the_tables_of_our_own_results_are_those_of_their_files():
    page = (ROOT / "docs" / "results.md").read_text()
    named = re.search(r"python visualize.py (.*) --output docs/results.svg", page)[1].split()
    assert sorted(named) == sorted(f"docs/results/{path.name}" for path in (ROOT / "docs" / "results").glob("*.json"))
    all_results = [json.loads((ROOT / name).read_text()) for name in named]
    for images in ("held-out", "test"):
        rows = [comparison.ACCURACY_HEADS, *comparison.accuracy_rows(comparison.methods_of(all_results), images)]
        assert comparison.markdown(comparison.TITLES[images], rows) in page
