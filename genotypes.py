"""Genotypes: the discrete cells that a search finds, how they are read off alpha, written, read and built.

A gene is a list of nodes; a node is a list of its (operation, source) pairs, strongest first. Sources 0 and 1 are the
two previous cells, 2 and up the nodes of this cell in order. A `Genotype` has a gene for each kind of cell, and which
nodes each concatenates as its output.
"""

import ast
import json
import warnings
from collections import namedtuple
from pathlib import Path

from torch import nn

from errors import UserError
from models.ops import OPS, PRIMITIVES, DropPath_, Identity

GENOTYPE_FILE = "genotype.json"  # in a search's folder

LARGEST = 10**6  # number in a genotype that is read any further

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")

# Liu et al., arXiv:1806.09055: the cell of the first-order search, 3.00 +- 0.14 % test error on CIFAR-10
DARTS_V1 = Genotype(
    normal=[
        [("sep_conv_3x3", 1), ("sep_conv_3x3", 0)],
        [("skip_connect", 0), ("sep_conv_3x3", 1)],
        [("skip_connect", 0), ("sep_conv_3x3", 1)],
        [("sep_conv_3x3", 0), ("skip_connect", 2)],
    ],
    normal_concat=range(2, 6),
    reduce=[
        [("max_pool_3x3", 0), ("max_pool_3x3", 1)],
        [("skip_connect", 2), ("max_pool_3x3", 0)],
        [("max_pool_3x3", 0), ("skip_connect", 2)],
        [("skip_connect", 2), ("avg_pool_3x3", 0)],
    ],
    reduce_concat=range(2, 6),
)

# the same paper: the cell of the second-order search, 2.76 +- 0.09 %
DARTS_V2 = Genotype(
    normal=[
        [("sep_conv_3x3", 0), ("sep_conv_3x3", 1)],
        [("sep_conv_3x3", 0), ("sep_conv_3x3", 1)],
        [("sep_conv_3x3", 1), ("skip_connect", 0)],
        [("skip_connect", 0), ("dil_conv_3x3", 2)],
    ],
    normal_concat=range(2, 6),
    reduce=[
        [("max_pool_3x3", 0), ("max_pool_3x3", 1)],
        [("skip_connect", 2), ("max_pool_3x3", 1)],
        [("max_pool_3x3", 0), ("skip_connect", 2)],
        [("skip_connect", 2), ("max_pool_3x3", 1)],
    ],
    reduce_concat=range(2, 6),
)

PUBLISHED = {"DARTS_V1": DARTS_V1, "DARTS_V2": DARTS_V2}


class GenotypeError(UserError):
    """A genotype that cannot be read or built; the message says where and what is allowed."""


def parse(alpha, k):
    """Read a gene off the edges' strengths (DARTS, section 2.4).

    alpha: a tensor per node, node i's of shape (i + 2, len(PRIMITIVES)); `SearchCNN.genotype` hands in softmax weights,
    since raw alphas are not comparable across edges. Of each edge the strongest candidate other than none counts; of
    each node the k edges whose candidate is strongest stay (all, if it has fewer), strongest first; ties go to the
    earlier one. Returns a list of nodes, each a list of (operation, source).
    """
    candidates = [index for index, primitive in enumerate(PRIMITIVES) if primitive != "none"]
    gene = []
    for edges in alpha:
        strengths = edges.tolist()
        best = [max(candidates, key=row.__getitem__) for row in strengths]
        sources = sorted(range(len(best)), key=lambda source: -strengths[source][best[source]])
        gene.append([(PRIMITIVES[best[source]], source) for source in sources[:k]])
    return gene


def to_dag(C_in, gene, reduction):
    """Build a cell's operations from its gene: a ModuleList per node of operations, each with its source as `s_idx`.

    C_in: the cell's channels. In a reduction cell the operations on the two input nodes have stride 2. Every operation
    but the identity is followed by drop path (DARTS, section 4.1).
    """
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
    """Read a genotype as `str(genotype)` prints it; nothing in the string is run.

    Lists, tuples and ranges come back as they were written, so from_str(str(genotype)) == genotype.
    Raises GenotypeError (a ValueError) with the place and what is allowed there.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of a strange text's escapes and numbers
            tree = ast.parse(s.strip().replace("\n", " "), mode="eval").body
    except SyntaxError as error:
        raise GenotypeError(f"genotype: {error.msg} at column {error.offset}: {_shorten(s)}") from None
    except (ValueError, RecursionError, MemoryError):
        raise GenotypeError(f"genotype: not readable: {_shorten(s)}") from None
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "Genotype"):
        raise GenotypeError(f"genotype: expected Genotype(normal=..., ...), found {_shorten(s)}")
    given = [(keyword.arg, keyword.value) for keyword in tree.keywords]
    if tree.args or sorted(str(name) for name, _ in given) != sorted(Genotype._fields):
        raise GenotypeError(f"genotype: Genotype(...) takes each of {', '.join(Genotype._fields)} once, by name")
    return check(Genotype(**{name: _read(node) for name, node in given}))


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
                if not isinstance(name, str) or name not in OPS:
                    raise GenotypeError(
                        f"genotype: {where}: unknown operation {_shorten(name)}; allowed are {', '.join(OPS)}"
                    )
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


def resolve(given):
    """A genotype from whatever a user has of it: a published name, a string, a `genotype.json`, or a search folder.

    Of a search the last genotype is taken, as in the paper. Raises GenotypeError.
    """
    if given in PUBLISHED:
        return PUBLISHED[given]
    path = Path(given)
    try:
        path = path / GENOTYPE_FILE if path.is_dir() else path
        found = path.is_file()
    except OSError:  # no name that a file could have
        found = False
    if not found and "(" in given:
        return from_str(given)
    if not found:
        raise GenotypeError(
            f"genotype: {_shorten(given)} is neither a published cell ({', '.join(PUBLISHED)}), a genotype string "
            "'Genotype(normal=..., ...)', a genotype.json nor a search folder that holds one"
        )
    try:
        string = json.loads(path.read_text())["last"]["string"]
    except json.JSONDecodeError as error:
        raise GenotypeError(f"genotype: {path}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise GenotypeError(f"genotype: {path} is not the genotype.json of a search: no last.string in it") from None
    if not isinstance(string, str):
        raise GenotypeError(f"genotype: {path}: last.string must be a string, not {_shorten(string)}")
    return from_str(string)


def _read(node):
    """The value of a literal built of lists, tuples, strings, integers and range(...) only."""
    if isinstance(node, ast.List):
        return [_read(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_read(item) for item in node.elts)
    if isinstance(node, ast.Constant):
        value = node.value
        if type(value) is str or (type(value) is int and value < LARGEST):
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
