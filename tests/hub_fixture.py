"""A repository of the loopback Hub that has one checkpoint, and processes that are told where it is."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from tests.hub_server import Handler, Server, serving
from zoo.checkpoints.catalogue import PRETRAINED
from zoo.hub import fetching as hub
from zoo.hub.repository import FILES, WEIGHTS

ROOT = Path(__file__).resolve().parent.parent

# Seconds, in place of those of zoo.hub.fetching.
PATIENCE = 3
NAME = "digits_cnn6_tanh_cosine"
REPOSITORY = f"me/{NAME}"
CONTENT = {file: (PRETRAINED / NAME / file).read_bytes() for file in FILES}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub with one repository, the client's cache empty, and little patience."""
    with serving(tmp_path / "hub") as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        for name in ("SECONDS_TO_ANSWER", "SECONDS_A_PIECE"):
            monkeypatch.setattr(hub, name, PATIENCE)
        monkeypatch.setattr(hub, "LONGEST_WAIT", 1)
        monkeypatch.setenv("HF_TOKEN", "hf_anything")
        put(server, CONTENT)
        yield server


def put(server: Server, files: dict[str, bytes], repository: str = REPOSITORY) -> str:
    """Commit files, as they are, to the Hub's repository."""
    server.hub.create(repository, private=False)
    stored = dict.fromkeys(FILES)
    for path, data in files.items():
        stored[path] = server.hub.store(data)
        if path == WEIGHTS:
            stored[path]["git"] = None
    return server.hub.commit(repository, "main", stored, "as told")


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def run(code: str, server: Server, cache: Path) -> subprocess.Popen:
    """Run Python in a process of its own, with the client told by the environment where the Hub is."""
    return run_words([sys.executable, "-c", code], server, cache)


def run_words(words: list[str], server: Server, cache: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_anything",
        "OMP_NUM_THREADS": "1",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=environment, cwd=ROOT, **pipes)
