"""Evaluation mode for a while."""

import contextlib
import threading
from collections.abc import Iterator

from torch import nn

# Two threads that change the mode of one network would leave it in neither's.
ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it lasts, all modules of ``model`` are in evaluation mode; then each is in the mode that it was in.

    Threads wait for each other if a module is in training.
    """
    with contextlib.ExitStack() as stack:
        with ONE_AT_A_TIME:
            training = {module: module.training for module in model.modules()}
            if any(training.values()):
                stack.enter_context(ONE_AT_A_TIME)
                model.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                if module.training is not mode:
                    module.training = mode
