"""Evaluation mode for a while."""

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn

# Two threads that change the mode of one network would leave it in neither's.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it lasts, all modules of ``model`` are in evaluation mode; then each is in the mode that it was in.

    Threads that share a model wait for each other if any of its modules is in training.
    """
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with contextlib.ExitStack() as stack:
        with lock:
            training = {module: module.training for module in model.modules()}
            if any(training.values()):
                stack.enter_context(lock)
                model.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                if module.training is not mode:
                    module.training = mode
