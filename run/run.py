"""A run: its folder, its position, and how it is saved, stopped and resumed."""

import contextlib
import copy
import sys
import time
import warnings

import torch

from command_line.errors import UserError, shell_quote
from images.loading import LoadingError
from machine import ranks
from machine.devices import device_name, pick_device, random_state, set_random_state, use_deterministic_algorithms
from machine.memory import check_memory
from machine.signals import StoppedError, StopSignals
from run.checkpoint_checks import check_classes, check_fits, load_state, state_misfit
from run.checkpoints import EPOCH_START, FORMAT, find_checkpoint, save_checkpoint
from run.folder import write_json
from run.forms import misfit
from run.log import get_logger
from run.tensorboard import event_writer, silent_writer
from run.version import program_version


class Run:
    """The state of a run of search.py or augment.py, except for its training loop. Only rank 0 writes files.

    epoch: number of completed epochs; step: steps of the optimizer of w since the start, the x axis of every scalar;
    position: the position in the current epoch, see `EPOCH_START`; log: a function that writes a line to log.txt and
    standard output; tensorboard: a tensorboardX.SummaryWriter. On ranks other than 0, and before `start`, the last two
    write nothing.

    The constructor only checks that the folder may be used. `start` creates it, so that errors in the input that are
    detected before `start` leave no folder. Raises UserError if the folder has a run, and neither --resume nor
    --overwrite is given.
    """

    def __init__(self, config):
        self.config = config
        self.folder = config.folder()
        if config.deterministic:
            use_deterministic_algorithms()
        self.device = pick_device(config.device)
        self.signals = StopSignals()
        self.epoch = self.step = 0
        self.position = dict(EPOCH_START)
        self.started = self.saved_at = time.monotonic()
        self.seconds_before = 0.0  # the running time before the last interruption
        self.save_failed = False
        self.log = lambda line: None
        self.tensorboard = silent_writer()
        ranks.on_rank_0(self._enter)

    def check_memory(self, n_ops, size, n):
        """Raise UserError if the network or a step certainly needs more memory than the machine has.

        n_ops: operations in a cell; size: pixels a side of what the first cell gets; n: images of the data set.
        """
        is_kept = self.device.type == "cpu" and not getattr(self.config, "recompute", False)
        images = min(self.config.batch_size, n) // ranks.size() if is_kept else 0
        ranks.on_rank_0(lambda: check_memory(self.config, n_ops, size, images))

    # Start and end

    def _enter(self):
        """Check that the run may use its folder, and if there is one, that no other run does."""
        self.folder.recover()
        if self.config.resume is None:
            self.folder.check_free(self.config.overwrite)
        if self.folder.path.is_dir():
            self.folder.lock()

    def start(self, state, results, **classes):
        """Create the folder, open log and TensorBoard, and save a checkpoint; or load the one of the run to resume.

        state: name -> the network or an optimizer, saved by their `state_dict`; results: initial values of all else
        that is saved, of built-in types; classes: network=..., architect=..., whose names are saved, since a run must
        be resumed with the same classes. Returns a copy of `results`, or of the results in the checkpoint. Raises
        UserError if the disk is full, or the checkpoint is of a run with other options, classes or tensors.
        """
        self.state, self.results = state, copy.deepcopy(results)
        self.classes = {role: kind.__name__ for role, kind in classes.items()}
        checkpoint, warning = ranks.on_rank_0(self._find_checkpoint)
        if checkpoint:
            ranks.on_rank_0(lambda: check_classes(checkpoint, self.folder, self.classes))
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
        """Whether `start` will load a checkpoint. With --resume there may be none, if the run was killed early."""
        files = self.folder.checkpoint, self.folder.previous
        return self.config.resume is not None and any(path.is_file() for path in files)

    def saved_results(self):
        """The results in the checkpoint of the run to resume, on every rank; None for a new run.

        Raises UserError if the checkpoint cannot be one of this run, so it comes before anything is built.
        """
        return ranks.on_rank_0(lambda: (self._find_checkpoint()[0] or {}).get("results"))

    def _find_checkpoint(self):
        """(checkpoint to resume or None, warning or None). There is a warning if a later checkpoint is damaged."""
        if self.config.resume is None:
            return None, None
        checkpoint, path, warning = find_checkpoint(self.folder, preferred=self.config.resume)
        if path is not None:
            check_fits(checkpoint, path, self.config)
        return checkpoint, warning

    def _restore(self, checkpoint):
        """Restore the state from a checkpoint of `_save`. All of it is checked before anything is changed."""
        found = misfit(checkpoint["keeps"], dict.fromkeys(self.state, lambda state: True), "keeps")
        for name, part in self.state.items():
            found = found or state_misfit(checkpoint["keeps"][name], part)
        if found:
            raise ranks.user_error(f"the checkpoint in {self.folder} is of another network: {found}")
        for name, part in self.state.items():
            load_state(part, checkpoint["keeps"][name])
        try:
            set_random_state(checkpoint["random"], self.device)
        except RuntimeError as error:  # of CUDA, which alone can check its generator's state
            raise ranks.user_error(f"the checkpoint in {self.folder} has no state of the generators: {error}") from None
        self.epoch, self.step, self.seconds_before = (checkpoint[name] for name in ("epoch", "step", "seconds"))
        self.position, self.results = checkpoint["within"], checkpoint["results"]
        if self.position["trained"]:  # the optimizer's steps were in an earlier process, so PyTorch warns wrongly
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")

    def _open(self, checkpoint):
        """Create the folder; when resuming, truncate its files to the checkpoint and append to them."""
        try:
            if self.config.resume is None:
                self.folder.create(self.config.as_dict(), self.config.overwrite)
            else:
                self.folder.update(self.config.as_dict())
            self.folder.cut_off(self.position["log"], checkpoint["events"] if checkpoint else {})
            self.log = get_logger(self.folder.log).info
            # purge_step: TensorBoard discards the events after the checkpoint
            self.tensorboard = event_writer(self.folder.tensorboard, purge_step=checkpoint and self.step + 1)
            if not checkpoint:
                self._write_options()
                self.position["log"] = self.folder.log_size()
                self._save()
                self.folder.check_room()
            self.folder.forget_replaced()
        except (OSError, UserError) as error:
            if self.config.resume is None:
                self.folder.discard()
            if isinstance(error, UserError):
                raise
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
        """Write summary.json, and log the same values in one line: `summary name=value name=value ...`.

        The folder is no longer locked then.
        """
        try:
            ranks.on_rank_0(lambda: self._finish(results))
        finally:
            self.folder.unlock()

    def _finish(self, results):
        options = {"stage": self.config.stage, "dataset": self.config.dataset, "folder": str(self.folder)}
        machine = f"{device_name(self.device)}; torch {torch.__version__}"
        origin = {"seconds": self.seconds(), "version": program_version(), "machine": machine}
        for name, found in self.results.get("data", {}).items():
            origin[f"{name.replace('-', '_')}_fingerprint"] = found["sha256"][:16]
        results = options | origin | results
        results = {name: round(value, 6) if isinstance(value, float) else value for name, value in results.items()}
        with self.surviving_full_disk(self.folder.summary.name):
            write_json(self.folder.summary, results)
        self.tensorboard.close()
        words = (round(value, 4) if isinstance(value, float) else shell_quote(str(value)) for value in results.values())
        self.log("summary " + " ".join(f"{name}={word}" for name, word in zip(results, words)))
        if self.save_failed:
            raise UserError(f"the run's end could not be saved in {self.folder}; with room, --resume does it again")

    # Output

    def seconds(self):
        """The running time in seconds, including that before interruptions."""
        return self.seconds_before + time.monotonic() - self.started

    def scalar(self, tag, value):
        """Write a number to TensorBoard, at the current step."""
        self.tensorboard.add_scalar(tag, value, self.step)

    def warn(self, text):
        """Write a warning to the log and to standard error."""
        self.log(f"warning: {text}")
        if ranks.rank() == 0:
            print(f"warning: {text}", file=sys.stderr)

    @contextlib.contextmanager
    def surviving_full_disk(self, name):
        """Inside, an OSError becomes a warning with the file's name, and the run continues, if its folder is there."""
        self.folder.check_unmoved()
        try:
            yield
        except OSError as error:
            self.warn(f"{name} could not be written: {error}")

    # Saving

    def note_position(self, meters):
        """Set the position to that of the meters. All log lines of the steps so far must be in the log already."""
        self.position = {
            "batches": meters.steps_done,
            "trained": meters.steps_done == meters.n_steps,
            "meters": meters.state(),
            "log": self.folder.log_size(),
        }

    def save_if_due(self):
        """Save the run if --checkpoint-minutes have passed since the last time, or if it is going to stop."""
        due = time.monotonic() - self.saved_at >= 60 * self.config.checkpoint_minutes
        if due or self.signals.agreed is not None:
            self.save()

    def stop_if_asked(self):
        """Raise StoppedError, on all ranks after the same step, if any rank received a signal to stop."""
        if self.signals.agreed is not None:
            ranks.wait()
            raise StoppedError

    def end_epoch(self, is_best, results):
        """Count the epoch as completed, and save the run with a copy of the results; also as best.pt if `is_best`."""
        self.epoch += 1
        self.position = EPOCH_START | {"log": self.folder.log_size()}
        self.results = copy.deepcopy(results)
        if ranks.size() > 1:
            states = [part.state_dict() for part in self.state.values()]
            ranks.check_equal([states, torch.get_rng_state()], f"after epoch {self.epoch}")
        self.save(is_best)

    def save(self, is_best=False):
        """Write checkpoint.pt, and best.pt if `is_best`. If that fails, warn, and keep the old files."""
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
        self.folder.check_unmoved()
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
        """Inside, SIGINT, SIGTERM and SIGUSR1 stop the loop after its step, with a checkpoint; see `StopSignals`.

        Then log the command that resumes the run, and exit with 128 + the signal's number. If no more batches can be
        loaded, the steps so far are saved too.
        """
        with self.signals, contextlib.ExitStack() as on_error:
            on_error.callback(self.folder.unlock)
            try:
                yield
                on_error.pop_all()  # the folder stays locked until `finish`
            except LoadingError:
                self.save()
                raise
            except StoppedError:
                saved = "not saved" if self.save_failed else "saved"
                command = f"--resume {shell_quote(str(self.folder))}"
                name = self.signals.agreed.name
                self.log(f"{name}: stopped after step {self.step}, {saved}; go on with {command}")
                self.tensorboard.close()
                sys.exit(128 + self.signals.agreed)
