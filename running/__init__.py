"""Everything but the training loops of search.py and augment.py: folders, checkpoints, progress, ranks, data."""
