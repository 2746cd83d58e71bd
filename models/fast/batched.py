"""The layout for CUDA and other devices where kernel launches are slow: all edges of a search cell run at once.

The images of E edges are one contiguous tensor (N, E, C, H, W). So a depthwise convolution has a group for each channel
of each edge, and a pointwise one is a product for each image and edge. The gradient of its matrix is then a sum of N
products; as one product, which sums over the pixels of all images, it would take CUDA several times as long.
"""

import torch
import torch.nn.functional as F

from models.fast.depthwise import pixels_read
from models.fast.layout import Inputs, Layout, add, batch_norm, recorded_scale
from models.fast.modules import geometry, separate_output


class Batched(Layout):
    weights_by_channel = True

    def mixed(self, states, edges, statistics):
        source = (torch.stack(states, 1) if len(states) > 1 else states[0].unsqueeze(1)).contiguous()
        shared, total = self._without_weights(source, edges.candidates, statistics)
        bases = None if total is None else total.unflatten(1, (-1, edges.n)).sum(1)
        if shared:
            bases = add(bases, _blended(edges.shared_weights.view(-1, edges.n).T, shared))
        return self._add_chains(bases, Inputs([source], edges.n, self._repeat), edges, statistics).unbind(1)

    def _repeat(self, sources, n):
        return [source.unsqueeze(2).expand(-1, -1, n, -1, -1, -1).contiguous().flatten(1, 2) for source in sources]

    def _depthwise(self, jobs):
        """Of each job (links, kernels, images): their depthwise convolutions, or the images if there are no kernels."""
        outputs = []
        for links, kernels, images in jobs:
            outputs.append(images)
            if kernels is not None:
                _, settings = pixels_read(*geometry(links[0].depthwise))
                outputs[-1] = [_grouped_depthwise(images[0], kernels.flatten(0, 1), *settings)]
        return outputs

    def _activated(self, product, zs, statistics):
        """The activation of BN(M z) for the z of each chain: a list with one tensor (N, E, C, H, W) for each."""
        y, bns = _multiplied(product.M, zs), product.bns
        y = self._batch_norm(y, bns, statistics) if bns[0].training else _affine(y, *recorded_scale(bns))
        return [[product.activation(part)] for part in y.split(len(bns) // len(zs), 1)]

    def _add_mixture(self, bases, product, zs, n, statistics):
        """bases + the sum of w BN(M z) over the chains and sources: for each target, (N, n, C, h, w)."""
        y, bns = _multiplied(product.M, zs), product.bns
        w = product.weights[:, : y.shape[2]]
        if bns[0].training:
            y = self._batch_norm(y, bns, statistics, w.flatten())
        else:
            y = _affine(y, *recorded_scale(bns, w))
        return add(bases, y.unflatten(1, (-1, n)).sum(1))

    def _apply(self, function, x):
        """Apply to x a function of images (N, C, H, W) that treats each channel separately, such as pooling."""
        return function(x.flatten(1, 2)).unflatten(1, x.shape[1:3])

    def _scaled(self, x, factor, shift):
        """factor x + shift for each edge; x: the S sources."""
        return _affine(x.repeat_interleave(len(factor) // x.shape[1], 1), factor, shift)

    def _separately(self, ops, x, weights):
        sources = (x[:, i * x.shape[1] // len(ops)] for i in range(len(ops)))
        outputs = torch.stack([separate_output(op, source) for op, source in zip(ops, sources)], 1)
        return outputs * weights[:, None, None, None]

    def _batch_norm(self, x, bns, statistics, scale=None):
        """PyTorch's BN of x with the batch's statistics, times scale, (E * C,)."""
        return batch_norm(x.flatten(1, 2), bns, scale, statistics).view_as(x)


def _multiplied(M, zs):
    """Pointwise convolutions of all edges of the zs, by M, (E, C, K)."""
    z = torch.cat([x for (x,) in zs], 1) if len(zs) > 1 else zs[0][0]
    return (M @ z.flatten(3)).unflatten(3, z.shape[3:])


def _affine(x, factor, shift):
    return x * factor[:, :, None, None] + shift[:, :, None, None]


def _blended(weights, terms):
    """Weighted sums of the terms. weights: (n, terms * S); terms: (N, S, C, H, W) each; result: (N, n, C, H, W)."""
    stacked = torch.stack(terms, 1).flatten(1, 2)
    blended = weights.expand(len(stacked), -1, -1).bmm(stacked.flatten(2))
    return blended.unflatten(2, stacked.shape[2:])


def _grouped_depthwise(x, kernels, stride, padding, dilation):
    """One grouped convolution with a group for each edge and channel: x is viewed as (N, E * C, H, W)."""
    z = F.conv2d(x.flatten(1, 2), kernels, None, stride, padding, dilation, len(kernels))
    return z.unflatten(1, x.shape[1:3])
