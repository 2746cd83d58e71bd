"""What README, docs/ and CONTRIBUTING.md say is true: commands, options, files, links, excerpts of code, tags."""

import ast
import dataclasses
import importlib
import itertools
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from conftest import ROOT
from short_runs import STAGES, command
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
OTHER_PROGRAMS = {"python3", ".", "pip", "tensorboard", "scontrol"}
OPTIONS_OF_OTHERS = {"--logdir"}  # TensorBoard's


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(*languages):
    """(page, text) of the code blocks in these languages; '' is a block without one, which is a shell's."""
    found = []
    for page in PAGES:
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), flags=re.MULTILINE | re.DOTALL):
            if language in languages:
                found.append(pytest.param(page, text, id=f"{page}: {text.splitlines()[0][:60]}"))
    return found


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def inline_code(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def command_lines():
    """All (page, words) of shell blocks, and of inline code that starts a program of this project."""
    lines = []
    for page, text in (block.values for block in blocks("")):
        lines += [(page, line) for line in text.replace("\\\n", " ").splitlines()]
    for page in PAGES:
        lines += [(page, code) for code in inline_code(page) if re.match(r"(python|make|torchrun) ", code)]
    found = []
    for page, line in lines:
        if re.match(r"#|\w+\(\) |\w+=|trap |wait ", line):  # comments and Slurm's script around it
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
        else:
            assert {word.partition("=")[0] for word in words if re.match(r"--\S+$", word)} <= options_of(script)


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
    for path in [*ROOT.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        known |= options_of(path.relative_to(ROOT).as_posix())
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
def test_links_lead_somewhere_and_files_that_are_named_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(page)):
        path, _, fragment = target.partition("#")
        there = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert there.exists(), target
        assert not fragment or fragment in anchors(there.relative_to(ROOT).as_posix()), target
    of_a_run = {path.name for path in vars(RunFolder("")).values()} | {"checkpoint.onnx", "about.json", "results.json"}
    for name in inline_code(page):
        is_path = re.fullmatch(r"[\w-]+(/[\w-]+)*(/|\.(py|c|md|json|toml|txt|html|pt|onnx))", name)
        if is_path and not name.startswith("runs/") and name.rstrip("/") not in of_a_run:
            assert (ROOT / name).exists(), name


def test_every_page_is_linked_from_readme():
    linked = set(re.findall(r"\]\(([\w/.-]+\.md)", prose("README.md")))
    assert linked == set(PAGES) - {"README.md"}


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_excerpts_are_the_code_and_other_python_compiles(page, text):
    """An excerpt's first line names the file; a line of `...` stands for lines left out.

    White space is not compared: an excerpt is indented less, and ruff formats it as the code that it then is.
    """
    first, _, rest = text.partition("\n")
    if not re.fullmatch(r"# [\w/]+\.py", first):
        text = textwrap.dedent(text)
        ast.parse(f"{{{text}}}" if text.startswith('"') else text)  # a line of a dictionary, as of OPS
        return
    code, start = squeezed(text_of(first.removeprefix("# "))), 0
    for piece in re.split(r"^ *\.\.\.\n", rest, flags=re.MULTILINE):
        assert squeezed(piece) in code[start:], piece
        start = code.index(squeezed(piece), start) + len(squeezed(piece))


def squeezed(text):
    return "".join(text.split())


def test_every_example_is_shown_in_full():
    shown = {text for page, text in (block.values for block in blocks("python")) if page == "docs/changing.md"}
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


def test_tensorboards_tags_are_those_of_the_table(finished, tmp_path):
    documented = table_after("docs/run-folder.md", "TensorBoard's tags")
    main, words = STAGES["augment"]
    words = [*(word.format(tmp_path) for word in words), "--hold-out", "0.5", "--aux-weight", "0.4"]
    assert command(main, words) == 0
    written = set()
    for run in (*finished.values(), tmp_path / "augment/digits"):
        events = EventAccumulator(str(run / "tb")).Reload().Tags()
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
