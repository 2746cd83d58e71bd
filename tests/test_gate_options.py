"""A run's options, history and scalars may come from a stranger: they are checked like typed ones, or refused."""

import random
import shutil

import pytest
from gates import command, refused

import genotypes
import protocol
import search
import visualize
from command_line.errors import UserError
from report.recorded_run import read_run

pytestmark = pytest.mark.usefixtures("short_runs")


@pytest.mark.parametrize("text", ["", "{", "7", "[]", "null", "[" * 10**5, '{"epochs": ' + "9" * 10**4 + "}", "\xff"])
def test_odd_json_is_one_line(text, copied, capsys):
    for name in ("config.json", "history.json", "summary.json"):
        path = copied["search"] / name
        before = path.read_bytes()
        path.write_bytes(text.encode("latin-1"))
        if text not in ("null", "[]"):
            refused(capsys, visualize.main, [copied["search"], copied["search"]])
        if name == "config.json":
            refused(capsys, search.main, ["--resume", copied["search"]], "config.json")
        path.write_bytes(before)


def test_a_run_whose_name_looks_like_a_files_is_reported(copied):
    folder = copied["search"].rename(copied["search"].with_name("results.json"))
    assert command(visualize.main, [folder]) == 0
    assert (folder / "report.html").is_file()


def test_absurdly_many_random_cells_are_one_line(capsys):
    refused(capsys, genotypes.main, ["--random", "1000000000"], "--random")
    refused(capsys, protocol.main, ["--random", "1000000000"], "--random")


# A report


def reports(folder, render):
    """Whether a run's folder can be read for a report; `render`: then write the report too, which takes a second."""
    try:
        read_run(folder)
    except UserError:
        return False
    return command(visualize.main, [folder]) == 0 if render else True


def test_a_run_without_tensorboards_files_has_nothing_to_show(copied, capsys):
    shutil.rmtree(copied["search"] / "tb")
    refused(capsys, visualize.main, [copied["search"]], "no epoch is over")


@pytest.mark.long
def test_damaged_files_of_tensorboard_are_reported_or_refused(copied):
    (path,) = (path for path in (copied["search"] / "tb").iterdir() if path.stat().st_size > 1000)
    data, chance, n_read = path.read_bytes(), random.Random(0), 0
    for i in range(30):
        changed = bytearray(data)
        for _ in range(chance.choice([1, 10, 100])):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(bytes(changed[: chance.choice([len(data), chance.randrange(len(data))])]))
        n_read += reports(copied["search"], render=i % 10 == 0)
    assert n_read < 30
