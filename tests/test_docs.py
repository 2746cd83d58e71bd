"""What README, docs/ and CONTRIBUTING.md say is true: commands, options, files, links, excerpts of code, tags."""

import argparse
import ast
import dataclasses
import importlib
import itertools
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from config import AugmentConfig, SearchConfig
from experiment.protocol_options import ProtocolOptions, read_options
from genotypes import PUBLISHED
from images.data_sets import DATASETS
from models.choices import SEARCH_SPACES
from models.ops import OPS
from run.folder import RunFolder, write_json
from run.options import option_name
from variants import VARIANTS

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CONFIGS = {"search.py": SearchConfig, "augment.py": AugmentConfig, "protocol.py": ProtocolOptions}
READERS = CONFIGS | {"protocol.py": read_options}
COMMANDS = ("cost", "export", "visualize", "genotypes")
OTHER_PROGRAMS = {"python3", ".", "pip", "tensorboard", "scontrol"}
OPTIONS_OF_OTHERS = {"--logdir"}  # TensorBoard's


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


@dataclass
class Block:
    page: str
    language: str
    text: str

    def __str__(self):
        return f"{self.page}: {self.text.splitlines()[0][:60]}"


def blocks(*languages):
    """The code blocks of all pages in these languages; '' is a block without one, which is a shell's."""
    found = []
    for page in PAGES:
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL):
            found.append(Block(page, language, text))
    return [block for block in found if block.language in languages]


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def inline_code(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def command_lines():
    """All (page, words) of shell blocks, and of inline code that starts a program of this project."""
    lines = []
    for block in blocks(""):
        lines += [(block.page, line) for line in block.text.replace("\\\n", " ").splitlines()]
    for page in PAGES:
        lines += [(page, code) for code in inline_code(page) if re.match(r"(python|make|torchrun) ", code)]
    found = []
    for page, line in lines:
        if line.startswith("#") or re.match(
            r"\w+\(\) |\w+=|trap |wait ", line
        ):  # comments and Slurm's script around it
            continue
        for part in line.split(" && "):
            words = shlex.split(part.removesuffix(" &"), comments=True)
            if words:
                found.append(pytest.param(words, id=f"{page}: {' '.join(words)[:70]}"))
    return found


def make_resumed_runs(config, words):
    """Leave the options of each run that a command resumes, where it looks for them."""
    for option, value in itertools.pairwise(words):
        if option == "--resume":
            Path(value).mkdir(parents=True)
            options = config(["--genotype", "DARTS_V2"] if config is AugmentConfig else [])
            write_json(Path(value) / "config.json", options.as_dict())


class ParsedError(Exception):
    """Raised in the place of going on after the command line is read."""


def parse_only(monkeypatch, script, words):
    """Let a command's own parser read the words; fails if it refuses them."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser, *args, **kwargs):
        parse_args(parser, *args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(ParsedError):
        importlib.import_module(script.removesuffix(".py")).main()


@pytest.mark.parametrize("words", command_lines())
def test_every_command_is_accepted(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.replace("$SLURM_ARRAY_TASK_ID", "1") for word in words]
    if words[0] == "srun":
        words = words[1:]
    program, *words = words
    if program in OTHER_PROGRAMS:
        files = [words[i + 1] for i, word in enumerate(words) if word == "-r"]
        assert all((ROOT / file).is_file() for file in files)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", text_of("Makefile"), flags=re.MULTILINE)
        assert next(word for word in words if "=" not in word) in targets
    elif program == "pytest":
        assert all((ROOT / word.partition("::")[0]).exists() for word in words if word.startswith("tests"))
    else:
        if program == "torchrun":
            run = importlib.import_module("torch.distributed.run")
            args = run.get_args_parser().parse_args(words)
            script, words = args.training_script, args.training_script_args
        else:
            assert program == "python"
            script, *words = words
            if script == "-m":  # an example, which runs a search
                monkeypatch.setitem(OPS, "max_pool_5x5", None)  # to be taken out again
                module, *words = words
                importlib.import_module(module)
                script = "search.py"
        assert (ROOT / script).is_file()
        if "--help" in words:
            assert len(words) == 1
        elif script in READERS:
            make_resumed_runs(READERS[script], words)
            READERS[script](words)
        else:  # in full: argparse takes beginnings of options too
            assert {word.partition("=")[0] for word in words if re.match(r"--\S+$", word)} <= options_of(script)
            if not script.startswith("benchmarks/"):
                parse_only(monkeypatch, script, words)


def options_in(config):
    """All options of a class, those of every variant included."""
    names = set(config.default_values({}))
    if config is SearchConfig:
        names |= {field.name for variant in VARIANTS.values() for field in dataclasses.fields(variant)}
    return {f"--{option_name(name)}" for name in names}


def options_of(script):
    """The options that a script's source adds to a parser."""
    return set(re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", text_of(script)))


def test_every_option_that_is_mentioned_exists():
    known = {"--help"} | OPTIONS_OF_OTHERS
    for config in CONFIGS.values():
        known |= options_in(config)
    for script in [f"{name}.py" for name in COMMANDS] + [
        path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("*.py")
    ]:
        known |= options_of(script)
    torchrun = importlib.import_module("torch.distributed.run").get_args_parser()
    known |= {name for action in torchrun._actions for name in action.option_strings}
    for page in PAGES:
        mentioned = {option for code in inline_code(page) for option in re.findall(r"(?<!\S)--[a-z][a-z_-]*", code)}
        assert {option.replace("_", "-") for option in mentioned} <= known, page


def anchors(page):
    """The fragments that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(page)):
        path, _, fragment = target.partition("#")
        there = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert there.exists(), target
        assert not fragment or fragment in anchors(there.relative_to(ROOT).as_posix()), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    of_a_run = {path.name for path in vars(RunFolder("")).values()} | {"checkpoint.onnx", "about.json", "results.json"}
    for name in inline_code(page):
        is_path = re.fullmatch(r"[\w-]+(/[\w-]+)*(/|\.(py|c|md|json|toml|txt|html|pt|onnx))", name)
        if is_path and not name.startswith("runs/") and name.rstrip("/") not in of_a_run:
            assert (ROOT / name).exists(), name


def test_every_page_is_linked_from_readme():
    linked = set(re.findall(r"\]\(([\w/.-]+\.md)", prose("README.md")))
    assert linked == set(PAGES) - {"README.md"}


EXCERPTS = [block for block in blocks("python") if re.match(r"# [\w/]+\.py\n", block.text)]


@pytest.mark.parametrize("block", [block for block in blocks("python") if block not in EXCERPTS], ids=str)
def test_python_blocks_compile(block):
    text = textwrap.dedent(block.text)
    ast.parse(f"{{{text}}}" if text.startswith('"') else text)  # a line of a dictionary, as of OPS


@pytest.mark.parametrize("block", EXCERPTS, ids=str)
def test_excerpts_are_the_code(block):
    """Its first line names the file; a line of `...` stands for lines left out.

    White space is not compared: an excerpt is indented less, and ruff formats it as the code that it then is.
    """
    first, _, rest = block.text.partition("\n")
    code, start = squeezed(text_of(first.removeprefix("# "))), 0
    for piece in re.split(r"^ *\.\.\.\n", rest, flags=re.MULTILINE):
        assert squeezed(piece) in code[start:], piece
        start = code.index(squeezed(piece), start) + len(squeezed(piece))


def squeezed(text):
    return "".join(text.split())


def test_the_tutorial_shows_code_and_every_example_is_shown_in_full():
    assert sum(block.page == "docs/tutorial.md" for block in EXCERPTS) > 5
    shown = {block.text for block in EXCERPTS if block.page == "docs/changing.md"}
    for path in set((ROOT / "examples").glob("[!_]*.py")) - {ROOT / "examples" / "darts_in_one_file.py"}:
        _, docstring, code = path.read_text(encoding="utf-8").split('"""', 2)
        assert f"# examples/{path.name}\n{code.strip()}\n" in shown, path.name
        command = re.search(r"python -m examples.*", docstring).group()
        assert f"python -m examples.{path.stem} " in command


def test_what_can_be_chosen_by_name_is_named():
    assert all(f"`{name}`" in text_of("docs/data.md") for name in DATASETS)
    assert all(f"`{name}`" in text_of("docs/cells.md") for name in PUBLISHED)
    assert all(f"`{name}`" in text_of("docs/changing.md") for name in SEARCH_SPACES)


def table_after(page, heading):
    """The names in the first column of the first table below a heading."""
    rows = text_of(page).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    first = re.findall(r"^\| (`.*?) \|", rows, flags=re.MULTILINE)
    return {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}


def test_a_runs_files_are_those_of_the_table():
    documented = {name.rstrip("/") for name in table_after("docs/run-folder.md", "Files")}
    files = {path.name for name, path in vars(RunFolder("x")).items() if name != "path"}
    assert documented == files | {"checkpoint.onnx"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A search and an augment run, as small as can be."""
    cwd = tmp_path_factory.mktemp("runs")
    small = ("--epochs", 1, "--init-channels", 2, "--device", "cpu", "--workers", 0)
    for words in (
        ("search.py", "--layers", 3, "--nodes", 2, "--batch-size", 360, *small),
        ("augment.py", "--layers", 3, "--batch-size", 400, "--genotype", "runs/search/digits", *small),
        ("augment.py", "--layers", 3, "--name", "held-out", "--hold-out", 0.5, "--genotype", "DARTS_V2", *small),
    ):
        process = run_script(*words, cwd=cwd)
        assert process.returncode == 0, process.stderr
    return cwd / "runs"


@pytest.mark.process
def test_tensorboards_tags_are_those_of_the_table(runs):
    documented = table_after("docs/run-folder.md", "TensorBoard's tags")
    written = set()
    for run in ("search/digits", "augment/digits", "augment/held-out"):
        events = EventAccumulator(str(runs / run / "tb")).Reload().Tags()
        written |= {
            *events["scalars"],
            *events["images"],
            *(tag.removesuffix("/text_summary") for tag in events["tensors"]),
        }
    edge = re.compile(r"alpha_(normal|reduce)/node\d+_from\d+/(" + "|".join(OPS) + ")")
    documented_edges = {tag for tag in documented if edge.fullmatch(tag)}
    written_edges = {tag for tag in written if edge.fullmatch(tag)}
    assert documented_edges <= written_edges
    drawn = {"cell/normal", "cell/reduce"}  # where graphviz's dot is
    assert documented - documented_edges - drawn == written - written_edges - drawn - {"custom_scalars__config__"}


@pytest.mark.process
def test_files_that_runs_write_are_documented(runs):
    documented = table_after("docs/run-folder.md", "Files")
    for folder in (runs / "search" / "digits", runs / "augment" / "digits"):
        assert {path.name + "/" * path.is_dir() for path in folder.iterdir()} <= documented
