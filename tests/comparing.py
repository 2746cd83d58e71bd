"""What a run leaves, and where two runs differ."""

import json

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from run.checkpoints import load_checkpoint


def outcome(run):
    """All that a run leaves that the same run would leave again: name -> value."""
    values = {}
    for name in ("checkpoint.pt", "best.pt"):
        state = load_checkpoint(run / name)
        values[name] = {key: state[key] for key in ("epoch", "step", "random", "parts", "results")}
    for name in ("genotype.json", "history.json"):
        if (run / name).exists():
            values[name] = json.loads((run / name).read_text())
    # TensorBoard's own reader, which leaves out what a later part of the run did again
    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        if not tag.startswith("speed/"):
            values[f"tb {tag}"] = {event.step: event.value for event in events.Scalars(tag)}
    return values


def differences(one, other, where=""):
    """The places where two outcomes differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        places = [f"{where}/{key} in one only" for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            places += differences(one[key], other[key], f"{where}/{key}")
        return places
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries"]
        return [place for i, pair in enumerate(zip(one, other)) for place in differences(*pair, f"{where}/{i}")]
    return [] if one == other else [where]
