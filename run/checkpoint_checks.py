"""Whether a checkpoint holds what this program would have saved, so that a run may go on with it; loading it then."""

import math
import random

import numpy as np
import torch

from command_line.errors import UserError, shown
from genotypes import GenotypeError, from_str
from run.checkpoints import FORMAT
from run.forms import PLAIN, Optional, any_number, flat, maybe, misfit, real, whole
from run.options import MAY_CHANGE

FINGERPRINT = {"classes": {str: whole(0)}, "sha256": str}
OF_AN_EPOCH = {"epoch": whole(1), "valid_top1": real(), "string": str, str: flat}
HISTORY = [
    OF_AN_EPOCH
    | {
        Optional("eigenvalue"): maybe(any_number),
        Optional("alphas_learn"): bool,
        Optional("margins"): {"normal": [any_number], "reduce": [any_number]},
    }
]

# The results that a stage saves: what must be there; a script of the user's may save more. Runs of older versions lack
# `data`, the fingerprints of the images.
RESULTS = {
    "search": {
        "found": {Optional("last"): OF_AN_EPOCH, Optional("best"): OF_AN_EPOCH},
        "history": HISTORY,
        Optional("data"): {"training": FINGERPRINT},
        str: lambda value: True,
    },
    "augment": {
        "top1": real(),
        "best_top1": real(),
        "genotype": str,
        "input_size": whole(1),
        "input_channels": whole(1),
        Optional("preprocessing"): str,
        "classes": [str],
        "mean": [real()],
        "std": [real(1e-30)],
        Optional("data"): {"training": FINGERPRINT, Optional("test"): FINGERPRINT, Optional("held-out"): FINGERPRINT},
        str: lambda value: True,
    },
}


def _is_dict(value):
    return isinstance(value, dict)


def _bits(value):
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.dim() == 1


# The form of a checkpoint, see run/forms.py. Older ones lack `classes`.
CONTENTS = {
    "format": int,
    "stage": str,  # search or augment
    "config": {str: PLAIN},  # the options
    Optional("classes"): {str: str},  # names of the classes of the network and, in a search, of the architect
    "epoch": whole(0),  # epochs that are done
    "step": whole(0),  # steps of the optimizer of w since the start
    "within": {  # the position in the epoch after those, see EPOCH_START
        "batches": whole(0),
        "trained": bool,
        "meters": [{"val": any_number, "avg": any_number, "sum": any_number, "count": whole(1)}],
        "log": whole(0),
    },
    "seconds": lambda value: type(value) is float and 0 <= value < math.inf,  # the running time so far
    "random": {"cpu": _bits, "cuda": [_bits], "numpy": [frozenset({str, float, int, list})], "python": tuple},
    "events": {str: whole(0)},  # the lengths of TensorBoard's files
    "keeps": {str: _is_dict},  # the states of the network and the optimizers, see `state_misfit`
    "results": _is_dict,  # other values of the script: genotypes, history, accuracies
}

# What these optimizers save of a parameter: name -> whether it is shaped as the parameter, and not a single number.
OPTIMIZER_STATE = {
    torch.optim.SGD: {"momentum_buffer": True},
    torch.optim.Adam: {"step": False, "exp_avg": True, "exp_avg_sq": True},
}


def check_contents(checkpoint, path, stage):
    """Raise UserError unless a checkpoint has all that this program saves for a stage, of the right types and ranges.

    The network's and the optimizers' tensors are left to `state_misfit`.
    """
    content = checkpoint if isinstance(checkpoint, dict) else {}
    for name, value in {"format": FORMAT, "stage": stage}.items():
        if type(content.get(name)) is not type(value) or content[name] != value:
            found = shown(content[name]) if name in content else None
            raise UserError(f"{path} is of {name} {found}; this program reads {name} {value!r}")
    found = misfit(checkpoint, CONTENTS | {"results": RESULTS[stage]})
    found = found or _random_misfit(checkpoint["random"]) or _position_misfit(checkpoint) or _result_misfit(checkpoint)
    if found:
        raise UserError(f"{path} is not a checkpoint that this program wrote: {found}")


def _random_misfit(random_state):
    """What is wrong with the states of the random generators, which are tried on generators of their own; or None."""
    try:
        torch.Generator().set_state(random_state["cpu"])
        np.random.RandomState().set_state(tuple(random_state["numpy"]))
        random.Random().setstate(random_state["python"])
        is_inside = 0 <= random_state["numpy"][2] <= len(random_state["numpy"][1])  # NumPy does not check its position
        ends_well = misfit(random_state["python"][2], frozenset({float, type(None)})) is None
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):  # each generator has its own of these
        is_inside = ends_well = False
    return None if is_inside and ends_well else "random is no state of the generators"


def _position_misfit(checkpoint):
    """Which numbers of a checkpoint's position contradict each other, or None."""
    epoch, step, within = (checkpoint[name] for name in ("epoch", "step", "within"))
    batches = within["batches"]
    steps_before = step - batches  # in the epochs that are done
    # all of the same number of steps; of a run without fingerprints of its images they may have changed
    of_an_epoch = steps_before / epoch if epoch and "data" in checkpoint["results"] else None
    if steps_before < epoch or (epoch == 0 and steps_before) or (of_an_epoch and of_an_epoch % 1):
        return f"step is {step}, after {epoch} epochs and {batches} batches"
    if of_an_epoch and (batches > of_an_epoch or within["trained"] != (batches == of_an_epoch)):
        return f"within.batches is {batches} of {of_an_epoch:.0f}, and within.trained is {within['trained']}"
    if within["trained"] and not batches:
        return "within.trained is True without batches"
    if len(within["meters"]) not in ((3,) if batches else (0, 3)):
        return f"within.meters has {len(within['meters'])} entries"
    return None


def _result_misfit(checkpoint):
    """Which results of a checkpoint contradict each other or its position, or None."""
    epoch, results = checkpoint["epoch"], checkpoint["results"]
    if checkpoint["stage"] == "search":
        if [entry["epoch"] for entry in results["history"]] != list(range(1, epoch + 1)):
            return f"results.history is not of the {epoch} epochs that are done"
        if len(results["found"]) != (2 if epoch else 0):
            return f"results.found has {len(results['found'])} genotypes after {epoch} epochs"
    elif not len(results["mean"]) == len(results["std"]) == results["input_channels"] or not results["classes"]:
        return "results.mean and results.std are not of each channel, or there are no classes"
    return None


def check_fits(checkpoint, path, config):
    """Raise UserError, which says what differs, unless a run with these options can resume a checkpoint.

    Needs no network, so it comes before one is built.
    """
    check_contents(checkpoint, path, config.stage)
    saved, options = vars(config.restored(checkpoint["config"], path)), config.as_dict()
    fixed = options.keys() - set(MAY_CHANGE)
    if "data" not in checkpoint["results"]:  # an older version: no fingerprint to compare data with
        fixed |= {"data_path"}
    for name in sorted(fixed):
        if saved[name] != options[name]:
            raise UserError(f"{path} is of a run with {name} {shown(saved[name])}, not {shown(options[name])}")
    epochs_begun = checkpoint["epoch"] + (checkpoint["within"]["batches"] > 0)
    if epochs_begun > config.epochs:
        raise UserError(f"--epochs {config.epochs}: {path} has begun {epochs_begun} already")
    if config.stage == "search":
        entries = [*checkpoint["results"]["history"], *checkpoint["results"]["found"].values()]
        check_genotypes(entries, config, path)
    check_size(checkpoint, config, config.nodes * (config.nodes + 3) // 2 if config.stage == "search" else 1, path)


def check_size(checkpoint, config, n_edges, path):
    """Raise UserError if a checkpoint is too small for a network of these options, so that none is built to compare.

    n_edges: of a cell.
    """
    tensors = checkpoint["keeps"].get("net", {})
    n_numbers = sum(tensor.numel() for tensor in tensors.values() if isinstance(tensor, torch.Tensor))
    if config.layers > len(tensors) or max(config.init_channels, config.layers * n_edges) > n_numbers:
        raise UserError(
            f"{path} is too small for {config.layers} cells of {n_edges} edges and {config.init_channels} channels"
        )


def check_genotypes(entries, config, source):
    """Raise UserError unless the genotypes of a search's epochs are of its nodes and operations.

    entries: dicts of the form `OF_AN_EPOCH`; source: the file, for error messages.
    """
    allowed = set(config.primitives)
    for text in {entry["string"] for entry in entries}:
        try:
            genotype = from_str(text)
        except GenotypeError as error:
            raise UserError(f"{source}: {error}") from None
        for gene in (genotype.normal, genotype.reduce):
            if len(gene) != config.nodes or not {op for node in gene for op, _ in node} <= allowed:
                raise UserError(
                    f"{source} is not of this search: it has a cell of other nodes or operations, {shown(text)}"
                )


def check_classes(checkpoint, path, classes):
    """Raise UserError unless a checkpoint is of these classes: "network" (in a search also "architect") -> name."""
    for role, name in checkpoint.get("classes", {}).items():
        if name != classes.get(role):
            raise UserError(
                f"{path} is of a run with the {role} {name[:80]}, not {classes.get(role)}; resume it with the script "
                "that started it"
            )


def _tensor_misfit(tensor, like):
    """How a tensor differs from one that this program would have saved, in words, or None."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"is {'a tensor of another kind' if isinstance(tensor, torch.Tensor) else shown(tensor)}"
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        return f"is {tensor.dtype} of shape {shown(str(list(tensor.shape)))}, not {like.dtype} of {list(like.shape)}"
    return None


def state_misfit(saved, part):
    """How a saved state differs from what a network or an optimizer would have saved, in words, or None.

    Compared are the names, types, dtypes and shapes of all tensors; strides are not, since values are copied. Of an
    optimizer's parameters some may have no state, since they had no gradient yet.
    """
    if isinstance(part, torch.optim.Optimizer):
        return _optimizer_misfit(saved, part)
    expected = part.state_dict()
    missing, unknown = expected.keys() - saved.keys(), saved.keys() - expected.keys()
    if missing or unknown:
        first = next(name for name in (*expected, *saved) if name in missing or name in unknown)
        return f"{len(missing)} tensors are missing and {len(unknown)} unknown, first {shown(first)}"
    for name, like in expected.items():
        found = _tensor_misfit(saved[name], like) if isinstance(like, torch.Tensor) else None
        if found:
            return f"{name} {found}"
    return None


def _optimizer_misfit(saved, optim):
    found = misfit(saved, {"state": _is_dict, "param_groups": [{str: lambda value: True}]})
    if found:
        return found
    parameters = [p for group in optim.param_groups for p in group["params"]]
    names = OPTIMIZER_STATE.get(type(optim))
    for index, state in saved["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(state, dict):
            return f"state.{shown(index)} is of no parameter"
        if names is not None and state and state.keys() != names.keys():
            return f"state.{index} has other entries than {', '.join(names)}"
        for name, value in state.items():
            shaped = names[name] if names is not None else not (isinstance(value, torch.Tensor) and value.dim() == 0)
            found = _tensor_misfit(value, parameters[index] if shaped else torch.zeros(()))
            if not found and not shaped and not 1 <= value <= 2**53:
                found = f"is {value.item()}"
            if found and (value is not None or optim.param_groups[0].get("momentum") != 0):  # then SGD may save None
                return f"state.{index}.{name} {found}"
    return None


def load_state(part, saved):
    """Load a saved state that fits, see `state_misfit`, into a network or an optimizer.

    An optimizer takes its settings from the options, not from the file, and lays its buffers out as the parameters.
    """
    if not isinstance(part, torch.optim.Optimizer):
        part.load_state_dict(saved)
        return
    parameters = [p for group in part.param_groups for p in group["params"]]
    state = {
        index: {name: _laid_out_as(parameters[index], value) for name, value in of_parameter.items()}
        for index, of_parameter in saved["state"].items()
    }
    if state and type(part) is torch.optim.SGD and part.param_groups[0]["momentum"] > 0:
        for index, parameter in enumerate(parameters):  # the fused step fails if some buffers are there and some not
            state.setdefault(index, {}).setdefault("momentum_buffer", torch.zeros_like(parameter, device="cpu"))
    groups = part.state_dict()["param_groups"]
    for group, before in zip(groups, saved["param_groups"]):
        if "initial_lr" in before:  # of the optimizers whose learning rate a scheduler changes, which needs it
            group["initial_lr"] = group["lr"]
    part.load_state_dict({"state": state, "param_groups": groups})


def _laid_out_as(parameter, value):
    if value is None or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, device="cpu").copy_(value)
