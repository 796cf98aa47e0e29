"""The folder of a training run: what it records, its checkpoints, its lock, and stops that save first."""
