"""The layout for CUDA and other devices where kernel launches are slow: all edges of a search cell run at once.

The images of E edges are one contiguous tensor (N, E, C, H, W). So a depthwise convolution has a group for each channel
of each edge, and a pointwise one is a product for each image and edge. The gradient of its matrix is then a sum of N
products; as one product, which sums over the pixels of all images, it would take CUDA several times as long.
"""

import torch
import torch.nn.functional as F

from models.fast.layout import Layout, add, batch_norm, separate_output


class Batched(Layout):
    weights_by_channel = True

    def mixed(self, states, group, statistics):
        source = (torch.stack(states, 1) if len(states) > 1 else states[0].unsqueeze(1)).contiguous()
        n, bases = group.n_targets, None
        equal = self._equal_outputs(source, group.candidates, statistics)
        if equal:
            bases = _blended(group.weights_of_equal.view(-1, n).T, equal)
        for candidate in group.candidates:
            if candidate.kind == "separate":
                for s, x in enumerate(source.unbind(1)):
                    here = candidate.from_source(s, n)
                    outputs = torch.stack([separate_output(op, x) for op in here.ops], 1)
                    bases = add(bases, outputs * here.weights[:, None, None, None])
        return list(self._add_chains(bases, [source], group, statistics).unbind(1))

    def _repeated(self, sources, n):
        return [source.unsqueeze(2).expand(-1, -1, n, -1, -1, -1).contiguous().flatten(1, 2) for source in sources]

    def _depthwise(self, jobs):
        """For each job (links, kernels, images) the convolved images, or the images if there are no kernels."""
        outputs = []
        for links, kernels, images in jobs:
            outputs.append(images)
            if kernels is not None:
                outputs[-1] = [_grouped_depthwise(images[0], kernels.flatten(0, 1), links[0].depthwise)]
        return outputs

    def _normalised(self, product, zs, statistics):
        """relu(BN(M z)) for the z of each chain: a list with one tensor (N, E, C, H, W) for each."""
        y = self._batch_norm(_multiplied(product.M, zs), product.bns, statistics).relu()
        return [[part] for part in y.split(len(product.bns) // len(zs), 1)]

    def _add_mixture(self, bases, product, zs, n_targets, statistics):
        """bases + the sum of w BN(M z) over the chains and sources: for each target, (N, n_targets, C, h, w)."""
        y = _multiplied(product.M, zs)
        y = self._batch_norm(y, product.bns, statistics, product.weights[:, : y.shape[2]].flatten())
        return add(bases, y.unflatten(1, (-1, n_targets)).sum(1))

    def _pooled(self, pool, x):
        return pool(x.flatten(1, 2)).unflatten(1, x.shape[1:3])

    def _batch_norm(self, x, bns, statistics, scale=None):
        """PyTorch's BN of x, times scale, (E * C,)."""
        return batch_norm(x.flatten(1, 2), bns, scale, statistics).view_as(x)


def _multiplied(M, zs):
    """Pointwise convolutions of all edges of the zs, by M, (E, C, K)."""
    z = torch.cat([x for (x,) in zs], 1) if len(zs) > 1 else zs[0][0]
    return (M @ z.flatten(3)).unflatten(3, z.shape[3:])


def _blended(weights, terms):
    """Weighted sums of the terms. weights: (n, terms * S); terms: (N, S, C, H, W) each; result: (N, n, C, H, W)."""
    stacked = torch.stack(terms, 1).flatten(1, 2)
    blended = weights.expand(len(stacked), -1, -1).bmm(stacked.flatten(2))
    return blended.unflatten(2, stacked.shape[2:])


def _grouped_depthwise(x, kernels, conv):
    """One grouped convolution with a group for each edge and channel: x is viewed as (N, E * C, H, W)."""
    z = F.conv2d(x.flatten(1, 2), kernels, None, conv.stride, conv.padding, conv.dilation, len(kernels))
    return z.unflatten(1, x.shape[1:3])
