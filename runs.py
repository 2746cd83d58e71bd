"""What surrounds both scripts' loops: a run's folder and all that is written there, devices, progress."""

import contextlib
import json
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from config import CONFIG_FILE
from errors import UserError
from utils import CHECKPOINT, AverageMeter, accuracy, get_logger, save_checkpoint
from visualize import HOW_TO_INSTALL, plot

LOG, TENSORBOARD, PLOTS, SUMMARY = "log.txt", "tb", "plots", "summary.json"
FORMAT = 1  # of checkpoints


def pick_device(name):
    """The torch.device that --device names; `auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    there += ["cuda"] * (len(there) > 1) + ["mps"] * torch.backends.mps.is_available()
    if name not in there:
        raise UserError(f"--device {name}: not on this machine; there are auto, {', '.join(there)}")
    return torch.device(name)


class Run:
    """A run's folder, `RUNS_PATH/STAGE/NAME`: log, TensorBoard, pictures, checkpoints, summary.

    Creating a Run only checks that the folder may be used; `start` creates it, so that bad input found on the way
    leaves nothing behind. Raises UserError where the folder holds a run and neither --resume nor --overwrite is given.
    """

    def __init__(self, config):
        self.config = config
        self.folder = config.folder()
        self.device = pick_device(config.device)
        self.started = time.monotonic()
        self.seconds_before = 0.0  # of the parts before an interruption
        self.step = 0  # the x axis of every scalar: optimizer steps of w since the start
        self.dot_missed = False
        if config.resume is None and self.folder.exists():
            self._check_free()

    def start(self):
        """Create the folder and open its log and TensorBoard file; with --resume, return the checkpoint, else None."""
        checkpoint = self._load() if self.config.resume else None
        try:
            if self.config.overwrite and self.folder.is_dir():
                shutil.rmtree(self.folder)
            (self.folder / PLOTS).mkdir(parents=True, exist_ok=True)
            self.write_json(CONFIG_FILE, self.config.as_dict())
            self.log = get_logger(self.folder / LOG).info
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error}") from None
        if checkpoint:
            self.step, self.seconds_before = checkpoint["step"], checkpoint["seconds"]
        # TensorBoard then ignores what was written after the checkpoint
        self.tensorboard = SummaryWriter(
            str(self.folder / TENSORBOARD), purge_step=self.step + 1 if checkpoint else None
        )
        if not checkpoint:
            self.tensorboard.add_text("config", self.config.as_markdown(), 0)
            for row in self.config.as_markdown().splitlines()[2:]:
                self.log("  ".join(cell.strip() for cell in row.strip("|").split("|", 1)))
        self.log(f"device {self.device}: {device_name(self.device)}; torch {torch.__version__}")
        return checkpoint

    def seconds(self):
        """Seconds that the run has taken, over all its parts."""
        return self.seconds_before + time.monotonic() - self.started

    def scalar(self, tag, value):
        self.tensorboard.add_scalar(tag, value, self.step)

    def draw(self, gene, name, tag, caption):
        """Draw a cell into the plots folder and TensorBoard; without `dot`, say once what to install."""
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
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        beside.replace(self.folder / name)

    def save(self, keeps, is_best, epoch, **results):
        """Write checkpoint.pt, and best.pt if `is_best`. keeps: name -> module or optimizer."""
        self.tensorboard.flush()
        about = {"format": FORMAT, "stage": self.config.stage, "config": self.config.as_dict()}
        position = {"epoch": epoch, "step": self.step, "seconds": self.seconds(), "random": random_state()}
        state = {name: keeper.state_dict() for name, keeper in keeps.items()}
        save_checkpoint(about | position | {"keeps": state, "results": results}, self.folder, is_best)

    def restore(self, checkpoint, keeps):
        """Load what `save` saved."""
        try:
            for name, keeper in keeps.items():
                keeper.load_state_dict(checkpoint["keeps"][name])
            set_random_state(checkpoint["random"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the checkpoint in {self.folder} is of another network: {reason}") from None
        done, epochs = checkpoint["epoch"], self.config.epochs
        self.log(
            f"resumed after epoch {done}" if done < epochs else f"all {epochs} epochs are done; --epochs adds more"
        )

    def finish(self, **results):
        """Write summary.json, and log the same in one line: `summary` and then name=value, separated by blanks."""
        about = {"stage": self.config.stage, "dataset": self.config.dataset, "folder": str(self.folder)}
        results = about | {"seconds": self.seconds()} | results
        results = {name: round(value, 6) if isinstance(value, float) else value for name, value in results.items()}
        self.write_json(SUMMARY, results)
        self.tensorboard.close()
        shown = (round(value, 4) if isinstance(value, float) else quote(str(value)) for value in results.values())
        self.log("summary " + " ".join(f"{name}={value}" for name, value in zip(results, shown)))

    @contextlib.contextmanager
    def interruptible(self):
        """On Ctrl-C say how to go on, and exit with 130."""
        try:
            yield
        except KeyboardInterrupt:
            self.tensorboard.close()
            saved = (self.folder / CHECKPOINT).exists()
            self.log(
                f"interrupted; the last finished epoch is saved: go on with --resume {self.folder}"
                if saved
                else "interrupted in the first epoch; nothing was saved yet"
            )
            sys.exit(130)

    def _check_free(self):
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; choose another --name")
        if not any(self.folder.iterdir()):
            return
        if not (self.folder / CONFIG_FILE).is_file():
            raise UserError(f"{self.folder} holds files that are no run's; choose another --name")
        if not self.config.overwrite:
            go_on = f"go on with --resume {self.folder}, " * (self.folder / CHECKPOINT).is_file()
            raise UserError(
                f"{self.folder} already holds a run; {go_on}replace it with --overwrite, or choose another --name"
            )

    def _load(self):
        given = Path(self.config.resume)
        path = given if given.is_file() else self.folder / CHECKPOINT
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(
                f"{self.folder} holds no {CHECKPOINT}: its first epoch was not finished; start anew with --overwrite"
            ) from None
        except Exception:  # damaged files make the reader raise a dozen types, none of them documented
            raise UserError(
                f"{path} cannot be read: it is damaged, or holds more than tensors and plain types"
            ) from None
        about = {"format": FORMAT, "stage": self.config.stage}
        kinds = {"epoch": int, "step": int, "seconds": float, "random": dict, "keeps": dict, "results": dict}
        found = checkpoint if isinstance(checkpoint, dict) else {}
        for name, value in about.items():
            if found.get(name) != value:
                raise UserError(f"{path} is of {name} {found.get(name)!r}; this program resumes {name} {value!r}")
        for name, kind in kinds.items():
            if type(found.get(name)) is not kind:
                raise UserError(
                    f"{path} is not a checkpoint that this program wrote: {name} is missing or no {kind.__name__}"
                )
        if checkpoint["epoch"] > self.config.epochs:
            raise UserError(f"--epochs {self.config.epochs}: {path} has done {checkpoint['epoch']} already")
        return checkpoint


def quote(text):
    """The text as one word of a shell's: as it is, in double quotes where that is enough, as for a genotype."""
    return shlex.quote(text) if "'" not in text or set('"$`\\!') & set(text) else f'"{text}"'


def one_line(transform):
    """A transform's description without its line breaks."""
    return " ".join(str(transform).split())


def random_state():
    """The global generators' state: torch's on the CPU and every CUDA device."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def device_name(device):
    """The processor's or accelerator's name, with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


class Meters:
    """Averages of loss, top 1 and top 5 (fractions) over a pass through the data, shown as it goes on.

    On a terminal as a progress bar with the time left; elsewhere as a log line every `print_freq` steps.
    """

    def __init__(self, run, title):
        self.run = run
        self.title = title
        self.loss, self.top1, self.top5 = AverageMeter(), AverageMeter(), AverageMeter()

    def watch(self, batches, n):
        """Yield the n batches, showing progress."""
        bar = tqdm(total=n, desc=self.title, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())
        self.started = time.monotonic()
        with bar:
            for i, batch in enumerate(batches, 1):
                yield batch
                bar.set_postfix_str(str(self), refresh=False)
                bar.update()
                if bar.disable and i % self.run.config.print_freq == 0 and i < n:
                    left = (time.monotonic() - self.started) / i * (n - i)
                    self.run.log(f"{self.title}  step {i}/{n}  {self}  {left:.0f} s left")
        self.seconds_a_step = (time.monotonic() - self.started) / n

    def update(self, loss, logits, y):
        """Add a batch. Reading the numbers waits for the device: once a step, after its work has been queued."""
        n = y.size(0)
        top1, top5 = accuracy(logits, y, topk=(1, 5))
        for meter, value in zip((self.loss, self.top1, self.top5), torch.stack([loss, top1, top5]).tolist()):
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
