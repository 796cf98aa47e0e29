"""Settings of all tests: one thread, since small tensors gain nothing from more and a shared machine loses much."""

import torch

torch.set_num_threads(1)
