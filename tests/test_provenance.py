"""How paths are recorded: without the folders of this machine, on POSIX and on Windows."""

import ntpath
import os
import posixpath
from pathlib import Path

import pytest

from zoo.data.preflight import examine
from zoo.files import relative
from zoo.models.transform import ImageTransform
from zoo.provenance import command_of, portable


@pytest.fixture
def windows(monkeypatch):
    """Have paths as Windows has them, in C:\\data\\run."""
    monkeypatch.setattr(os, "getcwd", lambda: "C:\\data\\run")
    with monkeypatch.context() as patch:
        patch.setattr("os.path", ntpath)
        yield


@pytest.mark.parametrize(
    ("word", "recorded"),
    [
        (r"--data.root=D:\photos", r"--data.root=D:\photos"),
        (r"D:\photos\new", r"D:\photos\new"),
        ("--data.root=D:/photos/", "--data.root=D:/photos/"),
        (r"\\server\share\photos", r"\\server\share\photos"),
        (r"--data.root=C:\data\run\photos", r"--data.root=photos"),
        (r"C:\data\run\photos\new", r"photos\new"),
        (r"--data.root=C:\Users\me\photos", "--data.root=photos"),
        ("C:/Users/me/photos/", "photos"),
        (r"--data.root=photos\new", r"--data.root=photos\new"),
        ("--trainer.max_epochs=3", "--trainer.max_epochs=3"),
    ],
)
def test_paths_of_windows_are_recorded(windows, word, recorded):
    assert portable(word) == recorded and command_of(word)


def test_a_path_on_another_drive_is_told_as_it_is(windows):
    assert relative(r"D:\runs\best.ckpt") == r"D:\runs\best.ckpt" and relative(r"C:\data\best.ckpt") == r"..\best.ckpt"


@pytest.mark.parametrize(
    ("word", "recorded"),
    [
        ("--data.root=/mnt/photos/", "--data.root=photos"),
        ("/srv/run/photos/new", "photos/new"),
        ("/srv/run", "."),
        ("/srv/..run/photos", "photos"),
        ("/srv/run/..photos", "..photos"),
        ("photos", "photos"),
    ],
)
def test_paths_of_posix_are_recorded(monkeypatch, word, recorded):
    assert os.path is posixpath
    monkeypatch.setattr(os, "getcwd", lambda: "/srv/run")
    assert portable(word) == recorded


def test_images_on_several_drives_are_examined(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def several(paths):
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr(os.path, "commonpath", several)
    files = [tmp_path / "a/0.png", tmp_path / "b/0.png"]
    assert examine(files, ImageTransform(3, 8)).keys() == set(files)
    assert len(list(Path(tmp_path, "decoupled_zoo").iterdir())) == 1
