"""Publishing to a Hub and loading from it again: by zoo.load, timm and torch.hub, with the real client."""

import json
import re
import shlex
import shutil
import sys

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard

import zoo
from benchmarks import loading
from operators import DecoupledConv2d
from tests.hub_checkpoint import EXPECTED, IMAGES, LOAD, TOTAL
from tests.hub_fixture import CONTENT, NAME, REPOSITORY, ROOT, hang_up, put, run, run_words
from tests.hub_server import Fault, silence, status
from tests.test_readme import BASH
from zoo.checkpoints.catalogue import PRETRAINED
from zoo.checkpoints.publishing import missing, publish
from zoo.commands import console as command_line
from zoo.hub.repository import CARD, CONFIG, FILES, WEIGHTS
from zoo.markdown import filled

# The client uploads files in a way that its own HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_what_is_published_is_loaded_by_everyone_with_the_same_logits(server, monkeypatch, tmp_path):
    commit = publish(NAME, "me/new")
    assert re.fullmatch("[0-9a-f]{40}", commit)
    held = server.hub.files("me/new", commit)
    assert {file: server.hub.blob(held[file]["sha256"]).read_bytes() for file in FILES} == CONTENT
    assert torch.equal(zoo.load("me/new", revision=commit)(IMAGES), EXPECTED)
    monkeypatch.setattr("zoo.checkpoints.catalogue.PUBLISHED", tmp_path / "published.json")
    (tmp_path / "published.json").write_text(json.dumps({"my_net": {"repository": "me/new", "commit": commit}}))
    assert torch.equal(zoo.load("my_net")(IMAGES), EXPECTED)
    spec = zoo.load(NAME).spec
    normalised = (IMAGES - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    network = timm.create_model(f"hf-hub:me/new@{commit}", pretrained=True).eval()
    torch.testing.assert_close(network(normalised), EXPECTED)


def test_a_partial_conversion_is_published_as_such(server, tmp_path):
    model = zoo.build("test_efficientnet", "tanh_cosine", keep=["conv_stem"], num_classes=3, input_size=64).eval()
    metrics = [zoo.Metric("accuracy", 0.5, "a", "test", 2)]
    training = {"command": "none", "commit": "none", "hardware": "none"}
    folder = tmp_path / "a_test_efficientnet_tanh_cosine"
    commit = publish(zoo.save(model, folder, metrics=metrics, training=training, licence="mit"), "me/part")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(zoo.load("me/part", revision=commit)(images), model(images))
    network = timm.create_model(f"hf-hub:me/part@{commit}", pretrained=True).eval()
    torch.testing.assert_close(network((images - model.mean) / model.std), model(images))


@pytest.mark.parametrize("operator", ["conv", {"name": "ball_cosine", "weighting": "linear", "radius": 3.0}])
@pytest.mark.parametrize("architecture", ["resnet20", "test_resnet"])
def test_timm_loads_a_folder_with_its_operator_and_settings(tmp_path, architecture, operator):
    model = zoo.build(architecture, operator, class_names=["a", "b", "c"], input_size=64).eval()
    folder = zoo.save(model, tmp_path / "net")
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(network((images - model.mean) / model.std), model(images))
    assert timm.data.resolve_model_data_config(network)["mean"] == pytest.approx(model.spec.mean)
    fresh = timm.create_model(f"local-dir:{folder}")
    assert [type(module) for module in fresh.modules()] == [type(module) for module in network.modules()]
    if operator != "conv":
        with pytest.warns(UserWarning, match="fresh classifier for 5 classes"):
            other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5)
        assert other((images - model.mean) / model.std).shape == (2, 5)
        features = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
        assert features((images - model.mean) / model.std).shape == (2, network.num_features)
        with pytest.raises(ValueError, match="cache_dir is not for checkpoints"):
            timm.create_model(f"local-dir:{folder}", pretrained=True, cache_dir="here")
        with pytest.raises(TypeError, match="net is built as its checkpoint says, so bogus=1 is refused"):
            timm.create_model(f"local-dir:{folder}", pretrained=True, bogus=1)


@pytest.mark.parametrize("operator", ["conv", "tanh_cosine"])
@pytest.mark.parametrize("architecture", ["resnet20", "test_resnet"])
def test_timm_loads_no_damaged_weights(tmp_path, architecture, operator):
    folder = zoo.save(zoo.build(architecture, operator, input_size=64).eval(), tmp_path / "net")
    weights = bytearray((folder / WEIGHTS).read_bytes())
    weights[-10] ^= 64
    (folder / WEIGHTS).write_bytes(weights)
    with pytest.raises(zoo.CheckpointError, match="has sha256 .*: it is damaged"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_publishing_waits_for_no_one_for_ever(server, monkeypatch):
    monkeypatch.setattr("zoo.checkpoints.publishing.SECONDS_TO_PUBLISH", 1)
    monkeypatch.setattr("zoo.checkpoints.publishing.LEAST_BYTES_A_SECOND", 10_000_000)
    server.hub.faults.append(Fault("POST", "/preupload/", silence(60)))
    with pytest.raises(zoo.HubError, match="did not answer for me/new in time"):
        publish(NAME, "me/new")


@pytest.mark.parametrize("repository", ["new", "me/new/er", "me/n w", "../new", "me/"])
def test_a_repository_of_no_legal_name_is_refused_before_anything(server, repository):
    server.hub.requests.clear()
    with pytest.raises(ValueError, match="a repository is called owner/name"):
        publish(NAME, repository, dry_run=True)
    with pytest.raises(ValueError, match="'nowhere/net' is neither a folder nor one of cifar10_resnet20_conv"):
        publish("nowhere/net", "me/new", dry_run=True)
    for revision in ("", "a b", "a..b", "../x", "a\nb", "/a", "0" * 40):
        with pytest.raises(ValueError, match="revision is the name of a branch, in letters"):
            publish(NAME, "me/new", revision=revision, dry_run=True)
    assert not server.hub.requests


def test_timm_lists_our_networks():
    assert "resnet20" in timm.list_models("*resnet20*")
    with pytest.raises(ValueError, match="'decoupled_zoo' is built from its checkpoint alone"):
        timm.create_model("decoupled_zoo")


def test_publishing_the_same_again_makes_no_commit(server):
    first = publish(NAME, "me/new")
    server.hub.requests.clear()
    assert publish(NAME, "me/new") == first
    assert not any("/commit/" in request for request in server.hub.requests)


def test_a_branch_and_a_private_repository_are_made_on_request(server):
    main = publish(NAME, "me/secret", private=True)
    other = publish("digits_cnn6_conv", "me/secret", private=True, revision="plain")
    assert other != main == server.hub.find("me/secret", "main")
    assert zoo.load("me/secret", revision="plain").spec.operator is None
    assert huggingface_hub.HfApi().model_info("me/secret").private
    with pytest.raises(ValueError, match="me/digits_cnn6_tanh_cosine is there, and public; make it private"):
        publish(NAME, REPOSITORY, private=True)


STEPS = ["/preupload/", r"\.git/info/lfs", "^/lfs/", "/commit/"]


# What is cut off, the client tries again for half a minute.
@pytest.mark.parametrize(("how", "step"), [*(("refused", step) for step in STEPS), ("cut off", "^/lfs/")])
def test_publishing_that_is_interrupted_leaves_the_repository_as_it_was(server, how, step):
    before = server.hub.find(REPOSITORY, "main")
    act, message = {
        "refused": (status(403), "me/.* is misspelt or not yours to write"),
        "cut off": (hang_up, "the Hub at .* did not take me/.*. Either the whole commit was made, or what was"),
    }[how]
    server.hub.faults += [Fault("POST", step, act), Fault("PUT", step, act)]
    with pytest.raises(zoo.HubError, match=message):
        publish("digits_cnn6_conv", REPOSITORY)
    assert any(re.search(step, request.split()[1]) for request in server.hub.requests)
    server.hub.faults.clear()
    assert server.hub.find(REPOSITORY, "main") == before
    assert torch.equal(zoo.load(REPOSITORY)(IMAGES), EXPECTED)


def test_a_commit_that_came_meanwhile_is_not_mixed_with_ours(server):
    config = {CONFIG: CONTENT[CONFIG].replace(b"digits", b"others")}

    def come_between(handler) -> bool:
        put(server, {**CONTENT, **config})
        return True

    server.hub.faults.append(Fault("POST", "/commit/", come_between, times=1))
    with pytest.raises(zoo.HubError, match="did not take me/.*412"):
        publish("digits_cnn6_conv", REPOSITORY)
    assert torch.equal(zoo.load(REPOSITORY)(IMAGES), EXPECTED)


def test_a_folder_of_the_same_name_is_not_taken_for_the_hubs(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PRETRAINED / "digits_cnn6_conv", REPOSITORY)
    assert zoo.load(REPOSITORY).spec.operator is None
    assert torch.equal(zoo.load(f"hf-hub:{REPOSITORY}")(IMAGES), EXPECTED)
    assert isinstance(timm.create_model(f"hf-hub:{REPOSITORY}", pretrained=True).features[0], DecoupledConv2d)


def test_what_is_missing_is_listed_and_nothing_is_sent(server, tmp_path):
    folder = zoo.save(zoo.load(NAME), tmp_path / "mine", licence="not stated")
    problems = "\n".join(missing(folder))
    for problem in (
        "no accuracy",
        "licence .* not stated",
        "training's command, commit, hardware is not recorded",
        "called mine and its config.json says mine; both .* <data>_cnn6_tanh_cosine",
    ):
        assert re.search(problem, problems)
    folder = shutil.copytree(PRETRAINED / NAME, tmp_path / NAME)
    (folder / CARD).write_text("another")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "fingerprint": [[0.0] * 10] * 2}))
    assert [problem.split(":")[0] for problem in missing(folder)] == ["config.json", "README.md"]
    (folder / WEIGHTS).write_bytes(b"")
    assert len(missing(folder)) == 1 and "sha256" in missing(folder)[0]
    server.hub.requests.clear()
    with pytest.raises(ValueError, match=f"{folder} is not published, for:\n  .*sha256"):
        publish(folder, "me/new")
    assert not server.hub.requests


@pytest.mark.parametrize("name", zoo.list_checkpoints())
def test_every_embedded_checkpoint_is_fit_to_be_published(name):
    assert missing(PRETRAINED / name) == []


@pytest.mark.parametrize("name", zoo.list_checkpoints())
def test_the_metadata_of_a_card_is_the_hubs(name):
    data = ModelCard.load(PRETRAINED / name / CARD).data
    # The Hub would take a tag for the library, too.
    assert data.library_name is None and not {"timm", "transformers", "pytorch", "keras"} & set(data.tags)
    assert data.pipeline_tag == "image-classification" and data.license
    assert re.fullmatch("[a-z0-9.-]+", data.license_name or "none")
    measured = {(result.dataset_split, result.metric_value) for result in data.eval_results}
    config = json.loads((PRETRAINED / name / CONFIG).read_text())
    assert measured == {(metric["split"], metric["value"]) for metric in config["metrics"]}
    assert (data.datasets == ["ylecun/mnist"]) == name.startswith("mnist_")


def test_the_command_prints_the_commit_and_a_dry_run_asks_nobody(server, monkeypatch, capsys):
    def command(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["zoo", "publish", NAME, "--repo-id", "me/new", *words])
        command_line.main()
        return capsys.readouterr().out

    server.hub.requests.clear()
    assert command("--dry-run") == f"{NAME} is fit to be published\n" and not server.hub.requests
    commit = re.fullmatch(r"me/new has it; to load it: zoo.load\('me/new', revision='(.*)'\)\n", command())[1]
    assert commit == server.hub.find("me/new", "main")


def test_without_a_network_publishing_is_refused_in_words(server):
    server.server_close()
    server.shutdown()
    with pytest.raises(zoo.HubError, match="the Hub at http.* did not take me/new .*; publish again to see"):
        publish(NAME, "me/new")


def test_a_process_told_by_the_environment_loads_from_the_hub(server, tmp_path):
    process = run(LOAD, server, tmp_path / "other")
    printed = process.communicate(timeout=120)[0]
    assert float(printed.splitlines()[-1]) == pytest.approx(TOTAL, rel=1e-6), printed


def test_torch_hub_fetches_what_is_too_large_to_embed_at_the_recorded_commit(server, tmp_path):
    commit = publish(NAME, "me/new")
    publish("digits_cnn6_conv", "me/new")
    clone = tmp_path / "clone"
    for part in ("operators", "zoo"):
        shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("*_cnn6_*", "*_resnet20_*"))
    shutil.copy(ROOT / "hubconf.py", clone)
    published = {"my_net": {"repository": "me/new", "commit": commit}}
    (clone / "zoo/pretrained/published.json").write_text(json.dumps(published))
    code = (
        f"import sys; sys.path.remove(''); import torch; m = torch.hub.load({str(clone)!r}, 'my_net', source='local')"
    )
    process = run(f"{code}; print(m(torch.ones(1, 1, 8, 8)).sum().item())", server, tmp_path / "other")
    printed = process.communicate(timeout=120)[0]
    assert float(printed.splitlines()[-1]) == pytest.approx(TOTAL, rel=1e-6), printed


def test_the_commands_of_the_readme_run(server, tmp_path):
    (block,) = [block for block in BASH if "zoo publish" in block]
    first, settings, *commands = block.strip().splitlines()
    assert first.startswith("python -m tests.hub_server") and settings.startswith("export HF_ENDPOINT=")
    for command in commands:
        words = shlex.split(command)
        process = run_words([sys.executable, *words[1:]], server, tmp_path / "other")
        printed = process.communicate(timeout=120)[0]
        assert process.returncode == 0, printed
    assert printed.endswith("tanh_cosine\n")


def test_the_page_on_checkpoints_names_tests_that_there_are_and_what_was_measured():
    page = loading.PAGE.read_text(encoding="utf-8")
    files = ("test_checkpoints", "test_hub_faults", "test_publish", "test_fuzz", "test_readers", "test_reported")
    tests = "".join((ROOT / "tests" / f"{name}.py").read_text(encoding="utf-8") for name in files)
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 20 and not [name for name in named if f"def {name}(" not in tests]
    assert page == filled(page, {"loading": loading.table()})
