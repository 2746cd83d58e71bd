"""The command line, run as a user runs it: as processes."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from genotypes import DARTS_V1, PRIMITIVES, from_str
from models.choices import SEARCH_SPACES

pytestmark = pytest.mark.process

TINY = ("--layers", 3, "--init-channels", 2, "--nodes", 2, "--batch-size", 256, "--workers", 0)
TINY_AUGMENT = ("--layers", 3, "--init-channels", 2, "--batch-size", 256, "--workers", 0)


def tiny_search(cwd, *words, epochs=2):
    process = run_script("search.py", *TINY, "--epochs", epochs, *words, cwd=cwd)
    assert process.returncode == 0, process.stderr
    return process


def scalars(run):
    """All of a run's scalars: tag -> [(step, value)]."""
    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0, "images": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


def summary_line(process):
    line = next(line for line in process.stdout.splitlines() if "  summary " in line)
    return dict(word.split("=", 1) for word in shlex.split(line.split("  summary ")[1]))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("searched")
    return cwd, tiny_search(cwd)


@pytest.fixture(scope="module")
def augmented(searched):
    cwd, process = searched
    lines = process.stdout.strip().splitlines()
    timing = next(i for i, line in enumerate(lines) if "a forward pass of it takes" in line)
    logged = next(i for i, line in enumerate(lines) if line.endswith(f"train the cell: {lines[-1]}"))
    assert logged < timing
    words = shlex.split(lines[-1])
    assert words[:2] == ["python", "augment.py"]
    return cwd, run_script(*words[1:], *TINY_AUGMENT, "--epochs", 2, cwd=cwd)


def test_a_search_leaves_all_of_its_folder(searched):
    cwd, process = searched
    run = cwd / "runs" / "search" / "digits"
    names = {path.name for path in run.iterdir()}
    files = "config.json log.txt tb plots checkpoint.pt best.pt genotype.json history.json lock summary.json"
    assert names == set(files.split())
    assert json.loads((run / "config.json").read_text())["batch_size"] == 256
    pictures = {path.stem for path in (run / "plots").iterdir()}
    assert pictures == {f"epoch{e:03d}-{kind}" for e in (1, 2) for kind in ("normal", "reduce")}
    genotypes = json.loads((run / "genotype.json").read_text())
    assert set(genotypes) == {"last", "best"}
    for entry in genotypes.values():
        genotype = from_str(entry["string"])
        assert [[list(pair) for pair in node] for node in genotype.normal] == entry["normal"]
        assert list(genotype.reduce_concat) == entry["reduce_concat"] == [2, 3]
    assert genotypes["last"]["epoch"] == 2
    # the log holds what standard output showed
    assert "genotype = Genotype(" in (run / "log.txt").read_text()
    assert "\r" not in process.stdout + process.stderr  # no progress bar where there is no terminal


def test_search_summary_is_for_people_and_for_scripts(searched):
    cwd, process = searched
    written = json.loads((cwd / "runs/search/digits/summary.json").read_text())
    line = summary_line(process)
    assert line.keys() == written.keys()
    assert line["stage"] == "search"
    assert from_str(line["genotype"]) == from_str(written["genotype"])
    assert float(line["valid_top1"]) == pytest.approx(written["valid_top1"], abs=1e-4)
    assert 0 <= written["valid_top1"] <= written["best_valid_top1"] <= 1


def test_search_shows_scalars_alphas_cells_and_configuration_in_tensorboard(searched):
    values, events = scalars(searched[0] / "runs/search/digits")
    steps = 3  # 719 images for w in batches of 256
    assert [step for step, _ in values["step/loss"]] == list(range(1, 2 * steps + 1))
    for tag in ("train/loss", "train/top1", "train/top5", "valid/loss", "valid/top1", "valid/top5", "epoch"):
        assert [step for step, _ in values[tag]] == [steps, 2 * steps]
    assert [value for _, value in values["epoch"]] == [1, 2]
    assert all(value > 0 for _, value in values["speed/steps_per_second"])
    alphas = {tag: series for tag, series in values.items() if tag.startswith("alpha_")}
    assert len(alphas) == 2 * (2 + 3) * len(PRIMITIVES)
    for kind in ("normal", "reduce"):  # an edge's softmax weights sum to 1
        assert sum(alphas[f"alpha_{kind}/node1_from2/{op}"][1][1] for op in PRIMITIVES) == pytest.approx(1, abs=1e-6)
    assert any("config" in tag for tag in events.Tags()["tensors"])


def test_learning_rate_in_use_is_the_cosine_of_finished_epochs(searched):
    values, _ = scalars(searched[0] / "runs/search/digits")
    # epoch e of n uses lr_min + (lr - lr_min) (1 + cos(pi e / n)) / 2, e from 0: the full rate first, never the last
    assert [value for _, value in values["lr/w"]] == pytest.approx([0.025, 0.013], rel=1e-6)
    assert [value for _, value in values["lr/alpha"]] == pytest.approx([3e-4] * 2)
    assert "lr_scheduler.step" not in searched[1].stderr  # PyTorch's warning about the order of the two steps


def test_the_printed_augment_command_trains_what_was_found(augmented):
    cwd, process = augmented
    assert process.returncode == 0, process.stderr
    run = cwd / "runs" / "augment" / "digits"
    assert {"config.json", "log.txt", "tb", "plots", "checkpoint.pt", "best.pt", "summary.json"} <= {
        path.name for path in run.iterdir()
    }
    written = json.loads((run / "summary.json").read_text())
    assert summary_line(process).keys() == written.keys()
    assert written["test_error"] == pytest.approx(1 - written["test_top1"], abs=1e-6)
    searched_genotype = json.loads((cwd / "runs/search/digits/genotype.json").read_text())["last"]["string"]
    assert json.loads((run / "config.json").read_text())["genotype"] == searched_genotype
    values, _ = scalars(run)
    assert len(values["step/loss"]) == 2 * 6  # 1437 images in batches of 256
    assert [value for _, value in values["lr/w"]] == pytest.approx([0.025, 0.0125])


def state(cwd, name, stage="search"):
    return torch.load(cwd / "runs" / stage / name / "checkpoint.pt", weights_only=True)


def assert_same_state(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "config"}:
            assert_same_state(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_same_state(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_search_again_is_bit_identical_for_every_number_of_workers(searched, workers):
    cwd, _ = searched
    name = f"again{workers}"
    tiny_search(cwd, "--name", name, "--workers", workers)
    assert_same_state(state(cwd, "digits"), state(cwd, name))


@pytest.mark.parametrize("words", [("--seed", 3), ("--order", "first")])
def test_another_seed_or_order_is_another_search(words, searched):
    cwd, _ = searched
    tiny_search(cwd, "--name", words[1], *words, epochs=1)
    alphas = [state(cwd, name)["parts"]["net"]["alpha_normal.0"] for name in ("digits", str(words[1]))]
    assert not torch.equal(*alphas)


def test_an_unreadable_image_that_a_worker_meets_is_one_line(image_folder, tmp_path):
    folder = image_folder(tmp_path / "images")
    (folder / "val" / "left" / "003.png").write_bytes(b"\x89PNG")
    words = ("--dataset", "folder", "--data-path", folder, "--image-size", 8, "--workers", 1, "--epochs", 1)
    process = run_script("augment.py", "--genotype", "DARTS_V1", *TINY_AUGMENT, *words, cwd=tmp_path)
    assert_one_line_error(process, "cannot read the image", "003.png")


def test_a_search_space_belongs_to_the_run(tmp_path):
    process = tiny_search(tmp_path, "--primitives", "s3", epochs=1)
    run = tmp_path / "runs/search/digits"
    assert json.loads((run / "config.json").read_text())["primitives"] == ["none", "skip_connect", "sep_conv_3x3"]
    tags = {tag.rsplit("/", 1)[1] for tag in scalars(run)[0] if tag.startswith("alpha_")}
    assert tags == set(SEARCH_SPACES["s3"])
    assert "weights of alpha_normal, %:  none  skip_connect  sep_conv_3x3" in process.stdout
    assert state(tmp_path, "digits")["parts"]["net"]["alpha_normal.1"].shape == (3, 3)
    assert run_script("search.py", "--resume", run, "--epochs", 2, cwd=tmp_path).returncode == 0
    genotype = from_str(json.loads((run / "summary.json").read_text())["genotype"])
    assert {op for node in genotype.normal for op, _ in node} <= {"skip_connect", "sep_conv_3x3"}


@pytest.mark.parametrize("script", ["search.py", "augment.py"])
def test_help_is_answered_without_torch(script, tmp_path):
    code = (
        "import runpy, sys\n"
        "sys.argv[1:] = ['--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "finally:\n"
        "    print([name for name in ('torch', 'torchvision') if name in sys.modules])\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "--resume" in process.stdout
    assert process.stdout.endswith("[]\n")


@pytest.mark.parametrize("redirection", ["| head -n 1 >&2", "> /dev/full"])
def test_a_run_is_done_wherever_its_output_goes(redirection, tmp_path):
    words = " ".join(map(str, [*TINY, "--epochs", 1, "--print-freq", 1]))
    line = f"set -o pipefail; {sys.executable} {ROOT}/search.py {words} {redirection}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    run = tmp_path / "runs/search/digits"
    assert json.loads((run / "summary.json").read_text())["epochs"] == 1
    assert "summary stage=" in (run / "log.txt").read_text()


def test_an_existing_run_is_kept_unless_told_otherwise(searched):
    cwd, _ = searched
    before = (cwd / "runs/search/digits/log.txt").read_text()
    assert_one_line_error(run_script("search.py", *TINY, cwd=cwd), "--overwrite", "--resume")
    assert (cwd / "runs/search/digits/log.txt").read_text() == before


def test_overwrite_deletes_a_run_and_nothing_else(searched):
    cwd, _ = searched
    tiny_search(cwd, "--name", "twice", epochs=1)
    (cwd / "runs/search/twice/plots/stale.png").touch()
    tiny_search(cwd, "--name", "twice", "--overwrite", epochs=1)
    assert not (cwd / "runs/search/twice/plots/stale.png").exists()
    precious = cwd / "runs/search/precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    assert_one_line_error(run_script("search.py", "--name", "precious", "--overwrite", cwd=cwd), "precious")
    assert (precious / "thesis.txt").exists()


def test_a_finished_run_says_so_and_goes_on_with_more_epochs(searched):
    cwd, _ = searched
    tiny_search(cwd, "--name", "longer", epochs=1)
    run = cwd / "runs/search/longer"
    assert_one_line_error(run_script("search.py", "--resume", cwd / "runs/search/digits", "--epochs", 1, cwd=cwd), "2")
    again = run_script("search.py", "--resume", run, cwd=cwd)
    assert again.returncode == 0
    assert "all 1 epochs are done" in again.stdout
    more = run_script("search.py", "--resume", run, "--epochs", 2, cwd=cwd)
    assert more.returncode == 0
    assert "--epochs is 2, and was 1: from here on learning rates are those of a run of 2 epochs" in more.stderr
    assert json.loads((run / "config.json").read_text())["epochs"] == 2
    # the second of two epochs: half-way down the cosine, whatever the first was told
    assert scalars(run)[0]["lr/w"][-1][1] == pytest.approx(0.013, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        (["--batch-size", "0"], "at least 1"),
        (["--device", "warp"], "cpu"),
        (["--dataset", "folder", "--data-path", "nowhere"], "nowhere"),
        (["--runs-path", "file.txt"], "file.txt"),
    ],
)
def test_bad_input_to_search_is_one_line_and_leaves_nothing(words, mention, tmp_path):
    (tmp_path / "file.txt").touch()
    assert_one_line_error(run_script("search.py", *TINY, *words, cwd=tmp_path), mention)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("genotype", "mention"),
    [
        ("DARTS_V9", "DARTS_V2"),
        (str(DARTS_V1).replace("sep_conv_3x3", "conv_1x1", 1), "unknown operation"),
        (str(DARTS_V1).replace("('skip_connect', 2)", "('skip_connect', 5)", 1), "0 to"),
        (str(DARTS_V1).replace("normal=", "normal=__import__('os').system('touch ran') or ", 1), "allowed"),
    ],
)
def test_bad_genotypes_are_one_line_and_not_run(genotype, mention, tmp_path):
    assert_one_line_error(run_script("augment.py", "--genotype", genotype, cwd=tmp_path), mention)
    assert list(tmp_path.iterdir()) == []


def test_search_and_augment_on_an_image_folder_with_a_space_in_its_path(image_folder, tmp_path):
    folder = image_folder(tmp_path / "my images", n=20)
    words = ("--dataset", "folder", "--data-path", folder, "--image-size", 9, "--image-channels", 1)
    process = tiny_search(tmp_path, *words, "--batch-size", 8, epochs=1)
    command = shlex.split(process.stdout.strip().splitlines()[-1])
    augment = run_script(*command[1:], *TINY_AUGMENT, "--batch-size", 8, "--epochs", 1, cwd=tmp_path)
    assert augment.returncode == 0, augment.stderr
    summary = json.loads((tmp_path / "runs/augment/folder/summary.json").read_text())
    assert summary["dataset"] == "folder"
    config = json.loads((tmp_path / "runs/augment/folder/config.json").read_text())
    assert (config["data_path"], config["image_size"], config["image_channels"]) == (str(folder), 9, 1)


def test_a_run_without_the_dot_program_goes_on_and_keeps_the_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    process = tiny_search(tmp_path)
    plots = tmp_path / "runs/search/digits/plots"
    assert {path.suffix for path in plots.iterdir()} == {".gv"}
    assert process.stdout.count("apt-get install graphviz") == 1
