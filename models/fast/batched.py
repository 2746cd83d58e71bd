"""The search cell's edges all at once, for CUDA and other devices where a launch is dear: few large steps.

The images of E edges are one tensor (E, C, N, H, W), in this order in memory.
"""

import torch
import torch.nn.functional as F

from models.fast.depthwise import pixels_read
from models.fast.layout import Inputs, Layout, add, alike, batch_norm, candidates_of, recorded_scale
from models.fast.modules import geometry, separate_output


class Batched(Layout):
    def mixed(self, states, edges, weights, statistics):
        n, candidates = len(edges[0]), candidates_of(edges, weights)
        source = torch.stack([state.transpose(0, 1) for state in states])
        w, terms, total = self._without_weights(source, candidates, statistics)
        bases = add(total, _blended(w, terms)) if terms else total
        outputs = self._add_chains(bases, Inputs([source], n, self._repeat), candidates, statistics)
        outputs = outputs.unflatten(0, (len(states), n))
        return [output.transpose(0, 1) for output in (outputs.sum(0) if len(states) > 1 else outputs[0]).unbind()]

    def _repeat(self, sources, n):
        return [source.unsqueeze(1).expand(-1, n, -1, -1, -1, -1).flatten(0, 1) for source in sources]

    def _depthwise(self, jobs):
        """Of each job (links, kernels, images) the depthwise convolutions."""
        outputs = []
        for links, kernels, (x,) in jobs:
            _, settings = pixels_read(*geometry(links[0].depthwise))
            outputs.append(_grouped_depthwise(x, kernels, *settings))
        return outputs

    def _unconvolved(self, images):
        return images[0]

    def _normalised(self, products, statistics):
        """BN(M z) of each product, (E, C, N, H, W), as the one of a list."""
        outputs = []
        for zs, M, bns, _ in alike(products):
            y = (M @ torch.cat(zs).flatten(2)).unflatten(2, zs[0].shape[2:])
            y = self._batch_norm(y, bns, statistics) if bns[0].training else _affine(y, *recorded_scale(bns))
            outputs += [[part] for part in y.split(len(zs[0]))]
        return outputs

    def _add_mixture(self, bases, products, statistics):
        """bases + the sum of w BN(M z) over the products, the last of their chains."""
        for zs, M, bns, weights in alike(products):
            w = torch.cat(weights)
            y = (M @ torch.cat(zs).flatten(2)).unflatten(2, zs[0].shape[2:])
            if bns[0].training:
                scale = w.unsqueeze(1).expand(-1, M.shape[1]).flatten()
                y = self._batch_norm(y, bns, statistics, scale)
            else:
                y = _affine(y, *recorded_scale(bns, w))
            bases = add(bases, y.unflatten(0, (-1, len(zs[0]))).sum(0))
        return bases

    def _apply(self, function, x):
        """A function of images (N, C, H, W) that keeps channels apart, at x."""
        return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _scaled(self, x, factor, shift):
        """factor x + shift of each edge from the S sources x."""
        return _affine(x.repeat_interleave(len(factor) // len(x), 0), factor, shift)

    def _separately(self, ops, x):
        sources = (x[i * len(x) // len(ops)].transpose(0, 1) for i in range(len(ops)))
        return torch.stack([separate_output(op, source).transpose(0, 1) for op, source in zip(ops, sources)])

    def _batch_norm(self, x, bns, statistics, scale=None):
        """PyTorch's BN of x by the statistics of the batch, times a scale (E * C,)."""
        y, moments = batch_norm(x.reshape(1, -1, x.shape[2:].numel()), bns, scale)
        statistics.add(bns, *moments.unflatten(1, x.shape[:2]))
        return y.view_as(x)


def _affine(x, factor, shift):
    return x * factor[:, :, None, None, None] + shift[:, :, None, None, None]


def _blended(weights, terms):
    """Weighted sums of the terms, each (S, C, N, H, W): weights (edges, terms) -> (edges, C, N, H, W)."""
    stacked = torch.stack(terms, 1)
    blended = weights.unflatten(0, (len(stacked), -1)) @ stacked.flatten(2)
    return blended.unflatten(2, stacked.shape[2:]).flatten(0, 1)


def _grouped_depthwise(x, weight, stride, padding, dilation):
    """One convolution with a group for each image and channel: (E, C, N, H, W) is (1, E * C * N, H, W) in memory."""
    N = x.shape[2]
    kernels = weight.expand(-1, -1, N, -1, -1).flatten(0, 2).unsqueeze(1)
    z = F.conv2d(x.flatten(0, 2).unsqueeze(0), kernels, None, stride, padding, dilation, len(kernels))
    return z.squeeze(0).unflatten(0, x.shape[:3])
