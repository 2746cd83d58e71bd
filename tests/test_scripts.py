"""The command line, run as a user runs it: as processes."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from comparing import differences, outcome
from conftest import ROOT, assert_one_line_error, run_script
from short_runs import command, refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import search
from genotypes import DARTS_V1, PRIMITIVES, from_str, resolve
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
    assert str(resolve(str(run / "log.txt"))) == genotypes["last"]["string"]  # it holds what standard output showed
    assert "\r" not in process.stdout + process.stderr  # no progress bar where there is no terminal
    written, line = json.loads((run / "summary.json").read_text()), summary_line(process)
    assert line.keys() == written.keys()
    assert from_str(line["genotype"]) == from_str(written["genotype"])
    assert float(line["valid_top1"]) == pytest.approx(written["valid_top1"], abs=1e-4)


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
    written = json.loads((run / "summary.json").read_text())
    assert summary_line(process).keys() == written.keys()
    assert written["test_error"] == pytest.approx(1 - written["test_top1"], abs=1e-6)
    searched_genotype = json.loads((cwd / "runs/search/digits/genotype.json").read_text())["last"]["string"]
    assert json.loads((run / "config.json").read_text())["genotype"] == searched_genotype
    values, _ = scalars(run)
    assert len(values["step/loss"]) == 2 * 6  # 1437 images in batches of 256
    assert [value for _, value in values["lr/w"]] == pytest.approx([0.025, 0.0125])


def test_the_same_search_again_is_bit_identical_for_every_number_of_workers_and_another_seed_is_another(searched):
    cwd, _ = searched
    tiny_search(cwd, "--name", "again", "--workers", 2)
    tiny_search(cwd, "--name", "other", "--seed", 3)
    expected, again, other = (outcome(cwd / "runs/search" / name) for name in ("digits", "again", "other"))
    assert differences(expected, again) == []
    assert differences(expected["checkpoint.pt"]["parts"]["net"], other["checkpoint.pt"]["parts"]["net"])


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
    genotype = from_str(json.loads((run / "summary.json").read_text())["genotype"])
    assert {op for node in genotype.normal for op, _ in node} <= {"skip_connect", "sep_conv_3x3"}


@pytest.mark.parametrize("redirection", ["| head -n 1 >&2", "> /dev/full"])
def test_a_run_is_done_wherever_its_output_goes(redirection, tmp_path):
    words = " ".join(map(str, [*TINY, "--epochs", 1, "--print-freq", 1]))
    line = f"set -o pipefail; {sys.executable} {ROOT}/search.py {words} {redirection}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    run = tmp_path / "runs/search/digits"
    assert json.loads((run / "summary.json").read_text())["epochs"] == 1
    assert "summary stage=" in (run / "log.txt").read_text()


def test_an_existing_run_is_kept_and_overwrite_deletes_a_run_and_nothing_else(searched, tmp_path, capsys):
    cwd, _ = searched
    runs = shutil.copytree(cwd / "runs", tmp_path / "runs")
    run, words = runs / "search/digits", [*TINY, "--epochs", 1, "--runs-path", runs]
    before = (run / "log.txt").read_text()
    refused(capsys, search.main, words, "--overwrite", "--resume")
    assert (run / "log.txt").read_text() == before
    (run / "plots/stale.png").touch()
    assert command(search.main, [*words, "--overwrite"]) == 0
    assert not (run / "plots/stale.png").exists()
    (runs / "search/precious").mkdir()
    (runs / "search/precious/thesis.txt").touch()
    refused(capsys, search.main, [*words, "--name", "precious", "--overwrite"], "precious")
    assert (runs / "search/precious/thesis.txt").exists()


def test_a_finished_run_says_so_and_goes_on_with_more_epochs(searched, tmp_path, capsys):
    refused(capsys, search.main, ["--resume", searched[0] / "runs/search/digits", "--epochs", 1], "2")
    assert command(search.main, [*TINY, "--epochs", 1, "--runs-path", tmp_path]) == 0
    run = tmp_path / "search/digits"
    assert command(search.main, ["--resume", run]) == 0
    assert "all 1 epochs are done" in capsys.readouterr().out
    assert command(search.main, ["--resume", run, "--epochs", 2]) == 0
    assert "--epochs is 2, and was 1" in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["epochs"] == 2
    # the second of two epochs: half-way down the cosine, whatever the first was told
    assert scalars(run)[0]["lr/w"][-1][1] == pytest.approx(0.013, rel=1e-6)


CODE = str(DARTS_V1).replace("normal=", "normal=__import__('os').system('touch ran') or ", 1)


@pytest.mark.parametrize(
    ("words", "mention"),
    [
        (["search.py", "--batch-size", 0], "at least 1"),
        (["search.py", "--dataset", "folder", "--data-path", "nowhere"], "nowhere"),
        (["search.py", "--runs-path", ROOT / "README.md"], "README.md"),
        (["augment.py", "--genotype", CODE], "allowed"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, mention, tmp_path):
    assert_one_line_error(run_script(*words, cwd=tmp_path), mention)
    assert list(tmp_path.iterdir()) == []


SLOW_TO_IMPORT = ("torch", "torchvision", "matplotlib", "tensorboard", "onnx", "onnxruntime")


@pytest.mark.parametrize(
    "words",
    [
        *(("visualize.py", "DARTS_V2"), ("genotypes.py",)),
        *((f"{name}.py", "--help") for name in ("search", "augment", "protocol", "cost", "export")),
    ],
    ids=" ".join,
)
def test_what_needs_no_network_imports_nothing_that_takes_seconds(words, tmp_path):
    code = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: print(*sorted(set(sys.modules) & set({SLOW_TO_IMPORT})), file=sys.stderr))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv = {[str(ROOT / words[0]), *words[1:]]!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True
    )
    assert process.stdout
    assert process.stderr.split() == []


def test_search_and_augment_on_an_image_folder_with_a_space_in_its_path(image_folder, tmp_path):
    folder = image_folder(tmp_path / "my images", n=20)
    words = ("--dataset", "folder", "--data-path", folder, "--image-size", 9, "--image-channels", 1)
    process = tiny_search(tmp_path, *words, "--batch-size", 8, epochs=1)
    words = shlex.split(process.stdout.strip().splitlines()[-1])
    augment = run_script(*words[1:], *TINY_AUGMENT, "--batch-size", 8, "--epochs", 1, cwd=tmp_path)
    assert augment.returncode == 0, augment.stderr
    summary = json.loads((tmp_path / "runs/augment/folder/summary.json").read_text())
    assert summary["dataset"] == "folder"
    config = json.loads((tmp_path / "runs/augment/folder/config.json").read_text())
    assert (config["data_path"], config["image_size"], config["image_channels"]) == (str(folder), 9, 1)
