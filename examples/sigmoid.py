"""Sigmoid weights: the operations of an edge no longer compete.  python -m examples.sigmoid --dataset cifar10"""

import torch

import search
from models.search_cnn import SearchCNN


class SigmoidCNN(SearchCNN):
    def edge_weights(self, noise=None):
        return {kind: [torch.sigmoid(edges) for edges in alpha] for kind, alpha in self.alpha.items()}


if __name__ == "__main__":
    search.main(network=SigmoidCNN)
