"""Mixup (Zhang et al., arXiv:1710.09412) in augment.py.  python -m examples.mixup --genotype DARTS_V2"""

import numpy as np
import torch.nn.functional as F

import augment


def mixup(X, y, n_classes):
    share = np.random.beta(0.2, 0.2)  # drawn from a generator that is saved with the run
    targets = F.one_hot(y, n_classes).to(X.dtype)
    return share * X + (1 - share) * X.flip(0), share * targets + (1 - share) * targets.flip(0)


if __name__ == "__main__":
    augment.main(augment_batch=mixup)
