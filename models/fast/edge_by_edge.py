"""The layout for the CPU: the edges of a search cell run one after the other, so that their data stays in the cache.

The images of E edges are a list of E channels-last tensors (N, C, H, W). native.c computes the depthwise convolutions,
the pointwise convolutions with their BN, and the weighted sums.
"""

import itertools

import torch
import torch.nn.functional as F

from models.fast import native
from models.fast.depthwise import convolve
from models.fast.folded_bn import Mixture
from models.fast.layout import Layout, add, batch_norm, separate_output
from models.fast.modules import is_synced
from models.sync_bn import refuse_second_derivatives


class EdgeByEdge(Layout):
    relu_in_depthwise = True

    def mixed(self, states, group, statistics):
        n = group.n_targets
        sources = [state.contiguous(memory_format=torch.channels_last) for state in states]
        weights_of_equal = group.weights_of_equal.view(-1, len(sources), n)
        bases = []  # for each edge, the sum of the candidates that are not chains
        for s, source in enumerate(sources):
            candidates = [candidate.from_source(s, n) for candidate in group.candidates]
            equal = self._equal_outputs(source, candidates, statistics)
            sums = list(_Blend.apply(weights_of_equal[:, s].T, *equal)) if equal else [None] * n
            for candidate in candidates:
                if candidate.kind == "separate":
                    for t, (op, weight) in enumerate(zip(candidate.ops, candidate.weights)):
                        sums[t] = add(sums[t], weight * separate_output(op, source))
            bases += [total for total in sums if total is not None]
        outputs = self._add_chains(bases, sources, group, statistics)
        return [sum(outputs[t + n :: n], start=outputs[t]) for t in range(n)]

    def _repeated(self, sources, n):
        return [source for source in sources for _ in range(n)]

    def _depthwise(self, jobs):
        """For each job (links, kernels, E images) the E convolved images, or the images if there are no kernels.

        All convolutions of images of the same size are one call of C code, which reads each image once.
        """
        outputs = [images if kernels is None else [] for _, kernels, images in jobs]
        jobs_by_size = {}
        for j, (_, kernels, images) in enumerate(jobs):
            if kernels is not None:
                jobs_by_size.setdefault(images[0].shape, []).append(j)
        for indices in jobs_by_size.values():
            images, places = [], {}  # places: id of an image -> its index
            convolutions, job_of_output = [], []
            for kernel_index, j in enumerate(indices):
                links, _, images_of_job = jobs[j]
                stride, dilation = links[0].depthwise.stride[0], links[0].depthwise.dilation[0]
                for row, image in enumerate(images_of_job):
                    if id(image) not in places:
                        places[id(image)] = len(images)
                        images.append(image)
                    convolutions.append((places[id(image)], kernel_index, row, stride, dilation))
                    job_of_output.append(j)
            kernels = [jobs[j][1] for j in indices]
            for j, z in zip(job_of_output, convolve(images, kernels, convolutions)):
                outputs[j].append(z)
        return outputs

    def _normalised(self, product, zs, statistics):
        """BN(M z) for the z of each chain: a list of E images."""
        images, bns = list(itertools.chain(*zs)), product.bns
        if bns[0].training:
            mean, var, *ys = Mixture.apply(bns[0].eps, is_synced(bns[0]), len(images), None, None, product.M, *images)
            statistics.add(bns, mean, var)
        else:
            ys = _recorded_products(product, images)
        return _split(ys, len(zs[0]))

    def _add_mixture(self, bases, product, zs, n_targets, statistics):
        """bases + the sum of w BN(M z) over the chains, for each edge: sources are not yet added up for a target."""
        images, bns, edges, w = list(itertools.chain(*zs)), product.bns, len(zs[0]), product.weights
        if bns[0].training:
            mean, var, *bases = Mixture.apply(bns[0].eps, is_synced(bns[0]), edges, w, None, product.M, *images, *bases)
            statistics.add(bns, mean, var)
        else:
            for ys in _split(_recorded_products(product, images, w), edges):
                bases = [base + y for base, y in zip(bases, ys)] if bases else ys
        return bases

    def _pooled(self, pool, x):
        return pool(x)

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


def _recorded_products(product, images, weights=None):
    """weights * BN(M z) with running statistics, for each z: one convolution each. weights: (products, 1) or None."""
    outputs = []
    for i, (z, M, bn) in enumerate(zip(images, product.M, product.bns)):
        factor = (bn.running_var + bn.eps).rsqrt()
        factor = factor if weights is None else weights[i] * factor
        outputs.append(F.conv2d(z, (factor[:, None] * M)[:, :, None, None], -factor * bn.running_mean))
    return outputs


def _split(tensors, n):
    """Split a list into lists of n."""
    return [list(tensors[i : i + n]) for i in range(0, len(tensors), n)]
