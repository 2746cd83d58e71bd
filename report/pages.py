"""Reports of runs as one self-contained HTML page. `visualize.py RUN ...` writes it.

For an augment run, the best network is evaluated on the test or held-out images again.
"""

from pathlib import Path

from command_line.errors import INPUT_ERRORS
from evidence.search_state import changes, genes, verdict
from genotypes import from_str
from models.spaces.space import cell_name
from report import figures
from report.html import drawing, drawings, picture, write_page
from report.recorded_run import RecordedRun, commands, read_run
from run.options import as_text, option_name
from trained.evaluation import evaluate


def write(folders: list[str | Path], path: str | Path) -> None:
    """Write the report of one run, or of several side by side, to an HTML file."""
    runs = [content_of(read_run(folder)) for folder in folders]
    write_page(path, "runs.html", title=", ".join(run["folder"] for run in runs), columns=len(runs), runs=runs)


def content_of(run: RecordedRun) -> dict:
    """What the template shows of a run."""
    return {
        "folder": str(run.folder),
        "measured_on": run.measured_on,
        "summary": run.summary,
        "n_epochs": len(run.steps),
        "curves": picture(figures.curves(run)),
        "search": search_content(run) if run.stage == "search" else None,
        "augment": augment_content(run) if run.stage == "augment" else None,
        "commands": commands(run),
        "options": {option_name(name): as_text(value) for name, value in run.config.as_dict().items()},
    }


def search_content(run):
    genotypes, kinds = run.genotypes(), run.space.kinds
    cells = [[(kind, str(getattr(genotype, kind))) for kind in kinds] for genotype in genotypes]
    genotype_of = {cell: genotype for genotype, pair in zip(genotypes, cells) for cell in pair}
    indices = {cell: i for i, cell in enumerate(genotype_of)}  # equal cells are drawn once
    result = run.summary.get("genotype", run.history[-1]["string"])
    return {
        "result": drawings(from_str(result)) if result != run.history[-1]["string"] else None,
        "drawings": [drawing(genotype, kind) for (kind, _), genotype in genotype_of.items()],
        "epochs": [[indices[cell] for cell in pair] for pair in cells],
        "labels": [f"epoch {epoch['epoch']}, top 1 {epoch['valid_top1']:.2%}" for epoch in run.history],
        "edge_weights": {cell_name(kind): picture(figures.edge_weights(run, kind)) for kind in kinds},
        "verdict": verdict(run.history),
        "changes": [i + 1 for i in changes(list(map(genes, genotypes)))],
        "margins_and_changes": picture(figures.margins_and_changes(genotypes, run.history)),
        "truth": picture(figures.truth(run)) if run.history[-1].get("truth") else None,
    }


def augment_content(run):
    try:
        evaluation = evaluate(run.folder, data_path=run.config.data_path)
    except INPUT_ERRORS as error:
        return {"error": str(error)}
    names, confusion = evaluation.trained.results["classes"], evaluation.confusion()
    accuracies = [f"{hits / max(n, 1):.2%} of {n}" for hits, n in zip(confusion.diagonal(), confusion.sum(1))]
    return {
        "error": None,
        "accuracy": evaluation.describe(),
        "classes": list(zip(names, accuracies)),
        "confusion": picture(figures.confusion_matrix(confusion, names)),
    }
