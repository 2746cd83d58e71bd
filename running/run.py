"""What surrounds both scripts' loops: a run's folder and all that is written there, devices, progress."""

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tensorboardX import SummaryWriter
from tensorboardX.event_file_writer import EventsWriter
from tqdm import tqdm

from config import MAY_CHANGE
from report.cells import HOW_TO_INSTALL, plot
from running import ranks
from running.checkpoints import CHECKPOINT, FORMAT, PREVIOUS, DamagedCheckpointError, load_checkpoint, save_checkpoint
from running.devices import device_name, pick_device, random_state, seed_generators, set_random_state  # noqa: F401
from running.errors import UserError
from running.folder import launcher
from running.loading import STOPPING
from utils import AverageMeter, accuracy, get_logger

CONFIG_FILE, LAUNCHER = "config.json", "launcher.txt"
LOG, TENSORBOARD, PLOTS, SUMMARY, FAULT = "log.txt", "tb", "plots", "summary.json", "fault.json"
HISTORY = "history.json"  # of a search: each epoch's genotype and validation accuracy

# Where a run is within its next epoch: steps done, whether those are all, the meters over them; the length of the log.
BETWEEN_EPOCHS = {"batches": 0, "trained": False, "meters": [], "log": 0}


class StoppedError(Exception):
    """A signal asked the run to stop, and it is saved."""


def open_run(config):
    """The run that these options say: on rank 0, which alone writes, a `Run`, on others a `FollowingRun`."""
    return Run(config) if ranks.rank() == 0 else FollowingRun(config)


class Run:
    """A run's folder, `RUNS_PATH/STAGE/NAME`: log, TensorBoard, pictures, checkpoints, summary; and where the run is.

    epoch: epochs done; trained: whether the next one lacks its validation only; step: optimizer steps of w since the
    start, the x axis of every scalar; results: what else the script remembers, of built-in types.

    Creating a Run only checks that the folder may be used; `start` creates it, so that bad input found on the way
    leaves nothing behind. Raises UserError where the folder holds a run and neither --resume nor --overwrite is given.
    """

    def __init__(self, config):
        self.config = config
        self.folder = config.folder().path
        self.device = pick_device(config.device)
        self.started = time.monotonic()
        self.seconds_before = 0.0  # of the parts before an interruption
        self.epoch = self.step = 0
        self.results = {}
        self.within = dict(BETWEEN_EPOCHS)
        self.asked = self.signal = None  # the signal that asked this process to stop, and that all ranks stop for
        self.saved_at, self.save_failed = time.monotonic(), False
        self.dot_missed = False
        ranks.first(self._check_free)

    @property
    def trained(self):
        return self.within["trained"]

    def start(self, keeps, **results):
        """Create the folder, open its log and TensorBoard file and save the start; with --resume, load the checkpoint.

        keeps: name -> module or optimizer; results: those at the start. Raises UserError where there is no room, or the
        checkpoint cannot be gone on with.
        """
        self.keeps, self.results = keeps, results
        checkpoint, warning = ranks.first(self._load)
        if checkpoint:
            self._restore(checkpoint)
        ranks.first(lambda: self._open(checkpoint))
        if warning:
            self.warn(warning)
        if checkpoint:
            where = f"step {self.step}, in epoch {self.epoch + 1}" if self.within["batches"] else f"epoch {self.epoch}"
            done = self.epoch == self.config.epochs
            self.log(f"all {self.epoch} epochs are done; --epochs adds more" if done else f"resumed after {where}")
        together = f", {ranks.size()} ranks" if ranks.size() > 1 else ""
        self.log(f"device {self.device}: {device_name(self.device)}{together}; torch {torch.__version__}")

    def _open(self, checkpoint):
        """Create the folder, or what there is to write on in it."""
        fresh = self.config.resume is None
        try:
            if self.config.overwrite and self.folder.is_dir():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / LAUNCHER).write_text(launcher())
            self.write_json(CONFIG_FILE, self.config.as_dict())
            (self.folder / PLOTS).mkdir(exist_ok=True)
            self._cut_off(checkpoint["events"] if checkpoint else {})
            self.log = get_logger(self.folder / LOG).info
            # one that is showing the run then forgets what came after the checkpoint
            self.tensorboard = event_writer(self.folder / TENSORBOARD, checkpoint and self.step + 1)
            if not checkpoint:
                self.tensorboard.add_text("config", self.config.as_markdown(), 0)
                for row in self.config.as_markdown().splitlines()[2:]:
                    self.log("  ".join(cell.strip() for cell in row.strip("|").split("|", 1)))
                self.within["log"] = self._log_size()
                self._save()
                self._check_room()
        except OSError as error:
            if fresh:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(f"cannot write to {self.folder}: {error.strerror or error}") from None

    def warn(self, text):
        self.log(f"warning: {text}")
        print(f"warning: {text}", file=sys.stderr)

    def seconds(self):
        """Seconds that the run has taken, over all its parts."""
        return self.seconds_before + time.monotonic() - self.started

    def scalar(self, tag, value):
        self.tensorboard.add_scalar(tag, value, self.step)

    def draw(self, gene, name, tag, caption):
        """Draw a cell into the plots folder and TensorBoard; without `dot`, say once what to install."""
        with self.losing_only(name):
            self._draw(gene, name, tag, caption)

    def _draw(self, gene, name, tag, caption):
        path = plot(gene, self.folder / PLOTS / name, caption)
        if path.suffix == ".png":
            with Image.open(path) as image:
                self.tensorboard.add_image(tag, np.asarray(image.convert("RGB")), self.step, dataformats="HWC")
        elif not self.dot_missed:
            self.dot_missed = True
            self.log(f"cells are kept as graphviz sources, as {path}; {HOW_TO_INSTALL}")

    def write_json(self, name, content):
        """Write a file that is complete or as it was, whenever the run is killed."""
        beside = self.folder / f"{name}.tmp"
        try:
            with open(beside, "w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        beside.replace(self.folder / name)

    @contextlib.contextmanager
    def losing_only(self, what):
        """Let a full disk cost what is written inside, not the run."""
        try:
            yield
        except OSError as error:
            self.warn(f"{what} could not be written: {error}")

    def after_step(self, meters, i, n):
        """After step i of n of a pass through the data: save if it is time to or a signal came, and then stop."""
        if meters.training:
            if i == n:  # what the epoch logs and charts at its end belongs to this step: see `after_training`
                return
            self.within = {"batches": i, "trained": False, "meters": meters.state(), "log": self._log_size()}
        self._save_if_due()

    def after_training(self, meters, n):
        """After the last of an epoch's n training steps, and its lines."""
        self.within = {"batches": n, "trained": True, "meters": meters.state(), "log": self._log_size()}
        self._save_if_due()

    def end_epoch(self, is_best):
        """Count the epoch as done and save it, as best.pt too if `is_best`; if the ranks are still equal."""
        self.epoch += 1
        self.within = BETWEEN_EPOCHS | {"log": self._log_size()}
        if ranks.size() > 1:
            states = [keeper.state_dict() for keeper in self.keeps.values()]
            ranks.check_equal(tensors_in([*states, torch.get_rng_state()]), f"after epoch {self.epoch}")
        self.save(is_best)
        self._stop_if_asked()

    def save(self, is_best=False):
        """Write checkpoint.pt, and best.pt if `is_best`; if that fails, say so and go on with those that are there."""
        try:
            self._save(is_best)
            self.save_failed = False
        except OSError as error:
            self.save_failed = True
            self.warn(f"step {self.step} could not be saved, the checkpoints before it are as they were: {error}")
        self.saved_at = time.monotonic()

    def _save(self, is_best=False):
        self.tensorboard.flush()
        about = {"format": FORMAT, "stage": self.config.stage, "config": self.config.as_dict()}
        position = {"epoch": self.epoch, "step": self.step, "within": self.within, "seconds": self.seconds()}
        state = {name: keeper.state_dict() for name, keeper in self.keeps.items()}
        events = {path.name: path.stat().st_size for path in (self.folder / TENSORBOARD).glob("events.*")}
        own = {"random": random_state(self.device), "events": events, "keeps": state, "results": self.results}
        save_checkpoint(about | position | own, self.folder, is_best)

    def _save_if_due(self):
        if self.signal is None and time.monotonic() - self.saved_at >= 60 * self.config.checkpoint_minutes:
            self.save()
        elif self.signal is not None:
            self.save()
            ranks.wait()
            self._stop_if_asked()

    def _stop_if_asked(self):
        if self.signal is not None:
            raise StoppedError

    def _log_size(self):
        path = self.folder / LOG
        return path.stat().st_size if path.exists() else 0

    def _cut_off(self, events):
        """Take off what the log and TensorBoard's files say of steps after the checkpoint, which will be done again."""
        lengths = {self.folder / LOG: self.within["log"]}
        for path in (self.folder / TENSORBOARD).glob("events.*"):
            lengths[path] = events.get(path.name, 0)
        for path, length in lengths.items():
            if path.exists() and path.stat().st_size > length:
                os.truncate(path, length)

    def _check_room(self):
        """Raise OSError unless there is room for a run's three checkpoints, and the one being written."""
        size = 2 * (self.folder / CHECKPOINT).stat().st_size  # with the optimizers' buffers, which are yet to come
        free = shutil.disk_usage(self.folder).free
        if free < 4 * size:
            raise OSError(f"its checkpoints need {4 * size / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free")

    def _restore(self, checkpoint):
        """Load what `_save` saved."""
        try:
            for name, keeper in self.keeps.items():
                keeper.load_state_dict(checkpoint["keeps"][name])
            set_random_state(checkpoint["random"], self.device)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ranks.user_error(f"the checkpoint in {self.folder} is of another network: {reason}") from None
        self.epoch, self.step, self.seconds_before = (checkpoint[name] for name in ("epoch", "step", "seconds"))
        self.within, self.results = checkpoint["within"], checkpoint["results"]
        if self.trained:  # the steps before the scheduler's were an earlier process's
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")

    def stop_unless_finite(self, phase, loss, gradient_norm, lr, epoch, batch):
        """Raise UserError, and leave the batch's samples in fault.json, if the loss or the gradient is not finite.

        batch: name -> f(epoch, index) that gives the samples. All ranks must give the same numbers. To be called before
        the step that would spoil the weights; reading the number waits for the device.
        """
        if math.isfinite((loss.detach() + gradient_norm).item()):
            return
        loss, norm, index = loss.item(), gradient_norm.item(), self.within["batches"]
        about = {"epoch": epoch, "step": self.step + 1, "phase": phase, "lr": lr}
        with self.losing_only(FAULT):
            samples = {name: of(epoch, index).tolist() for name, of in batch.items()}
            self.write_json(FAULT, about | {"loss": str(loss), "gradient_norm": str(norm), "samples": samples})
        message = (
            f"step {self.step + 1}, phase {phase}: loss {loss:.4g} and gradient norm {norm:.4g} are not both finite, "
            f"at learning rate {lr:.4g}; weights and alphas are as they were, the batch is in {self.folder / FAULT}, "
            f"the checkpoints in {self.folder} are from before"
        )
        self.log(message)
        raise ranks.user_error(message)

    def finish(self, **results):
        """Write summary.json, and log the same in one line: `summary` and then name=value, separated by blanks."""
        ranks.first(lambda: self._finish(results))

    def _finish(self, results):
        about = {"stage": self.config.stage, "dataset": self.config.dataset, "folder": str(self.folder)}
        results = about | {"seconds": self.seconds()} | results
        results = {name: round(value, 6) if isinstance(value, float) else value for name, value in results.items()}
        with self.losing_only(SUMMARY):
            self.write_json(SUMMARY, results)
        self.tensorboard.close()
        shown = (round(value, 4) if isinstance(value, float) else quote(str(value)) for value in results.values())
        self.log("summary " + " ".join(f"{name}={value}" for name, value in zip(results, shown)))
        if self.save_failed:
            raise UserError(f"the run's end could not be saved in {self.folder}; with room, --resume does it again")

    @contextlib.contextmanager
    def interruptible(self):
        """On SIGINT, SIGTERM and SIGUSR1 finish the step, save, say how to go on, exit with 128 + the signal's number.

        SIGUSR1 is what Slurm sends ahead of a preemption. A SIGINT after any of them stops the process at once.
        """

        def ask(number, frame):
            again = self.asked is not None and number == signal.SIGINT
            if again and not dist.is_torchelastic_launched():  # torchrun repeats the Ctrl-C that its ranks have had
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            self.asked = self.asked or number
            if ranks.size() == 1:
                self.signal = self.asked

        before = {number: signal.signal(number, ask) for number in STOPPING}
        try:
            yield
        except StoppedError:
            name, saved = signal.Signals(self.signal).name, "not saved" if self.save_failed else "saved"
            self.log(f"{name}: stopped after step {self.step}, {saved}; go on with --resume {quote(str(self.folder))}")
            self.tensorboard.close()
            sys.exit(128 + self.signal)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def all_asked(self):
        """A 1 for the signal among `STOPPING` that asked this rank to stop, else zeros, to be added over the ranks."""
        return [float(self.asked == number) for number in STOPPING]

    def stop_for(self, asked):
        """Let all ranks stop for the same signal after this step: the first that any was asked by."""
        self.signal = next((number for number, count in zip(STOPPING, asked) if count), None)

    def _check_free(self):
        if self.config.resume is not None or not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; choose another --name")
        if all(
            path.suffix == ".tmp" or path.name == LAUNCHER for path in self.folder.iterdir()
        ):  # a run killed before it wrote anything
            return
        if not (self.folder / CONFIG_FILE).is_file():
            raise UserError(f"{self.folder} holds files that are no run's; choose another --name")
        if not self.config.overwrite:
            go_on = f"go on with --resume {self.folder}, " * (self.folder / CHECKPOINT).is_file()
            raise UserError(
                f"{self.folder} already holds a run; {go_on}replace it with --overwrite, or choose another --name"
            )

    def has_checkpoint(self):
        """Whether there is something to go on from; a run that is killed early has nothing."""
        return self.config.resume is not None and any((self.folder / name).is_file() for name in (CHECKPOINT, PREVIOUS))

    def _load(self):
        """The checkpoint to go on from, or None for the start, and a warning if it isn't the last, or None."""
        if self.config.resume is None:
            return None, None
        given = Path(self.config.resume)
        paths = [given] if given.is_file() else []
        paths += [path for path in (self.folder / CHECKPOINT, self.folder / PREVIOUS) if path not in paths]
        damage = None
        for path in paths:
            try:
                checkpoint = load_checkpoint(path)
            except FileNotFoundError:
                continue
            except DamagedCheckpointError as error:
                damage = damage or error
                continue
            self._check(checkpoint, path)
            return checkpoint, damage and f"{damage}; going on from {path.name}"
        if damage:
            raise UserError(f"{damage}, and there is no other to go on from; start anew with --overwrite")
        return None, None  # killed before it saved anything, so nothing was done

    def _check(self, checkpoint, path):
        about = {"format": FORMAT, "stage": self.config.stage}
        kinds = {
            "epoch": int, "step": int, "within": dict, "seconds": float, "random": dict, "events": dict, "keeps": dict,
            "results": dict, "config": dict,
        }  # fmt: skip
        found = checkpoint if isinstance(checkpoint, dict) else {}
        for name, value in about.items():
            if found.get(name) != value:
                raise UserError(f"{path} is of {name} {found.get(name)!r}; this program resumes {name} {value!r}")
        for name, kind in kinds.items():
            if type(found.get(name)) is not kind:
                raise UserError(
                    f"{path} is not a checkpoint that this program wrote: {name} is missing or no {kind.__name__}"
                )
        if checkpoint["within"].keys() != BETWEEN_EPOCHS.keys():
            raise UserError(f"{path} is not a checkpoint that this program wrote: its position within the epoch is odd")
        config, given = checkpoint["config"], self.config.as_dict()
        for name in sorted((config.keys() | given.keys()) - set(MAY_CHANGE)):
            if config.get(name) != given.get(name):
                raise UserError(f"{path} is of a run with {name} {config.get(name)!r}, not {given.get(name)!r}")
        begun = checkpoint["epoch"] + (checkpoint["within"]["batches"] > 0)
        if begun > self.config.epochs:
            raise UserError(f"--epochs {self.config.epochs}: {path} has begun {begun} already")


class FollowingRun(Run):
    """The run on ranks other than 0: the same state and decisions, and nothing written."""

    def __init__(self, config):
        super().__init__(config)
        self.tensorboard = Nothing()

    def log(self, line):
        pass

    def warn(self, text):
        pass

    def scalar(self, tag, value):
        pass

    def draw(self, gene, name, tag, caption):
        pass

    def write_json(self, name, content):
        pass

    def save(self, is_best=False):
        pass


class Nothing:
    """An object whose methods do nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def quote(text):
    """The text as one word of a shell's: as it is, in double quotes where that is enough, as for a genotype."""
    return shlex.quote(text) if "'" not in text or set('"$`\\!') & set(text) else f'"{text}"'


def one_line(transform):
    """A transform's description without its line breaks."""
    return " ".join(str(transform).split())


def alpha_tag(kind, node, source, op):
    """TensorBoard's name for an operation's softmax weight on an edge."""
    return f"alpha_{kind}/node{node}_from{source}/{op}"


def tensors_in(state):
    """All tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


def event_writer(folder, purge_step=None):
    """tensorboardX's SummaryWriter, writing at once: its own queue of events is lost when a run is killed.

    purge_step: TensorBoard is to ignore earlier events from this step on.
    """
    unique = f".{os.getpid()}.{time.time_ns()}"
    writer = SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=unique)
    writer.file_writer.event_writer.close()
    writer.file_writer.event_writer = _EventFile(folder)
    return writer


class _EventFile:
    """A file of TensorBoard's events. On a full disk it loses events, not the run; the next flush begins a new file."""

    def __init__(self, folder):
        self.folder = folder
        self.file = None
        self._open()

    def get_logdir(self):
        return str(self.folder)

    def add_event(self, event):
        if self.file is not None:
            self._try(self.file.write_event, event)

    def flush(self):
        self._try(self._open if self.file is None else self.file.flush)

    def close(self):
        if self.file is not None:
            self._try(self.file.close)
            self.file = None

    def _open(self):
        self.file = EventsWriter(str(self.folder / "events"), f".{os.getpid()}.{time.time_ns()}")

    def _try(self, act, *args):
        try:
            act(*args)
        except OSError as error:
            self.file = None
            print(f"warning: TensorBoard's events could not be written: {error}", file=sys.stderr)


class Meters:
    """Averages of loss, top 1 and top 5 (fractions) over a pass through the data, shown as it goes on.

    On a terminal as a progress bar with the time left; elsewhere as a log line every `print_freq` steps.
    """

    def __init__(self, run, title, training=False):
        self.run = run
        self.title = title
        self.training = training
        self.loss, self.top1, self.top5 = AverageMeter(), AverageMeter(), AverageMeter()
        self.first = run.within["batches"] if training else 0  # of an epoch that was interrupted
        if self.first:
            for meter, state in zip(self._meters(), run.within["meters"]):
                vars(meter).update(state)

    def _meters(self):
        return self.loss, self.top1, self.top5

    def state(self):
        return [dict(vars(meter)) for meter in self._meters()]

    def watch(self, batches, n):
        """Yield the batches, from `first` to n, showing progress; after each the run may save itself, or stop."""
        bar = tqdm(
            total=n,
            initial=self.first,
            desc=self.title,
            leave=False,
            dynamic_ncols=True,
            disable=ranks.rank() > 0 or not sys.stderr.isatty(),
        )
        self.started = time.monotonic()
        with bar:
            for i, batch in enumerate(batches, self.first + 1):
                yield batch
                bar.set_postfix_str(str(self), refresh=False)
                bar.update()
                if bar.disable and i % self.run.config.print_freq == 0 and i < n:
                    left = (time.monotonic() - self.started) / (i - self.first) * (n - i)
                    self.run.log(f"{self.title}  step {i}/{n}  {self}  {left:.0f} s left")
                self.run.after_step(self, i, n)
        self.seconds_a_step = (time.monotonic() - self.started) / max(n - self.first, 1)

    def update(self, loss, logits, y, n):
        """Add a global batch of n. Reading the numbers waits for the device: once a step, after its work is queued."""
        means = torch.stack([loss, *accuracy(logits, y, topk=(1, 5))])
        if ranks.size() > 1:
            means, asked = ranks.average([ranks.row_weighted(means, y), means.new_tensor(self.run.all_asked())], y)
            self.run.stop_for(asked.tolist())
        for meter, value in zip(self._meters(), means.tolist()):
            meter.update(value, n)

    def scalars(self, prefix, attribute="avg"):
        """Write the averages, or the last values (`val`), to TensorBoard."""
        for name in ("loss", "top1", "top5"):
            self.run.scalar(f"{prefix}/{name}", getattr(getattr(self, name), attribute))

    def finish(self, prefix, note=""):
        """Log the averages of the whole pass, and write them to TensorBoard."""
        self.scalars(prefix)
        self.run.log(f"{self.title}  {self}  {note}{self.seconds_a_step:.2f} s a step")

    def __str__(self):
        return f"loss {self.loss.avg:.4f}  top1 {self.top1.avg:.2%}  top5 {self.top5.avg:.2%}"
