"""Trained networks: evaluated and exported."""
