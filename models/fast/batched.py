"""The layout for CUDA and other devices where kernel launches are slow: all edges of a search cell run at once.

The images of E edges are one contiguous tensor (E, C, N, H, W).
"""

import torch
import torch.nn.functional as F

from models.fast.depthwise import pixels_read
from models.fast.layout import Inputs, Layout, add, alike, batch_norm, recorded_scale
from models.fast.modules import geometry, separate_output


class Batched(Layout):
    def mixed(self, states, edges, statistics):
        sources = [state.transpose(0, 1) for state in states]
        source = torch.stack(sources) if len(sources) > 1 else sources[0].contiguous().unsqueeze(0)
        w, terms, total = self._without_weights(source, edges.candidates, statistics)
        bases = add(total, _blended(w, terms)) if terms else total
        outputs = self._add_chains(bases, Inputs([source], edges.n, self._repeat), edges.chains, statistics)
        if len(states) > 1:
            outputs = outputs.unflatten(0, (len(states), edges.n)).sum(0)
        return [output.transpose(0, 1) for output in outputs.unbind()]

    def _repeat(self, sources, n):
        return [source.unsqueeze(1).expand(-1, n, -1, -1, -1, -1).contiguous().flatten(0, 1) for source in sources]

    def _kernels(self, kernels, N):
        """A copy for each image: (E, C * N, 1, k, k)."""
        return kernels.expand(-1, -1, N, -1, -1).flatten(1, 2).unsqueeze(2)

    def _depthwise(self, jobs):
        """The output of each job (links, kernels, images): depthwise convolutions of the images."""
        outputs = []
        for links, kernels, (x,) in jobs:
            _, settings = pixels_read(*geometry(links[0].depthwise))
            outputs.append(_grouped_depthwise(x, kernels, *settings))
        return outputs

    def _unconvolved(self, images):
        return images[0]

    def _activated(self, products, statistics):
        """The activation of BN(M z) of each product: a list with one tensor (E, C, N, H, W) for each."""
        outputs = []
        for zs, M, bns, _, activation in alike(products):
            y = (M @ torch.cat(zs).flatten(2)).unflatten(2, zs[0].shape[2:])
            y = self._batch_norm(y, bns, statistics) if bns[0].training else _affine(y, *recorded_scale(bns))
            outputs += [[part] for part in activation(y).split(len(zs[0]))]
        return outputs

    def _add_mixture(self, bases, products, statistics):
        """bases + the sum of w BN(M z) over the products, which are the last links of their chains."""
        for zs, M, bns, weights, _ in alike(products):
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
        """Apply to x a function of images (N, C, H, W) that treats each channel separately, such as pooling."""
        return function(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def _scaled(self, x, factor, shift):
        """factor x + shift for each edge; x: the S sources."""
        return _affine(x.repeat_interleave(len(factor) // len(x), 0), factor, shift)

    def _separately(self, ops, x):
        sources = (x[i * len(x) // len(ops)].transpose(0, 1) for i in range(len(ops)))
        return torch.stack([separate_output(op, source).transpose(0, 1) for op, source in zip(ops, sources)])

    def _batch_norm(self, x, bns, statistics, scale=None):
        """PyTorch's BN of x with the batch's statistics, times scale, (E * C,)."""
        return batch_norm(x.reshape(1, -1, x.shape[2:].numel()), bns, scale, statistics).view_as(x)


def _affine(x, factor, shift):
    return x * factor[:, :, None, None, None] + shift[:, :, None, None, None]


def _blended(weights, terms):
    """Weighted sums of the terms. weights: (edges, terms); terms: (S, C, N, H, W) each; result: (edges, C, N, H, W)."""
    stacked = torch.stack(terms, 1)
    blended = weights.unflatten(0, (len(stacked), -1)) @ stacked.flatten(2)
    return blended.unflatten(2, stacked.shape[2:]).flatten(0, 1)


def _grouped_depthwise(x, kernels, stride, padding, dilation):
    """One grouped convolution with a group for each edge, channel and image: x is viewed as (1, E * C * N, H, W)."""
    kernels = kernels.flatten(0, 1)
    z = F.conv2d(x.flatten(0, 2).unsqueeze(0), kernels, None, stride, padding, dilation, len(kernels))
    return z.squeeze(0).unflatten(0, x.shape[:3])
