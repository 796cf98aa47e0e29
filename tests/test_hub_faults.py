"""Whatever a Hub, a network or a disk does: in bounded time, the right weights come, or an error that says what to do.

The real client of the Hub talks to ``tests.hub_server`` over loopback.
"""

import time
from pathlib import Path

import huggingface_hub
import pytest
import torch

import zoo
from tests.hub_server import Fault, Handler, Server, serving
from zoo import hub
from zoo.checkpoints import PRETRAINED
from zoo.hub import CONFIG, FILES, WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
# Each seconds of patience in these tests; the real ones are told in zoo.hub.
PATIENCE = 3
NAME = "digits_cnn6_tanh_cosine"
REPOSITORY = f"me/{NAME}"
IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
EXPECTED = zoo.load(NAME)(IMAGES)
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
        for name in ("SECONDS_TO_ANSWER", "SECONDS_A_FILE"):
            monkeypatch.setattr(hub, name, PATIENCE)
        monkeypatch.setattr(hub, "LONGEST_WAIT", 1)
        put(server, CONTENT)
        yield server


def put(server: Server, files: dict[str, bytes], repository: str = REPOSITORY) -> str:
    """Commit files, as they are, to the Hub's repository."""
    server.hub.create(repository, private=False)
    stored = {}
    for path, data in files.items():
        stored[path] = server.hub.store(data)
        if path == WEIGHTS:
            stored[path]["git"] = None
    return server.hub.commit(repository, "main", stored, "as told")


def loads(**settings) -> None:
    """Load the repository and compare its answers."""
    model = zoo.load(REPOSITORY, **settings)
    assert torch.equal(model(IMAGES), EXPECTED)


def refuses(message: str, seconds: float = 3 * PATIENCE + 3, **settings) -> None:
    """Ask for the repository and get our own error, in time."""
    began = time.monotonic()
    with pytest.raises(zoo.CheckpointError, match=message):
        zoo.load(REPOSITORY, **settings)
    assert time.monotonic() - began < seconds


def body(change) -> "callable":
    """Answer with the right headers and another body; one that is too short ends the connection."""

    def act(handler: Handler) -> None:
        commit = handler.server.hub.find(REPOSITORY, "main")
        file = handler.server.hub.files(REPOSITORY, commit)[handler.route.rsplit("/", 1)[1]]
        data = handler.server.hub.blob(file["sha256"]).read_bytes()
        sent = change(data)
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("X-Repo-Commit", commit)
        handler.send_header("ETag", f'"{file["git"] or file["sha256"]}"')
        handler.end_headers()
        handler.wfile.write(sent)
        handler.close_connection = True

    return act


def flipped(data: bytes, place: int = -100) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


def status(code: int, **headers):
    return lambda handler: handler.fail(code, "", "out of order", **headers)


def silence(handler: Handler) -> None:
    time.sleep(4 * PATIENCE)


def drip(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(40 * PATIENCE):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


ONCE = {
    "truncated body": (body(lambda data: data[: len(data) // 2]), "GET", WEIGHTS),
    "truncated config": (body(lambda data: data[: len(data) // 2]), "GET", CONFIG),
    "one bit flipped in transit": (body(flipped), "GET", WEIGHTS),
    "one bit of the config flipped in transit": (body(flipped), "GET", CONFIG),
    "500": (status(500), "GET", WEIGHTS),
    "503": (status(503), "GET", WEIGHTS),
    "503, come again": (status(503, Retry_After=1), "GET", "/api/models"),
    "429": (status(429), "GET", "/api/models"),
    "429, come again": (status(429, Retry_After=1), "GET", "/api/models"),
    "429, come again tomorrow": (status(429, Retry_After=86400), "GET", "/api/models"),
    "500 for a HEAD": (status(500), "HEAD", CONFIG),
}


@pytest.mark.parametrize("fault", ONCE)
def test_what_goes_wrong_once_is_overcome(server, fault):
    act, method, path = ONCE[fault]
    server.hub.faults.append(Fault(method, path, act, times=1))
    loads()
    assert server.hub.faults[0].times == 0
    loads()


REFUSED = r"misspelt; or it is private, .* \(hf auth login\); or it is gated, and you have to ask"
ALWAYS = {
    "truncated body": (body(lambda data: data[: len(data) // 2]), "GET", WEIGHTS, "model.safetensors of me/"),
    "bits flipped in transit": (body(flipped), "GET", WEIGHTS, "is not what the Hub sent"),
    "500": (status(500), "GET", WEIGHTS, "model.safetensors of me/.* cannot be had from http.*500"),
    "503 for all": (status(503), "GET", "", "cannot be had from http.*503"),
    "429 for all": (status(429, Retry_After=86400), "GET", "/api/models", "cannot be had from http.*429"),
    "no answer to a HEAD": (silence, "HEAD", WEIGHTS, "did not send it within .* s; try again"),
    "no answer at all": (silence, "GET", "/api/models", "cannot be had from|did not send it within"),
    "slow drip": (drip, "GET", WEIGHTS, "did not send it within"),
    "slow drip of the description": (drip, "GET", "/api/models", "did not send it within"),
    "the connection is dropped": (hang_up, "GET", WEIGHTS, "model.safetensors of me/"),
    "HTML in place of the weights": (lambda handler: handler.answer(200, b"<html>"), "GET", WEIGHTS, "safetensors"),
    "HTML in place of everything": (lambda handler: handler.answer(200, b"<html>"), "GET", "", "cannot be had"),
    "HTML for a HEAD": (lambda handler: handler.answer(200, b"<html>"), "HEAD", CONFIG, "config.json of me/.*X-Repo"),
    "401": (status(401), "GET", "/api/models", REFUSED),
    "403": (status(403), "GET", "/api/models", REFUSED),
    "gated": (lambda handler: handler.fail(403, "GatedRepo", "ask"), "GET", "/api/models", REFUSED),
}


@pytest.mark.parametrize("fault", ALWAYS)
def test_what_stays_wrong_is_an_error_and_leaves_nothing_that_is_believed_later(server, fault):
    act, method, path, message = ALWAYS[fault]
    server.hub.faults.append(Fault(method, path, act))
    refuses(message)
    server.hub.faults.clear()
    # What hangs still has the client's lock.
    if "answer" not in fault and "drip" not in fault:
        loads()


def test_a_dropped_connection_is_resumed(server, tmp_path):
    large = zoo.build("resnet20", "tanh_cosine", in_chans=1, input_size=8, widths=(64, 128, 256)).eval()
    folder = zoo.save(large, tmp_path / NAME)
    put(server, {file: (folder / file).read_bytes() for file in FILES})
    ranges = []
    # The client keeps what it has in pieces of 10 MB.
    server.hub.faults.append(Fault("GET", WEIGHTS, body(lambda data: data[:12_000_000]), times=1))
    server.hub.faults.append(Fault("GET", WEIGHTS, lambda handler: ranges.append(handler.headers["Range"]) or True))
    assert torch.equal(zoo.load(REPOSITORY)(IMAGES), large(IMAGES))
    assert ranges == [f"bytes={10 * 2**20}-"]


def test_a_bit_that_flips_in_the_cache_is_found_on_every_load_and_healed_by_one_request(server):
    loads()
    for file in (WEIGHTS, CONFIG):
        path = hub.fetch(REPOSITORY) / file
        path.write_bytes(flipped(path.read_bytes()))
        server.hub.requests.clear()
        refuses(f"{file} in .* is not what the Hub sent: it is damaged", local_files_only=True)
        assert not server.hub.requests
        loads()
        assert sum(request.startswith("GET") and request.endswith(file) for request in server.hub.requests) == 1
        loads(local_files_only=True)


def test_a_damaged_cache_without_a_network_is_an_error(server):
    commit = server.hub.find(REPOSITORY, "main")
    loads()
    path = hub.fetch(REPOSITORY) / WEIGHTS
    path.write_bytes(flipped(path.read_bytes()))
    server.hub.faults.append(Fault("GET", "", status(503)))
    refuses("it is damaged. Fetching it again failed: .* cannot be had from", revision=commit)
