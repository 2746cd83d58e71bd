"""The networks: operations (ops.py), cells and whole networks, for search.py and for augment.py."""
