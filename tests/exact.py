"""Exact differentiation to check against, on networks that can be differentiated often enough."""

import copy

import torch
from torch import nn
from torch.func import functional_call

XI = 0.1


def smoothed(module):
    """The module with every ReLU and max pool replaced by an infinitely differentiable function, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Softplus())
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        else:
            smoothed(child)
    return module


def by_definition(net):
    """The same search network, its cells run by their definition, which can be differentiated twice; in place."""
    for cell in net.cells:
        cell.execution = "plain"
    return net


def hessian_product(net, d, trn):
    """d2 L_T / (da dw) . d by differentiating twice: a tensor per alpha."""
    net = by_definition(copy.deepcopy(net))
    grads = torch.autograd.grad(net.loss(*trn), list(net.weights()), create_graph=True)
    return torch.autograd.grad(sum((g * v).sum() for g, v in zip(grads, d)), list(net.alphas()))


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def relative_error(found, exact):
    exact = flat(exact)
    return ((flat(found) - exact).norm() / exact.norm()).item()


def unrolled(net, names, trn, xi, optim, momentum, weight_decay):
    """w'(alpha) as a differentiable function of alpha, by the names of the weights. net: `by_definition`."""
    weights = dict(net.named_parameters())
    grads = torch.autograd.grad(net.loss(*trn), [weights[name] for name in names], create_graph=True)
    buffers = [optim.state[weights[name]].get("momentum_buffer", 0.0) for name in names]
    return {
        name: weights[name].detach() - xi * (momentum * buf + grad + weight_decay * weights[name].detach())
        for name, grad, buf in zip(names, grads, buffers)
    }


def copies(net, optim):
    """The network by its definition, and its weights' optimizer with the same momentum buffers."""
    twin = by_definition(copy.deepcopy(net))
    twin_optim = torch.optim.SGD(twin.weights(), 0.1, momentum=0.9)
    twin_optim.load_state_dict(optim.state_dict())
    return twin, twin_optim


def exact_alpha_gradient(net, trn, val, xi, optim, momentum=0.9, weight_decay=3e-4):
    """Differentiation straight through the virtual step."""
    net, optim = copies(net, optim)
    names = [name for name, _ in net.named_parameters() if not name.startswith("alpha")]
    w_virtual = unrolled(net, names, trn, xi, optim, momentum, weight_decay)
    loss = net.criterion(functional_call(net, w_virtual, (val[0],)), val[1])
    return torch.autograd.grad(loss, list(net.alphas()))
