"""Tables and a figure of searches in a space whose cells have published results, for the report of protocols."""

import statistics

import numpy as np
from matplotlib.figure import Figure

from evidence.intervals import mean_interval
from evidence.search_state import after_warm_up
from evidence.signals import RULES, accuracy, correlations, truth
from report.figures import COLOURS, GREY, epoch_axis, printable

HEADS = ["n", "mean accuracy, %", "95 %", "median rank", "in the best hundredth"]


def tables(methods) -> dict[str, list[list]]:
    """Title -> rows, of which the first are the heads. methods: of `comparison`; {} if nothing is published."""
    known = [method for method in methods if method.truths()]
    if not known:
        return {}
    result = {"Published accuracy": [["method", *HEADS], *([m.label, *summary(m.truths())] for m in known)]}
    for method in known:
        histories = histories_of(method)
        if histories:
            rules = [[rule, *summary([truth(choose(h)) for h in histories])] for rule, choose in RULES.items()]
            result[f"{method.label}: the epoch that a rule would choose"] = [["rule", *HEADS], *rules]
            title = f"{method.label}: rank correlation with the published accuracy over epochs, mean over searches"
            signals = [[name, *in_words(interval, "+")] for name, interval in correlations(histories).items()]
            result[title] = [["signal", "correlation", "95 %"], *signals]
    return result


def summary(truths):
    """The values under `HEADS`; accuracies and ranks are those on the first data set."""
    values, ranks = [next(iter(known.values())) for known in truths], [known["rank"] for known in truths]
    of = truths[0]["of"]
    share = sum(100 * rank <= of for rank in ranks) / len(ranks)
    return [len(values), *in_words(mean_interval(values)), f"{statistics.median(ranks):g} of {of}", f"{share:.0%}"]


def in_words(interval, sign=""):
    """(the value, its interval), both as text; the interval may be None."""
    if interval is None:
        return "-", "-"
    has_ends = interval.low is not None
    ends = f"{interval.low:{sign}.2f} to {interval.high:{sign}.2f}" if has_ends else "-"
    return f"{interval.value:{sign}.2f}", ends


def histories_of(method):
    """The histories of a method's searches, of the epochs in which alphas have learned."""
    searches = [member["search"] for member in method.members if "search" in member]
    histories = [after_warm_up(search.get("history", [])) for search in searches]
    return [history for history in histories if history]


def by_epoch(methods, space) -> Figure | None:
    """The published accuracy of the cell after each epoch: median over searches, and their range; None without any.

    Marks: the median of the epochs that a rule would choose. space: the search space.
    """
    shown = [method for method in methods if histories_of(method)]
    if not shown:
        return None
    columns = min(len(shown), 3)
    figure = Figure(figsize=(4 * columns, 3 * -(-len(shown) // columns)), layout="constrained")
    panels = list(figure.subplots(-(-len(shown) // columns), columns, squeeze=False, sharey=True).flat)
    marks = next(iter(space.truth_marks().values()))
    for axes in panels:
        axes.set_axis_off()
    for axes, method in zip(panels, shown):
        axes.set_axis_on()
        histories = histories_of(method)
        n = min(map(len, histories))
        values = np.array([[accuracy(entry) for entry in history[:n]] for history in histories])
        epochs = [entry["epoch"] for entry in histories[0][:n]]
        axes.plot(epochs, np.median(values, 0), color=COLOURS[0], label="median of searches")
        axes.fill_between(epochs, values.min(0), values.max(0), color=COLOURS[0], alpha=0.2, label="their range")
        for value in marks.values():
            axes.axhline(value, color=GREY, lw=0.8)
        for (rule, choose), colour in zip(list(RULES.items())[1:-1], COLOURS[1:]):
            chosen = statistics.median(choose(history)["epoch"] for history in histories)
            axes.axvline(chosen, color=colour, ls="--", lw=1, label=rule)
        axes.set(xlabel="epoch", title=printable(method.label, 40), ylim=(50, 95))
        epoch_axis(axes)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure
