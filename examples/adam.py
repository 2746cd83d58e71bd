"""Adam for w, with the virtual step that belongs to it.  python -m examples.adam --w-lr 0.001 --w-lr-min 0"""

import torch

import search
from architect import Architect


class AdamArchitect(Architect):
    @staticmethod
    def w_optimizer(weights, config):
        return torch.optim.Adam(weights, config.w_lr, weight_decay=config.w_weight_decay)

    def w_update(self, grads, w_optim):
        (beta1, beta2), updates = w_optim.param_groups[0]["betas"], []
        for w, grad in zip(self.weights, grads):
            state, g = w_optim.state.get(w, {}), grad + self.w_weight_decay * w
            t = int(state.get("step", 0)) + 1
            m = (beta1 * state.get("exp_avg", 0) + (1 - beta1) * g) / (1 - beta1**t)
            v = (beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * g * g) / (1 - beta2**t)
            updates.append(m / (v.sqrt() + w_optim.param_groups[0]["eps"]))
        return updates


if __name__ == "__main__":
    search.main(architect=AdamArchitect)
