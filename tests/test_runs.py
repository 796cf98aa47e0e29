"""What a run records, the private names of Lightning, and a run's folder."""

import ast
import dataclasses
import operator
import re
import types
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

import zoo
from zoo.checkpoints.config import RUN_RECORD
from zoo.resuming import lightning_internals
from zoo.resuming.folder import has_run, left_by, refuse_folder_of_another_run, usable_checkpoint
from zoo.resuming.lightning_internals import PRIVATE, OpenWeightAveraging
from zoo.resuming.record import RunRecord, record_in, record_of

EARLIER = Path(__file__).parent / "earlier_run" / "last.ckpt"
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", PRIVATE)
def test_lightning_has_the_private_names_that_are_used(name):
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    objects = types.SimpleNamespace(
        trainer=trainer,
        module=L.LightningModule(),
        strategy=ModelParallelStrategy(),
        averaging=OpenWeightAveraging(),
    )
    # The error names the one that has gone.
    operator.attrgetter(name)(objects)


# Private names that are not Lightning's.
OTHERS = {
    "torch": {"_C", "_functorch", "_is_amx_tile_supported", "_is_avx512_bf16_supported"},
    "argparse": {"_SubParsersAction"},
}


def private_names(file: Path) -> set[str]:
    """Return the private attributes that a file uses of what is neither its own object nor its own class's."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-zA-Z]\w*", node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.add(node.attr)
    return found - set().union(*OTHERS.values())


def test_private_names_of_lightning_stand_in_one_file_and_are_listed():
    internals = Path(lightning_internals.__file__)
    elsewhere = {file.name: names for file in (ROOT / "zoo").rglob("*.py") if (names := private_names(file))}
    # A data module takes over what another one has read; torch marks compiled networks.
    assert elsewhere.pop("module.py") == {"_sets"}
    used = elsewhere.pop(internals.name)
    assert elsewhere == {}
    # The average's own names are those of its base class.
    own = {name.rpartition(".")[2] for name in PRIVATE if name.startswith("averaging.")}
    assert used | own == {name.rpartition(".")[2] for name in PRIVATE}
    assert all(f"self.{name}" in internals.read_text(encoding="utf-8") for name in own)


def test_a_record_reads_what_it_wrote_and_what_earlier_versions_wrote():
    record = record_of(EARLIER)
    assert (record.epochs, record.max_epochs, record.seed, record.started_from) == (1, 2, 3, None)
    assert record.spec.architecture == "cnn9" and record.data["name"] == "Digits" and not record.is_finished
    written = record.to_dict()
    assert RunRecord.from_dict(written) == record
    # These came later than the first version.
    for name in ("source", "settings"):
        del written[name]
    written["training"] = {name: value for name, value in record.training.items() if name != "seed"}
    old = RunRecord.from_dict(written)
    assert (old.source, old.settings, old.seed) == (None, None, -1)


def test_a_record_that_this_version_does_not_read_is_told():
    fields = record_of(EARLIER).to_dict()
    fields["spec"] = {**fields["spec"], "operator": {**fields["spec"]["operator"], "temperature": 1.0}}
    with pytest.raises(ValueError, match="run.ckpt was not written by .*that this one does not read .*temperature"):
        record_in({RUN_RECORD: fields}, "run.ckpt")


def test_a_run_without_an_end_is_never_finished():
    record = record_of(EARLIER)
    finished = {limit: dataclasses.replace(record, max_epochs=limit).is_finished for limit in (-1, 1, 2)}
    assert finished == {-1: False, 1: True, 2: False}


@pytest.mark.parametrize("missing", ["spec", "model", "data", "trainer", "training"])
def test_a_record_without_what_is_needed_is_told(missing):
    fields = record_of(EARLIER).to_dict()
    del fields[missing]
    with pytest.raises(ValueError, match=f"run.ckpt was not written by .*'{missing}'"):
        record_in({RUN_RECORD: fields}, "run.ckpt")


def test_a_record_of_a_network_of_timm_names_its_architecture(tmp_path):
    spec = zoo.build("resnet10t", "tanh_cosine", num_classes=2).spec
    fields = {**record_of(EARLIER).to_dict(), "spec": spec.to_dict()}
    assert RunRecord.from_dict(fields).spec == spec


def test_a_folder_knows_its_run(tmp_path):
    assert not has_run(tmp_path) and left_by("any", tmp_path) is None
    refuse_folder_of_another_run(tmp_path, None, "best.ckpt")
    (tmp_path / "previous.ckpt").write_bytes(EARLIER.read_bytes())
    last = tmp_path / "last.ckpt"
    with pytest.warns(UserWarning, match="going on with the one before it"):
        assert usable_checkpoint(last) == str(tmp_path / "previous.ckpt")
        assert left_by(record_of(EARLIER).settings, tmp_path) == last
    last.write_bytes(EARLIER.read_bytes())
    assert has_run(tmp_path) and left_by("another", tmp_path) is None
    refuse_folder_of_another_run(tmp_path, str(last), "best.ckpt")
    with pytest.raises(FileExistsError, match="is of another command: python train.py fit .* give --ckpt_path"):
        refuse_folder_of_another_run(tmp_path, None, "best.ckpt")
