"""Edges whose operations run on half of the channels only.  python -m examples.half_channels --dataset cifar10"""

import torch
import torch.nn.functional as F

import search
from models.ops import MixedOp
from models.search_cnn import SearchCNN


class HalfMixedOp(MixedOp):
    def __init__(self, C, stride, primitives):
        super().__init__(C // 2, stride, primitives)
        self.stride = stride

    def forward(self, x, weights):
        mixed, passed = x.split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], dim=1)
        passed = F.max_pool2d(passed, 2, ceil_mode=True) if self.stride == 2 else passed
        return torch.cat([super().forward(mixed, weights), passed], dim=1)


class HalfCNN(SearchCNN):
    mixed_op = HalfMixedOp


if __name__ == "__main__":
    search.main(network=HalfCNN)
