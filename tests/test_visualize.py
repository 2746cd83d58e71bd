import re
import shutil

import pytest
from conftest import assert_one_line_error, run_script
from PIL import Image

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
@pytest.mark.parametrize(("name", "written"), [
    ("cell", "cell.png"), ("cell.png", "cell.png"), ("cell.svg", "cell.svg"), ("my run.v2", "my run.v2.png"),
])  # fmt: skip
def test_plot_writes_the_picture_and_nothing_else(name, written, tmp_path):
    folder = tmp_path / "missing parent"
    assert plot(DARTS_V1.reduce, folder / name, caption="reduce") == folder / written
    assert [path.name for path in folder.iterdir()] == [written]
    if written.endswith(".png"):
        with Image.open(folder / written) as image:
            assert min(image.size) > 100
    else:
        assert "skip_connect" in (folder / written).read_text()


def test_without_dot_the_source_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = plot(DARTS_V1.normal, tmp_path / "cell.svg")
    assert path == tmp_path / "cell.gv"
    assert "digraph" in path.read_text()


@needs_dot
def test_the_command_line_draws_both_cells(tmp_path):
    process = run_script("visualize.py", "DARTS_V2", "--format", "svg", cwd=tmp_path)
    assert process.stdout.split() == ["DARTS_V2-normal.svg", "DARTS_V2-reduce.svg"]
    process = run_script("visualize.py", str(DARTS_V1), "--output", "out/found", cwd=tmp_path)
    assert process.stdout.split() == ["out/found-normal.png", "out/found-reduce.png"]
    assert all((tmp_path / name).is_file() for name in process.stdout.split())


def test_a_bad_genotype_is_one_line(tmp_path):
    assert_one_line_error(run_script("visualize.py", "DARTS_V9", cwd=tmp_path), "DARTS_V2")
