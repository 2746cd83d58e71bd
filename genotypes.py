"""Genotypes: the discrete cells that a search finds, how they are read off alpha, written, read and built.

A gene is a list of nodes; a node is a list of its (operation, source) pairs, strongest first. Sources 0 and 1 are the
two previous cells, 2 and up the nodes of this cell in order. A `Genotype` has a gene for each kind of cell, and which
nodes each concatenates as its output.

Reading and writing genotypes needs no torch, which takes seconds to import; building one does.
"""

import ast
import json
import re
import warnings
from collections import namedtuple
from pathlib import Path

from models.choices import PRIMITIVES
from running.errors import OneLineParser, UserError, user_errors_in_one_line

GENOTYPE_FILE = "genotype.json"  # in a search's folder

LARGEST_NUMBER = 10**6  # that is read in a genotype

FORMS = ("nested", "flat", "json", "name")

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")

Published = namedtuple("Published", "genotype source results")  # results: what the source reports, by name


class GenotypeError(UserError):
    """A genotype that cannot be read or built; the message says where and what is allowed."""


def parse(alpha, k, primitives=PRIMITIVES):
    """Read a gene off the edges' strengths (DARTS, section 2.4).

    alpha: a tensor per node, node i's of shape (i + 2, len(primitives)); `SearchCNN.genotype` hands in softmax weights,
    since raw alphas are not comparable across edges. primitives: the operations that the columns stand for. Of each
    edge the strongest candidate other than none counts; of each node the k edges whose candidate is strongest stay
    (all, if it has fewer), strongest first; ties go to the earlier one. Returns a list of nodes, each a list of
    (operation, source).
    """
    candidates = [column for column, primitive in enumerate(primitives) if primitive != "none"]
    gene = []
    for edges in alpha:
        strengths = edges.tolist()
        best = [max(candidates, key=row.__getitem__) for row in strengths]
        sources = sorted(range(len(best)), key=lambda source: -strengths[source][best[source]])
        gene.append([(primitives[best[source]], source) for source in sources[:k]])
    return gene


def to_dag(C_in, gene, reduction):
    """Build a cell's operations from its gene: a ModuleList per node of operations, each with its source as `s_idx`.

    C_in: the cell's channels. In a reduction cell the operations on the two input nodes have stride 2. Every operation
    but the identity is followed by drop path (DARTS, section 4.1).
    """
    from torch import nn

    from models.ops import OPS, DropPath_, Identity

    dag = nn.ModuleList()
    for edges in gene:
        node = nn.ModuleList()
        for name, source in edges:
            op = OPS[name](C_in, 2 if reduction and source < 2 else 1, True)
            if not isinstance(op, Identity):
                op = nn.Sequential(op, DropPath_())
            op.s_idx = source
            node.append(op)
        dag.append(node)
    return dag


def from_str(s):
    """Read a genotype in any form that `to_str` writes: nested, flat, JSON, or the name of a published cell.

    Taken too as people paste it: with a name and `=` in front, from a log, in quotes, or as `gt.Genotype(...)`.
    Nothing in the string is run. Lists, tuples and ranges come back as they were written, from JSON as in
    `str(genotype)` of a search's, so that from_str(str(genotype)) == genotype. Raises GenotypeError (a ValueError) with
    the place and what is allowed there.
    """
    text = s.strip()
    if text in PUBLISHED:
        return PUBLISHED[text].genotype
    return check(_from_json(text) if text.startswith("{") else _from_call(_call_alone(text)))


def to_str(genotype, form="nested"):
    """Write a genotype: `nested`, as `str` does; `flat`, the original code's, all pairs in one list; `json`; `name`.

    Raises GenotypeError where it has no such form: flat needs two edges a node, the name a published cell.
    """
    if form == "nested":
        return str(genotype)
    if form == "json":
        return json.dumps(as_lists(genotype))
    if form == "name":
        for name, cell in PUBLISHED.items():
            if _same(cell.genotype, genotype):
                return name
        raise GenotypeError(f"genotype: it is none of the published cells, {', '.join(PUBLISHED)}")
    if form != "flat":
        raise GenotypeError(f"genotype: there is no form {form!r}; there are {', '.join(FORMS)}")
    if any(len(node) != 2 for node in (*genotype.normal, *genotype.reduce)):
        raise GenotypeError("genotype: the flat form needs two edges in each node")
    flat = {kind: [edge for node in getattr(genotype, kind) for edge in node] for kind in ("normal", "reduce")}
    return str(genotype._replace(**flat))


# Genotype(...) with what stands around it where people copy it from: a name, a log's time, quotes, a module
PASTED = re.compile(r"""(?:[^()]*\W)?(?P<call>Genotype\s*\(.*\))[\s"'`,;]*""", re.DOTALL)


def _call_alone(text):
    """`Genotype(...)` alone, of a text such as `DARTS = Genotype(...)`; any other text as it is."""
    pasted = PASTED.fullmatch(text) if len(text) < LARGEST_NUMBER else None
    return pasted["call"] if pasted else text


def _from_call(text):
    """Genotype(normal=..., ...) as Python writes it, nested or flat."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a strange text's escapes and numbers
            tree = ast.parse(text.replace("\n", " "), mode="eval").body
    except SyntaxError as error:
        raise GenotypeError(f"genotype: {error.msg} at column {error.offset}: {_shorten(text)}") from None
    except (ValueError, RecursionError, MemoryError):
        raise GenotypeError(f"genotype: not readable: {_shorten(text)}") from None
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "Genotype"):
        raise GenotypeError(
            f"genotype: expected Genotype(normal=..., ...), JSON or {', '.join(PUBLISHED)}, found {_shorten(text)}"
        )
    arguments = [(keyword.arg, keyword.value) for keyword in tree.keywords]
    if tree.args or sorted(str(name) for name, _ in arguments) != sorted(Genotype._fields):
        raise GenotypeError(f"genotype: Genotype(...) takes each of {', '.join(Genotype._fields)} once, by name")
    fields = {name: _read(node) for name, node in arguments}
    return Genotype(**fields | {kind: _by_node(fields[kind], kind) for kind in ("normal", "reduce")})


def _from_json(text):
    """An object of lists with the fields of a `Genotype`, nested or flat; others beside them are left alone."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise GenotypeError(f"genotype: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError):
        raise GenotypeError(f"genotype: not readable: {_shorten(text)}") from None
    missing = [field for field in Genotype._fields if field not in content]
    if missing:
        raise GenotypeError(f"genotype: the JSON object has no {', '.join(missing)}: {_shorten(text)}")
    fields = {}
    for kind in ("normal", "reduce"):
        gene, concat = _by_node(content[kind], kind), content[f"{kind}_concat"]
        is_nested = isinstance(gene, list) and all(isinstance(node, list) for node in gene)
        fields[kind] = [[_pair(edge) for edge in node] for node in gene] if is_nested else gene
        ends = (concat[0], concat[-1] + 1) if _is_integers(concat) else (0, 0)
        fields[f"{kind}_concat"] = range(*ends) if ends[0] and concat == list(range(*ends)) else concat
    return Genotype(**fields)


def _pair(edge):
    return tuple(edge) if isinstance(edge, list) else edge


def _is_integers(values):
    return isinstance(values, list) and values and all(type(n) is int and abs(n) < LARGEST_NUMBER for n in values)


def _by_node(gene, kind):
    """A flat gene, two (operation, source) pairs for each node in one list, by node; others as they are."""
    pairs = isinstance(gene, (list, tuple)) and gene
    if not pairs or not all(isinstance(e, (list, tuple)) and len(e) == 2 and isinstance(e[0], str) for e in gene):
        return gene
    if len(gene) % 2:
        raise GenotypeError(f"genotype: {kind} lists pairs without nodes, so two for each; it has {len(gene)}")
    return [list(gene[i : i + 2]) for i in range(0, len(gene), 2)]


def _same(one, other):
    """Whether two genotypes are the same cell, lists, tuples and ranges taken alike."""
    return json.dumps(as_lists(one)) == json.dumps(as_lists(other))


def as_lists(genotype):
    """The genotype as a dict of lists, for JSON."""
    return {field: list(value) for field, value in genotype._asdict().items()}


def check(genotype):
    """Return the genotype if it can be built; raise GenotypeError with the place and what is allowed if not."""
    for kind in ("normal", "reduce"):
        gene, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
        if not isinstance(gene, (list, tuple)) or not gene:
            raise GenotypeError(f"genotype: {kind} must be a list of nodes, not {_shorten(gene)}")
        for i, node in enumerate(gene):
            where = f"{kind}, node {i}"
            if not isinstance(node, (list, tuple)) or not node or isinstance(node[0], str):
                raise GenotypeError(
                    f"genotype: {where} must be a list of (operation, source) pairs, not {_shorten(node)}"
                )
            for pair in node:
                if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                    raise GenotypeError(f"genotype: {where}: expected (operation, source), found {_shorten(pair)}")
                name, source = pair
                _check_operation(name, where)
                if type(source) is not int or not 0 <= source < i + 2:
                    raise GenotypeError(
                        f"genotype: {where}: the source of {name} must be 0 to {i + 1}, not {_shorten(source)}"
                    )
        nodes = range(2, len(gene) + 2)
        if not isinstance(concat, (list, tuple, range)) or not 0 < len(concat) <= len(nodes):
            raise GenotypeError(f"genotype: {kind}_concat must name 1 to {len(nodes)} nodes, not {_shorten(concat)}")
        if len(set(map(repr, concat))) < len(concat) or any(type(n) is not int or n not in nodes for n in concat):
            raise GenotypeError(
                f"genotype: {kind}_concat must name nodes 2 to {nodes[-1]}, each once, not {_shorten(concat)}"
            )
    return genotype


def _check_operation(name, where):
    """Raise GenotypeError unless there is an operation of this name."""
    if isinstance(name, str) and name in PRIMITIVES:
        return
    from models.ops import OPS  # with torch, which only the operations outside of DARTS's search space need here

    if not isinstance(name, str) or name not in OPS:
        raise GenotypeError(f"genotype: {where}: unknown operation {_shorten(name)}; allowed are {', '.join(OPS)}")


def resolve(text):
    """A genotype from whatever a user has of it: what `from_str` reads, a file of that, or a search's folder.

    Of a search the last genotype is taken, as in the paper. Raises GenotypeError.
    """
    path = Path(text)
    try:
        path = path / GENOTYPE_FILE if path.is_dir() else path
        is_file = path.is_file()
    except (OSError, ValueError):  # no name that a file could have
        is_file = False
    if not is_file and (text in PUBLISHED or "(" in text or text.lstrip().startswith("{")):
        return from_str(text)
    if not is_file:
        raise GenotypeError(
            f"genotype: {_shorten(text)} is neither a published cell ({', '.join(PUBLISHED)}), a genotype string "
            "'Genotype(normal=..., ...)', JSON, a file of these, nor a search folder"
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise GenotypeError(f"genotype: cannot read {path}: {error}") from None
    try:
        return from_str(_last(content))
    except GenotypeError as error:
        raise GenotypeError(f"{path}: {error}") from None


def _last(text):
    """Of a search's genotype.json the last genotype's string; any other text as it is."""
    try:
        last = json.loads(text)["last"]["string"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return text
    if not isinstance(last, str):
        raise GenotypeError(f"genotype: last.string must be a string, not {_shorten(last)}")
    return last


def _read(node):
    """The value of a literal built of lists, tuples, strings, integers and range(...) only."""
    if isinstance(node, ast.List):
        return [_read(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_read(item) for item in node.elts)
    if isinstance(node, ast.Constant):
        value = node.value
        if type(value) is str or (type(value) is int and value < LARGEST_NUMBER):
            return value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        bounds = [_read(bound) for bound in node.args]
        if not node.keywords and len(bounds) in (1, 2) and all(type(n) is int for n in bounds):
            return range(*bounds)
    raise GenotypeError(
        f"genotype: at column {node.col_offset + 1}: only lists, tuples, operation names, source numbers and "
        "range(a, b) are allowed"
    )


def _shorten(value, limit=80):
    text = value if isinstance(value, str) else repr(value)
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def _published():
    """The cells of published_cells.json: name -> `Published`. That each can be built is a test, and takes torch."""
    cells = json.loads((Path(__file__).parent / "published_cells.json").read_text(encoding="utf-8"))
    published = {}
    for name, cell in cells.items():
        results = {key: value for key, value in cell.items() if key not in (*Genotype._fields, "source")}
        published[name] = Published(_from_json(json.dumps(cell)), cell["source"], results)
    return published


PUBLISHED = _published()
DARTS_V1, DARTS_V2 = PUBLISHED["DARTS_V1"].genotype, PUBLISHED["DARTS_V2"].genotype


def main():
    parser = OneLineParser(description="List the published cells, or write a genotype in another form.")
    parser.add_argument(
        "genotype", nargs="?", help="as for augment.py --genotype; without it, list the published cells"
    )
    parser.add_argument("--form", choices=FORMS, default="nested", help="to write (default: %(default)s)")
    args = parser.parse_args()
    if args.genotype is not None:
        print(to_str(resolve(args.genotype), args.form))
        return
    for name, cell in PUBLISHED.items():
        results = ", ".join(f"{key} {_with_slashes(value)}" for key, value in cell.results.items())
        print(f"{name}\n    {cell.source}\n    {results}\n    {to_str(cell.genotype)}")


def _with_slashes(value):
    return " / ".join(map(str, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    with user_errors_in_one_line("genotypes.py"):
        main()
