"""The runs of a protocol: which there are, and how they are started."""
