"""Running ``train.py`` and ``python -m zoo`` in the process of a test."""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train

# One epoch of two steps.
SHORT = "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1".split()


@pytest.fixture
def run(monkeypatch, capsys, caplog, tmp_path):
    """Run ``train.py`` or ``python -m zoo`` in this process and folder; return exit status and what was printed.

    ``run.told()`` returns what the last run told by Lightning's logger.
    """
    monkeypatch.chdir(tmp_path)

    def run_main(*words, main=train.main):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        capsys.readouterr()
        caplog.clear()
        status = 0
        try:
            main()
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    run_main.told = lambda: caplog.text
    return run_main


def fit(run, *words):
    status, _, errors = run("fit", *SHORT, "--checkpoint.dirpath", "run", *words)
    assert status == 0, errors
    return Path("run/last.ckpt").resolve()


def make_photos(folder, classes=("cat", "dog"), count=4, size=8, splits=("train",)):
    """Write random grey images, brighter for later classes."""
    generator = torch.Generator().manual_seed(0)
    for split in splits:
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.rand(size, size, generator=generator) * 100 + 150 * label / len(classes)
                Image.fromarray(pixels.byte().numpy()).save(folder / split / name / f"{index}.png")
    return folder
