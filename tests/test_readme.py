"""README's commands, options, files and tags are the program's."""

import re
import shlex

import pytest
from conftest import ROOT

from config import AugmentConfig, SearchConfig
from running.data_sets import DATASETS

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def options(config):
    return {name for action in config.build_parser()._actions for name in action.option_strings if name[:2] == "--"}


def commands(script):
    """The command lines in README's code blocks that run this script, as lists of words."""
    lines = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith(f"python {script}")]


@pytest.mark.parametrize(("script", "config"), [("search.py", SearchConfig), ("augment.py", AugmentConfig)])
def test_every_command_in_readme_is_accepted(script, config):
    assert commands(script)
    for words in commands(script):
        if "--resume" not in words:  # which needs the run
            config(words)
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options(config)


def test_readme_explains_every_option_and_no_other():
    explained = set(re.findall(r"`(--[a-z-]+)[` =]", README))
    known = options(SearchConfig) | options(AugmentConfig)
    assert known - {"--help"} <= explained
    others = {"--output", "--format", "--form"}  # visualize.py's and genotypes.py's
    others |= {"--logdir", "--nnodes", "--max-restarts", "--signals-to-handle"}  # TensorBoard's and torchrun's
    others |= {"--gpu-step"}  # a benchmark's
    assert explained <= known | others


def test_readme_names_every_data_set():
    for name in DATASETS:
        assert f"`{name}`" in README


def test_files_that_readme_points_to_exist():
    for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:models/|tests/|benchmarks/)?\w+\.py)`", README):
        assert (ROOT / path).exists(), path
