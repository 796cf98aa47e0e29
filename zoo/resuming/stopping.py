"""Signals that tell a run to stop: the first one lets it save, the second stops it at once."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # The command line asks for exit statuses without lightning, which takes a second to import.
    from lightning import Trainer

# Clusters and people send these, and terminals that are closed; Windows does not know the last.
SIGNALS = [number for number in signal.Signals if number.name in ("SIGTERM", "SIGINT", "SIGHUP")]
# A shell adds the signal's number to this for the exit status of a program that it stopped.
STOPPED = 128
INTERRUPTED = STOPPED + signal.SIGINT


class StopSignals:
    """Notes the first signal that tells this process to stop.

    Attributes:
        received: its number; None as long as there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def listen(self, trainer: "Trainer") -> None:
        """Note signals from now on, and the SIGTERM that the trainer may have had already."""
        self.received = signal.SIGTERM if trainer.received_sigterm else None
        # Lightning puts back what was there before when the trainer is done.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # A program begun by nohup is to ignore that its terminal is closed.
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._receive)

    def is_told(self, trainer: "Trainer") -> bool:
        """Return whether any process was told to stop; all must save together."""
        return trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)

    def leave(self, trainer: "Trainer") -> None:
        """Exit as a program that a signal has stopped; the first process alone, which is killed if another one fails.

        Raises:
            SystemExit: always.
        """
        trainer.strategy.barrier("saved")
        raise SystemExit(STOPPED + (self.received or signal.SIGTERM) if trainer.is_global_zero else 0)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        # A print may be interrupted by this very signal, and must not be entered again; the terminal may be closed.
        with contextlib.suppress(OSError):
            os.write(2, b"\nsaving before stopping; once more to stop at once\n")
        for each in SIGNALS:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)


def stop_status(error: BaseException) -> int | None:
    """Return the exit status of a program that a signal has stopped by this exception; None if it was no signal."""
    # Lightning makes exit status 1 of a KeyboardInterrupt.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return INTERRUPTED
    statuses = [STOPPED + number for number in SIGNALS]
    return error.code if isinstance(error, SystemExit) and error.code in statuses else None
