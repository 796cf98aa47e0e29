"""What lets a training run stop and go on: its folder, its record, its checkpoints, and stops that save first."""
