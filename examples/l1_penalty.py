"""An L1 penalty on the alphas, added to the validation loss.  python -m examples.l1_penalty --dataset cifar10"""

import search
from architect import Architect


class SparseArchitect(Architect):
    strength = 0.01

    def alpha_objective(self, X, y):
        return super().alpha_objective(X, y) + self.strength * sum(alpha.abs().sum() for alpha in self.alphas)


if __name__ == "__main__":
    search.main(architect=SparseArchitect)
