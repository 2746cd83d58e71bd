"""DARTS in one file, to be read once from top to bottom (Liu, Simonyan, Yang: arXiv:1806.09055).

python examples/darts_in_one_file.py    # searches a cell on scikit-learn's digits: about a minute on a CPU

The file needs torch and scikit-learn, and nothing of this project. Names, equations and sections are the paper's: w are
the weights of the network, alpha the architecture parameters. `search.py` takes the same steps, with much around them;
tests/test_one_file.py compares the two.
"""

import time
from collections import namedtuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")


def conv(C_in, C_out, size=1, stride=1, dilation=1, groups=1):
    """A convolution whose output is ceil(input size / stride) pixels high and wide."""
    return nn.Conv2d(C_in, C_out, size, stride, dilation * (size // 2), dilation, groups, bias=False)


def bn(C):
    return nn.BatchNorm2d(C, affine=False)  # a learned scale could undo alpha


def depthwise(C, size, stride, dilation=1):
    """A convolution of each channel by itself, then a 1x1 convolution that mixes the channels."""
    return nn.Sequential(nn.ReLU(), conv(C, C, size, stride, dilation, groups=C), conv(C, C), bn(C))


class FactorizedReduce(nn.Module):
    """Halve height and width: a 1x1 convolution of the even pixels beside one of the odd pixels."""

    def __init__(self, C_in, C_out):
        super().__init__()
        self.conv1, self.conv2, self.bn = conv(C_in, C_out - C_out // 2), conv(C_in, C_out // 2), bn(C_out)

    def forward(self, x):
        even, odd = x.relu()[:, :, ::2, ::2], F.pad(x.relu(), (0, 1, 0, 1))[:, :, 1::2, 1::2]
        return self.bn(torch.cat([self.conv1(even), self.conv2(odd)], dim=1))


# The candidate operations (section 3.1). There is an eighth candidate, `none`, whose output is zero.
OPS = {
    "max_pool_3x3": lambda C, stride: nn.Sequential(nn.MaxPool2d(3, stride, 1), bn(C)),
    "avg_pool_3x3": lambda C, stride: nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), bn(C)),
    "skip_connect": lambda C, stride: nn.Identity() if stride == 1 else FactorizedReduce(C, C),
    "sep_conv_3x3": lambda C, stride: nn.Sequential(depthwise(C, 3, stride), depthwise(C, 3, 1)),
    "sep_conv_5x5": lambda C, stride: nn.Sequential(depthwise(C, 5, stride), depthwise(C, 5, 1)),
    "dil_conv_3x3": lambda C, stride: depthwise(C, 3, stride, dilation=2),
    "dil_conv_5x5": lambda C, stride: depthwise(C, 5, stride, dilation=2),
}


class MixedOp(nn.Module):
    """An edge of the cell: all candidates, weighted by the softmax of the edge's alpha (eq. 2)."""

    def __init__(self, C, stride):
        super().__init__()
        self._ops = nn.ModuleList(build(C, stride) for build in OPS.values())

    def forward(self, x, alpha):
        weights = F.softmax(alpha, dim=-1)  # the last one is the weight of `none`, which adds nothing
        return sum(weight * op(x) for weight, op in zip(weights[:-1], self._ops))


class Cell(nn.Module):
    """A cell: each node is the sum of its edges from the two previous cells and from all earlier nodes (eq. 1)."""

    def __init__(self, n_nodes, C_pp, C_p, C, reduction_p, reduction):
        super().__init__()
        self.reduction = reduction
        self.preproc0 = FactorizedReduce(C_pp, C) if reduction_p else nn.Sequential(nn.ReLU(), conv(C_pp, C), bn(C))
        self.preproc1 = nn.Sequential(nn.ReLU(), conv(C_p, C), bn(C))
        self.dag = nn.ModuleList()
        for i in range(n_nodes):
            strides = [2 if reduction and source < 2 else 1 for source in range(i + 2)]
            self.dag.append(nn.ModuleList(MixedOp(C, stride) for stride in strides))

    def forward(self, s0, s1, alpha):
        states = [self.preproc0(s0), self.preproc1(s1)]
        for edges, alpha_i in zip(self.dag, alpha):  # of node i
            states.append(sum(edge(s, alpha_ij) for edge, s, alpha_ij in zip(edges, states, alpha_i)))
        return torch.cat(states[2:], dim=1)


class Network(nn.Module):
    """A stack of cells (section 3.1). All normal cells share one alpha, all reduction cells another."""

    def __init__(self, C_in, C, n_classes, n_layers, n_nodes):
        super().__init__()
        sizes = [(i + 2, len(OPS) + 1) for i in range(n_nodes)]  # node i has i + 2 edges
        self.alpha_normal = nn.ParameterList(1e-3 * torch.randn(size) for size in sizes)
        self.alpha_reduce = nn.ParameterList(1e-3 * torch.randn(size) for size in sizes)
        self.stem = nn.Sequential(conv(C_in, 3 * C, 3), nn.BatchNorm2d(3 * C))
        self.cells = nn.ModuleList()
        C_pp, C_p, reduction_p = 3 * C, 3 * C, False
        for layer in range(n_layers):
            reduction = layer in (n_layers // 3, 2 * n_layers // 3)
            C = 2 * C if reduction else C
            self.cells.append(Cell(n_nodes, C_pp, C_p, C, reduction_p, reduction))
            C_pp, C_p, reduction_p = C_p, n_nodes * C, reduction
        self.linear = nn.Linear(C_p, n_classes)

    def forward(self, x):
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, self.alpha_reduce if cell.reduction else self.alpha_normal)
        return self.linear(s1.mean(dim=(2, 3)))

    def alphas(self):
        return [*self.alpha_normal, *self.alpha_reduce]

    def weights(self):
        """w, by name: all parameters except the alphas."""
        return {name: parameter for name, parameter in self.named_parameters() if not name.startswith("alpha")}

    def genotype(self):
        """The discrete cells: each node keeps its two edges with the strongest operations (section 2.4)."""
        concat = range(2, 2 + len(self.alpha_normal))
        return Genotype(strongest(self.alpha_normal), concat, strongest(self.alpha_reduce), concat)


def strongest(alpha):
    """For each node its two strongest (operation, source), by softmax weight; `none` is left out."""
    names, gene = list(OPS), []
    for edges in alpha:
        strengths, operations = F.softmax(edges, dim=-1)[:, :-1].max(dim=-1)
        sources = strengths.argsort(descending=True)[:2].tolist()
        gene.append([(names[operations[source]], source) for source in sources])
    return gene


def loss_at(w, net, batch):
    """L(w, alpha) of a batch, at any weights w. The network's own weights and BN statistics stay as they are."""
    images, labels = batch
    statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}  # BN moves these copies
    return F.cross_entropy(functional_call(net, w | statistics, (images,)), labels)


def virtual_step(net, w_batch, w_optim):
    """w' = w - xi * (momentum * buf + grad_w L_train(w, alpha) + weight_decay * w), the step that SGD would take."""
    w, sgd = net.weights(), w_optim.param_groups[0]
    gradients = torch.autograd.grad(loss_at(w, net, w_batch), w.values())
    w_virtual = {}
    for (name, weight), gradient in zip(w.items(), gradients):
        buf = w_optim.state[weight].get("momentum_buffer", torch.zeros_like(weight))  # none before the first step
        step = sgd["momentum"] * buf + gradient + sgd["weight_decay"] * weight
        w_virtual[name] = (weight - sgd["lr"] * step).detach().requires_grad_()
    return w_virtual


def alpha_gradients(net, w_batch, alpha_batch, w_optim):
    """Eq. 6: grad_alpha L_val(w', alpha) - xi * H, a tensor per alpha. With xi = 0: DARTS in first order."""
    alphas, w_virtual, xi = net.alphas(), virtual_step(net, w_batch, w_optim), w_optim.param_groups[0]["lr"]
    gradients = torch.autograd.grad(loss_at(w_virtual, net, alpha_batch), [*alphas, *w_virtual.values()])
    d = dict(zip(w_virtual, gradients[len(alphas) :]))  # grad_w' L_val(w', alpha)
    return [gradient - xi * h for gradient, h in zip(gradients, hessian_product(net, d, w_batch))]


def hessian_product(net, d, w_batch):
    """Eq. 7: H = (grad_alpha L_train(w + eps d, alpha) - grad_alpha L_train(w - eps d, alpha)) / (2 eps)."""
    eps = 0.01 / (nn.utils.get_total_norm(d.values()).item() or 1.0)  # if d is zero, so is H, whatever eps is
    w, gradients = net.weights(), []
    for shift in (eps, -eps):
        shifted = {name: w[name].detach() + shift * d[name] for name in w}
        gradients.append(torch.autograd.grad(loss_at(shifted, net, w_batch), net.alphas()))
    return [(plus - minus) / (2 * eps) for plus, minus in zip(*gradients)]


def train(net, w_batches, alpha_batches, w_optim, alpha_optim):
    """One epoch of Algorithm 1, on two halves of the training set: w learns on one, alpha on the other."""
    net.train()
    w = list(net.weights().values())
    for w_batch, alpha_batch in zip(w_batches, alpha_batches):
        # 1. alpha descends L_val(w', alpha)
        for alpha, gradient in zip(net.alphas(), alpha_gradients(net, w_batch, alpha_batch, w_optim)):
            alpha.grad = gradient
        alpha_optim.step()
        # 2. w descends L_train(w, alpha), at the new alpha
        images, labels = w_batch
        w_optim.zero_grad()
        F.cross_entropy(net(images), labels).backward(inputs=w)
        nn.utils.clip_grad_norm_(w, 5.0)
        w_optim.step()


def optimizers(net, alpha_lr=3e-4):
    w_optim = torch.optim.SGD(net.weights().values(), lr=0.025, momentum=0.9, weight_decay=3e-4)
    alpha_optim = torch.optim.Adam(net.alphas(), lr=alpha_lr, betas=(0.5, 0.999), weight_decay=1e-3)
    return w_optim, alpha_optim


def main(epochs=12, batch_size=64):
    torch.manual_seed(2)
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = (pixels.float().view(-1, 1, 8, 8) - pixels.mean()) / pixels.std()
    w_half, alpha_half = torch.randperm(len(images)).chunk(2)

    def batches(half):
        for rows in half[torch.randperm(len(half))].split(batch_size):
            yield images[rows], labels[rows]

    net = Network(C_in=1, C=4, n_classes=10, n_layers=3, n_nodes=2)
    w_optim, alpha_optim = optimizers(net, alpha_lr=0.01)  # 33 times the paper's, since there are few steps
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(w_optim, epochs, eta_min=0.001)
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        train(net, batches(w_half), batches(alpha_half), w_optim, alpha_optim)
        scheduler.step()
        net.eval()
        with torch.no_grad():
            hits = net(images[alpha_half]).argmax(dim=1) == labels[alpha_half]
        seconds = time.perf_counter() - start
        print(f"epoch {epoch:2}/{epochs}: {hits.float().mean():.1%} right on alpha's half, {seconds:.0f} s", flush=True)
    print(net.genotype())


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors this small, more threads gain nothing
    main()
