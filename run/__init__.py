"""A run of search.py or augment.py: its options, folder, checkpoints and progress."""
