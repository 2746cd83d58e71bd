"""Checks that losses and gradients are finite, before a step changes the weights."""

import math

import torch

from machine import ranks
from run.folder import write_json


def check_finite_mean(run, phase, loss):
    """Raise UserError unless the mean loss of a validation pass is finite. All ranks must pass the same number."""
    if math.isfinite(loss):
        return
    message = (
        f"epoch {run.epoch + 1}, phase {phase}: the mean loss, {loss:.4g}, is not finite and says nothing; "
        f"a lower learning rate may help; the checkpoints in {run.folder} are from before"
    )
    run.log(message)
    raise ranks.user_error(message)


class Undo:
    """Puts an optimizer's parameters and state back, when called, as they are now."""

    def __init__(self, optim):
        self.optim = optim
        self.parameters = [(p, p.detach().clone()) for group in optim.param_groups for p in group["params"]]
        self.state = {p: {name: _copy(value) for name, value in state.items()} for p, state in optim.state.items()}

    @torch.no_grad()
    def __call__(self):
        for parameter, value in self.parameters:
            parameter.copy_(value)
        self.optim.state.clear()
        self.optim.state.update(self.state)


def _copy(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def check_finite(run, phase, loss, gradient_norm, optim, loaders, undo=None):
    """Unless loss and gradient norm, floats, are finite, write the step's samples to fault.json and raise UserError.

    phase: "alpha" or "w", the parameters that `optim` updates; loaders: name -> the `Loader` of a batch of this step;
    undo: an `Undo` of what this step has updated already. All ranks must pass the same numbers.
    """
    if math.isfinite(loss) and math.isfinite(gradient_norm):
        return
    if undo is not None:
        undo()
    epoch, step, lr = run.epoch + 1, run.step + 1, optim.param_groups[0]["lr"]
    if ranks.rank() == 0:
        batch = run.position["batches"]
        fault = {
            "epoch": epoch,
            "step": step,
            "phase": phase,
            "lr": lr,
            "loss": str(loss),
            "gradient_norm": str(gradient_norm),
            "samples": {name: loader.samples(epoch, batch).tolist() for name, loader in loaders.items()},
        }
        with run.surviving_full_disk(run.folder.fault.name):
            write_json(run.folder.fault, fault)
    message = (
        f"step {step}, phase {phase}: loss {loss:.4g} and gradient norm {gradient_norm:.4g} are not both "
        f"finite, at learning rate {lr:.4g}; weights and alphas are as they were, the batch is in {run.folder.fault}, "
        f"the checkpoints in {run.folder} are from before"
    )
    run.log(message)
    raise ranks.user_error(message)
