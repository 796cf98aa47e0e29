"""Whatever a Hub, a network or a disk does: in bounded time, the right weights come, or an error that says what to do.

The real client of the Hub talks to ``tests.hub_server`` over loopback.
"""

import hashlib
import json
import pickle
import re
import signal
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch

import zoo
from tests.hub_checkpoint import EXPECTED, IMAGES, LOAD, TOTAL
from tests.hub_fixture import CONTENT, NAME, PATIENCE, REPOSITORY, ROOT, hang_up, put, run
from tests.hub_server import Fault, Handler, drip, serving, silence, status
from zoo.checkpoints.catalogue import PRETRAINED
from zoo.checkpoints.publishing import publish
from zoo.hub import fetching as hub
from zoo.hub.repository import CARD, CONFIG, FILES, WEIGHTS


def loads(**settings) -> None:
    """Load the repository and compare its answers."""
    model = zoo.load(REPOSITORY, **settings)
    assert torch.equal(model(IMAGES), EXPECTED)


def refuses(message: str, where: str = REPOSITORY, seconds: float = 3 * PATIENCE + 3, **settings) -> None:
    """Ask for the repository and get our own error, in time."""
    began = time.monotonic()
    with pytest.raises(zoo.CheckpointError, match=message):
        zoo.load(where, **settings)
    assert time.monotonic() - began < seconds


def body(change: Callable[[bytes], bytes]) -> Callable[[Handler], None]:
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


def page(handler: Handler) -> None:
    handler.answer(200, b"<html>")


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
    "bits flipped in transit": (body(flipped), "GET", WEIGHTS, "has sha256 .*: it is damaged"),
    "bits of the config flipped in transit": (body(flipped), "GET", CONFIG, "is not what the Hub sent"),
    "500": (status(500), "GET", WEIGHTS, "model.safetensors of me/.* cannot be had from http.*500"),
    "503 for all": (status(503), "GET", "", "cannot be had from http.*503"),
    "429 for all": (status(429, Retry_After=86400), "GET", "/api/models", "cannot be had from http.*429"),
    "no answer to a HEAD": (silence(4 * PATIENCE), "HEAD", WEIGHTS, "sent too little for .* s; try again"),
    "no answer at all": (silence(4 * PATIENCE), "GET", "/api/models", "cannot be had from|sent too little for"),
    "slow drip": (drip(4 * PATIENCE), "GET", WEIGHTS, "sent too little for"),
    "slow drip of the description": (drip(4 * PATIENCE), "GET", "/api/models", "sent too little for"),
    "the connection is dropped": (hang_up, "GET", WEIGHTS, "model.safetensors of me/"),
    "HTML in place of the weights": (page, "GET", WEIGHTS, "model.safetensors of me/.* cannot be had"),
    "HTML in place of everything": (page, "GET", "", "cannot be had"),
    "HTML for a HEAD": (page, "HEAD", CONFIG, "config.json of me/.*X-Repo"),
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
    refuses("is not in the Hub's cache|has sha256|is not what the Hub sent", local_files_only=True)
    # What hangs still has the client's lock.
    if "answer" not in fault and "drip" not in fault:
        loads()


# What the Hub says of tokens that it does not know, and of those that it knows no more.
REFUSED_TOKENS = ("Invalid credentials in Authorization header", 'User Access Token "mine" is expired')


@pytest.mark.parametrize("said", REFUSED_TOKENS)
def test_a_token_that_is_refused_is_told_and_the_way_without_it(server, said, monkeypatch, tmp_path):
    server.hub.refused["hf_anything"] = said
    told = r"refuses your token \(HF_TOKEN\): it has expired, .* Renew .* without one \(remove the variable HF_TOKEN\)"
    refuses(told)
    with pytest.raises(zoo.HubError, match=f"me/new is not published: .*{told}"):
        publish(NAME, "me/new")
    monkeypatch.delenv("HF_TOKEN")
    loads()
    (tmp_path / "token").write_text("hf_anything")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(zoo.HubError, match=r"refuses your token \(.*/token\): .*go without one \(hf auth logout\)"):
        zoo.load("me/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    refuses(REFUSED, "me/other")


def test_a_token_that_is_known_is_not_blamed(server):
    refuses(REFUSED, "me/other")


def test_a_dropped_connection_is_resumed(server, tmp_path):
    large = zoo.build("resnet20", "tanh_cosine", in_chans=1, input_size=8, widths=(64, 128, 256)).eval()
    folder = zoo.save(large, tmp_path / NAME)
    put(server, {file: (folder / file).read_bytes() for file in FILES})
    ranges = []
    # The client keeps what it has in pieces of 1 MiB.
    server.hub.faults.append(Fault("GET", WEIGHTS, body(lambda data: data[:12_000_000]), times=1))
    server.hub.faults.append(Fault("GET", WEIGHTS, lambda handler: ranges.append(handler.headers["Range"]) or True))
    assert torch.equal(zoo.load(REPOSITORY)(IMAGES), large(IMAGES))
    assert ranges == [f"bytes={11 * 2**20}-"]


def test_a_slow_download_is_waited_for_as_long_as_it_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS_A_PIECE", 1)
    large = zoo.build("resnet20", "tanh_cosine", in_chans=1, input_size=8, widths=(32, 64, 128)).eval()
    folder = zoo.save(large, tmp_path / NAME)
    put(server, {file: (folder / file).read_bytes() for file in FILES})

    def slow(handler: Handler) -> None:
        data = (folder / WEIGHTS).read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for start in range(0, len(data), 2**20):
            handler.wfile.write(data[start : start + 2**20])
            time.sleep(0.6)

    # A busy server, and a broken connection, in the middle of it.
    server.hub.faults.append(Fault("GET", WEIGHTS, status(503), times=1))
    server.hub.faults.append(Fault("GET", WEIGHTS, slow, times=1))
    began = time.monotonic()
    assert torch.equal(zoo.load(REPOSITORY)(IMAGES), large(IMAGES))
    assert time.monotonic() - began > 2


def test_a_bit_that_flips_in_the_cache_is_found_on_every_load_and_healed_by_one_request(server):
    loads()
    for file in (WEIGHTS, CONFIG):
        path = hub.fetch(REPOSITORY) / file
        path.write_bytes(flipped(path.read_bytes()))
        server.hub.requests.clear()
        refuses(f"{file} (is not what the Hub sent|has sha256 .*): it is damaged", local_files_only=True)
        assert not server.hub.requests
        loads()
        assert sum(request.startswith("GET") and request.endswith(file) for request in server.hub.requests) == 1
        loads(local_files_only=True)


def test_a_damaged_memory_of_a_branch_is_renewed(server):
    loads()
    for content in (b"\xb5", b"0" * 40):
        (hub.fetch(REPOSITORY).parents[1] / "refs/main").write_bytes(content)
        refuses("is not in the Hub's cache", local_files_only=True)
        loads()
        loads(local_files_only=True)


def test_a_damaged_cache_without_a_network_is_an_error(server):
    commit = server.hub.find(REPOSITORY, "main")
    loads()
    path = hub.fetch(REPOSITORY) / WEIGHTS
    path.write_bytes(flipped(path.read_bytes()))
    server.hub.faults.append(Fault("GET", "", status(503)))
    refuses("it is damaged .*. Fetching it again failed: .* cannot be had from", revision=commit)


def test_without_links_in_the_cache_damaged_weights_are_healed_too(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: False)
    loads()
    path = hub.fetch(REPOSITORY) / WEIGHTS
    assert not path.is_symlink()
    path.write_bytes(flipped(path.read_bytes()))
    refuses("has sha256 .*: it is damaged", local_files_only=True)
    loads()
    loads(local_files_only=True)


def test_what_was_withdrawn_is_not_taken_from_the_cache(server):
    loads()
    put(server, {})
    refuses("has no config.json and no model.safetensors: it is no checkpoint of decoupled-zoo")


def test_a_file_without_an_end_is_given_up(server):
    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b"%x\r\n%s\r\n" % (2**20, bytes(2**20)))
            time.sleep(0.05)

    server.hub.faults.append(Fault("GET", WEIGHTS, endless))
    refuses("sends more than the .* bytes that it said|cannot be had")


def test_a_card_that_cannot_be_had_is_not_needed(server):
    server.hub.faults.append(Fault("GET", CARD, status(403)))
    loads()
    (problem,) = zoo.verify(REPOSITORY)
    assert problem.startswith("README.md: not the card that config.json gives; python -m zoo cards")
    server.hub.faults.clear()
    assert zoo.verify(REPOSITORY) == []


def changed_config(**changes) -> bytes:
    return json.dumps({**json.loads(CONTENT[CONFIG]), **changes}).encode()


def with_weights(data: bytes) -> dict[str, bytes]:
    """Return a checkpoint with these weights and a config that names their hash."""
    return {**CONTENT, WEIGHTS: data, CONFIG: changed_config(sha256=hashlib.sha256(data).hexdigest())}


def tensors(change) -> bytes:
    """Return the weights after ``change`` was done to their tensors."""
    state = safetensors.torch.load(CONTENT[WEIGHTS])
    change(state)
    return safetensors.torch.save(state)


def header(text: str, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text.encode() + bytes(64)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 1\n" % (b"0" * 64)

TAMPERED = tensors(lambda state: state["fc.bias"].add_(1))

WRONG = {
    "weights tampered with": (
        {**CONTENT, WEIGHTS: TAMPERED},
        f"{hashlib.sha256(TAMPERED).hexdigest()}, config.json says {hashlib.sha256(CONTENT[WEIGHTS]).hexdigest()}",
    ),
    "config of another checkpoint": (
        {**CONTENT, CONFIG: (PRETRAINED / "mnist_cnn6_conv" / CONFIG).read_bytes()},
        "has sha256 .*, config.json says",
    ),
    "an LFS pointer": ({**CONTENT, WEIGHTS: POINTER}, "has sha256 .*, config.json says"),
    "an LFS pointer with its hash": (with_weights(POINTER), "is not a safetensors file"),
    "HTML": (with_weights(b"<!doctype html><html></html>"), "is not a safetensors file"),
    "a pickle": (with_weights(b"\x80\x04\x95" + pickle.dumps({"fc.bias": [0.0]})), "is not a safetensors file"),
    "a missing tensor": (with_weights(tensors(lambda state: state.pop("fc.bias"))), "missing fc.bias"),
    "an additional tensor": (
        with_weights(tensors(lambda state: state.update(more=torch.zeros(1)))),
        "unexpected more",
    ),
    "a misshapen tensor": (
        with_weights(tensors(lambda state: state.update({"fc.bias": torch.zeros(9)}))),
        r"fc.bias has shape \(9,\), not \(10,\)",
    ),
    "another dtype": (
        with_weights(tensors(lambda state: state.update({"fc.bias": torch.zeros(10).double()}))),
        "fc.bias has dtype torch.float64, not torch.float32",
    ),
    "a header of 2 GiB": (with_weights(header("{}", claimed=2**31)), "its header does not fit"),
    "negative offsets": (
        with_weights(header('{"fc.bias": {"dtype": "F32", "shape": [10], "data_offsets": [-40, 0]}}')),
        "is not a safetensors file",
    ),
    "overlapping offsets": (
        with_weights(
            header(
                '{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}, '
                '"b": {"dtype": "F32", "shape": [12], "data_offsets": [16, 64]}}'
            )
        ),
        "is not a safetensors file",
    ),
    "schema of the future": ({**CONTENT, CONFIG: changed_config(schema=99)}, "schema 99, .* update decoupled-zoo"),
    "unknown operator": (
        {**CONTENT, CONFIG: changed_config(operator={"name": "tahn_cosine"})},
        "unknown operator 'tahn_cosine'. Did you mean 'tanh_cosine'",
    ),
    "no config": ({WEIGHTS: CONTENT[WEIGHTS]}, "has no config.json: it is no checkpoint of decoupled-zoo"),
    "no weights": ({CONFIG: CONTENT[CONFIG]}, "has no model.safetensors: it is no checkpoint of decoupled-zoo"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_the_repository_is_named_and_never_loaded(server, case):
    files, message = WRONG[case]
    put(server, files)
    refuses(message)
    refuses(message)
    put(server, CONTENT)
    loads()


def test_a_repository_or_revision_that_does_not_exist_is_told(server):
    with pytest.raises(zoo.HubError, match="me/nothing: .* shows no such repository. Its name is " + REFUSED):
        zoo.load("me/nothing")
    for revision in ("", 3):
        with pytest.raises(ValueError, match=f"revision is the name of a commit, branch or tag, got {revision!r}"):
            zoo.load(REPOSITORY, revision=revision)
    refuses("at nowhere: the repository has no such revision; name a commit, branch or tag", revision="nowhere")
    refuses("at 0{40}: the repository has no such revision", revision="0" * 40)
    with pytest.raises(ValueError, match="no checkpoint folder me/../../etc/passwd; check the path"):
        zoo.load("me/../../etc/passwd")


def test_a_path_that_leaves_the_folder_is_not_followed(server, tmp_path):
    put(server, {**CONTENT, "../../../../evil": b"evil"})
    loads()
    assert not list(tmp_path.rglob("evil"))


def test_a_commit_in_the_cache_needs_no_request_and_a_branch_follows_the_hub(server):
    first = server.hub.find(REPOSITORY, "main")
    loads()
    folder = zoo.save(zoo.build("cnn6", "tanh_cosine", in_chans=1, input_size=8).eval(), Path(server.hub.root) / NAME)
    second = put(server, {file: (folder / file).read_bytes() for file in FILES})
    assert not torch.equal(zoo.load(REPOSITORY)(IMAGES), EXPECTED)
    assert torch.equal(zoo.load(REPOSITORY, revision=second)(IMAGES), zoo.load(folder)(IMAGES))
    server.hub.requests.clear()
    loads(revision=first)
    assert not server.hub.requests
    with pytest.raises(ValueError, match="revision='main' is that of a Hub repository .owner/name., and"):
        zoo.load(NAME, revision="main")


def test_another_commit_than_the_pinned_one_is_refused(server):
    first = server.hub.find(REPOSITORY, "main")
    loads()
    other = (PRETRAINED / "digits_cnn6_sphere_cosine").iterdir()
    second = put(server, {path.name: path.read_bytes() for path in other})
    refs = server.hub.root / REPOSITORY / "commits"
    (refs / "1".zfill(40)).write_text((refs / second).read_text())

    def lie(handler: Handler) -> None:
        handler.answer(200, {"id": REPOSITORY, "sha": first, "siblings": []})

    server.hub.faults.append(Fault("GET", "/api/models", lie))
    refuses("the Hub calls the commit", revision="1".zfill(40))
    server.hub.faults.clear()
    server.hub.faults.append(Fault("HEAD", CONFIG, body(lambda data: b"")))
    refuses(f"the Hub sent config.json of commit {second} in place of 0+1", revision="1".zfill(40))


def test_both_files_are_of_one_commit_though_the_branch_moves_between(server):
    other = zoo.save(zoo.build("cnn6", "tanh_cosine", in_chans=1, input_size=8).eval(), Path(server.hub.root) / NAME)

    def move(handler: Handler) -> bool:
        put(server, {file: (other / file).read_bytes() for file in FILES})
        return True

    server.hub.faults.append(Fault("GET", WEIGHTS, move, times=1))
    loads()


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE"])
def test_offline_makes_no_request(server, monkeypatch, how):
    settings = {"local_files_only": True} if how == "local_files_only" else {}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    refuses("is not in the Hub's cache, .* and no request is made", seconds=1, **settings)
    assert not server.hub.requests
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    loads()
    server.hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
    loads(**settings)
    assert not server.hub.requests


def test_without_a_network_the_cache_is_taken_with_a_warning(server):
    server.server_close()
    server.shutdown()
    refuses("cannot be had from http", seconds=10)
    with serving(server.hub.root, server.server_port):
        loads()
    huggingface_hub.close_session()
    with pytest.warns(UserWarning, match="cannot be had from .*; the commit in the cache is taken, [0-9a-f]{40}$"):
        loads()


def test_a_cache_that_cannot_be_written_is_told(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/proc/cache")
    refuses("cannot be written into the Hub's cache, /proc/cache .*; HF_HOME moves it")


def test_a_process_killed_in_mid_download_leaves_nothing_that_is_believed(server, tmp_path):
    asked = threading.Event()

    def half(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT[WEIGHTS])))
        handler.end_headers()
        handler.wfile.write(CONTENT[WEIGHTS][:1000])
        handler.wfile.flush()
        asked.set()
        time.sleep(60)

    server.hub.faults.append(Fault("GET", WEIGHTS, half, times=1))
    process = run(LOAD, server, tmp_path / "cache")
    assert asked.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    loads()
    loads(local_files_only=True)


def test_eight_processes_load_the_same_name_at_once(server, tmp_path):
    processes = [run(LOAD, server, tmp_path / "cache") for _ in range(8)]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [float(text.splitlines()[-1]) for text in printed] == pytest.approx([TOTAL] * 8, rel=1e-6), printed


def test_a_full_disk_is_told_and_leaves_nothing_that_is_believed(server, tmp_path):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); "
    process = run(limited + LOAD, server, tmp_path / "cache")
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 1, printed
    assert re.search("HubError: model.safetensors of me/.* cannot be written into the Hub's cache", printed), printed
    loads()


def test_a_cache_that_has_everything_serves_where_nothing_can_be_written(server, tmp_path):
    loads()
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
    printed = run(limited + LOAD, server, tmp_path / "cache").communicate(timeout=120)[0]
    assert float(printed.splitlines()[-1]) == pytest.approx(TOTAL, rel=1e-6), printed


def test_no_loading_path_runs_code_from_a_checkpoint():
    runs_code = r"pickle|(?<!safetensors\.)torch\.load\b|trust_remote_code|(?<!\.)\b(eval|exec)\(|load_state_dict_from"
    wings = [ROOT / "zoo" / wing for wing in ("architectures", "checkpoints", "hub", "models")]
    files = [*(ROOT / "zoo").glob("*.py"), *(file for wing in wings for file in wing.glob("*.py"))]
    assert len(files) > 15
    for file in files:
        # Others' weights in a .pth file, which a person names; no checkpoint is loaded so.
        text = file.read_text(encoding="utf-8").replace('torch.load(file, "cpu", weights_only=True)', "")
        assert not re.search(runs_code, text), file


WATCHED = """
import sys, timm, torch, zoo
events = []
sys.addaudithook(lambda event, _: events.append(event) if event == "pickle.find_class" else None)
{code}
print("unpickled:", len(events))
"""


@pytest.mark.parametrize(
    ("code", "unpickles"),
    [
        ("zoo.load({repository!r}); zoo.load({folder!r}); zoo.load_untrained({repository!r})", False),
        ("timm.create_model('hf-hub:' + {repository!r}, pretrained=True)", False),
        ("timm.create_model('local-dir:' + {folder!r}, pretrained=True)", False),
        ("torch.hub.load('.', 'checkpoint', {folder!r}, source='local')", False),
        ("import pickle; pickle.loads(pickle.dumps(zoo.Metric))", True),
    ],
)
def test_nothing_is_unpickled_while_a_checkpoint_is_loaded(server, tmp_path, code, unpickles):
    code = code.format(repository=REPOSITORY, folder=str(PRETRAINED / NAME))
    printed = run(WATCHED.format(code=code), server, tmp_path / "other").communicate(timeout=120)[0]
    found = re.fullmatch(r"unpickled: (\d+)", printed.splitlines()[-1])
    assert found and (int(found[1]) > 0) == unpickles, printed
