"""The gradients of a search step as CUDA graphs: recorded in each epoch, then replayed, which launches all at once.

A graph repeats the kernels that were recorded, at the same addresses and with the same numbers. This is right since

- what a step is given anew, its batches and the network's `noise`, is copied to where the recording read it;
- weights, alphas, buffers and momentum are changed in place only;
- all other numbers, such as xi, BN's flags and what `begin_epoch` sets, stay as they are in an epoch, and each epoch
  records anew;
- gradients lie where the recording put them, and a replay makes them the parameters' `grad` again;
- whatever depends on numbers that Python reads, and Adam and SGD, are no part of a graph.

The eager step is the definition. Batches of another shape than the recorded, as the last of an epoch, run eagerly.
"""

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from machine import ranks

# Steps of an epoch before recording. The first of a run creates momentum buffers; the second loads all later kernels.
EAGER_STEPS = 2


def reason_against(config, device):
    """Why a run has no CUDA graphs, in words; None if it may have them."""
    if device.type != "cuda":
        return "the device is not CUDA"
    if ranks.size() > 1:
        return "there are several ranks"
    return "--sync-bn is given" if config.sync_bn else "--cuda-graphs is off" if config.cuda_graphs == "off" else None


class StepGraphs:
    """Runs functions that set gradients, each as a CUDA graph where it can be one.

    Once it turns out that one cannot, all run eagerly to the end of the run, and a line in the log says why.
    """

    def __init__(self, run, net, architect):
        self.run, self.net, self.architect = run, net, architect
        self.reason = reason_against(run.config, run.device)
        self.forget()
        if self.reason is None:
            self.stream = torch.cuda.Stream(run.device)
        elif run.device.type == "cuda":
            run.log(f"no CUDA graphs: {self.reason}")

    def forget(self):
        """Drop all recordings, at the end of an epoch: in the next, other numbers are in use."""
        self.recordings = {}  # function -> `Recording`
        self.pool = None  # of memory: one for all graphs, of which one runs at a time

    def __call__(self, parameters, function, tensors, *constants):
        """function(*tensors, *constants), which sets the gradients of the parameters and returns tensors without one.

        tensors: what is given anew in each step; constants: what is the same throughout the epoch. The gradients of a
        replay are overwritten by the next one.
        """
        noise = tree_leaves(self.net.noise)
        if self.reason is None and not all(isinstance(leaf, torch.Tensor | None) for leaf in noise):
            self._give_up("the network's noise is not made of tensors")
        if self.reason is not None:
            return function(*tensors, *constants)
        inputs = [leaf for leaf in (*tensors, *noise) if leaf is not None]
        layouts = [(leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in inputs]
        recording = self.recordings.setdefault(function, Recording(layouts))
        if layouts != recording.layouts:
            return function(*tensors, *constants)
        if recording.eager_steps < EAGER_STEPS:
            return self._warm_up(recording, function, tensors, constants)
        if recording.graph is None and not self._record(recording, parameters, function, tensors, constants):
            return function(*tensors, *constants)
        return recording.replay(inputs)

    def _warm_up(self, recording, function, tensors, constants):
        """Run it eagerly, on the stream that will be recorded."""
        recording.eager_steps += 1
        recording.attributes = recording.attributes or self._attributes()
        random_state, stream = torch.cuda.get_rng_state(), torch.cuda.current_stream()
        self.stream.wait_stream(stream)
        with torch.cuda.stream(self.stream):
            results = function(*tensors, *constants)
        stream.wait_stream(self.stream)
        if not torch.equal(torch.cuda.get_rng_state(), random_state):
            self._give_up("a pass through the network draws random numbers")
        return results

    def _record(self, recording, parameters, function, tensors, constants):
        """Record what it launches, without running it. Returns whether that was possible."""
        for (name, before), (_, now) in zip(recording.attributes, self._attributes()):
            if now is not before and (isinstance(now, torch.Tensor) or now != before):
                return self._give_up(f"{name} changes from step to step")
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph, noise = torch.cuda.CUDAGraph(), self.net.noise
        try:
            tensors, self.net.noise = copies = tree_map_only(torch.Tensor, torch.clone, (tensors, noise))
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):  # loaders go on
                results = function(*tensors, *constants)
        except RuntimeError as error:
            for parameter in parameters:
                parameter.grad = None
            torch.clear_autocast_cache()  # of what was recorded, and never computed
            with torch.cuda.graph(torch.cuda.CUDAGraph()):  # until one succeeds, PyTorch draws no random numbers
                torch.zeros(1, device=self.run.device)
            return self._give_up(" ".join(str(error).split())[:200])
        finally:
            self.net.noise = noise
        gradients = [(parameter, parameter.grad) for parameter in parameters]
        recording.inputs = [leaf for leaf in tree_leaves(copies) if leaf is not None]
        recording.graph, recording.results, recording.gradients = graph, results, gradients
        return True

    def _attributes(self):
        """Names and values that a graph bakes in: the numbers, words and tensors of the network and the architect."""
        found = []
        for owner in (self.architect, *self.net.modules()):
            own = vars(owner)
            for name, value in {**own, **own.get("_parameters", {}), **own.get("_buffers", {})}.items():
                if isinstance(value, (bool, int, float, str, torch.Tensor)) and value is not self.net.noise:
                    found.append((f"{type(owner).__name__}.{name}", value))
        return found

    def _give_up(self, reason):
        self.reason = reason
        self.forget()
        self.run.log(f"no CUDA graphs from here on: {reason}")
        return False


class Recording:
    """A function's graph, and the tensors that it reads and leaves. layouts: how its inputs lie in memory."""

    def __init__(self, layouts):
        self.layouts, self.eager_steps, self.attributes, self.graph = layouts, 0, None, None

    def replay(self, inputs):
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return tree_map_only(torch.Tensor, torch.clone, self.results)  # which other graphs of the pool may overwrite
