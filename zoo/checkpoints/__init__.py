"""Folders that hold a model: saved, loaded, verified, described, and exchanged with the Hugging Face Hub."""
