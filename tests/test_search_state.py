"""What a search's history says: its verdict, and when DARTS-ES stops; then real searches."""

import json
import re

import pytest

import search
from architect import Architect
from evidence.search_state import (
    chosen,
    early_stop,
    local_averages,
    margins,
    skip_connections,
    stable_epochs,
    verdict,
)
from genotypes import DARTS_V1, DARTS_V2, Genotype

CONV = [[("sep_conv_3x3", 0), ("sep_conv_3x3", 1)]] * 4
TINY = ["--layers", "3", "--init-channels", "2", "--nodes", "1", "--batch-size", "720", "--workers", "0"]


def with_skips(n):
    """A genotype whose normal cell has n skip connections among its 8 edges."""
    ops = ["skip_connect"] * n + ["sep_conv_3x3"] * (8 - n)
    normal = [[(ops[2 * i], 0), (ops[2 * i + 1], 1)] for i in range(4)]
    return Genotype(normal, range(2, 6), CONV, range(2, 6))


def history_of(genotypes, eigenvalues=None, margin=0.1):
    eigenvalues = eigenvalues or [1.0] * len(genotypes)
    state = {"alphas_learn": True, "margins": {"normal": [margin] * 8}}
    return [
        state | {"epoch": i, "string": str(genotype), "eigenvalue": eigenvalue}
        for i, (genotype, eigenvalue) in enumerate(zip(genotypes, eigenvalues), 1)
    ]


# Early stopping.


def test_averages_are_over_the_five_epochs_around_one():
    averages = local_averages(history_of([DARTS_V1] * 7, [1.0, 2.0, 3.0, 4.0, 10.0, -6.0, 7.0]))
    assert averages == {3: 4.0, 4: 5.0, 5: 6.0}  # the magnitudes'


@pytest.mark.parametrize(
    ("eigenvalues", "stop"),
    [
        ([1.0] * 15 + [2.0] * 20, 15),  # the average around 15 is 7 / 5, around 10 it is 1: 0.71 < 0.75
        ([1.0] * 15 + [2.0], None),  # the average around 15 is not known yet
        ([1.0] * 20 + [2.0] * 10, 20),  # around 19: 6 / 5, 1 / 1.2 = 0.83; around 20: 7 / 5
        ([1.06**i for i in range(50)], 15),  # 1.06^-5 = 0.747 from the start on, but no epoch before 10 is returned
        ([1.055**i for i in range(50)], None),  # 0.765
        ([None] * 50, None),
        ([1.1**i if i != 9 else None for i in range(50)], 18),  # averages around 8 to 12 are unknown: first 13 and 18
    ],
)
def test_the_search_stops_where_the_average_has_grown_by_a_third_in_five_epochs(eigenvalues, stop):
    assert early_stop(history_of([DARTS_V1] * len(eigenvalues), eigenvalues)) == stop


def test_the_chosen_epoch_is_the_last_or_that_of_early_stopping():
    history = history_of([DARTS_V1] * 17, [1.0] * 15 + [2.0] * 2)  # stops at epoch 15
    assert chosen(history, with_early_stop=False) == history[16]
    assert chosen(history, with_early_stop=True) == history[9]
    assert chosen(history[:16], with_early_stop=True) == history[15]  # not known yet


def test_epochs_in_which_alphas_do_not_learn_count_for_nothing():
    waiting = [entry | {"alphas_learn": False} for entry in history_of([DARTS_V1] * 15, [1.1**i for i in range(15)])]
    learning = history_of([with_skips(8)] * 17, [1.0] * 15 + [2.0] * 2)
    later = [entry | {"epoch": entry["epoch"] + 15} for entry in learning]
    assert early_stop(waiting) is None
    assert verdict(waiting) == "not settled: alphas have not learned"
    assert stable_epochs(waiting) == 0
    assert early_stop(waiting + later) == 15 + 15
    assert stable_epochs(waiting + later[:2]) == 2
    assert verdict(waiting + later) == verdict(learning)


# The verdict.


GROWING = [1.07**i for i in range(10)]


@pytest.mark.parametrize(
    ("genotypes", "options", "sentence"),
    [
        ([DARTS_V1] * 2, {}, r"not settled: only 2 epochs are over"),
        ([DARTS_V1, DARTS_V2] * 3, {}, r"not settled: .* changed in each of the last 3 epochs"),
        ([DARTS_V1] * 5 + [DARTS_V2] * 2, {}, r"not settled: .* changed in epoch 6"),
        ([DARTS_V1] * 5 + [DARTS_V2] * 3, {}, r"settled: .* the same for 3 epochs"),
        ([DARTS_V1] * 4, {"margin": 0.001}, r"not settled: .* same for 4 epochs, but .* by less than 0.5 %"),
        ([with_skips(6)] * 4, {}, r"collapsed: 6 of 8 edges"),
        ([with_skips(5)] * 10, {"eigenvalues": GROWING}, r"collapsing: 5 of 8 edges .* has grown 1.4 times"),
        ([with_skips(2)] * 10, {"eigenvalues": GROWING}, r"settled: .*; the eigenvalue has grown 1.4 times"),
    ],
)
def test_the_verdict_says_what_state_the_search_is_in(genotypes, options, sentence):
    assert re.match(sentence, verdict(history_of(genotypes, **options)))


def test_the_order_of_a_nodes_edges_makes_no_other_cell():
    swapped = DARTS_V2._replace(normal=[node[::-1] for node in DARTS_V2.normal])
    assert stable_epochs(history_of([DARTS_V1, DARTS_V2, swapped, DARTS_V2])) == 3


def test_margins_are_of_the_chosen_over_the_best_other_but_none():
    candidates = ["none", "skip_connect", "sep_conv_3x3"]
    rows = [[0.6, 0.1, 0.3], [0.2, 0.5, 0.3]]
    assert margins([rows], [[("sep_conv_3x3", 0), ("skip_connect", 1)]], candidates, candidates[1:]) == pytest.approx(
        [0.2, 0.2]
    )
    assert margins([[[0.6, 0.4]]], [[("skip_connect", 0)]], ["none", "skip_connect"], ["skip_connect"]) == [0.4]
    assert skip_connections(DARTS_V1.normal) == skip_connections(DARTS_V2.reduce) == 3


# Searches.


def run_search(monkeypatch, folder, *words):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["search.py", *words])
    search.main()
    run = folder / "runs/search/digits"
    return (run / "log.txt").read_text(), {path.stem: json.loads(path.read_text()) for path in run.glob("*.json")}


@pytest.fixture
def growing(short_runs, monkeypatch):
    """Let the eigenvalue be 1 in the first ten epochs and 2 from then on."""
    calls = iter([1.0] * 10 + [2.0] * 40)
    monkeypatch.setattr(search, "dominant_eigenvalue", lambda net, X, y: next(calls))


def test_a_search_that_stops_early_takes_the_genotype_of_five_epochs_before(growing, tmp_path, monkeypatch):
    log, files = run_search(monkeypatch, tmp_path, *TINY, "--epochs", "20", "--alpha-lr", "0.1", "--early-stop")
    history, genotype, summary = files["history"], files["genotype"], files["summary"]
    assert [entry["epoch"] for entry in history] == list(range(1, 18))  # the average around 15 is known after 17
    assert genotype["last"]["epoch"] == summary["genotype_epoch"] == 10
    assert genotype["last"]["string"] == summary["genotype"] == history[9]["string"]
    assert (summary["epochs"], summary["early_stop_epoch"]) == (17, 15)
    assert "stopped at epoch 15, with the genotype of epoch 10" in log
    assert verdict(history) in log
    _, again = run_search(monkeypatch, tmp_path, "--resume", "runs/search/digits")  # leaves it as it was
    del again["summary"]["seconds"], summary["seconds"]
    assert again == files


@pytest.mark.parametrize(("n_images", "kind"), [("8", float), ("0", type(None))])
def test_each_epochs_state_is_in_the_history(n_images, kind, short_runs, tmp_path, monkeypatch):
    _, files = run_search(monkeypatch, tmp_path, *TINY, "--epochs", "1", "--eigenvalue-images", n_images)
    assert type(files["history"][0]["eigenvalue"]) is kind
    assert [len(files["history"][0]["margins"][kind]) for kind in ("normal", "reduce")] == [2, 2]


def test_the_architects_eps_scale_is_the_options(tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    class Stopped(Architect):
        def __init__(self, net, w_momentum, w_weight_decay, eps_scale):
            raise StoppedError(eps_scale)

    monkeypatch.setattr("sys.argv", ["search.py", *TINY, "--eps-scale", "0.1", "--runs-path", str(tmp_path)])
    with pytest.raises(StoppedError, match=r"^0\.1$"):
        search.main(architect=Stopped)
