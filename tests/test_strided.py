"""Strided 1×1 convolutions of few channels: torch's own gradient of their filters overwrites memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.command_line import make_photos
from zoo.training.strided import SubsampledConv2d, avoid_wrong_gradients, undo

ROOT = Path(__file__).resolve().parent.parent

# What fails would end this process, or damage what other tests have in memory.
GRADIENTS = """
import copy, torch
from torch import nn
from operators import convert_decoupled
from zoo.training.strided import avoid_wrong_gradients

torch.manual_seed(0)
torch.set_num_threads(2)
for operator in (None, "tanh_cosine", "sphere_cosine", "tanh_square_cosine"):
    network = nn.Sequential(nn.Conv2d(3, 24, 1, stride=2), nn.Conv2d(3, 24, 3, stride=2, padding=1))
    if operator:
        convert_decoupled(network, operator)
    exact = copy.deepcopy(network).double()
    avoid_wrong_gradients(network)
    network.to(memory_format=torch.channels_last)
    for size in (28, 112):
        images = torch.rand(4, 3, size, size).to(memory_format=torch.channels_last)
        for images, layers in ((images, network), (images.double().contiguous(), exact)):
            layers.zero_grad()
            (layers[0](images) * layers[1](images)).sum().backward()
        for got, wanted in zip(network.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=1e-4, atol=1e-4 * wanted.grad.abs().max())
"""


def in_a_process_of_its_own(words, environment, folder=ROOT):
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


@pytest.mark.parametrize("instructions", ["", "AVX2"])
def test_gradients_are_right_with_the_channels_last(instructions):
    environment = {"ONEDNN_MAX_CPU_ISA": instructions} if instructions else {}
    finished = in_a_process_of_its_own(["-c", GRADIENTS], environment)
    assert finished.returncode == 0, finished.stderr[-2000:]


@pytest.mark.parametrize("architecture", ["repvgg_a0", "mobileone_s0"])
def test_a_network_that_begins_so_is_trained(tmp_path, architecture):
    make_photos(tmp_path / "photos", size=80)
    words = f"fit --data ImageFolder --data.root photos --data.input_size 80 --model.architecture {architecture}"
    words += " --trainer.accelerator cpu --trainer.max_steps 2 --model.operator conv --checkpoint.dirpath run"
    finished = in_a_process_of_its_own([str(ROOT / "train.py"), *words.split()], {"OMP_NUM_THREADS": "2"}, tmp_path)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert (tmp_path / "run/last.ckpt").is_file()


def test_only_what_torch_trains_wrongly_is_changed():
    wrong = nn.Conv2d(3, 8, 1, stride=(1, 2)), nn.Conv2d(15, 8, 1, stride=2, padding="valid")
    right = (
        nn.Conv2d(16, 8, 1, stride=2),
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(4, 8, 1, stride=2, groups=2),
        nn.Conv2d(3, 8, 1, stride=2, padding=1),
        nn.Conv2d(3, 8, 3, stride=2),
    )
    images = {layer: torch.rand(2, layer.in_channels, 9, 9) for layer in (*wrong, *right)}
    answers = {layer: layer(batch) for layer, batch in images.items()}
    avoid_wrong_gradients(nn.ModuleList([*wrong, *right]))
    assert [type(layer) for layer in wrong] == [SubsampledConv2d] * 2 and {type(layer) for layer in right} == {
        nn.Conv2d
    }
    for layer in wrong:
        torch.testing.assert_close(layer(images[layer]), answers[layer])
    undo(nn.ModuleList([*wrong, *right]))
    assert {type(layer) for layer in (*wrong, *right)} == {nn.Conv2d}
