"""The networks: operations (`ops`), cells and whole networks, for the search and for augment."""
