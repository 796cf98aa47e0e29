"""The Hugging Face Hub: what a repository is, fetching one, and the model card. ``zoo.checkpoints`` publishes to it."""
