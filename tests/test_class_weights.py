"""Classes of very different numbers of images: weights of the loss, and what is measured of each class."""

import json
import re
from pathlib import Path

import lightning as L
import numpy
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score
from sklearn.utils.class_weight import compute_class_weight

import zoo
from tests.command_line import SHORT, run  # noqa: F401
from tests.image_files import write_images
from zoo.commands import console as command_line
from zoo.data import DATA, build_data
from zoo.training.classifier import Classifier

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")

UNEVEN = {"train/many": 24, "train/few": 3, "train/some": 9, "val/many": 5, "val/few": 2, "val/some": 3}


def uneven(root, **arguments):
    write_images(root, UNEVEN)
    return build_data("ImageFolder", root=str(root), input_size=8, batch_size=12, **arguments)


def test_auto_is_the_inverse_frequency(tmp_path):
    data = uneven(tmp_path, class_weights="auto")
    labels = data.split("train").labels
    expected = compute_class_weight("balanced", classes=numpy.arange(3), y=labels.numpy())
    torch.testing.assert_close(data.loss_weights(), torch.tensor(expected, dtype=torch.float32))
    assert data.loss_weights()[labels].mean().item() == pytest.approx(1)
    assert build_data("ImageFolder", root=str(tmp_path)).loss_weights() is None


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 0.0], [1.0, 2.0, -1.0], [1.0, 2.0, float("nan")], [1.0] * 4])
def test_weights_that_do_not_fit_are_refused(tmp_path, weights):
    with pytest.raises(
        ValueError, match='class_weights is "auto", or .* for each of the 3 classes, .* few, many, some'
    ):
        uneven(tmp_path, class_weights=weights).loss_weights()


@pytest.mark.parametrize("weights", [None, "auto", [0.5, 1.0, 4.0]])
def test_the_training_loss_is_weighted_and_the_others_are_not(tmp_path, weights):
    data = uneven(tmp_path, class_weights=weights, augment="none")
    classifier = Classifier("cnn6", "conv", learning_rate=1e-9, weight_decay=0.0)
    losses = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            module.model.eval()
            images, labels = batch[:2]
            factors = torch.ones(3) if weights is None else data.loss_weights()
            each = F.cross_entropy(module.training_forward(images).double(), labels, reduction="none")
            losses["expected"] = (factors[labels] * each).mean().item()
            losses["logged"] = module.training_step((images, labels), 0).item()

    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=1, callbacks=[Watch()], **settings)
    trainer.fit(classifier, datamodule=data)
    assert losses["logged"] == pytest.approx(losses["expected"], rel=1e-5)
    (found,) = trainer.validate(classifier, datamodule=data, verbose=False)
    images, labels = (torch.cat(parts) for parts in zip(*data.evaluation_batches("val"), strict=True))
    logits = classifier.model.eval()(images)
    assert found["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert found["val_balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))


def test_every_class_has_the_same_part_of_the_gradient_however_small_the_batches_are(tmp_path):
    data = uneven(tmp_path, class_weights="auto")
    labels = data.split("train").labels
    classifier = Classifier("cnn6", "conv")
    classifier.loss_weights = data.loss_weights()
    # The images are the logits, and nothing is logged.
    classifier.training_forward = lambda images: images
    classifier.log = lambda *arguments, **settings: None
    for size in (1, 5, len(labels)):
        shares = torch.zeros(3)
        for batch in labels[torch.randperm(len(labels))].split(size):
            logits = torch.zeros(len(batch), 3, 1, 1, requires_grad=True)
            loss = classifier.training_step((logits, batch[:, None, None]), 0)
            (gradient,) = torch.autograd.grad(loss, logits)
            shares.index_add_(0, batch, gradient.abs().sum((1, 2, 3)) * len(batch))
        torch.testing.assert_close(shares, shares.mean().expand(3))


def train(run, *words):  # noqa: F811
    write_images(Path("photos"), UNEVEN)
    words = ["--data", "ImageFolder", "--data.root", "photos", "--data.input_size", "8", *words]
    return run("fit", *SHORT, "--checkpoint.dirpath", "run", *words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "classes are uneven: many has 24 training images, few 3; --data.class_weights auto"),
        (["--data.class_weights", "auto"], "class weights of the training loss: few 4, many 0.5, some 1.33"),
        (["--data.class_weights", "[1, 2, 3]"], "class weights of the training loss: few 0.462, many 0.923, some 1.38"),
    ],
)
def test_what_is_done_about_uneven_classes_is_told(run, words, told):  # noqa: F811
    status, _, errors = train(run, *words, "--checkpoint.monitor", "val_balanced_accuracy")
    assert status == 0 and told in run.told(), errors


@pytest.mark.parametrize("given", ["automatic", "[1, 2]", "[1, 2, -3]"])
def test_wrong_weights_end_the_command(run, given):  # noqa: F811
    status, _, errors = train(run, "--data.class_weights", given)
    assert status == 1 and "Traceback" not in errors and given.replace("[", "").split(",")[0] in errors
    assert not Path("run").exists()


@pytest.mark.parametrize("name", DATA)
def test_every_data_set_takes_weights(name):
    assert "class_weights" in DATA[name].__init__.__annotations__


def test_test_and_measure_tell_the_accuracy_of_each_class(run):  # noqa: F811
    assert train(run)[0] == 0
    status, printed, errors = run("test", "--ckpt_path", "run/last.ckpt", "--data.root", "photos")
    assert status == 0 and "test_balanced_accuracy" in printed, errors
    status, exported, errors = run("export", "run/last.ckpt", "uneven_cnn6_tanh_cosine", main=command_line.main)
    assert status == 0, errors
    folder = Path("outputs/uneven_cnn6_tanh_cosine")
    model = zoo.load(folder)
    data = build_data("ImageFolder", root="photos", input_size=8)
    images, labels = (torch.cat(parts) for parts in zip(*data.evaluation_batches("val"), strict=True))
    named = model(images).argmax(1)
    status, measured, errors = run("measure", str(folder), "--root", "photos", main=command_line.main)
    assert status == 0, errors
    shares = recall_score(labels, named, average=None)
    for name, share, count in zip(data.class_names, shares, labels.bincount().tolist(), strict=True):
        for text in (printed, measured):
            assert re.search(rf"{name} +│ {share:.4f} +│ {count} ", text), text
    config = json.loads((folder / "config.json").read_text())
    values = {metric["name"]: metric["value"] for metric in config["metrics"] if metric["split"] == "val"}
    assert values["accuracy"] == pytest.approx(accuracy_score(labels, named))
    assert values["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, named))
    assert (
        f"| balanced_accuracy on photos, val split, 10 images | {values['balanced_accuracy']:.4f} |"
        in (folder / "README.md").read_text()
    )
    assert zoo.verify(folder, data.evaluation_batches("val"), "val") == []
