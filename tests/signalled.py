"""``train.py`` whose first process sends itself the signal ``$SIGNAL``, if that is set, before step ``$STEP``."""

import os
import signal

import lightning as L

from zoo.commands.console import readable_errors
from zoo.training.cli import run


class Signal(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_index):
        if trainer.is_global_zero and trainer.global_step == int(os.environ.get("STEP", -1)):
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))


if __name__ == "__main__":
    # Which nohup, by which the tests may have been begun, lets all programs ignore.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with readable_errors():
        run(callbacks=[Signal()])
