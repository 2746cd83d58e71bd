"""SGD with Nesterov's momentum for w.  python -m examples.nesterov --dataset cifar10"""

import torch

import search
from architect import Architect


class NesterovArchitect(Architect):
    @staticmethod
    def w_optimizer(weights, config):
        return torch.optim.SGD(weights, config.w_lr, config.w_momentum, 0, config.w_weight_decay, nesterov=True)

    def w_update(self, grads, w_optim):
        decayed = [grad + self.w_weight_decay * w for grad, w in zip(grads, self.weights)]
        buffers = [w_optim.state.get(w, {}).get("momentum_buffer", 0) for w in self.weights]
        moved = [self.w_momentum * buffer + grad for grad, buffer in zip(decayed, buffers)]
        return [grad + self.w_momentum * buffer for grad, buffer in zip(decayed, moved)]


if __name__ == "__main__":
    search.main(architect=NesterovArchitect)
