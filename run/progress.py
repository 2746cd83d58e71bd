"""Averages of loss and accuracy over a pass through the data, and a progress bar."""

import sys
import time

import torch
from tqdm import tqdm

from machine import ranks


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


def accuracy(output: torch.Tensor, target: torch.Tensor, topk=(1,)) -> list[torch.Tensor]:
    """Top-k accuracy: the fraction of samples whose target is among the k largest logits, a tensor for each k in topk.

    output: (N, n_classes); target: (N,). If there are at most k classes it is 1.
    """
    n_classes = output.size(1)
    ranked = output.topk(min(max(topk), n_classes), dim=1).indices
    hits = ranked == target.unsqueeze(1)
    return [hits[:, :k].any(dim=1).float().mean() for k in topk]


class Meters:
    """Averages of loss, top-1 and top-5 accuracy (fractions) over a pass of n_steps batches.

    title: of the pass, in the log; prefix: of its tags, such as `train` in `train/loss`; learning_rates: name -> the
    rate in use, if this is training; steps_done, states: how far an interrupted pass is, see `state`.

    On a terminal the pass has a progress bar with the time left, elsewhere a log line every `print_freq` steps.
    """

    def __init__(self, run, title, prefix, n_steps, learning_rates=None, steps_done=0, states=()):
        self.run, self.title, self.prefix, self.n_steps = run, title, prefix, n_steps
        self.learning_rates = learning_rates or {}
        self.loss, self.top1, self.top5 = AverageMeter(), AverageMeter(), AverageMeter()
        for meter, state in zip(self._all(), states):
            vars(meter).update(state)
        self.steps_done = self.steps_before = steps_done
        self.started = time.monotonic()
        on_terminal = ranks.rank() == 0 and sys.stderr.isatty()
        self.bar = tqdm(
            total=n_steps, initial=steps_done, desc=title, leave=False, dynamic_ncols=True, disable=not on_terminal
        )

    def _all(self):
        return self.loss, self.top1, self.top5

    def state(self) -> list[dict]:
        """The averages as built-in types, for a checkpoint."""
        return [dict(vars(meter)) for meter in self._all()]

    def update(self, loss, logits, y, n, scalars) -> dict[str, float]:
        """Add a global batch of n images, and read all numbers of a step from the device at once.

        loss, logits, y: those of this rank's rows; scalars: name -> a scalar tensor that is the same on all ranks.
        Returns name -> the number, with the loss of the global batch as "loss". On several ranks the same all-reduce
        exchanges the signals that each has received, so that all ranks stop after the same step.
        """
        means = torch.stack([loss, *accuracy(logits, y, topk=(1, 5))])
        flags = means.new_empty(0)
        if ranks.size() > 1:
            flags = means.new_tensor(self.run.signals.flags())
            means, flags = ranks.average([ranks.row_weighted(means, y), flags], y)
        others = [scalar.detach().view(1).to(means.dtype) for scalar in scalars.values()]
        numbers = torch.cat([means, flags, *others]).tolist()  # waits for the device
        for meter, value in zip(self._all(), numbers):
            meter.update(value, n)
        self.steps_done += 1
        first = len(means) + len(flags)
        if ranks.size() > 1:
            self.run.signals.agree(numbers[len(means) : first])
        return {"loss": numbers[0]} | dict(zip(scalars, numbers[first:]))

    def show(self):
        """Advance the progress bar; without one, log a line every `print_freq` steps."""
        if not self.bar.disable:
            self.bar.set_postfix_str(str(self), refresh=False)
            self.bar.update()
        elif self.steps_done % self.run.config.print_freq == 0 and self.steps_done < self.n_steps:
            seconds_left = self.seconds_per_step() * (self.n_steps - self.steps_done)
            self.run.log(f"{self.title}  step {self.steps_done}/{self.n_steps}  {self}  {seconds_left:.0f} s left")

    def seconds_per_step(self) -> float:
        return (time.monotonic() - self.started) / max(self.steps_done - self.steps_before, 1)

    def write_scalars(self, prefix, attribute):
        """Log the averages (attribute "avg") or the values of the last batch ("val")."""
        for name in ("loss", "top1", "top5"):
            self.run.scalar(f"{prefix}/{name}", getattr(getattr(self, name), attribute))

    def finish(self):
        """Log the averages of the whole pass."""
        self.bar.close()
        self.write_scalars(self.prefix, "avg")
        rates = ""
        for name, rate in self.learning_rates.items():
            self.run.scalar(f"lr/{name}", rate)
            rates += f"{name}_lr {rate:.5f}  "
        if rates:
            self.run.scalar("speed/steps_per_second", 1 / self.seconds_per_step())
        self.run.log(f"{self.title}  {self}  {rates}{self.seconds_per_step():.2f} s a step")

    def __str__(self):
        return f"loss {self.loss.avg:.4f}  top1 {self.top1.avg:.2%}  top5 {self.top5.avg:.2%}"
