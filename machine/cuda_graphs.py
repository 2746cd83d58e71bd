"""The gradients of a search step as CUDA graphs: recorded in each epoch, then replayed, which launches all at once.

A graph repeats the kernels that were recorded, at the same addresses and with the same numbers. This is right since

- the inputs of a step, which are its batches and the network's `noise`, are copied to where the recording read them;
- weights, alphas, buffers and momentum are changed in place only;
- all other numbers, such as xi, BN's flags and what `begin_epoch` sets, stay as they are in an epoch, and each epoch
  records anew;
- gradients lie where the recording put them, and a replay makes them the parameters' `grad` again;
- whatever depends on numbers that Python reads, and Adam and SGD, are not part of a graph.

The eager step is the definition. Batches of another shape than the recorded one, such as the last of an epoch, run
eagerly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from machine import ranks

# Steps of an epoch before recording. The first of a run creates momentum buffers; the second loads all later kernels.
EAGER_STEPS = 2


def reason_against(config, device: torch.device) -> str | None:
    """Why a run has no CUDA graphs, in words; None if it may have them."""
    if device.type != "cuda":
        return "the device is not CUDA"
    if ranks.size() > 1:
        return "there are several ranks"
    if config.sync_bn:
        return "--sync-bn is given"
    return "--cuda-graphs is off" if config.cuda_graphs == "off" else None


@dataclass
class Recording:
    """The graph of a function, with the tensors that it reads and writes.

    layouts: shape, strides, type and device of each input; numbers: `StepGraphs._numbers` before the last eager step
    """

    layouts: list[tuple]
    numbers: dict[tuple[int, str], Any] = field(default_factory=dict)
    eager_steps: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    inputs: list[torch.Tensor] = field(default_factory=list)
    results: Any = None
    gradients: list[tuple[nn.Parameter, torch.Tensor]] = field(default_factory=list)

    def replay(self, inputs: list[torch.Tensor]) -> Any:
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return tree_map_only(torch.Tensor, torch.clone, self.results)  # other graphs of the pool may overwrite them


class StepGraphs:
    """Runs functions that set gradients, each as a CUDA graph if possible.

    Once it turns out that one cannot be a graph, all run eagerly to the end of the run, and a line in the log says why.
    """

    def __init__(self, run, net: nn.Module, architect):
        self.device, self.log, self.net, self.architect = run.device, run.log, net, architect
        self.reason_against = reason_against(run.config, run.device)
        self.forget()
        if self.reason_against is None:
            self.stream = torch.cuda.Stream(run.device)
        elif run.device.type == "cuda":
            self.log(f"no CUDA graphs: {self.reason_against}")

    def forget(self) -> None:
        """Drop all recordings, at the end of an epoch: in the next, other numbers are in use."""
        self.recordings = {}  # function -> `Recording`
        self.pool = None  # of memory: one for all graphs, of which one runs at a time

    def run(
        self,
        function: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        fixed: Sequence[Any],
        fills: Sequence[nn.Parameter],
    ) -> Any:
        """function(*inputs, *fixed), which sets the gradients of the parameters `fills`; returns its result.

        inputs: the tensors that are new in each step; fixed: arguments that stay the same throughout the epoch. The
        result may be a tensor or tensors, without gradients. The next replay overwrites the gradients of this one.
        """
        noise = tree_leaves(self.net.noise)
        if self.reason_against is None and not all(isinstance(leaf, torch.Tensor | None) for leaf in noise):
            self._give_up("the network's noise is not made of tensors")
        if self.reason_against is not None:
            return function(*inputs, *fixed)
        new = [leaf for leaf in (*inputs, *noise) if leaf is not None]
        layouts = [(leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in new]
        recording = self.recordings.setdefault(function, Recording(layouts))
        if layouts != recording.layouts:
            return function(*inputs, *fixed)
        if recording.eager_steps < EAGER_STEPS:
            recording.eager_steps += 1
            recording.numbers = self._numbers(fixed)
            return self._warm_up(function, inputs, fixed)
        if recording.graph is None and not self._record(recording, function, inputs, fixed, fills):
            return function(*inputs, *fixed)
        return recording.replay(new)

    def _warm_up(self, function, inputs, fixed):
        """Run it eagerly, on the stream that will be recorded."""
        random_state, stream = torch.cuda.get_rng_state(), torch.cuda.current_stream()
        self.stream.wait_stream(stream)
        with torch.cuda.stream(self.stream):
            results = function(*inputs, *fixed)
        stream.wait_stream(self.stream)
        if not torch.equal(torch.cuda.get_rng_state(), random_state):
            self._give_up("a pass through the network draws random numbers")
        return results

    def _record(self, recording, function, inputs, fixed, fills):
        """Record what it launches, without running it. Returns whether that was possible."""
        for (owner, name), now in self._numbers(fixed).items():
            before = recording.numbers.get((owner, name))
            if now is not before and (isinstance(now, torch.Tensor) or now != before):
                return self._give_up(f"{name} changes from step to step")
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph, noise = torch.cuda.CUDAGraph(), self.net.noise
        try:
            inputs, self.net.noise = copies = tree_map_only(torch.Tensor, torch.clone, (tuple(inputs), noise))
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):  # loaders go on
                recording.results = function(*inputs, *fixed)
        except RuntimeError as error:
            for parameter in fills:
                parameter.grad = None
            torch.clear_autocast_cache()  # of what was recorded, and never computed
            with torch.cuda.graph(torch.cuda.CUDAGraph()):  # until one succeeds, PyTorch draws no random numbers
                torch.zeros(1, device=self.device)
            return self._give_up(" ".join(str(error).split())[:200])
        finally:
            self.net.noise = noise
        recording.graph, recording.inputs = graph, [leaf for leaf in tree_leaves(copies) if leaf is not None]
        recording.gradients = [(parameter, parameter.grad) for parameter in fills]
        return True

    def _numbers(self, fixed):
        """The values that a graph repeats: attributes of network and architect, and the step counts of optimizers.

        A subclass may change one in each step. A replay would not see that, and silently compute something else.
        """
        owners = [
            (type(owner).__name__, vars(owner) | vars(owner).get("_buffers", {}))
            for owner in (self.architect, *self.net.modules())
        ]
        for optimizer in fixed:
            if isinstance(optimizer, torch.optim.Optimizer):
                owners += [(type(optimizer).__name__, counts(state)) for state in optimizer.state.values()]
        numbers = {}
        for i, (owner, attributes) in enumerate(owners):
            for name, value in attributes.items():
                if isinstance(value, bool | int | float | str | torch.Tensor) and value is not self.net.noise:
                    numbers[i, f"{owner}.{name}"] = value
        return numbers

    def _give_up(self, reason):
        self.reason_against = reason
        self.forget()
        self.log(f"no CUDA graphs from here on: {reason}")
        return False


def counts(state: dict[str, Any]) -> dict[str, float]:
    """The numbers on the CPU in an optimizer's state of a parameter, such as Adam's count of steps."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name: tensor.item() for name, tensor in tensors.items() if tensor.is_cpu and tensor.dim() == 0}
