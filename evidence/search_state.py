"""The state of a search: whether it has settled, whether it collapses, and when DARTS-ES would stop it.

All of it is computed from the history, the content of history.json, a dict for each epoch that is over: `epoch`;
`string`, the genotype; `eigenvalue`, the dominant eigenvalue of the Hessian of L_val in alpha, or None; `margins`, for
each kind of cell the list of `margins`; and `alphas_learn`, False in the warm-up of a variant and with --alpha-lr 0,
where alphas, and so genotypes, are random.
"""

import itertools
import statistics
from typing import Any

from config import FIRST_RETURNED, WINDOW
from genotypes import from_str
from models.spaces import space_of
from models.spaces.space import Gene, cell_name

# DARTS-ES (Zela et al., arXiv:1909.09656, section 4.3): lambda(i) is the mean eigenvalue of the WINDOW epochs around i.
# The search stops at the first i >= FIRST_RETURNED + WINDOW with lambda(i - WINDOW) < STOP_BELOW * lambda(i).
STOP_BELOW = 0.75

# The thresholds below are this project's choice. DARTS+ (arXiv:1909.06035) stops at two skip connections in a normal
# cell already, which DARTS_V2 has too; the collapsed cells of Zela et al. (figures 1 and 9) have them on most edges.
SETTLED_EPOCHS = 3  # for so many epochs the genotype must have been the same
CLEAR_MARGIN = 0.005  # half of the choices must lead by at least this
COLLAPSING_SKIPS = 1 / 2  # share of the normal cell's edges, if the eigenvalue has grown by the rule above
COLLAPSED_SKIPS = 3 / 4  # share of the normal cell's edges, whatever the eigenvalue


def skip_connections(gene: list) -> int:
    """The number of skip connections in a gene."""
    return sum(op == "skip_connect" for node in gene for op, _ in node)


def margins(weights: list, gene: list, candidates: list[str], choosable: list[str]) -> list[float]:
    """By how much the weight of each chosen operation exceeds that of the best other candidate on its edge.

    weights: [node][source][candidate]; gene: the chosen operations; choosable: the candidates that can be chosen, as
    `Space.choosable`. If there is no other one, the margin is the weight itself.
    """
    differences = []
    for node, edges in zip(weights, gene):
        for op, source in edges:
            weight_of = dict(zip(candidates, node[source]))
            others = [weight_of[name] for name in choosable if name != op]
            differences.append(weight_of[op] - max(others, default=0.0))
    return differences


def genes(genotype: Any) -> dict[str, Gene]:
    """The gene of each kind of cell, with each node's edges in one order: this changes no network."""
    return {kind: list(map(sorted, getattr(genotype, kind))) for kind in space_of(genotype).kinds}


def changes(values: list) -> list[int]:
    """The positions at which a list's value is another than the one before; 1 is that of the second."""
    return [i for i, (before, after) in enumerate(itertools.pairwise(values), 1) if before != after]


def after_warm_up(history: list[dict]) -> list[dict]:
    """The epochs in which alphas learned."""
    return [entry for entry in history if entry["alphas_learn"]]


def stable_epochs(history: list[dict]) -> int:
    """For how many epochs after the warm-up, the last included, the cell has been the same."""
    learned = after_warm_up(history)
    return len(learned) - max(_changes_of_cell(learned), default=0)


def _changes_of_cell(history):
    return changes([genes(from_str(entry["string"])) for entry in history])


def local_averages(history: list[dict]) -> dict[int, float]:
    """Epoch -> the eigenvalue's mean magnitude over the `WINDOW` epochs around it, if all of these are known."""
    eigenvalues = {entry["epoch"]: entry["eigenvalue"] for entry in history}
    averages = {}
    for epoch in eigenvalues:
        window = [eigenvalues.get(epoch + i) for i in range(-(WINDOW // 2), WINDOW // 2 + 1)]
        if None not in window:
            averages[epoch] = statistics.fmean(map(abs, window))
    return averages


def early_stop(history: list[dict]) -> int | None:
    """The first epoch i at which DARTS-ES stops, or None. The genotype to use is that of epoch i - WINDOW.

    The mean around i takes the eigenvalues of later epochs, so that it is known after epoch i + WINDOW // 2. The rule
    begins after a warm-up.
    """
    learned = after_warm_up(history)
    averages, first = local_averages(learned), FIRST_RETURNED + WINDOW + len(history) - len(learned)
    for i in sorted(averages):
        before = averages.get(i - WINDOW)
        if i >= first and before is not None and before < STOP_BELOW * averages[i]:
            return i
    return None


def chosen(history: list[dict], with_early_stop: bool) -> dict:
    """The epoch of the history whose genotype is the search's result: the last, or the one that DARTS-ES returns."""
    stop = early_stop(history) if with_early_stop else None
    return next(entry for entry in history if entry["epoch"] == stop - WINDOW) if stop else history[-1]


def growth(history: list[dict]) -> float | None:
    """By how much the average eigenvalue has grown in the last `WINDOW` epochs whose averages are known, or None."""
    averages = local_averages(history)
    last = max(averages, default=0)
    before = averages.get(last - WINDOW)
    return averages[last] / before if before else None


def verdict(history: list[dict]) -> str:
    """The state of the search in a sentence, which begins with collapsed, collapsing, not settled, or settled."""
    if not history[-1]["alphas_learn"]:
        return "not settled: alphas have not learned"
    learned = after_warm_up(history)
    kind, gene = next(iter(genes(from_str(history[-1]["string"])).items()))
    grown = growth(learned)
    n_skips, n_edges, same = skip_connections(gene), sum(map(len, gene)), stable_epochs(learned)
    skips = f"{n_skips} of {n_edges} edges of the {cell_name(kind)} are skip connections"
    is_growing = grown is not None and grown > 1 / STOP_BELOW
    growing = f"the eigenvalue has grown {grown:.1f} times in {WINDOW} epochs" if is_growing else ""
    if n_skips >= COLLAPSED_SKIPS * n_edges:
        return f"collapsed: {skips}" + (f" and {growing}" if is_growing else "")
    if is_growing and n_skips >= COLLAPSING_SKIPS * n_edges:
        return f"collapsing: {skips} and {growing}"
    warning = f"; {growing}, which comes before a collapse" if is_growing else ""
    if same < SETTLED_EPOCHS:
        return _not_settled(learned, same) + warning
    lead = statistics.median(margin for kind in history[-1]["margins"].values() for margin in kind)
    unchanged = f"the genotype has been the same for {same} epochs"
    if lead < CLEAR_MARGIN:
        return f"not settled: {unchanged}, but half of its choices lead by less than {100 * CLEAR_MARGIN:g} %" + warning
    return f"settled: {unchanged}, and half of its choices lead by more than {100 * lead:.1f} %{warning}"


def _not_settled(history, same):
    n = len(history)
    if n <= SETTLED_EPOCHS and same == n:
        return f"not settled: only {n} epoch{'s are' if n > 1 else ' is'} over"
    if set(range(n - SETTLED_EPOCHS, n)) <= set(_changes_of_cell(history)):
        return f"not settled: the genotype changed in each of the last {SETTLED_EPOCHS} epochs"
    return f"not settled: the genotype changed in epoch {history[n - same]['epoch']}"
