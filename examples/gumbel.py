"""Gumbel-softmax weights, with one draw of noise per training step.  python -m examples.gumbel --dataset cifar10"""

import torch

import search
from models.search_cnn import SearchCNN


class GumbelCNN(SearchCNN):
    def draw_noise(self):
        weights = super().edge_weights()
        return {kind: [-torch.empty_like(w).exponential_().log() for w in weights[kind]] for kind in weights}

    def edge_weights(self, noise=None):
        weights = super().edge_weights()
        if noise is None:
            return weights
        return {kind: [(w.log() + g).softmax(-1) for w, g in zip(weights[kind], noise[kind])] for kind in weights}


if __name__ == "__main__":
    search.main(network=GumbelCNN)
