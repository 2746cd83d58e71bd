"""A run: where it stands, and how it is logged, saved, stopped and resumed."""

import contextlib
import copy
import gc
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from command_line.errors import UserError, shell_quote
from images.loading import LoadingError, check_unchanged
from machine import ranks
from machine.devices import device_name, pick_device, random_state, set_random_state, use_deterministic_algorithms
from machine.signals import StoppedError, StopSignals
from run.checkpoints import load_checkpoint, load_network, load_optimizer, save_checkpoint
from run.folder import reading, write_json
from run.loggers import Logger, TensorBoard, get_logger
from run.options import MAY_CHANGE, option_name
from run.progress import Meters
from run.version import program_version


class Run:
    """The state of a run of search.py or augment.py, except for its training loop. Only rank 0 writes files.

    config: the options; loggers: classes of loggers besides TensorBoard's, see `Logger`.

    epoch: number of completed epochs; step: optimizer steps of w since the start, the x axis of every scalar; log: a
    function that writes a line to log.txt and standard output. On ranks other than 0 nothing is written.

    The constructor only checks that the folder may be used. `start` creates it, so that errors in the input that are
    found before `start` leave no folder. Raises UserError if the folder holds a run, and neither --resume nor
    --overwrite is given.
    """

    def __init__(self, config, loggers: Iterable[type[Logger]] = ()):
        self.config, self.logger_classes = config, loggers
        self.folder = config.folder()
        if config.deterministic:
            use_deterministic_algorithms()
        self.device = pick_device(config.device)
        self.signals = StopSignals()
        self.epoch = self.step = 0
        self.steps_of_epoch, self.averages_of_epoch = 0, []  # how far the training of the current epoch is
        self.started = self.saved_at = time.monotonic()
        self.seconds_before = 0.0  # the running time before the last interruption
        self.log: Callable[[str], None] = lambda line: None
        self.loggers: list[Logger] = []
        ranks.on_rank_0(self._check_folder)

    def _check_folder(self):
        if self.config.resume is None:
            self.folder.check_free(self.config.overwrite)
        self.folder.check()
        if self.folder.config.is_file():
            self.folder.lock()

    def start(self, parts: dict, results: dict, **classes: type) -> dict:
        """Create the folder with a first checkpoint, or load the one of the run to resume. Open the logs.

        parts: name -> the network or an optimizer, saved by its `state_dict`; results: initial values of everything
        else that is saved, of built-in types, with the fingerprints of the images under "data"; classes: network=...,
        architect=..., whose names are saved, since a run must be resumed with the same classes. Returns a copy of
        `results`, or of the results in the checkpoint. Raises UserError if the folder cannot be written to, or if the
        checkpoint is of a run with other options, images, classes or tensors.
        """
        self.parts, self.results = parts, copy.deepcopy(results)
        self.classes = {role: kind.__name__ for role, kind in classes.items()}
        if self.config.resume is not None:
            is_file = Path(self.config.resume).is_file()
            path = Path(self.config.resume) if is_file else self.folder.checkpoint
            self._resume(ranks.on_rank_0(lambda: load_checkpoint(path)))
        ranks.on_rank_0(self._open)
        n_ranks = f", {ranks.size()} ranks" if ranks.size() > 1 else ""
        self.log(f"device {self.device}: {device_name(self.device)}{n_ranks}; torch {torch.__version__}")
        return copy.deepcopy(self.results)

    def _resume(self, checkpoint):
        """Restore the state of the run from a checkpoint."""
        with reading(self.folder):
            if checkpoint["stage"] != self.config.stage:
                raise UserError(f"{self.folder} is a run of {checkpoint['stage']}.py")
            for name, value in self.config.as_dict().items():
                before = checkpoint["config"].get(name, value)
                if before != value and name not in MAY_CHANGE:
                    raise UserError(f"{self.folder} holds a run with --{option_name(name)} {before}, not {value}")
            for role, name in checkpoint["classes"].items():
                if name != self.classes[role]:
                    raise UserError(
                        f"{self.folder} holds a run with the {role} {name}, not {self.classes[role]}; resume it with "
                        "the script that started it"
                    )
            check_unchanged(self.results.get("data", {}), checkpoint["results"].get("data", {}))
            for name, part in self.parts.items():
                load = load_optimizer if isinstance(part, torch.optim.Optimizer) else load_network
                load(part, checkpoint["parts"][name], self.folder)
            set_random_state(checkpoint["random"], self.device)
            self.epoch, self.step, self.results = (checkpoint[name] for name in ("epoch", "step", "results"))
            self.steps_of_epoch, self.averages_of_epoch = checkpoint["steps_of_epoch"], checkpoint["averages_of_epoch"]
            self.seconds_before, self.epochs_before = checkpoint["seconds"], checkpoint["config"]["epochs"]
            begun = self.epoch + (self.steps_of_epoch > 0)
            if self.config.epochs < begun:
                raise UserError(f"--epochs {self.config.epochs}: {self.folder} has begun {begun} epochs already")
        # the optimizers' steps were in another process, so PyTorch warns wrongly
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")

    def _open(self):
        """Create the folder, unless the run is resumed, and open the logs."""
        try:
            if self.config.resume is None:
                save = lambda folder: save_checkpoint(self._checkpoint(), folder)  # noqa: E731
                self.folder.create(self.config.as_dict(), save, self.config.overwrite)
            else:
                write_json(self.folder.config, self.config.as_dict())
            self.log = get_logger(self.folder.log).info
            first_step = None if self.config.resume is None else self.step + 1
            self.loggers = [TensorBoard(self.folder.path, self.config, first_step)]
            self.loggers += [kind(self.folder.path, self.config) for kind in self.logger_classes]
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror or error}") from None
        if self.config.resume is not None:
            return self._log_resumption()
        table = self.config.as_markdown()
        self.text("config", table)
        for row in table.splitlines()[2:]:
            self.log("  ".join(cell.strip() for cell in row.strip("|").split("|", 1)))

    def _log_resumption(self):
        if self.epoch == self.config.epochs:
            return self.log(f"all {self.epoch} epochs are done; --epochs adds more")
        within = f"step {self.step}, in epoch {self.epoch + 1}"
        self.log(f"resumed after {within if self.steps_of_epoch else f'epoch {self.epoch}'}")
        if self.config.epochs != self.epochs_before:
            self.warn(
                f"--epochs is {self.config.epochs}, and was {self.epochs_before}: from here on learning rates are "
                f"those of a run of {self.config.epochs} epochs, so they jump"
            )

    # The passes of an epoch

    def training_pass(self, epoch: int, n_steps: int, optimizers: dict) -> Meters:
        """Meters for the training of an epoch, of which a resumed run may have done `steps_done` steps already.

        optimizers: name, for tags such as `lr/w` -> the optimizer.
        """
        rates = {name: optim.param_groups[0]["lr"] for name, optim in optimizers.items()}
        title = f"epoch {epoch}/{self.config.epochs}  train"
        return Meters(self, title, "train", n_steps, rates, self.steps_of_epoch, self.averages_of_epoch)

    def validation_pass(self, epoch: int, n_steps: int, images: str) -> Meters:
        """Meters for a pass in evaluation mode. images: their name in the log: valid, test or held-out."""
        return Meters(self, f"epoch {epoch}/{self.config.epochs}  {images}", images, n_steps)

    def end_step(self, meters: Meters, loss, logits, y, n: int, **scalars):
        """End a step of a pass: check and log its numbers, and save or stop if that is due.

        loss, logits, y: of this rank's rows of a global batch of n images, without gradients; scalars: further numbers
        of the step, scalar tensors that are the same on all ranks, such as norms of gradients. This is the one place of
        a step that reads numbers, since reading waits for the device. Raises UserError if a number is not finite, and
        StoppedError, on all ranks after the same step, if a rank has received a signal to stop.
        """
        numbers = meters.update(loss, logits, y, n, scalars)
        self._check_finite(meters, numbers)
        is_training, is_last = meters.prefix == "train", meters.steps_done == meters.n_steps
        if is_training:
            self.step += 1
            meters.write_scalars("step", "val")
            for name in scalars:
                self.scalar(f"step/{name}", numbers[name])
        meters.show()
        if is_last:
            meters.finish()
        if is_training:
            self.steps_of_epoch, self.averages_of_epoch = meters.steps_done, meters.state()
            if is_last:
                self.scalar("epoch", self.epoch + 1)
        due = time.monotonic() - self.saved_at >= 60 * self.config.checkpoint_minutes
        if due or self.signals.agreed is not None:
            self.save()
        self.stop_if_asked()

    def _check_finite(self, meters, numbers):
        for name, number in numbers.items():
            if not math.isfinite(number):
                message = (
                    f"{meters.title}, step {meters.steps_done}: {name.replace('_', ' ')} is {number}; a lower learning "
                    f"rate may help; the checkpoints in {self.folder} are from before"
                )
                self.log(message)
                raise UserError(message)

    def end_epoch(self, is_best: bool, results: dict):
        """Count the epoch as completed, and save the run with a copy of the results; also as best.pt if `is_best`."""
        self.epoch += 1
        self.steps_of_epoch, self.averages_of_epoch = 0, []
        self.results = copy.deepcopy(results)
        self.save(is_best)
        self.stop_if_asked()

    # Output

    def seconds(self) -> float:
        """The running time in seconds, including that before interruptions."""
        return self.seconds_before + time.monotonic() - self.started

    def scalar(self, tag: str, value: float):
        """Log a number at the current step."""
        for logger in self.loggers:
            logger.scalar(tag, value, self.step)

    def text(self, tag: str, text: str):
        """Log a text, in Markdown, at the current step."""
        for logger in self.loggers:
            logger.text(tag, text, self.step)

    def picture(self, tag: str, pixels):
        """Log a picture, (height, width, 3) bytes, at the current step."""
        for logger in self.loggers:
            logger.picture(tag, pixels, self.step)

    def charts(self, charts: dict):
        """Group scalars into TensorBoard's charts, see `TensorBoard.charts`."""
        for logger in self.loggers[:1]:
            logger.charts(charts)

    def warn(self, text: str):
        """Write a warning to the log and to standard error."""
        self.log(f"warning: {text}")
        if ranks.rank() == 0:
            print(f"warning: {text}", file=sys.stderr)

    # Saving and stopping

    def _checkpoint(self):
        return {
            "stage": self.config.stage,
            "config": self.config.as_dict(),
            "classes": self.classes,
            "epoch": self.epoch,
            "step": self.step,
            "steps_of_epoch": self.steps_of_epoch,
            "averages_of_epoch": self.averages_of_epoch,
            "seconds": self.seconds(),
            "random": random_state(self.device),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "results": self.results,
        }

    def save(self, is_best: bool = False):
        """Write checkpoint.pt, and best.pt if `is_best`. Raises OSError if that fails; then the old files remain."""
        if ranks.rank() > 0:
            return
        for logger in self.loggers:
            logger.flush()
        save_checkpoint(self._checkpoint(), self.folder.path, is_best)
        self.saved_at = time.monotonic()

    def stop_if_asked(self):
        """Raise StoppedError, on all ranks after the same step, if any rank received a signal to stop."""
        if self.signals.agreed is not None:
            ranks.wait()
            raise StoppedError

    @contextlib.contextmanager
    def interruptible(self):
        """Inside, the signals of `StopSignals` stop the run after its step, with a checkpoint.

        Then log the command that resumes the run, and exit with 128 + the signal's number. If no more batches can be
        loaded, the steps so far are saved too.
        """
        gc.freeze()  # 260,000 objects, which Python's garbage collector would traverse every third step, in 0.2 s
        try:
            with self.signals:
                yield
        except LoadingError:
            self.save()
            raise
        except StoppedError:
            command = f"--resume {shell_quote(str(self.folder))}"
            self.log(f"{self.signals.agreed.name}: stopped after step {self.step}, saved; go on with {command}")
            sys.exit(128 + self.signals.agreed)
        finally:
            gc.unfreeze()
            if sys.exc_info()[0] is not None:  # without an exception `finish` closes them
                self._close()

    def finish(self, **results):
        """Write summary.json, and log the same values in one line: `summary name=value name=value ...`."""
        ranks.on_rank_0(lambda: self._finish(results))

    def _finish(self, results):
        summary = {
            "stage": self.config.stage,
            "dataset": self.config.dataset,
            "folder": str(self.folder),
            "seconds": self.seconds(),
            "version": program_version(),
            "machine": f"{device_name(self.device)}; torch {torch.__version__}",
        }
        for images, fingerprint in self.results.get("data", {}).items():
            summary[f"{images.replace('-', '_')}_fingerprint"] = fingerprint["sha256"][:16]
        summary |= results
        summary = {name: round(value, 6) if isinstance(value, float) else value for name, value in summary.items()}
        write_json(self.folder.summary, summary)
        words = (round(value, 4) if isinstance(value, float) else shell_quote(str(value)) for value in summary.values())
        self.log("summary " + " ".join(f"{name}={word}" for name, word in zip(summary, words)))
        self._close()

    def _close(self):
        for logger in self.loggers:
            logger.close()
        self.folder.unlock()
