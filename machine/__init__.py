"""The machine: its devices, their precision, several processes on it (ranks), CUDA graphs, signals."""
