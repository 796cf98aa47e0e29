"""Folders that hold a model: saved, loaded, verified and published, and the trained networks to start from."""
