"""What loading a checkpoint raises."""


class CheckpointError(ValueError):
    """A checkpoint folder that is incomplete, damaged, or not what its ``config.json`` says."""


class HubError(CheckpointError):
    """A repository of the Hub that cannot be had: there is none, it may not be read, or it did not come in time."""


class DamagedError(CheckpointError):
    """A file is not the one that was written; fetched again, it may be."""
