"""Reads the folder of a run: options, results, values by epoch, and the cells of a search.

Values are read from TensorBoard's files, the cells of a search from history.json.
"""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from command_line.errors import UserError, shell_quote, shown
from config import AugmentConfig, SearchConfig
from genotypes import from_str
from run.checkpoint_checks import HISTORY, check_genotypes
from run.folder import RunFolder, read_json
from run.forms import PLAIN, misfit
from run.options import option_name
from run.tensorboard import alpha_tag

KINDS = ("normal", "reduce")


@dataclass
class Story:
    """The contents of a run's folder.

    stage: "search" or "augment"; config: the options; summary: the contents of summary.json, {} before the end of the
    run; scalars: TensorBoard tag -> {step: value}; history: the contents of history.json, a dict for each completed
    epoch of a search; [] for an augment run.
    """

    folder: Path
    stage: str
    config: SearchConfig | AugmentConfig
    summary: dict
    scalars: dict
    history: list

    @property
    def held_out(self):
        """The prefix of TensorBoard's tags for the images that measure accuracy: "valid", "test" or "held-out"."""
        return "valid" if self.stage == "search" else self.config.measured_on

    @property
    def steps(self):
        """Completed epoch -> its last step."""
        ends = {round(epoch): step for step, epoch in self.scalars.get("epoch", {}).items()}
        measured = self.scalars.get(f"{self.held_out}/top1", {})
        return {epoch: step for epoch, step in sorted(ends.items()) if step in measured}

    def by_epoch(self, tag, epochs=None):
        """The values of a tag at the end of each epoch, (epochs,); NaN if TensorBoard's files do not have one."""
        values, steps = self.scalars.get(tag, {}), self.steps
        return np.array([values.get(steps.get(epoch), np.nan) for epoch in epochs or steps])

    # Only for a search

    @property
    def candidates(self):
        """The names of the candidate operations on every edge."""
        return self.config.primitives.split(",")

    def genotypes(self):
        """The genotype after each epoch of `history`."""
        return [from_str(epoch["string"]) for epoch in self.history]

    def edge_weights(self, kind):
        """[node][source]: weights of the candidates on an edge after each epoch of `history`, (epochs, candidates)."""
        epochs = [epoch["epoch"] for epoch in self.history]
        return [
            [
                np.stack([self.by_epoch(alpha_tag(kind, node, source, op), epochs) for op in self.candidates], axis=1)
                for source in range(node + 2)
            ]
            for node in range(self.config.nodes)
        ]


def read(path):
    """Read the `Story` of a run's folder. Raises UserError if it is not one, or no epoch is completed."""
    folder = RunFolder(path)
    folder.check()
    options = read_json(folder.config)
    if options is None:
        raise UserError(f"{folder} is no run's folder: there is no {folder.config.name} in it")
    stage = "search" if isinstance(options, dict) and "order" in options else "augment"
    config = {"search": SearchConfig, "augment": AugmentConfig}[stage](["--resume", str(folder)])
    summary, history = read_json(folder.summary), read_json(folder.history)
    summary, history = {} if summary is None else summary, [] if history is None else history
    for file, content, form in ((folder.summary, summary, {str: PLAIN}), (folder.history, history, HISTORY)):
        found = misfit(content, form, file.stem)
        if found:
            raise UserError(f"{file} is not a file that this program wrote: {found}")
    if stage == "search":
        check_genotypes(history, config, folder.history)
    if [epoch["epoch"] for epoch in history] != list(range(1, len(history) + 1)):
        raise UserError(f"{folder.history} is not of the epochs 1, 2, ... of a search")
    story = Story(folder.path, stage, config, summary, _read_scalars(folder.tensorboard), history)
    if not story.steps or (stage == "search" and not history):
        raise UserError(f"{folder}: no epoch is over yet, so there is nothing to show")
    return story


def _read_scalars(folder):
    """TensorBoard's scalars: tag -> {step: the last value that was written for this step}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # here, since it takes a second

    if not folder.is_dir():
        return {}
    try:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        scalars = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    except MemoryError:  # says nothing of the files
        raise
    except Exception as error:  # of damaged files TensorBoard's reader says so in many types
        raise UserError(f"{folder} cannot be read: {shown(str(error))}") from None
    if not all(map(math.isfinite, scalars.get("epoch", {}).values())):
        raise UserError(f"{folder} has epochs that are no numbers")
    return scalars


def commands(story):
    """The commands that repeat the run and, for a search, train its cell."""
    parser = story.config.build_parser()
    story.config.set_defaults(parser, ["--stem", getattr(story.config, "stem", "cifar")])
    defaults = vars(parser.parse_args([]))
    words = []
    for name, value in story.config.as_dict().items():
        if value != defaults[name] and name != "name":
            words.append(f"--{option_name(name)}" + ("" if value is True else f" {shell_quote(str(value))}"))
    lines = [f"python {story.stage}.py {' '.join(words)}".strip()]
    if story.stage == "search":
        lines.append(f"python augment.py {story.config.data_options()} --genotype {shlex.quote(str(story.folder))}")
    return lines
