"""Data modules: every pixel and label arrives as it was stored, splits are fixed, and bad data is named."""

import collections
import contextlib
import io
import itertools
import os
import re
import types
import urllib.error

import numpy
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import DemoModel
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision import datasets

import zoo.data
import zoo.data.image_files
from tests.image_files import FOLDERS, noise, write_dataset, write_images
from zoo.commands.console import main
from zoo.data import build_data
from zoo.data.augmentation import (
    AUGMENTS,
    augment_batch,
    random_cutout,
    random_flip,
    random_light,
    random_resized_crop,
    random_shift,
)
from zoo.models.transform import ImageTransform
from zoo.randomness import uniform

SPLITS = ("train", "val", "test")

TWO = {"train/a": 2, "train/b": 2}


def draws(images, number):
    return uniform(torch.arange(len(images)), number)


def count(images, labels):
    """Count each (pixels, label), so that collections compare whatever their order."""
    return collections.Counter((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def contents(data, *splits):
    sets = [data.split(split) for split in splits]
    return sum((count(chosen.images.numpy(), chosen.labels) for chosen in sets), start=collections.Counter())


@pytest.fixture
def any_md5(monkeypatch):
    """Accept files whatever their hash, which only the authors' own files can have."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: os.path.isfile(path))


def pixels(image, in_chans):
    return numpy.atleast_3d(numpy.asarray(image.convert("L" if in_chans == 1 else "RGB"))).transpose(2, 0, 1)


def image_folder(root, **arguments):
    return build_data("ImageFolder", root=str(root), **{"input_size": 8, **arguments})


def test_digits_are_scikit_learns_each_in_one_split():
    digits, data = load_digits(), build_data("Digits")
    images = numpy.round(255 * digits.images / 16).astype(numpy.uint8)
    assert contents(data, *SPLITS) == count(images, digits.target)
    shares = numpy.bincount(digits.target) / 1797
    for split, size in zip(SPLITS, (1293, 144, 360), strict=True):
        assert data.split(split).images.shape == (size, 1, 8, 8) and data.split(split).labels.dtype == torch.int64
        assert numpy.abs(numpy.bincount(data.split(split).labels) - shares * size).max() <= 1
    train = data.split("train").images / 255
    assert abs(train.mean() - data.mean[0]) < 2e-4 and abs(train.std() - data.std[0]) < 2e-4


def test_the_split_depends_on_no_seed():
    first, second, half = (build_data("Digits", val_fraction=fraction) for fraction in (0.1, 0.1, 0.5))
    for seed, data in enumerate((first, second, half)):
        torch.manual_seed(seed)
        numpy.random.seed(seed)
        data.setup("test")
        data.setup("fit")
    assert all(torch.equal(first.split(split).images, second.split(split).images) for split in SPLITS)
    assert torch.equal(first.split("test").images, half.split("test").images) and len(half.split("val")) == 718


@pytest.mark.parametrize("name", FOLDERS)
def test_original_files_are_read_pixel_by_pixel(name, tmp_path, any_md5):
    written = write_dataset(name, tmp_path)
    data = build_data(name, root=str(tmp_path), val_fraction=0.4)
    assert contents(data, "train", "val") == count(*written["train"])
    assert numpy.bincount(data.split("val").labels).tolist() == [2] * data.num_classes
    images, labels = (torch.from_numpy(array) for array in written["test"])
    assert torch.equal(data.split("test").images, images) and torch.equal(data.split("test").labels, labels)
    assert len(data.mean) == len(data.std) == data.in_chans


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("kept", [None, 0, 0.5, 0.99])
def test_missing_and_truncated_files_are_told_with_the_cure(name, kept, tmp_path, any_md5, monkeypatch):
    write_dataset(name, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    where = f"no complete {zoo.data.DATA[name].title} under {re.escape(str(tmp_path / 'data'))} "
    for file in (tmp_path / "data" / FOLDERS[name]).iterdir():
        content = file.read_bytes()
        file.unlink() if kept is None else file.write_bytes(content[: int(kept * len(content))])
        split = "test" if file.name.startswith(("test", "t10k")) else "train"
        with pytest.raises(FileNotFoundError, match=f"{where}.*--data.root.*--data.download true.*--data ImageFolder"):
            build_data(name, root="data").split(split)
        file.write_bytes(content)
    assert len(build_data(name, root="data").split("test")) == 2 * build_data(name).num_classes


def test_data_is_downloaded_only_on_request_and_before_it_is_read(tmp_path, monkeypatch):
    def fail(self):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(datasets.MNIST, "download", fail)
    build_data("MNIST", root=str(tmp_path)).prepare_data()
    with pytest.raises(FileNotFoundError, match="no complete MNIST .*no route to host"):
        build_data("MNIST", root=str(tmp_path), download=True).prepare_data()
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: write_dataset("MNIST", tmp_path))
    batches = build_data("MNIST", root=str(tmp_path), download=True).evaluation_batches("test")
    assert sum(len(labels) for _, labels in batches) == 20


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("splits", [("train",), ("train", "val"), ("train", "test"), SPLITS])
def test_image_folders_are_read_as_they_are_split(mode, in_chans, splits, tmp_path):
    classes = ["Bee", "ant", "zebra"]
    counts = {f"{split}/{name}": 2 + len(name) % 3 for split in splits for name in reversed(classes)}
    images = write_images(tmp_path / "animals", counts, mode=mode)
    data = image_folder(tmp_path / "animals", in_chans=in_chans, val_fraction=0.5)
    assert data.class_names == classes and data.title == "animals" and len(data.mean) == len(data.std) == in_chans

    def stored(split):
        chosen = {path: image for path, image in images.items() if path.startswith(split)}
        labels = [classes.index(path.split("/")[1]) for path in chosen]
        return count([pixels(image, in_chans) for image in chosen.values()], labels)

    if "val" in splits:
        assert contents(data, "train") == stored("train") and contents(data, "val") == stored("val")
    else:
        assert contents(data, "train", "val") == stored("train")
        assert set(data.split("train").labels.tolist()) == set(data.split("val").labels.tolist()) == {0, 1, 2}
    assert contents(data, "test") == (stored("test") if "test" in splits else contents(data, "val"))


@pytest.mark.parametrize("size", [(8, 8), (20, 8), (8, 14), (40, 16), (9, 31), (5, 4)])
def test_images_are_resized_by_the_shorter_side_and_cropped_in_the_centre(size, tmp_path):
    images = write_images(tmp_path, {**TWO, "test/a": 1, "test/b": 1}, size)
    width, height = (8 * side // min(size) for side in size)
    left, top = round((width - 8) / 2), round((height - 8) / 2)
    for tensor, name in zip(image_folder(tmp_path).split("test").images, ("test/a/0.png", "test/b/0.png"), strict=True):
        expected = pixels(images[name].resize((width, height), Image.Resampling.BILINEAR), 3)
        assert (tensor.numpy() == expected[:, top : top + 8, left : left + 8]).all()


def test_files_that_are_no_images_are_left_out_and_counted(tmp_path):
    write_images(tmp_path, {"train/a": 3, "train/b": 3, "train/.cache": 1})
    for name in ("notes.txt", "train/classes.csv", "train/a/Thumbs.db", "train/b/._0.png", "train/b/.DS_Store"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "train/a/0.png").rename(tmp_path / "train/a/0.PNG")
    with pytest.warns(UserWarning, match=r"train: files left out for their endings: 1 in .db \(convert them") as told:
        data = image_folder(tmp_path)
        assert data.class_names == ["a", "b"] and len(data.split("train")) + len(data.split("val")) == 6
    assert len(told) == 1


def test_images_on_disk_are_the_images_in_memory(tmp_path):
    write_images(tmp_path, {"train/a": 4, "train/b": 4, "test/a": 4, "test/b": 4}, (11, 9))
    memory, disk = (image_folder(tmp_path, batch_size=3, memory_limit_mb=limit) for limit in (1, 0))
    for split in SPLITS:
        assert memory.split(split).in_memory and not disk.split(split).in_memory
        for pair in zip(memory.evaluation_batches(split), disk.evaluation_batches(split), strict=True):
            assert all(torch.equal(*tensors) for tensors in zip(*pair, strict=True))
    for limit, in_memory in ((2, [True, True, True]), (1, [False, True, False])):
        data = image_folder(tmp_path, input_size=512, in_chans=1, memory_limit_mb=limit)
        assert [data.split(split).in_memory for split in SPLITS] == in_memory


@pytest.mark.parametrize(("limit", "workers", "decoded"), [(2048, 0, 1), (0, 2, 4)])
def test_images_in_memory_are_decoded_once_and_others_once_more_than_used(
    limit, workers, decoded, tmp_path, monkeypatch
):
    write_images(tmp_path, {"train/a": 4, "train/b": 4})
    read, calls = ImageTransform.read, []
    monkeypatch.setattr(ImageTransform, "read", lambda transform, file: calls.append(file) or read(transform, file))
    data = image_folder(tmp_path, batch_size=2, num_workers=2, memory_limit_mb=limit)
    data.setup("fit")
    data.setup("test")
    loaders = [data.train_dataloader(), data.val_dataloader()]
    assert [loader.reader.num_workers if loader.reader else 0 for loader in loaders] == [workers] * 2
    for loader in loaders * 3:
        if workers:
            # Calls in other processes would not be counted.
            loader = DataLoader(loader.dataset, batch_sampler=loader.sampler, collate_fn=loader.reader.collate_fn)
        assert sum(len(labels) for _, labels, *_ in loader) == len(loader.dataset)
    assert collections.Counter(calls) == {tmp_path / "train" / c / f"{i}.png": decoded for c in "ab" for i in range(4)}


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"a": 2, "b": 2}, "no folder .*train; images are expected in .*/train/CLASS/"),
        ({"train/a": 2}, "train needs a folder for each of two or more classes, but has a$"),
        ({"train": 2}, "train needs a folder for each of two or more classes, but has none$"),
        ({"train/a": 2, "train/b": 0}, "no image in the class folders b of .*train; add images or remove"),
        ({**TWO, "test/a": 2, "test/b": 0}, "no image in the class folders b of .*test"),
        ({**TWO, "val/a": 1}, "val and .*train must have the same class folders, but only .*train has b; add"),
        ({**TWO, "test/a": 1, "test/b": 1, "test/c": 1}, "test and .*train .* only .*test has c; add"),
        (
            {**TWO, "val/b": 0, "test/a": 1},
            r"no image in .* b of .*val; .*\n.*val and .* has a; .*\n.*test and .* has b;",
        ),
    ],
)
def test_folders_that_are_no_data_set_are_told(counts, message, tmp_path):
    write_images(tmp_path, counts)
    with pytest.raises(ValueError if "train" in str(counts) else FileNotFoundError, match=message):
        image_folder(tmp_path)


def test_a_class_with_one_image_needs_a_validation_folder(tmp_path):
    write_images(tmp_path, {"train/a": 3, "train/b": 1})
    with pytest.raises(ValueError, match="class 'b' of mine has 1 training image, too few .* validation split of its"):
        image_folder(tmp_path, title="mine").setup("fit")
    write_images(tmp_path, {"val/a": 1, "val/b": 1})
    assert len(image_folder(tmp_path).split("train")) == 4


@pytest.mark.parametrize("limit", [2048, 0])
def test_a_few_unreadable_images_are_left_out_and_named(limit, tmp_path):
    images = write_images(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 1, "val/b": 1}, (64, 64))
    broken = [tmp_path / f"train/{name}.png" for name in ("a/1", "b/0", "b/2")]
    broken[0].write_bytes(broken[0].read_bytes()[:-400])
    broken[1].write_bytes(b"no image at all")
    broken[2].write_bytes(b"")
    data = image_folder(tmp_path, input_size=64, memory_limit_mb=limit, max_unreadable=3)
    message = (
        rf"^3 of 6 images cannot be read and are left out:\n  {broken[0]}: .*truncated.*"
        rf"\n  {broken[1]}: no image of a known kind\n  {broken[2]}: the file is empty$"
    )
    with pytest.warns(UserWarning) as warned:
        data.setup("fit")
    assert [bool(re.match(message, str(warning.message))) for warning in warned] == [True]
    data.setup("fit")  # the split is read, so that nothing is left to warn of
    chosen = data.split("train")
    assert chosen.in_memory == (limit > 0) and len(data.split("val")) == 2
    read, labels = (torch.cat(parts) for parts in zip(*DataLoader(chosen, 2, collate_fn=lambda x: x), strict=True))
    left = [images[f"train/{name}.png"] for name in ("a/0", "a/2", "b/1")]
    assert labels.tolist() == [0, 0, 1]
    assert count(read.numpy(), labels) == count([pixels(image, 3) for image in left], labels)


@pytest.mark.parametrize("limit", [2048, 0])
def test_too_many_unreadable_images_are_an_error_that_counts_them(limit, tmp_path):
    write_images(tmp_path, {"train/a": 12, "train/b": 13, "val/a": 1, "val/b": 2})
    (tmp_path / "val/b/1.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^1 of 3 images .*; remove .* more than 0 .* \(--data.max_unreadable\):\n.*val/b/1.png: the"
    ):
        image_folder(tmp_path, memory_limit_mb=limit, max_unreadable=0).setup("validate")
    for index in range(12):
        (tmp_path / f"train/b/{index}.png").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"^12 of 25 images cannot be read; .* more than 10 of .*:(\n  \S+: .*){10}\n  \.\.\. and 2 more$",
    ):
        image_folder(tmp_path, memory_limit_mb=limit).setup("fit")
    with pytest.warns(UserWarning, match=r"^12 of 25 images cannot be read and are left out:(\n  \S+: .*){12}$"):
        assert len(image_folder(tmp_path, memory_limit_mb=limit, max_unreadable=12).split("train")) == 13


@pytest.mark.parametrize("limit", [2048, 0])
@pytest.mark.parametrize("split", SPLITS)
def test_a_class_with_no_readable_image_is_told(split, limit, tmp_path):
    write_images(tmp_path, {f"{split}/{name}": 2 for split in SPLITS for name in "abc"})
    for name in "ac":
        for file in (tmp_path / split / name).iterdir():
            file.write_bytes(b"")
    data = image_folder(tmp_path, memory_limit_mb=limit)
    message = (
        rf"^4 of 6 images .* the {split} split has no others of the classes a, c; .*:(\n  .*/{split}/[ac]/.*){{4}}$"
    )
    with pytest.raises(ValueError, match=message):
        data.split(split)


def test_a_class_of_which_no_held_out_image_is_readable_is_told(tmp_path):
    write_images(tmp_path, {"train/a": 2, "train/b": 2})
    held = image_folder(tmp_path, val_fraction=0.5).split("val").files
    held[0].write_bytes(b"")
    with pytest.raises(ValueError, match="the part held out of train for validation has no others of the classes a;"):
        image_folder(tmp_path, val_fraction=0.5).split("val")


def test_images_in_folders_of_a_class_folder_count_and_those_beside_are_told(tmp_path):
    write_images(tmp_path, {"train/a": 2, "train/a/more": 3, "train/b/only": 4, "train/b/.cache": 2})
    data = image_folder(tmp_path, val_fraction=0.3)
    assert data.class_names == ["a", "b"] and len(data.split("train")) + len(data.split("val")) == 9
    write_images(tmp_path, {"train": 2})
    with pytest.warns(UserWarning, match="^2 images in .*train are in no class folder: left out"):
        image_folder(tmp_path, val_fraction=0.3)


def test_which_images_are_held_out_does_not_depend_on_those_that_are_readable(tmp_path):
    write_images(tmp_path, {"train/a": 8, "train/b": 8})
    whole = image_folder(tmp_path, val_fraction=0.5)
    held = [str(file) for file in whole.split("val").files]
    (tmp_path / "train/a/3.png").write_bytes(b"")
    data = image_folder(tmp_path, val_fraction=0.5)
    with pytest.warns(UserWarning, match="1 of 8 images cannot be read"):
        data.setup("fit")
    left = {split: [str(file) for file in data.split(split).files] for split in ("train", "val")}
    gone = str(tmp_path / "train/a/3.png")
    assert left["val"] == [file for file in held if file != gone] and len(left["train"]) + len(left["val"]) == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": [0.5]}, r"mean and std are 3 numbers each, got \[0.5\]"),
        ({"in_chans": 1, "std": [0.2, 0.2]}, "mean and std are 1 numbers each"),
        ({"std": [0.2, 0.0, 0.2]}, "std is that of pixels in .0, 1., more than 0 .* divide it by 255"),
        ({"std": [0.2, float("nan"), 0.2]}, "std is that of pixels"),
        ({"mean": [123.7, 116.3, 103.5]}, "mean is that of pixels in .0, 1., at least 0 .* divide it by 255"),
        ({"in_chans": 2}, r"grey \(1 channel\) or RGB \(3 channels\), got in_chans=2"),
        ({"input_size": 0}, "input_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"max_unreadable": -1}, "max_unreadable must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"val_fraction": 0}, r"share in \(0, 0.5\] .* got 0"),
        ({"val_fraction": 0.6}, "got 0.6"),
        ({"val_fraction": float("nan")}, "got nan"),
        (
            {"augment": "crops"},
            "unknown augment 'crops'. Did you mean 'crop'. Choose one of: crop, crop_flip, crop_flip_cutout, "
            "crop_flip_light, none, resized_crop_flip",
        ),
    ],
)
def test_arguments_out_of_range_are_told(arguments, message, tmp_path):
    write_images(tmp_path, TWO)
    with pytest.raises(ValueError, match=message):
        image_folder(tmp_path, **arguments)


@pytest.mark.parametrize(("path", "names"), [("new", ["0.png", "1.png", "deep/0.png"]), ("new/1.png", ["1.png"])])
def test_predict_takes_a_file_or_a_folder(path, names, tmp_path):
    images = write_images(tmp_path, {"new": 2, "new/deep": 1}, mode="L")
    for ignored in ("notes.txt", "._1.png", ".cache/2.png", "album.jpg/notes.txt"):
        (tmp_path / "new" / ignored).parent.mkdir(exist_ok=True)
        (tmp_path / "new" / ignored).write_text("no image")
    told = pytest.warns(UserWarning, match="new: files left out for their endings: 2 in .txt")
    with told if path == "new" else contextlib.nullcontext():
        data, other = (build_data("Digits", predict=str(tmp_path / path)) for _ in range(2))
    assert data.predict_files == [str(tmp_path / "new" / name) for name in names]
    assert contents(data, "predict") == count([pixels(images[f"new/{name}"], 1) for name in names], [-1] * len(names))
    model = types.SimpleNamespace(transform=ImageTransform(3, 5))
    other.trainer = types.SimpleNamespace(lightning_module=types.SimpleNamespace(model=model))
    assert other.split("predict").images.shape == (len(names), 3, 5, 5)


def test_predict_refuses_what_is_no_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image file or folder .*nowhere; check the path"):
        build_data("Digits", predict=str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"no image in .* \(files left out .* 1 in .txt .*; images end in .*png"):
        build_data("Digits", predict=str(tmp_path))
    with pytest.raises(ValueError, match="1 of 1 images cannot be read;.*\n.*notes.txt: no image of a known"):
        build_data("Digits", predict=str(tmp_path / "notes.txt")).split("predict")


@pytest.mark.parametrize("limit", [2048, 0])
def test_predict_leaves_out_what_cannot_be_read_and_says_why(limit, tmp_path, monkeypatch):
    images = write_images(tmp_path, {"train/a": 2, "train/b": 2, "new": 4})
    (tmp_path / "new/1.png").write_text("no image")
    Image.fromarray(noise(64, 64)).save(tmp_path / "new/2.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = image_folder(tmp_path, memory_limit_mb=limit, predict=str(tmp_path / "new"))
    with pytest.warns(UserWarning, match="2 of 4 images cannot be read and are left out"):
        chosen = data.split("predict")
    assert chosen.in_memory == (limit > 0) and data.predict_files == [str(tmp_path / f"new/{n}.png") for n in (0, 3)]
    read = torch.cat([batch for batch, _ in DataLoader(chosen, 1, collate_fn=lambda batch: batch)])
    assert count(read.numpy(), [-1] * 2) == count([pixels(images[f"new/{n}.png"], 3) for n in (0, 3)], [-1] * 2)
    reasons = {file.name: reason for file, reason in data.unreadable_files.items()}
    assert reasons.keys() == {"1.png", "2.png"} and "4096 pixels) exceeds limit of" in reasons["2.png"]


def test_the_test_images_of_a_folder_are_predicted_by_name(tmp_path):
    write_images(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 2})
    for limit in (2048, 0):
        data = image_folder(tmp_path, memory_limit_mb=limit)
        data.split("predict")
        assert data.predict_files == [str(tmp_path / f"test/{name}.png") for name in ("a/0", "b/0", "b/1")]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_random_shift_is_one_of_all_shifts_and_each_as_often(padding, dtype):
    image = torch.arange(1, 2 * 5 * 6 + 1, dtype=dtype).view(2, 5, 6)
    expected = {}
    for move in itertools.product(range(-padding, padding + 1), repeat=2):
        moved = F.pad(image, [padding] * 4).roll(move, (1, 2))[:, padding : padding + 5, padding : padding + 6]
        expected[moved.numpy().tobytes()] = move
    images = image.repeat(400 * len(expected), 1, 1, 1)
    shifted = random_shift(images, padding, draws(images, 2))
    assert shifted.shape == images.shape and shifted.dtype == dtype
    counts = collections.Counter(expected[image.numpy().tobytes()] for image in shifted)
    assert len(counts) == (2 * padding + 1) ** 2 and all(300 <= number <= 500 for number in counts.values())


def test_random_flip_mirrors_half_of_the_images():
    image = torch.from_numpy(noise(3, 4, 5))
    flipped = random_flip(images := image.repeat(2000, 1, 1, 1), draws(images, 1)[:, 0])
    same, mirrored = ((flipped == other).flatten(1).all(1) for other in (image, image.flip(2)))
    assert (same ^ mirrored).all() and 900 <= mirrored.sum() <= 1100


@pytest.mark.parametrize(
    ("augment", "size", "outcomes"),
    [("none", 8, 1), ("crop", 7, 1), ("crop", 8, 9), ("crop", 16, 25), ("crop_flip", 7, 2), ("crop_flip", 8, 18)],
)
def test_augmentation_gives_all_that_it_may(augment, size, outcomes):
    images = torch.from_numpy(noise(3, size, size)).repeat(1000, 1, 1, 1)
    augmented = augment_batch(images, augment, size, torch.arange(len(images)))
    assert len(augmented.unique(dim=0)) == outcomes and (augmented is images) == (augment == "none")


def test_random_light_changes_brightness_and_then_contrast():
    images = torch.randint(0, 120, (4, 3, 16, 16), dtype=torch.uint8)
    # Factors of 0.1 + 1.8 draw: as it is, dark, pale, and bright.
    changed = random_light(images, torch.tensor([[0.5, 0.5], [0.0, 0.5], [0.5, 0.0], [0.9, 0.5]]))
    before, after = images.float(), changed.float()
    assert changed.dtype == torch.uint8 and torch.equal(changed[0], images[0])
    assert torch.allclose(after[1], before[1] * 0.1, atol=0.51)
    mean = before[2].mean()
    assert torch.allclose(after[2], mean + 0.1 * (before[2] - mean), atol=0.51)
    assert torch.allclose(after[3], (before[3] * 1.72).clamp(max=255), atol=0.51)


def test_random_cutout_blackens_one_square_that_may_be_cut_off_at_the_edge():
    images = torch.ones(4000, 2, 8, 6, dtype=torch.uint8)
    cut = random_cutout(images, 4, draws(images, 2))
    outcomes = cut.unique(dim=0)
    assert torch.equal(cut[:, 0], cut[:, 1]) and images.all() and cut.dtype == torch.uint8
    black = outcomes[:, 0] == 0
    for square in black:
        rows, columns = square.any(1).nonzero(), square.any(0).nonzero()
        top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        assert square[top:bottom, left:right].all() and square.sum() == (bottom - top) * (right - left)
        assert (bottom - top == 4 or top == 0 or bottom == 8) and (right - left == 4 or left == 0 or right == 6)
    # The centre is any pixel.
    assert len(outcomes) == 8 * 6


@pytest.mark.parametrize("size", [12, 10])
def test_random_resized_crop_cuts_its_own_rectangle_out_of_each_image(size):
    image, boxes = noise(12, 12, 3), {}
    for height, width in itertools.product(range(1, 13), repeat=2):
        # The sides are rounded, each by at most half a pixel.
        area, ratio = (0.35 * 144, 144), (3 / 4, 4 / 3)
        if not (height + 0.5) * (width + 0.5) >= area[0] or not (height - 0.5) * (width - 0.5) <= area[1]:
            continue
        if (width + 0.5) / (height - 0.5) < ratio[0] or (width - 0.5) / (height + 0.5) > ratio[1]:
            continue
        for top, left in itertools.product(range(13 - height), range(13 - width)):
            cut = Image.fromarray(image[top : top + height, left : left + width])
            resized = numpy.asarray(cut.resize((size, size), Image.Resampling.BILINEAR))
            boxes[top, left, height, width] = torch.from_numpy(resized.copy()).permute(2, 0, 1).flatten().float()
    images = torch.from_numpy(image).permute(2, 0, 1).repeat(400, 1, 1, 1)
    cropped = random_resized_crop(images, size, draws(images, 22))
    assert cropped.shape == (400, 3, size, size) and cropped.dtype == torch.uint8
    names, truth = list(boxes), torch.stack(list(boxes.values()))
    distances = torch.cdist(cropped.flatten(1).float(), truth, p=float("inf"))
    assert distances.min(1).values.max() <= 1  # PIL rounds in another place
    found = collections.Counter(names[index] for index in distances.argmin(1))
    assert len(found) > 100 and max(found.values()) < 60
    assert {side for box in found for side in box[2:]} == set(range(6, 13))


def test_crops_are_mirrored_half_of_the_time():
    ramp = torch.arange(0, 240, 20, dtype=torch.uint8).expand(1000, 1, 12, 12)
    augmented = augment_batch(ramp, "resized_crop_flip", 6, torch.arange(1000))
    rising, falling = (augmented[..., 0] < augmented[..., 5]), (augmented[..., 0] > augmented[..., 5])
    assert augmented.shape == (1000, 1, 6, 6) and (rising.all(2) ^ falling.all(2)).all()
    assert 440 <= rising.all(2).sum() <= 560


@pytest.mark.parametrize("limit", [2048, 0])
def test_crops_are_taken_of_larger_training_images(limit, tmp_path):
    images = write_images(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 1, "val/b": 1}, (48, 32))
    plain, cropping = (
        image_folder(tmp_path, input_size=14, memory_limit_mb=limit, augment=augment)
        for augment in ("none", "resized_crop_flip")
    )
    assert (plain.stored_size, cropping.stored_size) == (14, 16)
    assert image_folder(tmp_path, input_size=224, augment="resized_crop_flip").stored_size == 256
    stored, labels = cropping.split("train").__getitems__([0])
    expected = pixels(images["train/a/0.png"].resize((24, 16), Image.Resampling.BILINEAR), 3)
    assert (stored[0].numpy() == expected[:, :, 4:20]).all()
    assert torch.equal(*(torch.cat([x for x, _ in data.evaluation_batches("val")]) for data in (plain, cropping)))
    # As they are evaluated, they are the stored ones resized by PIL.
    ((batch, _),) = cropping.evaluation_batches("train")
    resized = Image.fromarray(expected[:, :, 4:20].transpose(1, 2, 0)).resize((14, 14), Image.Resampling.BILINEAR)
    assert batch.shape == (6, 3, 14, 14) and batch.dtype == torch.float32
    assert (255 * batch[0] - torch.from_numpy(pixels(resized, 3).copy())).abs().max() < 1.01
    for training in (True, False):
        cropping.trainer = types.SimpleNamespace(training=training, predicting=False)
        split = cropping.split("train" if training else "val")
        keys = [torch.arange(2)] if training else []
        floats, _ = cropping.on_after_batch_transfer((*split.__getitems__([0, 1]), *keys), 0)
        assert floats.shape == (2, 3, 14, 14)


def test_larger_training_images_count_for_memory(tmp_path):
    write_images(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 2, "val/b": 2})
    # Four images of 512×512 are one MiB.
    data = image_folder(tmp_path, input_size=512, in_chans=1, memory_limit_mb=1, augment="resized_crop_flip")
    assert [data.split(split).in_memory for split in ("train", "val")] == [False, True]


def test_images_are_shared_by_whoever_would_read_the_same(tmp_path):
    write_images(tmp_path, {"train/a": 2, "train/b": 2})
    kinds = {augment: image_folder(tmp_path, augment=augment) for augment in AUGMENTS}
    kinds["none"].setup("fit")
    for name in ("crop", "crop_flip", "crop_flip_cutout", "resized_crop_flip"):
        kinds[name].share_images(kinds["none"])
        assert (kinds[name].split("train") is kinds["none"].split("train")) == (name != "resized_crop_flip")
    other = image_folder(tmp_path, augment="resized_crop_flip", batch_size=3)
    other.share_images(kinds["resized_crop_flip"])
    assert other.split("train") is kinds["resized_crop_flip"].split("train")
    digits, cropped = build_data("Digits"), build_data("Digits", augment="resized_crop_flip")
    cropped.share_images(digits)
    assert cropped.split("train").images.shape[2:] == (8, 8)
    digits.split("val")
    cropped.share_images(digits)
    assert cropped.split("val") is digits.split("val")


@pytest.mark.parametrize("limit", [2048, 0])
@pytest.mark.parametrize(
    ("number", "chosen"), [(1, [6]), (2, [3, 9]), (3, [2, 6, 10]), (6, [1, 3, 5, 7, 9, 11]), (99, list(range(12)))]
)
def test_a_sample_is_spread_evenly_and_the_same_everywhere(number, chosen, limit, tmp_path):
    counts = {"train/a": 4, "train/b": 4, "train/c": 4, "val/a": 1, "val/b": 1, "val/c": 1}
    images = write_images(tmp_path, counts)
    stored = [pixels(image, 3) / numpy.float32(255) for name, image in images.items() if name.startswith("train")]
    samples = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        samples.append(image_folder(tmp_path, memory_limit_mb=limit, augment="crop_flip_cutout").sample(number))
    assert torch.equal(*samples) and samples[0].dtype == torch.float32
    assert [[(image == other).all() for other in stored].index(True) for image in samples[0].numpy()] == chosen


def test_a_sample_of_larger_training_images_is_what_is_evaluated(tmp_path):
    write_images(tmp_path, {"train/a": 2, "train/b": 2}, (40, 40))
    data = image_folder(tmp_path, input_size=14, augment="resized_crop_flip")
    evaluated = torch.cat([images for images, _ in data.evaluation_batches("train")])
    assert torch.equal(data.sample(len(evaluated)), evaluated) and evaluated.shape[1:] == (3, 14, 14)
    assert build_data("Digits").sample(5).shape == (5, 1, 8, 8)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        data.sample(0)


def test_a_folder_has_224_pixels_and_colours_unless_told(tmp_path):
    write_images(tmp_path, TWO)
    for given, resolved in (((None, None), (224, 3)), ((None, 1), (224, 1)), ((16, None), (16, 3))):
        data = image_folder(tmp_path, input_size=given[0], in_chans=given[1])
        assert (data.input_size, data.in_chans, len(data.mean)) == (*resolved, resolved[1])
        assert (data.hparams.input_size, data.hparams.in_chans) == resolved
        again = build_data("ImageFolder", **data.hparams)
        assert (again.input_size, again.in_chans) == resolved


def test_the_command_line_records_what_none_stands_for(tmp_path, monkeypatch):
    write_images(tmp_path, TWO)
    options = ["--data=ImageFolder", f"--data.root={tmp_path}", "--data.input_size=null", "--trainer.logger=false"]
    monkeypatch.setattr("sys.argv", ["train.py", *options])
    settings = {"subclass_mode_data": True, "seed_everything_default": False, "run": False}
    built = LightningCLI(DemoModel, zoo.data.ImageData, **settings)
    assert (built.datamodule.hparams.input_size, built.datamodule.hparams.in_chans) == (224, 3)


def test_only_training_images_are_augmented_and_all_become_floats():
    images, labels = torch.from_numpy(noise(64, 1, 8, 8)), torch.arange(64)
    data = build_data("Digits")
    for training, predicting in ((True, False), (False, False), (False, True)):
        data.trainer = types.SimpleNamespace(training=training, predicting=predicting)
        batch = data.on_after_batch_transfer((images, labels, *([torch.arange(64)] if training else [])), 0)
        floats, kept = (batch, labels) if predicting else batch
        assert floats.dtype == torch.float32 and 0 <= floats.min() and floats.max() <= 1
        assert torch.equal(floats, images / 255) != training and torch.equal(kept, labels)
    defaults = {name: build_data(name).augment for name in ("Digits", *FOLDERS)}
    assert defaults == {"Digits": "crop", "MNIST": "crop", "CIFAR10": "crop_flip", "CIFAR100": "crop_flip"}


@pytest.mark.parametrize("split", SPLITS)
def test_evaluation_batches_come_in_order_as_floats(split):
    data = build_data("Digits", batch_size=100)
    batches = list(data.evaluation_batches(split))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert {len(labels) for _, labels in batches[:-1]} == {100} and images.dtype == torch.float32
    assert torch.equal(images, data.split(split).images / 255) and torch.equal(labels, data.split(split).labels)


def test_unknown_names_bring_the_nearest():
    with pytest.raises(ValueError, match="unknown data set 'CIFAR-10'. Did you mean 'CIFAR10'. Choose one of: .*MNIST"):
        build_data("CIFAR-10")
    with pytest.raises(ValueError, match="unknown split 'tests'. Did you mean 'test'"):
        next(build_data("Digits").evaluation_batches("tests"))


def test_training_images_are_shuffled_and_others_are_not():
    data = build_data("Digits", batch_size=431)
    loaders = [data.train_dataloader()] * 2 + [data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()]
    epochs = [[torch.cat(parts) for parts in zip(*loader, strict=True)] for loader in loaders]
    for (images, labels, *_), split in zip(epochs, ("train", *SPLITS, "test"), strict=True):
        assert count(images.numpy(), labels) == contents(data, split)
        assert torch.equal(images, data.split(split).images) == (split != "train")
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert data.predict_files == [f"test image {index}" for index in range(360)]


@pytest.mark.parametrize("batch_size", [64, 100, 431, 432, 646, 647, 1292, 1293, 1294, 5000])
def test_the_last_small_batch_is_dropped_but_never_the_only_one(batch_size):
    data = build_data("Digits", batch_size=batch_size)
    batches = [len(labels) for _, labels, _ in data.train_dataloader()]
    assert batches == [min(batch_size, 1293)] * max(1, 1293 // batch_size)
    for processes in (2, 3, 8):
        data.trainer = fake_trainer(processes, rank=processes - 1)
        loader = data.train_dataloader()
        assert len(loader) == len(list(loader)) > 0


def fake_trainer(processes, rank):
    strategy = types.SimpleNamespace(root_device=torch.device("cpu"))
    return types.SimpleNamespace(world_size=processes, global_rank=rank, strategy=strategy)


def test_processes_share_the_images_of_an_epoch():
    data = build_data("Digits", batch_size=100)
    images = []
    for rank in range(3):
        data.trainer = fake_trainer(3, rank)
        images += [image for batch, _ in data.val_dataloader() for image in batch]
    assert count(torch.stack(images).numpy(), torch.zeros(144)) == count(
        data.split("val").images.numpy(), torch.zeros(144)
    )


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone(monkeypatch):
    def orders(seed, epochs):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        loader = build_data("Digits").train_dataloader()
        found = []
        for epoch in epochs:
            loader.sampler.set_epoch(epoch)
            found.append(torch.cat([labels for _, labels, _ in loader]).tolist())
        return found

    first, second = orders(0, [0, 1])
    assert [second] == orders(0, [1]) and first != second and [first] != orders(1, [0])


BAD = {
    "truncated.png": ("truncated", lambda content: content[:-400]),
    "empty.png": ("the file is empty", lambda content: b""),
    "text.jpg": ("no image of a known kind", lambda content: b"no image at all"),
    "bomb.png": ("pixels are more than 10,000: a decompression bomb", None),
    "range.tiff": ("no stated range", None),
    "link.png": ("No such file", None),
}


def write_bad_images(folder):
    content = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(content, "PNG")
    for name, (_, damage) in BAD.items():
        if damage:
            (folder / name).write_bytes(damage(content.getvalue()))
    Image.new("L", (101, 100)).save(folder / "bomb.png")
    Image.fromarray(numpy.zeros((8, 8), numpy.float32)).save(folder / "range.tiff")
    (folder / "link.png").symlink_to(folder / "nowhere.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_preflight_opens_each_file_once_and_lists_all_that_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    root = tmp_path / "photos"
    write_images(root, {"train/a": 3, "train/b": 20, "val/a": 1, "val/b": 2})
    write_bad_images(root / "train/b")
    opened, read = [], ImageTransform.read
    monkeypatch.setattr(
        ImageTransform, "read", lambda transform, file: opened.append(file.name) or read(transform, file)
    )
    monkeypatch.setattr("sys.argv", ["zoo", "preflight", str(root)])
    for again in range(3):
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr().out
        assert stop.value.code == 1 and all(
            re.search(rf"{root}/train/b/{name}: .*{reason}", printed) for name, (reason, _) in BAD.items()
        )
        assert re.search(r"train │ 29 +│ 2 +│ 3 +│ 6 ", printed)
        # Those that cannot be read are tried each time, and a file that has changed.
        assert len(opened) == (32, 6, 7)[again]
        opened.clear()
        if again == 1:
            (root / "train/a/0.png").write_bytes((root / "train/a/1.png").read_bytes() + b" ")
    # What is on disk has been examined, and training opens no sound file before it needs it.
    with pytest.warns(UserWarning, match="6 of 29 images cannot be read and are left out"):
        image_folder(root, memory_limit_mb=0).setup("fit")
    assert len(opened) == 6
    opened.clear()
    for record in (tmp_path / "caches/decoupled_zoo").iterdir():
        record.write_text("damaged")
    with pytest.warns(UserWarning, match="6 of 29 images cannot be read and are left out"):
        image_folder(root, memory_limit_mb=0).setup("fit")
    assert len(opened) == 32


def test_preflight_of_a_sound_folder_ends_well(tmp_path, monkeypatch, capsys):
    write_images(tmp_path, TWO)
    monkeypatch.setattr("sys.argv", ["zoo", "preflight", str(tmp_path), "--grey"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0 and "png" not in capsys.readouterr().out


def test_classes_without_a_training_image_are_refused(tmp_path):
    write_dataset("MNIST", tmp_path)
    labels = numpy.arange(200).astype(numpy.uint8) % 8
    file = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    count = int.from_bytes(file.read_bytes()[4:8], "big")
    file.write_bytes(file.read_bytes()[:8] + labels[:count].tobytes())
    with pytest.raises(ValueError, match="class '8' of MNIST has 0 training image, too few"):
        build_data("MNIST", root=str(tmp_path)).setup("fit")


def test_a_rare_class_has_a_validation_image():
    class Two(zoo.data.Digits):
        class_names = ["often", "rarely"]

    labels = torch.tensor([0] * 1000 + [1] * 2)
    kept, held = Two().hold_out(labels)
    assert labels[kept].bincount().tolist() == [900, 1] and labels[held].bincount().tolist() == [100, 1]
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(1002))


@pytest.mark.parametrize("damage", ["fewer labels", "a label beyond the classes"])
def test_files_that_do_not_fit_together_are_told(damage, tmp_path):
    write_dataset("MNIST", tmp_path)
    labels = numpy.arange(20 if damage == "a label beyond the classes" else 15).astype(numpy.uint8)
    header = numpy.array([0x801, len(labels)], dtype=">i4")
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(header.tobytes() + labels.tobytes())
    with pytest.raises(
        FileNotFoundError, match=f"test files of MNIST under .* do not fit together.* {len(labels)} labels"
    ):
        build_data("MNIST", root=str(tmp_path)).split("test")


def test_unusual_image_files_look_as_they_should(tmp_path):
    grey = noise(8, 8)
    write = {
        "sixteen bits": (Image.fromarray(grey.astype(numpy.uint16) * 257), {}),
        "turned by EXIF": (Image.fromarray(numpy.rot90(grey).copy()), {"exif": Image.Exif()}),
    }
    write["turned by EXIF"][1]["exif"][0x112] = 6  # turn clockwise to see it upright
    for name, (image, options) in write.items():
        image.save(tmp_path / f"{name}.png", **options)
        assert torch.equal(ImageTransform(1, 8).read(tmp_path / f"{name}.png")[0], torch.from_numpy(grey)), name
    for values in (grey.astype(numpy.float32), grey.astype(numpy.int32)):
        Image.fromarray(values).save(tmp_path / "no range.tiff")
        with pytest.raises(
            ValueError, match="no range.tiff is no readable image .*no stated range; save it with 8 or 16"
        ):
            ImageTransform(1, 8).read(tmp_path / "no range.tiff")
