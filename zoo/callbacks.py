"""The callbacks that recipes may name since version 0.1, by the class paths that they had: ``zoo.callbacks.NAME``."""

from zoo.training.callbacks import MovingAverage, WeightedGradients, WeightProjection

__all__ = ["MovingAverage", "WeightProjection", "WeightedGradients"]
