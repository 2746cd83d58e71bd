"""The check that a step's numbers are finite, before they spoil the weights."""

import math

from running import ranks
from running.folder import write_json


def check_finite_mean(run, phase, loss):
    """Raise UserError unless a pass's mean loss, the same number on all ranks, is finite; nothing is saved of it."""
    if math.isfinite(loss):
        return
    message = (
        f"epoch {run.epoch + 1}, phase {phase}: the mean loss is {loss:.4g}, which says nothing of the network; "
        f"a lower learning rate may help; the checkpoints in {run.folder} are from before"
    )
    run.log(message)
    raise ranks.user_error(message)


def check_finite(run, phase, loss, gradient_norm, optim, loaders):
    """Raise UserError, and leave the step's samples in fault.json, unless loss and gradient norm are finite.

    phase: "alpha" or "w", the parameters that `optim` is about to step; loaders: name -> the `Loader` of a batch of the
    step. To be called with the same numbers on all ranks. Reading them waits for the device.
    """
    if math.isfinite((loss.detach() + gradient_norm).item()):
        return
    epoch, step, lr = run.epoch + 1, run.step + 1, optim.param_groups[0]["lr"]
    if ranks.rank() == 0:
        batch = run.position["batches"]
        fault = {
            "epoch": epoch,
            "step": step,
            "phase": phase,
            "lr": lr,
            "loss": str(loss.item()),
            "gradient_norm": str(gradient_norm.item()),
            "samples": {name: loader.samples(epoch, batch).tolist() for name, loader in loaders.items()},
        }
        with run.surviving_full_disk(run.folder.fault.name):
            write_json(run.folder.fault, fault)
    message = (
        f"step {step}, phase {phase}: loss {loss.item():.4g} and gradient norm {gradient_norm.item():.4g} are not both "
        f"finite, at learning rate {lr:.4g}; weights and alphas are as they were, the batch is in {run.folder.fault}, "
        f"the checkpoints in {run.folder} are from before"
    )
    run.log(message)
    raise ranks.user_error(message)
