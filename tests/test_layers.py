"""Folders and top-level files stand in one order, and none imports what comes after it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Each may import those before it. models comes first, so that it can be copied into another project.
ORDER = [
    *("models", "command_line", "machine", "images", "preproc", "run", "utils", "architect", "variants", "genotypes"),
    *("config", "trained", "evidence", "experiment", "report"),
    *("search", "augment", "protocol", "visualize", "cost", "export"),
]


def imports_of(path):
    """Names of the project's folders and top-level files that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [node.module]
        else:
            continue
        yield from ({name.split(".")[0] for name in names} & set(ORDER))


def test_no_import_runs_back():
    files = [*ROOT.glob("*.py"), *(file for name in ORDER for file in (ROOT / name).rglob("*.py"))]
    wrong = []
    for file in files:
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        later = ORDER[ORDER.index(own) + 1 :]
        wrong += [f"{file.relative_to(ROOT)} imports {name}" for name in imports_of(file) if name in later]
    assert wrong == []
