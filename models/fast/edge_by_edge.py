"""The layout for the CPU: the edges of a search cell run one after the other, so that their data stays in the cache.

The images of E edges are a list of E channels-last tensors (N, C, H, W). native.c computes the depthwise convolutions,
the pointwise convolutions with their BN, and the weighted sums.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from models.fast import native
from models.fast.depthwise import convolve, pixels_read
from models.fast.folded_bn import Mixture
from models.fast.layout import Inputs, Layout, batch_norm, recorded_scale
from models.fast.modules import geometry, is_synced, separate_output
from models.sync_bn import refuse_second_derivatives


class EdgeByEdge(Layout):
    folded_activations = (nn.ReLU,)

    def mixed(self, states, edges, statistics):
        n = edges.n
        sources = [state.contiguous(memory_format=torch.channels_last) for state in states]
        bases = []
        weights = edges.shared_weights.view(-1, len(sources), n)
        for i, (source, w) in enumerate(zip(sources, weights.unbind(1))):
            from_source = [candidate.of_source(i, n) for candidate in edges.candidates]
            shared, total = self._without_weights(source, from_source, statistics)
            blended = _Blend.apply(w.T, *shared) if shared else [0] * n
            if shared or total is not None:
                bases += blended if total is None else map(torch.add, total.unbind(), blended)
        outputs = self._add_chains(bases, Inputs(sources, n, self._repeat), edges, statistics)
        return [sum(outputs[t + n :: n], start=outputs[t]) for t in range(n)]

    def _repeat(self, sources, n):
        return [source for source in sources for _ in range(n)]

    def _depthwise(self, jobs):
        """Of each job (links, kernels, E images): a list of E convolved images, or the images if there are no kernels.

        All convolutions of images of the same size are one call of C code.
        """
        by_size = {}
        for j, (_, kernels, images) in enumerate(jobs):
            if kernels is not None:
                by_size.setdefault(images[0].shape, []).append(j)
        outputs = [images if kernels is None else [] for _, kernels, images in jobs]
        for indices in by_size.values():
            inputs, convolutions, job_of_output = {}, [], []  # inputs: each image once, (index, image, relu)
            for kernel_index, j in enumerate(indices):
                links, _, images = jobs[j]
                relu = type(links[0].activation) in self.folded_activations
                _, settings = pixels_read(*geometry(links[0].depthwise))
                for row, image in enumerate(images):
                    index, *_ = inputs.setdefault((id(image), relu), (len(inputs), image, relu))
                    convolutions.append((index, kernel_index, row, settings))
                    job_of_output.append(j)
            _, images, relus = zip(*inputs.values())
            kernels = [jobs[j][1] for j in indices]
            for j, z in zip(job_of_output, convolve(images, relus, kernels, convolutions)):
                outputs[j].append(z)
        return outputs

    def _activated(self, product, zs, statistics):
        """The activation of BN(M z) for the z of each chain: a list of E images."""
        images, bns = list(itertools.chain(*zs)), product.bns
        if bns[0].training:
            mean, var, *ys = Mixture.apply(bns[0].eps, is_synced(bns[0]), len(images), None, None, product.M, *images)
            statistics.add(bns, mean, var)
        else:
            ys = _scaled_products(product.M, images, *recorded_scale(bns))
        return _rows(list(map(product.activation, ys)), len(zs[0]))

    def _add_mixture(self, bases, product, zs, n, statistics):
        """bases + the sum of w BN(M z) over the chains: for each edge, not yet for each of the n targets."""
        images, bns, edges, w = list(itertools.chain(*zs)), product.bns, len(zs[0]), product.weights
        if bns[0].training:
            mean, var, *bases = Mixture.apply(bns[0].eps, is_synced(bns[0]), edges, w, None, product.M, *images, *bases)
            statistics.add(bns, mean, var)
        else:
            for ys in _rows(_scaled_products(product.M, images, *recorded_scale(bns, w)), edges):
                bases = [base + y for base, y in zip(bases, ys)] if bases else ys
        return bases

    def _apply(self, function, x):
        return function(x)

    def _scaled(self, x, factor, shift):
        """factor x + shift for each edge, (E, N, C, H, W); factor, shift: (E, C)."""
        return x * factor[:, None, :, None, None] + shift[:, None, :, None, None]

    def _separately(self, ops, x, weights):
        return torch.stack([separate_output(op, x) for op in ops]) * weights[:, None, None, None, None]

    def _batch_norm(self, x, bns, statistics):
        """PyTorch's BN of x with the batch's statistics."""
        return batch_norm(x, bns, None, statistics)


class _Blend(torch.autograd.Function):
    """E weighted sums of images. weights: (E, terms); images: (N, C, h, w) each."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, weights, *images):
        ctx.save_for_backward(weights, *images)
        return tuple(native.blend(list(images), weights))

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, *gs):
        refuse_second_derivatives()
        weights, *images = ctx.saved_tensors
        dweights = native.dots(list(gs), images).to(weights.dtype) if ctx.needs_input_grad[0] else None
        wants_images = any(ctx.needs_input_grad[1:])
        return dweights, *(native.blend(list(gs), weights.T) if wants_images else [None] * len(images))


def _scaled_products(M, images, factor, shift):
    """factor M z + shift for each product. M: (products, C, K); factor, shift: (products, C)."""
    A = factor.unsqueeze(-1) * M
    return [F.conv2d(z, A_k[:, :, None, None], shift_k) for z, A_k, shift_k in zip(images, A, shift)]


def _rows(tensors, n):
    """Split a list into lists of n."""
    return [list(tensors[i : i + n]) for i in range(0, len(tensors), n)]
