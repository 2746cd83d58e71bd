"""The state of a search: whether it has settled, whether it collapses, and when DARTS-ES would stop it.

All of it is computed from the history, a dict for each epoch that is over: `epoch`, `string`, the genotype,
`eigenvalue`, the dominant eigenvalue of the Hessian of L_val in alpha or None, and `margins`, of each kind of cell the
list of `margins`; `alphas_learn` is False in the warm-up of a variant, whose genotypes are those of random alphas.
Histories of older versions lack the last three.
"""

import itertools
import statistics

from config import FIRST_STOP, WINDOW
from genotypes import from_str

# DARTS-ES (Zela et al., arXiv:1909.09656, section 4.3): lambda(i) is the mean eigenvalue of the WINDOW epochs around i.
# The search stops at the first i >= FIRST_STOP with lambda(i - WINDOW) < STOP_BELOW * lambda(i).
STOP_BELOW = 0.75

# The rest is this project's choice. DARTS+ (arXiv:1909.06035) stops at two skip connections in a normal cell already,
# which DARTS_V2 has too; the collapsed cells of Zela et al. (figures 1 and 9) have them on most of the edges.
SETTLED_EPOCHS = 3  # that the genotype must have been the same
CLEAR_MARGIN = 0.005  # by which half of the choices must lead
COLLAPSING_SKIPS = 1 / 2  # of the normal cell's edges, where the eigenvalue has grown by the rule above
COLLAPSED_SKIPS = 3 / 4  # of them, whatever the eigenvalue


def skip_connections(gene):
    """The number of skip connections in a gene."""
    return sum(op == "skip_connect" for node in gene for op, _ in node)


def margins(weights, gene, candidates):
    """By how much each chosen operation's weight exceeds that of the best other on its edge, `none` left out.

    weights: [node][source][candidate]; gene: the operations chosen. Where there is no other, the weight itself counts.
    """
    differences = []
    for node, chosen in zip(weights, gene):
        for op, source in chosen:
            weight_of = dict(zip(candidates, node[source]))
            others = [weight for name, weight in weight_of.items() if name not in (op, "none")]
            differences.append(weight_of[op] - max(others, default=0.0))
    return differences


def cell(genotype):
    """The genotype without the order of each node's edges, which says which is stronger, and makes no other network."""
    return genotype._replace(normal=list(map(sorted, genotype.normal)), reduce=list(map(sorted, genotype.reduce)))


def changes(values):
    """The positions at which a list's value is another than the one before; 1 is that of the second."""
    return [i for i, (before, after) in enumerate(itertools.pairwise(values), 1) if before != after]


def after_warm_up(history):
    """The epochs in which alphas learned."""
    return [entry for entry in history if entry.get("alphas_learn", True)]


def stable_epochs(history):
    """For how many epochs after the warm-up, the last included, the cell has been the same."""
    history = after_warm_up(history)
    return len(history) - max(_changes(history), default=0)


def _changes(history):
    return changes([cell(from_str(entry["string"])) for entry in history])


def local_averages(history):
    """Epoch -> the eigenvalue's mean magnitude over the `WINDOW` epochs around it, where all of these are known."""
    values = {entry["epoch"]: entry.get("eigenvalue") for entry in history}
    averages = {}
    for epoch in values:
        window = [values.get(epoch + i) for i in range(-(WINDOW // 2), WINDOW // 2 + 1)]
        if None not in window:
            averages[epoch] = statistics.fmean(map(abs, window))
    return averages


def early_stop(history):
    """The first epoch i at which DARTS-ES stops, or None. The genotype to use is that of epoch i - WINDOW.

    The mean around i takes the eigenvalues of later epochs, so that it is known after epoch i + WINDOW // 2. The rule
    begins after a warm-up.
    """
    learned = after_warm_up(history)
    averages, first = local_averages(learned), FIRST_STOP + len(history) - len(learned)
    for i in sorted(averages):
        before = averages.get(i - WINDOW)
        if i >= first and before is not None and before < STOP_BELOW * averages[i]:
            return i
    return None


def chosen(history, with_early_stop):
    """The epoch of the history whose genotype is the search's result: the last, or the one that DARTS-ES returns."""
    stop = early_stop(history) if with_early_stop else None
    return next(entry for entry in history if entry["epoch"] == stop - WINDOW) if stop else history[-1]


def growth(history):
    """By how much the average eigenvalue has grown in the last `WINDOW` epochs whose averages are known, or None."""
    averages = local_averages(history)
    last = max(averages, default=0)
    before = averages.get(last - WINDOW)
    return averages[last] / before if before else None


def verdict(history):
    """The state of the search in a sentence, which begins with collapsed, collapsing, not settled, or settled."""
    history, waits = after_warm_up(history), not history[-1].get("alphas_learn", True)
    if waits:
        return "not settled: alphas do not learn yet"
    gene, grown = from_str(history[-1]["string"]).normal, growth(history)
    skips, edges, same = skip_connections(gene), sum(map(len, gene)), stable_epochs(history)
    is_growing = grown is not None and grown > 1 / STOP_BELOW
    eigenvalue = f"the eigenvalue has grown {grown:.1f} times in {WINDOW} epochs" if is_growing else ""
    in_words = f"{skips} of {edges} edges of the normal cell are skip connections"
    if skips >= COLLAPSED_SKIPS * edges:
        return f"collapsed: {in_words}" + f" and {eigenvalue}" * is_growing
    if is_growing and skips >= COLLAPSING_SKIPS * edges:
        return f"collapsing: {in_words} and {eigenvalue}"
    warning = f"; {eigenvalue}, which comes before a collapse" * is_growing
    if same < SETTLED_EPOCHS:
        return _not_settled(history, same) + warning
    leads = [margin for kind in history[-1].get("margins", {}).values() for margin in kind]
    lead = statistics.median(leads) if leads else None
    unchanged = f"the genotype has been the same for {same} epochs"
    if lead is not None and lead < CLEAR_MARGIN:
        return f"not settled: {unchanged}, but half of its choices lead by less than {100 * CLEAR_MARGIN:g} %" + warning
    by = f", and half of its choices lead by more than {100 * lead:.1f} %" if lead is not None else ""
    return f"settled: {unchanged}{by}{warning}"


def _not_settled(history, same):
    n = len(history)
    if n <= SETTLED_EPOCHS and same == n:
        return f"not settled: only {n} epoch{'s are' if n > 1 else ' is'} over"
    if set(range(n - SETTLED_EPOCHS, n)) <= set(_changes(history)):
        return f"not settled: the genotype changed in each of the last {SETTLED_EPOCHS} epochs"
    return f"not settled: the genotype changed in epoch {history[n - same]['epoch']}"
