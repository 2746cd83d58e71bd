"""Averages of loss and accuracy over a pass through the data, and a progress bar."""

import sys
import time

import torch
from tqdm import tqdm

from machine import ranks
from run.checkpoints import EPOCH_START


class AverageMeter:
    """A running mean. val: the last value; avg: the mean of all values, weighted by their n."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.val = self.avg = self.sum = 0.0
        self.count = 0

    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


def accuracy(output, target, topk=(1,)):
    """Top-k accuracy: the fraction of samples whose target is among the k largest logits, a tensor for each k in topk.

    output: (N, n_classes); target: (N,). If there are at most k classes it is 1.
    """
    n_classes = output.size(1)
    ranked = output.topk(min(max(topk), n_classes), dim=1).indices
    hits = ranked == target.unsqueeze(1)
    return [hits[:, :k].any(dim=1).float().mean() for k in topk]


class Meters:
    """Averages of loss, top-1 and top-5 accuracy (fractions) over a pass of n_steps batches.

    `show` displays them: on a terminal as a progress bar with the time left, elsewhere as a log line every `print_freq`
    steps. position: the position in an epoch's training from which the run resumes, see `EPOCH_START`. steps_done: the
    number of batches so far, including those before an interruption.
    """

    def __init__(self, run, title, n_steps, position=EPOCH_START):
        self.run = run
        self.title = title
        self.n_steps = n_steps
        self.loss, self.top1, self.top5 = AverageMeter(), AverageMeter(), AverageMeter()
        for meter, state in zip(self._all(), position["meters"]):
            vars(meter).update(state)
        self.steps_done = self.steps_before = position["batches"]
        self.started = time.monotonic()
        on_terminal = ranks.rank() == 0 and sys.stderr.isatty()
        self.bar = tqdm(
            total=n_steps,
            initial=self.steps_before,
            desc=title,
            leave=False,
            dynamic_ncols=True,
            disable=not on_terminal,
        )

    def _all(self):
        return self.loss, self.top1, self.top5

    def state(self):
        """The averages as built-in types, for a checkpoint."""
        return [dict(vars(meter)) for meter in self._all()]

    def update(self, loss, logits, y, n, others=()):
        """Add a global batch of n images. loss, logits, y: those of this rank's rows.

        others: scalars, the same on all ranks, that are read along and returned as floats. Call it once per step, after
        the step's work is queued, since reading the numbers synchronises with the device. On several ranks the same
        all-reduce exchanges the received signals, so that all ranks stop after the same step.
        """
        means = torch.stack([loss, *accuracy(logits, y, topk=(1, 5))])
        if ranks.size() > 1:
            signals = self.run.signals
            flags = torch.cat([means.new_full((1,), flag) for flag in signals.flags()])
            means, flags = ranks.average([ranks.row_weighted(means, y), flags], y)
            others = *others, *flags
        numbers = torch.cat([means, *(other.view(1).to(means.dtype) for other in others)]).tolist()
        for meter, value in zip(self._all(), numbers):
            meter.update(value, n)
        self.steps_done += 1
        others = numbers[len(means) :]
        if ranks.size() > 1:
            signals.agree(others[-len(flags) :])
            del others[-len(flags) :]
        return others

    def show(self):
        """Advance the progress bar; without one, log a line every `print_freq` steps."""
        if not self.bar.disable:
            self.bar.set_postfix_str(str(self), refresh=False)
            self.bar.update()
        elif self.steps_done % self.run.config.print_freq == 0 and self.steps_done < self.n_steps:
            seconds_left = self.seconds_per_step() * (self.n_steps - self.steps_done)
            self.run.log(f"{self.title}  step {self.steps_done}/{self.n_steps}  {self}  {seconds_left:.0f} s left")

    def seconds_per_step(self):
        return (time.monotonic() - self.started) / max(self.steps_done - self.steps_before, 1)

    def write_scalars(self, prefix, attribute="avg"):
        """Write the averages (attribute "avg") or the values of the last batch ("val") to TensorBoard."""
        for name in ("loss", "top1", "top5"):
            self.run.scalar(f"{prefix}/{name}", getattr(getattr(self, name), attribute))

    def finish(self, prefix, note=""):
        """Log the averages of the whole pass, and write them to TensorBoard."""
        self.bar.close()
        self.write_scalars(prefix)
        self.run.log(f"{self.title}  {self}  {note}{self.seconds_per_step():.2f} s a step")

    def __str__(self):
        return f"loss {self.loss.avg:.4f}  top1 {self.top1.avg:.2%}  top5 {self.top5.avg:.2%}"
