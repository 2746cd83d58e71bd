"""Checks that losses and gradients are finite, before a step changes the weights."""

import math

from running import ranks
from running.folder import write_json


def check_finite_mean(run, phase, loss):
    """Raise UserError unless the mean loss of a validation pass is finite. All ranks must pass the same number."""
    if math.isfinite(loss):
        return
    message = (
        f"epoch {run.epoch + 1}, phase {phase}: the mean loss is {loss:.4g}, which says nothing of the network; "
        f"a lower learning rate may help; the checkpoints in {run.folder} are from before"
    )
    run.log(message)
    raise ranks.user_error(message)


def check_finite(run, phase, loss, gradient_norm, optim, loaders):
    """Unless loss and gradient norm are finite, write the step's samples to fault.json and raise UserError.

    phase: "alpha" or "w", the parameters that `optim` is going to update; loaders: name -> the `Loader` of a batch of
    this step. All ranks must pass the same numbers. Reading them synchronises with the device.
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
