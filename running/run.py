"""A run: its folder, where it is, and how it is saved, stopped and resumed."""

import contextlib
import copy
import sys
import time
import warnings

import torch

from running import ranks
from running.checkpoints import EPOCH_START, FORMAT, check_fits, find_checkpoint, save_checkpoint
from running.devices import device_name, pick_device, random_state, set_random_state
from running.errors import UserError
from running.folder import write_json
from running.signals import StoppedError, StopSignals
from running.tensorboard import event_writer, silent_writer
from utils import get_logger, shell_quote


class Run:
    """What surrounds the loop of a script, from a start or a checkpoint to the summary. Only rank 0 writes.

    epoch: epochs done; step: steps of the weights' optimizer since the start, the x axis of every scalar; position:
    where the run is in its next epoch, see `EPOCH_START`; log: writes a line to log.txt and standard output;
    tensorboard: a tensorboardX.SummaryWriter. The last two write nothing before `start`, and on other ranks.

    Creating a Run only checks that the folder may be used. `start` creates it, so that a mistake in the input that is
    met on the way leaves nothing behind. Raises UserError where the folder holds a run that is neither to be resumed
    nor to be overwritten.
    """

    def __init__(self, config):
        self.config = config
        self.folder = config.folder()
        self.device = pick_device(config.device)
        self.signals = StopSignals()
        self.epoch = self.step = 0
        self.position = dict(EPOCH_START)
        self.started = self.saved_at = time.monotonic()
        self.seconds_before = 0.0  # of the parts before an interruption
        self.save_failed = False
        self.log = lambda line: None
        self.tensorboard = silent_writer()
        if config.resume is None:
            ranks.on_rank_0(lambda: self.folder.check_free(config.overwrite))

    # Start and end

    def start(self, state, results, **classes):
        """Create the folder, open log and TensorBoard, and save the start; or load the checkpoint of the run to resume.

        state: name -> the network or an optimizer, whose states are saved with the run; results: what else is saved, of
        built-in types, as it is at the start; classes: network=..., architect=..., which a run must be resumed with.
        Returns the results to go on with: a copy of those given, or of those in the checkpoint. Raises UserError where
        there is no room, or the checkpoint does not fit.
        """
        self.state, self.results = state, copy.deepcopy(results)
        self.classes = {role: kind.__name__ for role, kind in classes.items()}
        checkpoint, warning = ranks.on_rank_0(self._find_checkpoint)
        if checkpoint:
            self._restore(checkpoint)
        ranks.on_rank_0(lambda: self._open(checkpoint))
        if warning:
            self.warn(warning)
        if checkpoint:
            self.log(self._where_resumed())
        n_ranks = f", {ranks.size()} ranks" if ranks.size() > 1 else ""
        self.log(f"device {self.device}: {device_name(self.device)}{n_ranks}; torch {torch.__version__}")
        return copy.deepcopy(self.results)

    def will_resume(self):
        """Whether there is a checkpoint to go on from; a run that was killed early has none."""
        files = self.folder.checkpoint, self.folder.previous
        return self.config.resume is not None and any(path.is_file() for path in files)

    def saved_results(self):
        """The results in the checkpoint of the run to resume, on every rank; None if the run starts."""
        return ranks.on_rank_0(self._saved_results)

    def _saved_results(self):
        if self.config.resume is None:
            return None
        checkpoint, _, _ = find_checkpoint(self.folder, preferred=self.config.resume)
        results = checkpoint.get("results") if isinstance(checkpoint, dict) else None
        return results if isinstance(results, dict) else None

    def _find_checkpoint(self):
        """The checkpoint to go on from, or None at the start, and a warning if it is not the last, or None."""
        if self.config.resume is None:
            return None, None
        checkpoint, path, warning = find_checkpoint(self.folder, preferred=self.config.resume)
        if path is not None:
            check_fits(checkpoint, path, self.config, self.classes)
        return checkpoint, warning

    def _restore(self, checkpoint):
        """Load what `_save` saved."""
        try:
            for name, part in self.state.items():
                part.load_state_dict(checkpoint["keeps"][name])
            set_random_state(checkpoint["random"], self.device)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ranks.user_error(f"the checkpoint in {self.folder} is of another network: {reason}") from None
        self.epoch, self.step, self.seconds_before = (checkpoint[name] for name in ("epoch", "step", "seconds"))
        self.position, self.results = checkpoint["within"], checkpoint["results"]
        if self.position["trained"]:  # the optimizer's steps before the scheduler's were an earlier process's
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")

    def _open(self, checkpoint):
        """Create the folder, or go on writing in it where the checkpoint is."""
        try:
            self.folder.create(self.config.as_dict(), self.config.overwrite)
            self.folder.cut_off(self.position["log"], checkpoint["events"] if checkpoint else {})
            self.log = get_logger(self.folder.log).info
            # a TensorBoard that is showing the run forgets what came after the checkpoint
            self.tensorboard = event_writer(self.folder.tensorboard, purge_step=checkpoint and self.step + 1)
            if not checkpoint:
                self._write_options()
                self.position["log"] = self.folder.log_size()
                self._save()
                self.folder.check_room()
        except OSError as error:
            if self.config.resume is None:
                self.folder.delete()
            raise UserError(f"cannot write to {self.folder}: {error.strerror or error}") from None

    def _write_options(self):
        table = self.config.as_markdown()
        self.tensorboard.add_text("config", table, 0)
        for row in table.splitlines()[2:]:
            self.log("  ".join(cell.strip() for cell in row.strip("|").split("|", 1)))

    def _where_resumed(self):
        if self.epoch == self.config.epochs:
            return f"all {self.epoch} epochs are done; --epochs adds more"
        within = f"step {self.step}, in epoch {self.epoch + 1}"
        return f"resumed after {within if self.position['batches'] else f'epoch {self.epoch}'}"

    def finish(self, **results):
        """Write summary.json, and log the same in one line: `summary` and then name=value, separated by blanks."""
        ranks.on_rank_0(lambda: self._finish(results))

    def _finish(self, results):
        options = {"stage": self.config.stage, "dataset": self.config.dataset, "folder": str(self.folder)}
        results = options | {"seconds": self.seconds()} | results
        results = {name: round(value, 6) if isinstance(value, float) else value for name, value in results.items()}
        with self.surviving_full_disk(self.folder.summary.name):
            write_json(self.folder.summary, results)
        self.tensorboard.close()
        words = (round(value, 4) if isinstance(value, float) else shell_quote(str(value)) for value in results.values())
        self.log("summary " + " ".join(f"{name}={word}" for name, word in zip(results, words)))
        if self.save_failed:
            raise UserError(f"the run's end could not be saved in {self.folder}; with room, --resume does it again")

    # What the run tells

    def seconds(self):
        """Seconds that the run has taken, over all its parts."""
        return self.seconds_before + time.monotonic() - self.started

    def scalar(self, tag, value):
        """Write a number to TensorBoard."""
        self.tensorboard.add_scalar(tag, value, self.step)

    def warn(self, text):
        """Write a warning to the log and to standard error."""
        self.log(f"warning: {text}")
        if ranks.rank() == 0:
            print(f"warning: {text}", file=sys.stderr)

    @contextlib.contextmanager
    def surviving_full_disk(self, name):
        """Inside, a file that cannot be written costs a warning with its name, not the run."""
        try:
            yield
        except OSError as error:
            self.warn(f"{name} could not be written: {error}")

    # Saving

    def note_position(self, meters):
        """Note that the epoch's training is where the meters are, and all its lines up to there are in the log."""
        self.position = {
            "batches": meters.steps_done,
            "trained": meters.steps_done == meters.n_steps,
            "meters": meters.state(),
            "log": self.folder.log_size(),
        }

    def save_if_due(self):
        """Save the run at its position, every --checkpoint-minutes and when it is about to stop."""
        due = time.monotonic() - self.saved_at >= 60 * self.config.checkpoint_minutes
        if due or self.signals.agreed is not None:
            self.save()

    def stop_if_asked(self):
        """Stop, on all ranks after the same step, if a signal asked any of them to."""
        if self.signals.agreed is not None:
            ranks.wait()
            raise StoppedError

    def end_epoch(self, is_best, results):
        """Count the epoch as done and save it with a copy of the results, as best.pt too if `is_best`."""
        self.epoch += 1
        self.position = EPOCH_START | {"log": self.folder.log_size()}
        self.results = copy.deepcopy(results)
        if ranks.size() > 1:
            states = [part.state_dict() for part in self.state.values()]
            ranks.check_equal([states, torch.get_rng_state()], f"after epoch {self.epoch}")
        self.save(is_best)

    def save(self, is_best=False):
        """Write checkpoint.pt, and best.pt if `is_best`; if that fails, warn, and leave the old files."""
        if ranks.rank() > 0:
            return
        try:
            self._save(is_best)
            self.save_failed = False
        except OSError as error:
            self.save_failed = True
            self.warn(f"step {self.step} could not be saved, the checkpoints before it are as they were: {error}")
        self.saved_at = time.monotonic()

    def _save(self, is_best=False):
        self.tensorboard.flush()
        checkpoint = {
            "format": FORMAT,
            "stage": self.config.stage,
            "config": self.config.as_dict(),
            "classes": self.classes,
            "epoch": self.epoch,
            "step": self.step,
            "within": self.position,
            "seconds": self.seconds(),
            "random": random_state(self.device),
            "events": self.folder.event_sizes(),
            "keeps": {name: part.state_dict() for name, part in self.state.items()},
            "results": self.results,
        }
        save_checkpoint(checkpoint, self.folder.path, is_best)

    # Stopping

    @contextlib.contextmanager
    def interruptible(self):
        """Inside, SIGINT, SIGTERM and SIGUSR1 make the loop stop after its step, saved; see `StopSignals`.

        Then say how to go on, and exit with 128 + the signal's number.
        """
        with self.signals:
            try:
                yield
            except StoppedError:
                saved = "not saved" if self.save_failed else "saved"
                command = f"--resume {shell_quote(str(self.folder))}"
                name = self.signals.agreed.name
                self.log(f"{name}: stopped after step {self.step}, {saved}; go on with {command}")
                self.tensorboard.close()
                sys.exit(128 + self.signals.agreed)
