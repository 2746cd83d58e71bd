"""The gradient of the architecture parameters: DARTS's eq. 6 and 7 (Liu et al., arXiv:1806.09055, section 2.3)."""

import contextlib
from collections.abc import Generator, Iterable

import torch
from torch import Tensor, nn

from machine import ranks
from machine.precision import full_float32
from models.search_cnn import SearchCNN, frozen_statistics, tracking


class Architect:
    """Computes the alphas' gradient of L_V(w'(alpha), alpha), w' being w after one virtual step on L_T.

    net: the network, or any module with `loss(X, y)`, `weights()` and `alphas()`; w_momentum, w_weight_decay: those of
    the optimizer of its weights, so that the virtual step is the one it would take if gradients were not clipped;
    eps_scale: the length of eq. 7's shift of w.

    The objectives are those of this rank's rows of a batch; what is computed from them is that of the global batch, the
    same on every rank, at the cost of three all-reduces: w', (d, the alphas' gradient at w'), and H. Weights, BN
    statistics and optimizer are afterwards as they were, to the last bit.
    """

    def __init__(self, net: SearchCNN, w_momentum: float, w_weight_decay: float, eps_scale: float = 0.01):
        self.net = net
        self.w_momentum = w_momentum
        self.w_weight_decay = w_weight_decay
        self.eps_scale = eps_scale
        # listed once: walking through all modules in every step is slow
        self.weights, self.alphas, self.tracking = list(net.weights()), list(net.alphas()), tracking(net)
        self._trn_grads: list[Tensor] | None = None  # g, kept if `w_update` is not that of plain SGD

    # What a script may override: the objectives, and the optimizer of w with its update

    def w_objective(self, X: Tensor, y: Tensor) -> Tensor:
        """What w descends: L_T, a scalar, at a training batch. Override it to add a regulariser of w."""
        return self.net.loss(X, y)

    def alpha_objective(self, X: Tensor, y: Tensor) -> Tensor:
        """What alpha descends: L_V, a scalar, at a validation batch. Override it to add a regulariser of alpha."""
        return self.net.loss(X, y)

    @staticmethod
    def w_optimizer(weights: Iterable[Tensor], config) -> torch.optim.Optimizer:
        """The optimizer of w; config: the options of search.py. If you override it, override `w_update` too."""
        decay, nesterov = config.w_weight_decay, config.w_nesterov
        return torch.optim.SGD(weights, config.w_lr, config.w_momentum, 0, decay, nesterov, fused=True)

    def w_update(self, grads: list[Tensor], w_optim: torch.optim.Optimizer) -> list[Tensor]:
        """The update u of w by the optimizer, for these gradients g of L_T: w' = w - xi u(g). A tensor per weight.

        Here v = momentum * buf + g + weight_decay * w, with the momentum buffers of `w_optim`, none before its first
        step; with Nesterov's momentum g + weight_decay * w + momentum * v. An override must be differentiable in g, and
        change neither the weights nor the optimizer.
        """
        updates, factor = torch._foreach_add(grads, self.weights, alpha=self.w_weight_decay), self.w_momentum
        if self._is_nesterov(w_optim):
            torch._foreach_mul_(updates, 1 + self.w_momentum)
            factor = self.w_momentum**2
        buffers = [w_optim.state.get(w, {}).get("momentum_buffer") for w in self.weights]
        with_buffer = [(update, buffer) for update, buffer in zip(updates, buffers) if buffer is not None]
        if with_buffer:
            torch._foreach_add_(*map(list, zip(*with_buffer)), alpha=factor)
        return updates

    # Eq. 6 and 7

    def virtual_step(self, trn_X: Tensor, trn_y: Tensor, xi: float, w_optim: torch.optim.Optimizer) -> list[Tensor]:
        """w' = w - xi u, with the update u of `w_update` at grad_w L_T(w, alpha): a tensor per weight.

        xi: the learning rate of w.
        """
        _, grads = self._grad(self.w_objective, trn_X, trn_y, self.weights)
        is_plain_sgd = type(self).w_update is Architect.w_update and not self._is_nesterov(w_optim)
        self._trn_grads = None if is_plain_sgd else grads
        with torch.no_grad():
            return self._weights_plus(self.w_update(grads, w_optim), -xi)

    def unrolled_backward(
        self, trn_X: Tensor, trn_y: Tensor, val_X: Tensor, val_y: Tensor, xi: float, w_optim: torch.optim.Optimizer
    ) -> Tensor:
        """Eq. 6: set every alpha.grad to grad_a L_V(w', a) - xi * H. Returns L_V(w', a), a scalar.

        With xi = 0, w' is w and this is the first-order approximation: one backward pass of L_V at (w, a).
        """
        alphas = self.alphas
        if xi == 0:
            loss, dalpha = self._grad(self.alpha_objective, val_X, val_y, alphas)
        else:
            with self._weights_at(self.virtual_step(trn_X, trn_y, xi, w_optim)):
                loss, grads = self._grad(self.alpha_objective, val_X, val_y, alphas + self.weights)
            dalpha, d = grads[: len(alphas)], grads[len(alphas) :]
            hessian = self.compute_hessian(self._through_update(d, w_optim), trn_X, trn_y)
            dalpha = [da - xi * h for da, h in zip(dalpha, hessian)]
        for alpha, grad in zip(alphas, dalpha):
            alpha.grad = grad
        return loss

    def compute_hessian(self, dw: list[Tensor], trn_X: Tensor, trn_y: Tensor) -> list[Tensor]:
        """Eq. 7: (grad_a L_T(w + eps d, a) - grad_a L_T(w - eps d, a)) / (2 eps), a tensor per alpha.

        dw: d = grad_w' L_V(w', a), a tensor per weight; eps = eps_scale / ||d||, over all weights together.
        Approximates the mixed second derivative d2 L_T / (da dw) times d; zero if d is zero. Autocast is switched off:
        in bf16 the difference of two gradients that lie so near each other would be rounding noise. TF32 would do the
        same; `full_float32` switches it off.
        """
        alphas = self.alphas
        norm = nn.utils.get_total_norm(dw)
        eps = self.eps_scale / (norm + (norm == 0))  # avoids 0 / 0 without reading the norm, which would synchronise
        shifts = torch._foreach_mul(dw, eps)
        with torch.autocast(trn_X.device.type, enabled=False):
            with self._weights_at(self._weights_plus(shifts, 1)):
                _, dalpha_pos = self._grad_of_rows(self.w_objective, trn_X, trn_y, alphas)
            with self._weights_at(self._weights_plus(shifts, -1)):
                _, dalpha_neg = self._grad_of_rows(self.w_objective, trn_X, trn_y, alphas)
        return ranks.average([(pos - neg) / (2 * eps) for pos, neg in zip(dalpha_pos, dalpha_neg)], trn_y)

    @staticmethod
    def _is_nesterov(w_optim):
        return w_optim.param_groups[0].get("nesterov", False)

    def _through_update(self, d, w_optim):
        """(du/dg)^T d, which takes the place of d in eq. 6 if u is not that of plain SGD, where du/dg = 1."""
        if self._trn_grads is None:
            return d
        grads = [grad.detach().requires_grad_() for grad in self._trn_grads]
        with torch.enable_grad():
            updates = self.w_update(grads, w_optim)
        return torch.autograd.grad(updates, grads, d, materialize_grads=True)

    def _grad(self, objective, X, y, wrt):
        """An objective at the global batch, and its gradients w.r.t. `wrt`: (scalar, list of tensors)."""
        loss, grads = self._grad_of_rows(objective, X, y, wrt)
        loss, *grads = ranks.average([loss, *grads], y)
        return loss, grads

    def _grad_of_rows(self, objective, X, y, wrt):
        """As `_grad`, but of this rank's rows, times their number: what `ranks.average` takes.

        Every other parameter is frozen during the pass, so that nothing is computed or kept for it.
        """
        others_frozen = _only_requiring_grad(self.alphas + self.weights, wrt)
        with frozen_statistics(self.tracking), others_frozen, full_float32():
            loss = ranks.row_weighted(objective(X, y), y)
            return loss.detach(), torch.autograd.grad(loss, wrt, allow_unused=True, materialize_grads=True)

    @contextlib.contextmanager
    def _weights_at(self, values: list[Tensor]) -> Generator[None]:
        """Run at other weights; afterwards the weights are copied back rather than shifted back, which would round.

        Autocast keeps the bf16 casts of weights until its outermost context ends, so they are dropped at each change.
        """
        with torch.no_grad():
            saved = torch._foreach_mul(self.weights, 1.0)  # clones all weights in one launch
        try:
            self._set_weights(values)
            del values  # frees w' before the passes
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
