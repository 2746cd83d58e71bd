"""The names that options accept: search spaces, executions, stems. Does not import torch, which takes seconds."""

# The search space of DARTS: the candidates on every edge, in the order of alpha's columns (section 3.1).
PRIMITIVES = [
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "none",
]

# S2 and S3 are those of RobustDARTS (Zela et al., arXiv:1909.09656, section 3).
SEARCH_SPACES = {
    "darts": PRIMITIVES,
    "s2": ["skip_connect", "sep_conv_3x3"],
    "s3": ["none", "skip_connect", "sep_conv_3x3"],
}

EXECUTIONS = ("fused", "plain")  # `plain` is the definition; `fused` computes the same numbers, up to rounding, faster

STEM_STRIDES = {"cifar": 1, "imagenet": 8}  # stem -> by how much it divides the side of an image
STEMS = tuple(STEM_STRIDES)
