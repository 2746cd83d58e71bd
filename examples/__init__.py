"""Research variants: searches that differ from DARTS in a few lines. Run one as `python -m examples.sigmoid`."""
