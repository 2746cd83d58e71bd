import re
import shutil

import pytest
from PIL import Image
from short_runs import command, refused

import visualize
from genotypes import DARTS_V1, DARTS_V2, PUBLISHED
from visualize import draw, plot

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz's dot program is not installed")


def test_a_drawing_has_an_arrow_for_every_operation_and_every_output():
    source = draw(DARTS_V2.normal, "a caption").source
    assert source.count("->") == 8 + 4
    for op, i in [("sep_conv_3x3", '"c_{k-1}" -> 2'), ("dil_conv_3x3", "0 -> 3")]:
        assert any(i in line and op in line for line in source.splitlines())
    assert "a caption" in source


def test_nodes_that_are_no_part_of_the_output_have_no_arrow_to_it():
    genotype = PUBLISHED["AMOEBANET_A"].genotype
    source = draw(genotype.normal, concat=genotype.normal_concat).source
    outputs = re.findall(r'(\d) -> "c_\{k\}"', source)
    assert [int(i) + 2 for i in outputs] == list(genotype.normal_concat)


@needs_dot
@pytest.mark.parametrize(("name", "written"), [("cell", "cell.png"), ("cell.svg", "cell.svg"), ("a.v2", "a.v2.png")])
def test_plot_writes_the_picture_and_nothing_else(name, written, tmp_path):
    folder = tmp_path / "missing parent"
    assert plot(DARTS_V1.reduce, folder / name, caption="reduce") == folder / written
    assert [path.name for path in folder.iterdir()] == [written]
    if written.endswith(".png"):
        with Image.open(folder / written) as image:
            assert min(image.size) > 100
    else:
        assert "skip_connect" in (folder / written).read_text()


@pytest.fixture(params=["missing", "failing"])
def no_dot(request, tmp_path, monkeypatch):
    """No `dot`, or one that fails."""
    (tmp_path / "bin").mkdir()
    if request.param == "failing":
        (tmp_path / "bin/dot").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin/dot").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_without_dot_the_source_is_written(no_dot, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(visualize.main, ["DARTS_V1", "--format", "svg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["DARTS_V1-normal.gv", "DARTS_V1-reduce.gv"]
    assert all("install graphviz" in line for line in lines)
    assert "digraph" in (tmp_path / "DARTS_V1-normal.gv").read_text()
    assert not list(tmp_path.glob("*.svg"))


@needs_dot
@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["DARTS_V2", "--format", "svg"], ["DARTS_V2-normal.svg", "DARTS_V2-reduce.svg"]),
        ([str(DARTS_V1), "--output", "out/cell"], ["out/cell-normal.png", "out/cell-reduce.png"]),
    ],
)
def test_the_command_line_draws_both_cells(words, names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(visualize.main, words) == 0
    assert capsys.readouterr().out.split() == names
    assert all((tmp_path / name).is_file() for name in names)
    refused(capsys, visualize.main, ["DARTS_V9"], "DARTS_V2")
