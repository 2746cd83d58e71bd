"""The gradient of the architecture parameters: DARTS's eq. 6 and 7 (Liu et al., arXiv:1806.09055, section 2.3)."""

import contextlib

import torch

from machine import ranks
from machine.precision import full_float32
from models.search_cnn import frozen_statistics, tracking


class Architect:
    """Computes the alphas' gradient of L_V(w'(alpha), alpha), w' being w after one virtual step on L_T.

    net: a module with `loss(X, y)`, `weights()` and `alphas()`; w_momentum, w_weight_decay: those of the optimizer of
    its weights, so that the virtual step is the one it would take if gradients were not clipped; eps_scale: the length
    of eq. 7's shift of w.

    On several ranks each method is given the rank's rows, and gives all ranks what the global batch does: a sum over
    ranks for w', one for d with the alphas' gradient at w', and one for H.

    Every method leaves weights, BN statistics and optimizer as they were, to the last bit.
    """

    def __init__(self, net, w_momentum, w_weight_decay, eps_scale=0.01):
        self.net = net
        self.w_momentum = w_momentum
        self.w_weight_decay = w_weight_decay
        self.eps_scale = eps_scale
        # finding these takes a while
        self.weights, self.alphas, self.tracking = list(net.weights()), list(net.alphas()), tracking(net)

    def virtual_step(self, trn_X, trn_y, xi, w_optim):
        """w' = w - xi * (momentum * buf + grad_w L_T(w, a) + weight_decay * w), a tensor per weight.

        xi: the weights' learning rate; buf: the momentum buffers of `w_optim`, none before its first step.
        """
        _, *grads = ranks.average(self._grad(self.net.loss, trn_X, trn_y, self.weights), trn_y)
        with torch.no_grad():
            steps = torch._foreach_add(grads, self.weights, alpha=self.w_weight_decay)
        buffers = [w_optim.state.get(w, {}).get("momentum_buffer") for w in self.weights]
        moving = [(step, buffer) for step, buffer in zip(steps, buffers) if buffer is not None]
        if moving:
            torch._foreach_add_(*map(list, zip(*moving)), alpha=self.w_momentum)
        return self._weights_plus(steps, -xi)

    def unrolled_backward(self, trn_X, trn_y, val_X, val_y, xi, w_optim):
        """Eq. 6: set every alpha.grad to grad_a L_V(w', a) - xi * H. Returns L_V(w', a), a scalar.

        With xi = 0, w' is w and this is the first-order approximation: one backward pass of L_V at (w, a).
        """
        alphas = self.alphas
        if xi == 0:
            loss, *dalpha = ranks.average(self._grad(self.alpha_objective, val_X, val_y, alphas), val_y)
        else:
            with self._weights_at(self.virtual_step(trn_X, trn_y, xi, w_optim)):
                loss, *grads = ranks.average(
                    self._grad(self.alpha_objective, val_X, val_y, alphas + self.weights), val_y
                )
            dalpha, d = grads[: len(alphas)], grads[len(alphas) :]
            hessian = self.compute_hessian(d, trn_X, trn_y)
            dalpha = [da - xi * h for da, h in zip(dalpha, hessian)]
        for alpha, grad in zip(alphas, dalpha):
            alpha.grad = grad
        return loss

    def compute_hessian(self, dw, trn_X, trn_y):
        """Eq. 7: (grad_a L_T(w + eps d, a) - grad_a L_T(w - eps d, a)) / (2 eps), a tensor per alpha.

        dw: d = grad_w' L_V(w', a), a tensor per weight; eps = eps_scale / ||d||, over all weights together. It is an
        approximation of d2 L_T / (da dw) . d, which is zero where d is. Autocast is switched off: in bf16 the
        difference of two gradients that lie so near each other would be rounding noise. So would it be in TF32, which
        no pass here uses.
        """
        alphas = self.alphas
        norm = torch.nn.utils.get_total_norm(dw)
        eps = self.eps_scale / (norm + (norm == 0))  # d of zero shifts nothing; to ask for it would wait for the device
        shifts = torch._foreach_mul(dw, eps)
        with torch.autocast(trn_X.device.type, enabled=False):
            with self._weights_at(self._weights_plus(shifts, 1)):
                _, *dalpha_pos = self._grad(self.net.loss, trn_X, trn_y, alphas)
            with self._weights_at(self._weights_plus(shifts, -1)):
                _, *dalpha_neg = self._grad(self.net.loss, trn_X, trn_y, alphas)
        return ranks.average([(pos - neg) / (2 * eps) for pos, neg in zip(dalpha_pos, dalpha_neg)], trn_y)

    def alpha_objective(self, X, y):
        """What alpha descends: L_V, a scalar, at a validation batch. Override it to add a regulariser of alpha."""
        return self.net.loss(X, y)

    def _grad(self, objective, X, y, wrt):
        """objective(X, y), and its gradients with respect to `wrt`, zeros where it does not depend on them.

        Other parameters are set not to need any meanwhile, so that nothing is computed or kept for them. All are this
        rank's parts: see `ranks.average`.
        """
        others_frozen = _only_requiring_grad(self.alphas + self.weights, wrt)
        with frozen_statistics(self.tracking), others_frozen, full_float32():
            loss = ranks.row_weighted(objective(X, y), y)
            return loss.detach(), *torch.autograd.grad(loss, wrt, allow_unused=True, materialize_grads=True)

    @contextlib.contextmanager
    def _weights_at(self, values):
        """Run at other weights; afterwards the weights are copied back rather than shifted back, which would round.

        Autocast keeps the bf16 casts of weights until its outermost context ends, so they are dropped at each change.
        """
        with torch.no_grad():
            saved = torch._foreach_mul(self.weights, 1.0)  # the same bits, by a call for all
        try:
            self._set_weights(values)
            del values  # not to be kept through the passes
            yield
        finally:
            self._set_weights(saved)

    @torch.no_grad()
    def _weights_plus(self, steps, factor):
        return torch._foreach_add(self.weights, steps, alpha=factor)

    @torch.no_grad()
    def _set_weights(self, values):
        torch._foreach_copy_(self.weights, values)
        torch.clear_autocast_cache()


@contextlib.contextmanager
def _only_requiring_grad(parameters, wrt):
    """Let no others of the parameters require a gradient."""
    wanted = set(map(id, wrt))
    others = [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in wanted]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
