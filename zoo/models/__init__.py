"""A network, its operator and its images made into one model."""
