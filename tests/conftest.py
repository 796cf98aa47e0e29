"""Settings of all tests: one thread, since small tensors gain nothing from more and a shared machine loses much."""

import os
import signal
import tempfile

import torch

# No test waits for the Hugging Face Hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# What is known of image files is kept for this run of the tests alone.
CACHES = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = CACHES.name

torch.set_num_threads(1)

# A shell that starts the tests in the background lets them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Their fixtures, ``run`` and ``server``, serve several files of tests.
pytest_plugins = ["tests.command_line", "tests.hub_fixture"]
