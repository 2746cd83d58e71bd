"""A search with a new operation and some of the existing ones.

python -m examples.new_operation --primitives none,skip_connect,sep_conv_3x3,max_pool_5x5
"""

import search
from models.ops import OPS, PoolBN

OPS["max_pool_5x5"] = lambda C, stride, affine: PoolBN("max", C, 5, stride, 2, affine)

if __name__ == "__main__":
    search.main()
