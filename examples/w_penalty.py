"""An L1 penalty on w, which alpha's loss lacks.  python -m examples.w_penalty --dataset cifar10"""

import search
from architect import Architect


class SparseWeightsArchitect(Architect):
    strength = 1e-5

    def w_objective(self, X, y):
        return super().w_objective(X, y) + self.strength * sum(w.abs().sum() for w in self.weights)


if __name__ == "__main__":
    search.main(architect=SparseWeightsArchitect)
