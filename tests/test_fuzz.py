"""Whatever is changed in a checkpoint folder, ``zoo.load`` gives the same model or our own error, and soon."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import zoo
from zoo.hub.repository import CONFIG, WEIGHTS

# 5,000 mutations in all; hypothesis shrinks what fails to the smallest that does.
EXAMPLES = 1250
SETTINGS = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A small checkpoint, put back before each mutation."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        model = zoo.build("resnet20", {"name": "tanh_cosine", "radius_mode": "learned"}, in_chans=1, input_size=8,
                          widths=[2, 2, 3], class_names=["a", "b", "c"]).eval()  # fmt: skip
        yield zoo.save(model, Path(scratch) / "original", metrics=[zoo.Metric("accuracy", 0.5, "noise", "test", 2)])


def check(folder: Path, config: bytes, weights: bytes, same: bool) -> None:
    """Load a folder of this content; where that succeeds and ``same`` is true, compare its answers."""
    changed = folder.parent / "changed"
    changed.mkdir(exist_ok=True)
    (changed / CONFIG).write_bytes(config)
    (changed / WEIGHTS).write_bytes(weights)
    try:
        model = zoo.load(changed)
    except zoo.CheckpointError as error:
        assert len(str(error)) > 20
        return
    finally:
        shutil.rmtree(changed)
    if same:
        assert torch.equal(model(IMAGES), zoo.load(folder)(IMAGES))
    else:
        # Another reader of the format finds the same in the file.
        stored = safetensors.torch.load(weights)
        assert all(torch.equal(stored[name], value) for name, value in model.network.state_dict().items())


def hashed(config: bytes, weights: bytes) -> bytes:
    """Return the config with the hash of other weights, which a careful liar would write."""
    return json.dumps({**json.loads(config), "sha256": hashlib.sha256(weights).hexdigest()}).encode()


MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "repeat"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, mutations: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, content in mutations:
        place = round(share * max(0, len(data) - 1))
        if kind == "flip":
            data = data[:place] + bytes([(data[place : place + 1] or b"\0")[0] ^ content[0]]) + data[place + 1 :]
        elif kind == "cut":
            data = data[:place] + data[place + content[0] :]
        elif kind == "insert":
            data = data[:place] + content + data[place:]
        else:
            data = data[:place] + data[place : place + content[0]] + data[place:]
    return data


@SETTINGS
@given(mutations=MUTATIONS)
def test_mutated_weights_are_never_loaded(folder, mutations):
    weights = (folder / WEIGHTS).read_bytes()
    check(folder, (folder / CONFIG).read_bytes(), mutated(weights, mutations), same=True)


@SETTINGS
@given(mutations=MUTATIONS, near_the_header=st.booleans())
def test_mutated_weights_of_which_the_hash_is_told_are_read_strictly(folder, mutations, near_the_header):
    weights = (folder / WEIGHTS).read_bytes()
    length = 8 + int.from_bytes(weights[:8], "little") if near_the_header else len(weights)
    weights = mutated(weights[:length], mutations) + weights[length:]
    check(folder, hashed((folder / CONFIG).read_bytes(), weights), weights, same=False)


@SETTINGS
@given(mutations=MUTATIONS)
def test_a_mutated_config_gives_a_model_or_our_error(folder, mutations):
    check(folder, mutated((folder / CONFIG).read_bytes(), mutations), (folder / WEIGHTS).read_bytes(), same=False)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 40)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["resnet20", "cnn6", "resnet50", "decoupled_zoo", "conv", "tanh_cosine", "operator", "pretrained"]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def replaced(config: Any, path: list[float], value: Any) -> Any:
    """Return ``config`` with the value that lies on a path of places, each a share of what there is, replaced."""
    if not path or not isinstance(config, dict | list) or not config:
        return value
    keys = list(config) if isinstance(config, dict) else range(len(config))
    key = keys[round(path[0] * (len(keys) - 1))]
    changed = config.copy()
    changed[key] = replaced(config[key], path[1:], value)
    return changed


@SETTINGS
@given(path=st.lists(st.floats(0, 1), min_size=1, max_size=3), value=VALUES)
def test_any_value_in_the_config_gives_a_model_or_our_error(folder, path, value):
    config = replaced(json.loads((folder / CONFIG).read_text()), path, value)
    check(folder, json.dumps(config).encode(), (folder / WEIGHTS).read_bytes(), same=False)
