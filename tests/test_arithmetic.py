"""``exact_arithmetic``: no rounding while it lasts, in any thread, and torch's settings as they were afterwards."""

import subprocess
import sys
import threading
from operator import attrgetter

import pytest
import torch

from zoo.arithmetic import SETTINGS, exact_arithmetic

# How people ask for less than float32, each in a process of its own.
WAYS = {
    "nothing": "",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "all": "torch.backends.fp32_precision = 'tf32'",
    "one": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "legacy": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True",
}
SCRIPT = """
import torch
from operator import attrgetter
from zoo.arithmetic import SETTINGS, exact_arithmetic

def state():
    return {name: attrgetter(name)(torch.backends).fp32_precision for names in SETTINGS.values() for name in names}

@WAY@
before = state()
for device in ("cuda", "cpu"):
    with exact_arithmetic(device), exact_arithmetic(device):
        assert not {"tf32", "bf16"} & {state()[name] for name in SETTINGS[device]}, state()
    assert state() == before, (before, state())
@AFTER@
"""


@pytest.mark.parametrize("way", WAYS)
def test_torchs_settings_are_put_back(way):
    after = "torch.get_float32_matmul_precision()" if way in ("nothing", "high", "medium", "legacy") else ""
    script = SCRIPT.replace("@WAY@", WAYS[way]).replace("@AFTER@", after)
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def precision(name):
    return attrgetter(name)(torch.backends).fp32_precision


def test_the_last_of_several_threads_puts_the_settings_back():
    name = SETTINGS["cuda"][1]
    before = precision(name)
    attrgetter(name)(torch.backends).fp32_precision = "tf32"
    entered, leave = threading.Event(), threading.Event()

    def work():
        with exact_arithmetic("cuda"):
            entered.set()
            leave.wait()

    try:
        thread = threading.Thread(target=work)
        thread.start()
        entered.wait()
        with exact_arithmetic("cuda"):
            leave.set()
            thread.join()
            assert precision(name) == "ieee"
        assert precision(name) == "tf32"
    finally:
        attrgetter(name)(torch.backends).fp32_precision = before
