"""Which of the numbers that a search has tell how good its cell is, where that is published (see `Space.truth`)."""

import math
import statistics
import warnings
from collections.abc import Callable

from scipy.stats import spearmanr

from evidence import search_state
from evidence.intervals import Interval, mean_interval
from genotypes import from_str
from models.spaces import space_of


def _skips(entry):
    return sum(map(search_state.skip_connections, search_state.genes(from_str(entry["string"])).values()))


# signal -> its value in an epoch of a history, larger where the cell should be better; None if it is not known
SIGNALS: dict[str, Callable[[dict], float | None]] = {
    "validation accuracy": lambda entry: entry["valid_top1"],
    "few skip connections": lambda entry: -_skips(entry),
    "small eigenvalue": lambda entry: None if entry["eigenvalue"] is None else -abs(entry["eigenvalue"]),
    "large margins": lambda entry: statistics.median(m for margins in entry["margins"].values() for m in margins),
    "late epoch": lambda entry: entry["epoch"],
}


def _first_settled(history):
    ends = range(1, len(history) + 1)
    return next((history[n - 1] for n in ends if search_state.verdict(history[:n]).startswith("settled")), history[-1])


# rule -> the epoch that it chooses from a history; if it finds none, the last
RULES: dict[str, Callable[[list[dict]], dict]] = {
    "last epoch": lambda history: history[-1],
    "highest validation accuracy": lambda history: max(history, key=lambda entry: entry["valid_top1"]),
    "first epoch that is settled": _first_settled,
    "early stopping (DARTS-ES)": lambda history: search_state.chosen(history, with_early_stop=True),
    "fewest skip connections, the last of equals": lambda history: min(reversed(history), key=_skips),
    "best epoch, by the published accuracy": lambda history: max(history, key=accuracy),
}


def truth(entry: dict) -> dict:
    """The published results of an epoch's genotype."""
    genotype = from_str(entry["string"])
    return space_of(genotype).truth(genotype)


def accuracy(entry: dict) -> float:
    """The published accuracy of an epoch's genotype on the first data set."""
    return next(iter(truth(entry).values()))


def correlations(histories: list[list[dict]]) -> dict[str, Interval | None]:
    """Signal -> Spearman's rank correlation with the published accuracy over a search's epochs, mean over searches.

    A search in which the signal or the accuracy never changes has none; if no search has one, it is None.
    """
    result = {}
    for name, signal in SIGNALS.items():
        values = []
        for history in histories:
            pairs = [(signal(entry), accuracy(entry)) for entry in history if signal(entry) is not None]
            with warnings.catch_warnings(action="ignore"):  # if one of them is constant
                correlation = spearmanr(*zip(*pairs)).statistic if len(pairs) > 2 else math.nan
            if not math.isnan(correlation):
                values.append(float(correlation))
        result[name] = mean_interval(values) if values else None
    return result
