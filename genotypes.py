"""Genotypes as text: how they are read and written; published genotypes, and random ones.

python genotypes.py                                          # list the published cells
python genotypes.py runs/search/cifar10 --form flat          # write the genotype of a search in another form
python genotypes.py --random 5 --seed 1                      # draw random cells
python genotypes.py "|nor_conv_3x3~0|+..."                   # what a cell of NAS-Bench-201 is worth

What a genotype is, how alpha becomes one and how it becomes a network (`Genotype`, `parse`, `to_dag`) is in
models/genotype.py and offered here too; models/spaces/ has other search spaces, whose genotypes are read here as well.
Nothing here imports torch, which takes seconds, until it is needed.
"""

import ast
import contextlib
import functools
import json
import os
import random
import re
import warnings
from collections import namedtuple
from pathlib import Path

from command_line.errors import OneLineParser, user_errors_in_one_line, warn
from models.choices import PRIMITIVES
from models.genotype import Genotype, GenotypeError, check, parse, shorten, to_dag
from models.spaces import SPACES, Space, space_of
from run.folder import RunFolder, read_json, reading
from run.options import number

__all__ = ["PRIMITIVES", "PUBLISHED", "Genotype", "GenotypeError", "check", "from_str", "parse", "to_dag", "to_str"]

FORMS = ("nested", "flat", "json")

MAX_NUMBER = 1000  # in range(a, b); no cell has so many nodes

Published = namedtuple("Published", "genotype source results")  # results: name -> number, as the source reports them


def from_str(s: str, name: str | None = None) -> Genotype:
    """Read a genotype: nested or flat, JSON, or the name of a published cell, such as `DARTS_V2` or `darts_v2`; or the
    text of a cell of another search space, such as `|nor_conv_3x3~0|+...` of NAS-Bench-201.

    Also accepts pasted text: with a name and `=` in front, in quotes, as `gt.Genotype(...)`, or the log of a search, of
    which the last genotype counts. It never executes the string. Lists, tuples and ranges keep their types, so that
    from_str(str(genotype)) == genotype; JSON gives the types that a search writes.

    name: which genotype to take if the text defines several, as the genotypes.py of a DARTS code does. Raises
    GenotypeError (a ValueError), which says where the error is and what is allowed there.
    """
    text = s.strip().removeprefix("\ufeff")  # a byte order mark, which editors on Windows write
    genotype = _of_a_space(text)
    if genotype is not None:
        return genotype
    if text.startswith("{"):
        return check(_from_json(text))
    if "(" in text:
        return check(_from_call(_choose_call(text, name)))
    if _known_name(text):
        return PUBLISHED[_known_name(text)].genotype
    raise _unexpected(text)


def _of_a_space(text):
    """The genotype that a text describes in the form of another search space; None if it has no such form."""
    genotypes = (space.from_str(text) for space in SPACES.values())
    return next((genotype for genotype in genotypes if genotype is not None), None)


def _known_name(text):
    """The name of the published cell that a text such as `darts-v2` names; None if there is no such cell."""

    def letters(name):
        return "".join(filter(str.isalnum, name)).lower()

    return next((name for name in PUBLISHED if letters(name) == letters(text)), None)


def _unexpected(text):
    return GenotypeError(
        f"genotype: expected Genotype(normal=..., ...), JSON or {', '.join(PUBLISHED)}, found {shorten(text)}"
    )


def to_str(genotype: Genotype, form: str = "nested") -> str:
    """Write a genotype. form: `nested`, as by `str`; `flat`, one list of pairs as in the authors' code; or `json`.

    Raises GenotypeError if the form is `flat` and a node does not have two edges. Cells of other spaces than DARTS's
    have one form only, `nested`.
    """
    if form == "nested":
        return str(genotype)
    if not isinstance(genotype, Genotype):
        raise GenotypeError(f"genotype: a cell of {space_of(genotype).name} has no form {form}, leave --form out")
    if form == "json":
        return json.dumps(as_lists(genotype))
    if any(len(node) != 2 for node in (*genotype.normal, *genotype.reduce)):
        raise GenotypeError("genotype: the flat form needs two edges in each node")
    flat = {kind: [edge for node in getattr(genotype, kind) for edge in node] for kind in ("normal", "reduce")}
    return str(genotype._replace(**flat))


def as_lists(genotype: Genotype) -> dict[str, list]:
    """The genotype as a dict of lists, for JSON."""
    return {field: list(value) for field, value in genotype._asdict().items()}


# `NAME = Genotype(`, in which NAME may have a type, and Genotype may come after a quote or the name of its module
CALL = re.compile(r"""(?:(?P<name>\w+)\s*(?::\s*\w+\s*)?=[\s"']*(?:\w+\.)*)?(?P<call>\bGenotype\s*\()""")


def _calls_in(text):
    """(name, call) of each `NAME = Genotype(...)` in a text. The name is None if there is none."""
    calls, end = [], 0
    while match := CALL.search(text, end):
        end, depth = match.end(), 1  # depth: the number of open parentheses
        while depth > 0 and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        calls.append((match["name"], text[match.start("call") : end]))
    return calls


def _choose_call(text, name):
    """The last `Genotype(...)` in a text, or the last with this name; the text itself if there is none.

    Raises GenotypeError if there are several names and `name` is None, or if it is not one of them.
    """
    text = re.sub(r"(^|\s)#.*", "", text, flags=re.MULTILINE)  # comments
    calls = _calls_in(text)
    names = list(dict.fromkeys(known for known, _ in calls if known is not None))
    if name is None and len(names) <= 1:
        return calls[-1][1] if calls else text
    aliases = re.findall(rf"^{re.escape(name or '')}\s*=\s*(\w+)\s*$", text, re.MULTILINE)  # such as DARTS = DARTS_V2
    if aliases and name not in names:
        name = aliases[-1]
    if name not in names:
        raise GenotypeError(
            f"genotype: the text defines {', '.join(names) or 'no names'}; give one of them, as FILE:NAME"
        )
    return dict(calls)[name]


def _from_call(text):
    """The genotype of `Genotype(normal=..., ...)`, nested or flat."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes and numbers in the text
            call = ast.parse(text.replace("\n", " "), mode="eval").body
    except SyntaxError as error:
        raise GenotypeError(f"genotype: {error.msg} at column {error.offset}: {shorten(text)}") from None
    except (ValueError, RecursionError, MemoryError):
        raise GenotypeError(f"genotype: not readable: {shorten(text)}") from None
    if not _is_call_of("Genotype", call):
        raise _unexpected(text)
    names = [str(keyword.arg) for keyword in call.keywords]
    if call.args or sorted(names) != sorted(Genotype._fields):
        others = [name for name in names if name not in Genotype._fields]
        superfluous = f"; leave out {', '.join(others)}" if others else ""
        raise GenotypeError(
            f"genotype: Genotype(...) takes each of {', '.join(Genotype._fields)} once, by name{superfluous}"
        )
    fields = {keyword.arg: _value(keyword.value) for keyword in call.keywords}
    return Genotype(**fields | {kind: _by_node(fields[kind], kind) for kind in ("normal", "reduce")})


def _is_call_of(name, node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _value(node):
    """The value of a syntax tree of lists, tuples, strings and numbers, or of range(a, b). Nothing is executed."""
    try:
        if not _is_call_of("range", node):
            return ast.literal_eval(node)
        bounds = [ast.literal_eval(bound) for bound in node.args]
        if not node.keywords and len(bounds) in (1, 2) and all(type(n) is int and abs(n) <= MAX_NUMBER for n in bounds):
            return range(*bounds)
    except (TypeError, ValueError, RecursionError, MemoryError):  # what literal_eval raises
        pass
    raise GenotypeError(
        f"genotype: at column {node.col_offset + 1}: only lists, tuples, operation names, source numbers and "
        "range(a, b) are allowed"
    )


def _from_json(text):
    """The genotype of a JSON object that has the fields of `Genotype`, nested or flat. Other fields are ignored."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise GenotypeError(f"genotype: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError):
        raise GenotypeError(f"genotype: not readable: {shorten(text)}") from None
    missing = [field for field in Genotype._fields if field not in content]
    if missing:
        raise GenotypeError(f"genotype: the JSON object has no {', '.join(missing)}: {shorten(text)}")
    fields = {}
    for kind in ("normal", "reduce"):
        gene, concat = _by_node(content[kind], kind), content[f"{kind}_concat"]
        if isinstance(gene, list) and all(isinstance(node, list) for node in gene):
            gene = [[tuple(edge) if isinstance(edge, list) else edge for edge in node] for node in gene]
        if isinstance(gene, list) and concat == list(range(2, len(gene) + 2)):
            concat = range(2, len(gene) + 2)
        fields |= {kind: gene, f"{kind}_concat": concat}
    return Genotype(**fields)


def _by_node(gene, kind):
    """Convert a flat gene (one list, two (operation, source) pairs per node) to a nested one; keep others unchanged."""
    pairs = isinstance(gene, (list, tuple)) and gene
    if not pairs or not all(isinstance(e, (list, tuple)) and len(e) == 2 and isinstance(e[0], str) for e in gene):
        return gene
    if len(gene) % 2:
        raise GenotypeError(f"genotype: {kind} is a list of pairs, of which each node has two; it has {len(gene)}")
    return [list(gene[i : i + 2]) for i in range(0, len(gene), 2)]


def _published():
    """The cells of published_cells.json: name -> `Published`. A test checks that they are valid."""
    cells = json.loads((Path(__file__).parent / "published_cells.json").read_text(encoding="utf-8"))
    published = {}
    for name, cell in cells.items():
        results = {key: value for key, value in cell.items() if key not in (*Genotype._fields, "source")}
        published[name] = Published(_from_json(json.dumps(cell)), cell["source"], results)
    return published


PUBLISHED = _published()
DARTS_V1, DARTS_V2 = PUBLISHED["DARTS_V1"].genotype, PUBLISHED["DARTS_V2"].genotype


@functools.cache  # so that what it warns of is told once
def resolve(text: str) -> Genotype:
    """Read a genotype from a text that `from_str` reads, from a file with such a text, or from the folder of a search.

    From a search the genotype of the last epoch is taken, or the one that --early-stop chose, not that of the best.
    Warns if the search is not over, or if nothing uses a node of the cells. `FILE:NAME` is a genotype of a file with
    several; `random:SEED` is the first cell that `random_genotypes` draws with this seed. Raises GenotypeError.
    """
    if text.startswith("random:"):
        seed = text.removeprefix("random:")
        if not (seed.isascii() and seed.isdecimal() and len(seed) <= 10):
            raise GenotypeError(
                f"genotype: {shorten(text)} must be random:SEED, SEED a whole number of up to 10 digits"
            )
        return random_genotypes(1, int(seed))[0]
    path, name = _file_of(text), None
    if path is None and ":" in text:
        file, _, name = text.rpartition(":")
        path = _file_of(file)
    if path is not None:
        genotype = _read_file(path, name)
    elif "(" in text or "{" in text or _known_name(text) or _of_a_space(text) is not None:
        genotype = from_str(text)
    else:
        raise GenotypeError(
            f"genotype: {shorten(text)} is neither a published cell ({', '.join(PUBLISHED)}), random:SEED, a genotype "
            "string 'Genotype(normal=..., ...)' or '|...~0|+...', JSON, a file of these, FILE:NAME, nor a search folder"
        )
    if isinstance(genotype, Genotype):
        _warn_of_unused_nodes(genotype)
    return genotype


def _file_of(text):
    """The file that a text names, genotype.json if it is the folder of a search; None if there is no such file."""
    path = Path(text)
    try:
        path = RunFolder(path).genotype if path.is_dir() else path
        return path if path.is_file() else None
    except (OSError, ValueError):  # not a possible file name
        return None


def _read_file(path, name):
    """The genotype of a file, see `resolve`."""
    _check_search(RunFolder(path.parent))
    try:
        text = path.read_text(encoding="utf-8-sig")
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
            text = str(json.loads(text)["last"]["string"])  # of the genotype.json of a search
        return from_str(text, name)
    except GenotypeError as error:
        raise GenotypeError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise GenotypeError(f"genotype: cannot read {path}: {error}") from None


def _check_search(folder):
    """Warn if this is the folder of a search that is not over. Raises GenotypeError if alphas have not learned yet."""
    with reading(folder):
        history, summary = read_json(folder.history), read_json(folder.summary)
        if not history:
            return
        n_epochs = history[-1]["epoch"]
        result = (summary or {}).get("genotype", history[-1]["string"])  # another one if it was not chosen by alphas
        if not history[-1]["alphas_learn"] and result == history[-1]["string"]:
            raise GenotypeError(
                f"genotype: in the search in {folder} alphas have not learned after epoch {n_epochs}, and are random"
            )
        if summary is None or summary["epochs"] != n_epochs:
            warn(f"the search in {folder} stopped after epoch {n_epochs} of {read_json(folder.config)['epochs']}")


def _warn_of_unused_nodes(genotype):
    for kind in ("normal", "reduce"):
        gene, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
        used = {*concat, *(source for node in gene for _, source in node)}
        for i in range(len(gene)):
            if i + 2 not in used:
                warn(f"genotype: no edge and no {kind}_concat has state {i + 2}, node {i} of the {kind} cell")


# Random cells


def random_genotypes(
    n: int,
    seed: int,
    space: Space = SPACES["darts"],
    n_nodes: int | None = None,
    primitives: list[str] | None = None,
) -> list:
    """Draw n cells from a search space, independently of each other; all cells are equally likely.

    A seed gives the same cells on every machine, and the same first cell for every n. n_nodes, primitives: those of the
    space by default; the order of the primitives does not matter.
    """
    generator, n_nodes = random.Random(seed), n_nodes or space.n_nodes
    return [space.random(generator, n_nodes, primitives or space.primitives) for _ in range(n)]


def main():
    parser = OneLineParser(description="List published cells, write a genotype in another form, or draw random ones.")
    what = "a genotype, as for augment.py --genotype (default: list the published cells)"
    parser.add_argument("genotype", nargs="?", type=os.path.expanduser, help=what)
    parser.add_argument("--form", choices=FORMS, default="nested", help="form to write (default: %(default)s)")
    number_of_cells = number(int, 0, 10**6)
    parser.add_argument(
        "--random", type=number_of_cells, metavar="N", help="number of random cells to draw, one a line"
    )
    seed = number(int, 0, 10**10 - 1)  # as `random:SEED` takes
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="seed of --random (default: %(default)s)")
    parser.add_argument("--space", choices=SPACES, default="darts", help="space of random cells (default: darts)")
    args = parser.parse_args()
    if args.random is None:
        if args.genotype is None:
            return list_published()
        genotypes = [resolve(args.genotype)]
    elif args.genotype is not None:
        parser.error("--random takes no genotype")
    else:
        genotypes = random_genotypes(args.random, args.seed, SPACES[args.space])
    for genotype in genotypes:
        print(to_str(genotype, args.form))
        truth = space_of(genotype).truth(genotype)
        if truth is not None and args.random is None:
            print(describe_truth(truth))


def describe_truth(truth: dict) -> str:
    """The published results of a genotype, see `Space.truth`, in words."""
    accuracies = ", ".join(f"{name} {value:.2f} %" for name, value in truth.items() if name not in ("rank", "of"))
    return f"published test accuracy: {accuracies}; rank {truth['rank']} of {truth['of']}"


def list_published():
    """Print every published cell with its source and results."""
    for name, cell in PUBLISHED.items():
        results = ", ".join(f"{key} {_with_slashes(value)}" for key, value in cell.results.items())
        print(f"{name}\n    {cell.source}\n    {results}\n    {to_str(cell.genotype)}")


def _with_slashes(value):
    return " / ".join(map(str, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    with user_errors_in_one_line("genotypes.py"):
        main()
