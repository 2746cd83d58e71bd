"""What surrounds the loops of search.py and augment.py, a file each: folder, checkpoints, progress, ranks, data."""
