"""Reads the folder of a run: options, results, values by epoch, and the cells of a search.

Values are read from TensorBoard's files, the cells of a search from history.json.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from command_line.errors import UserError
from config import AugmentConfig, SearchConfig
from genotypes import from_str
from models.spaces import SPACES, Space
from report.search_log import alpha_tag
from run.folder import RunFolder, read_json, reading
from run.options import in_a_shell


@dataclass
class RecordedRun:
    """The contents of a run's folder.

    stage: "search" or "augment"; config: the options; summary: the contents of summary.json, {} before the end of the
    run; scalars: TensorBoard tag -> {step: value}; history: the contents of history.json, a dict for each completed
    epoch of a search; [] for an augment run.
    """

    folder: Path
    stage: str
    config: SearchConfig | AugmentConfig
    summary: dict
    scalars: dict[str, dict[int, float]]
    history: list[dict]

    @property
    def measured_on(self) -> str:
        """The images that accuracy is measured on, which begin TensorBoard's tags: "valid", "test" or "held-out"."""
        return "valid" if self.stage == "search" else self.config.measured_on

    @property
    def steps(self) -> dict[int, int]:
        """Completed epoch -> its last step."""
        ends = {round(epoch): step for step, epoch in self.scalars.get("epoch", {}).items()}
        measured = self.scalars.get(f"{self.measured_on}/top1", {})
        return {epoch: step for epoch, step in sorted(ends.items()) if step in measured}

    def by_epoch(self, tag: str, epochs: list[int] | None = None) -> np.ndarray:
        """The values of a tag at the end of each epoch, (epochs,); NaN if TensorBoard's files do not have one."""
        values, steps = self.scalars.get(tag, {}), self.steps
        return np.array([values.get(steps.get(epoch), np.nan) for epoch in epochs or steps])

    # Only for a search

    @property
    def space(self) -> Space:
        """The search space."""
        return SPACES[self.config.space]

    def genotypes(self) -> list:
        """The genotype after each epoch of `history`."""
        return [from_str(epoch["string"]) for epoch in self.history]

    def edge_weights(self, kind: str) -> list[list[np.ndarray]]:
        """[node][source]: weights of the candidates on an edge after each epoch of `history`, (epochs, candidates)."""
        epochs = [epoch["epoch"] for epoch in self.history]

        def of_edge(node, source):
            tags = [alpha_tag(kind, node, source, op) for op in self.config.primitives]
            return np.stack([self.by_epoch(tag, epochs) for tag in tags], axis=1)

        n_inputs = self.space.n_inputs
        return [[of_edge(node, source) for source in range(n_inputs + node)] for node in range(self.config.nodes)]


def read_run(path: str | Path) -> RecordedRun:
    """Read a run's folder. Raises UserError if it is not one, or no epoch is completed."""
    folder = RunFolder(path)
    options = read_json(folder.config)
    if options is None:
        raise UserError(f"{folder} is not the folder of a run: there is no {folder.config.name} in it")
    stage = "search" if "order" in options else "augment"
    config = (SearchConfig if stage == "search" else AugmentConfig)(["--resume", str(folder)])
    summary, history = read_json(folder.summary) or {}, read_json(folder.history) or []
    run = RecordedRun(folder.path, stage, config, summary, _read_scalars(folder.tensorboard), history)
    if not run.steps or (stage == "search" and not history):
        raise UserError(f"{folder}: no epoch is over yet, so there is nothing to show")
    return run


def _read_scalars(folder):
    """TensorBoard's scalars: tag -> {step: the last value that was written for this step}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # here, since it takes a second

    if not folder.is_dir():
        return {}
    with reading(folder):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def commands(run: RecordedRun) -> list[str]:
    """The commands that repeat the run and, for a search, train its cell."""
    names = [name for name in run.config.as_dict() if name != "name"]
    lines = [f"python {run.stage}.py {in_a_shell(run.config.changed(names))}".strip()]
    if run.stage == "search":
        lines.append(f"python augment.py {run.config.data_options()} --genotype {shlex.quote(str(run.folder))}")
    return lines
