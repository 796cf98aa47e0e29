"""What the checkpoint in the loopback Hub's repository answers."""

import torch

import zoo
from tests.hub_fixture import NAME, REPOSITORY

IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
EXPECTED = zoo.load(NAME)(IMAGES)
LOAD = f"import torch, zoo; print(zoo.load({REPOSITORY!r})(torch.ones(1, 1, 8, 8)).sum().item())"
TOTAL = zoo.load(NAME)(torch.ones(1, 1, 8, 8)).sum().item()
