"""The photographs of the walk-through: what their page claims of them, and that the zoo reads them as they look."""

import collections
import sys

import numpy
import pytest
import torch
from PIL import Image, ImageOps

from benchmarks import photos
from zoo.data import build_data
from zoo.data.measuring import portable_description, recorded_data
from zoo.models.transform import ImageTransform

CLASSES = ["flower", "portrait", "temple"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "deep/photos"
    assert photos.write_photos(folder) == 153
    return folder


def read(path):
    with Image.open(path) as image:
        image.load()
        return image


def test_each_class_has_every_form_and_many_shapes(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["new", "train", "val"]
    for split, count in (("train", 40), ("val", 10)):
        assert sorted(path.name for path in (folder / split).iterdir()) == CLASSES
        for name in CLASSES:
            images = [read(path) for path in (folder / split / name).iterdir()]
            kinds = [(image.format, image.mode, image.getexif().get(0x112)) for image in images]
            forms = [("JPEG", "RGB", None), ("JPEG", "RGB", 6), ("JPEG", "L", None)]
            forms += [("PNG", "RGBA", None), ("PNG", "P", None)]
            assert collections.Counter(kinds) == dict.fromkeys(forms, count // 5)
            sizes = {image.size for image in images}
            assert len(sizes) > count / 2 and min(map(min, sizes)) >= 96
            assert all(any(wide == (width > height) for width, height in sizes) for wide in (True, False))
            # The corners are transparent, the middle is not.
            for image in images:
                if image.mode == "RGBA":
                    assert image.getpixel((0, 0))[3] == 0
                    assert image.getpixel((image.width // 2, image.height // 2))[3] == 255
    assert len(list((folder / "new").iterdir())) == 3


def test_training_and_validation_crops_are_of_different_columns(tmp_path, monkeypatch):
    columns = numpy.zeros((600, 640, 3), dtype=numpy.uint8)
    columns[..., 0], columns[..., 1] = numpy.divmod(numpy.arange(640), 256)
    crops = collections.defaultdict(list)
    monkeypatch.setattr(photos, "photographs", lambda: dict.fromkeys(CLASSES, Image.fromarray(columns)))
    monkeypatch.setattr(photos, "save", lambda image, path, form: crops[path.parent].append(image))
    photos.write_photos(tmp_path)

    def seen(*folders):
        arrays = [numpy.asarray(image).astype(int) for name in folders for image in crops[tmp_path / name]]
        return set(numpy.concatenate([(256 * array[..., 0] + array[..., 1]).ravel() for array in arrays]).tolist())

    for name in CLASSES:
        assert max(seen(f"train/{name}")) < min(seen(f"val/{name}"))


def test_subjects_lie_in_their_photographs():
    photographs = photos.photographs()
    assert sorted(photographs) == sorted(photos.SUBJECTS) == CLASSES
    for name, ((left, top, right, bottom), border) in photos.SUBJECTS.items():
        image = photographs[name]
        assert image.mode == "RGB" and 0 <= left and 0 <= top and right <= image.width and bottom <= image.height
        assert min(border - left, right - border, bottom - top) >= photos.SMALLEST


def test_the_seed_alone_decides_what_is_written(folder, tmp_path):
    photos.write_photos(tmp_path / "same")
    photos.write_photos(tmp_path / "other", seed=1)
    for path in sorted(folder.rglob("*.*")):
        written = path.relative_to(folder)
        assert (tmp_path / "same" / written).read_bytes() == path.read_bytes()
        assert (tmp_path / "other" / written).read_bytes() != path.read_bytes()


@pytest.mark.parametrize("name", CLASSES)
def test_a_turned_photograph_is_seen_upright(name, tmp_path):
    crop = photos.photographs()[name].crop((130, 60, 330, 180))
    for form in ("colour", "turned"):
        photos.save(crop, tmp_path / form, form)
    upright, turned = (read(tmp_path / f"{form}.jpg") for form in ("colour", "turned"))
    assert upright.size == (200, 120) and turned.size == (120, 200)
    twins = [ImageTransform(3, 64)(image) for image in (upright, turned)]
    # JPEG loses different details of pixels on their side.
    assert (twins[0] - twins[1]).abs().mean() < 2 / 255
    on_its_side = ImageTransform(3, 64)(Image.fromarray(numpy.asarray(turned)))
    assert (twins[0] - on_its_side).abs().mean() > 10 / 255


@pytest.mark.parametrize("size", [24, 35])
@pytest.mark.parametrize("form", ["colour", "turned"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_decoder_scales_a_large_photograph_down(name, form, size, tmp_path, monkeypatch):
    """Upright or not, cropped at the same place: close to all its pixels, and decoded at a fraction."""
    file = tmp_path / "photo.jpg"
    photos.save(photos.photographs()[name], tmp_path / "photo", form)
    pixels = {draft: ImageTransform(3, size, draft).read(file).float() for draft in (True, False)}
    assert (pixels[True] - pixels[False]).abs().mean() <= 1
    with Image.open(file) as image:
        whole, decoded = image.size, []
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: decoded.append(image.size) or image)
    for draft in (True, False):
        ImageTransform(3, size, draft).read(file)
    assert min(decoded[0]) < min(whole) / 3 and min(decoded[0]) >= 3 * size and decoded[1] == whole


def test_what_an_earlier_version_measured_is_decoded_whole(folder):
    """What a checkpoint records of its images says how they were decoded; a record without it is of before."""
    data = build_data("ImageFolder", root=str(folder), input_size=24)
    record = portable_description(data.describe())
    assert data.draft and record["arguments"]["draft"] is True
    assert recorded_data(record, str(folder)).draft
    del record["arguments"]["draft"]
    earlier = recorded_data(record, str(folder))
    assert not earlier.draft and earlier.describe()["arguments"]["draft"] is False
    assert torch.equal(earlier.split("val").images[0], ImageTransform(3, 24, False).read(earlier.files_of("val")[0][0]))


def test_an_image_folder_reads_them(folder):
    data = build_data("ImageFolder", root=str(folder), input_size=56, augment="resized_crop_flip")
    assert data.class_names == CLASSES
    for split, count in (("train", 40), ("val", 10)):
        assert torch.bincount(data.split(split).labels).tolist() == [count] * 3
    assert data.sample(6).shape == (6, 3, 56, 56)
    new = build_data("ImageFolder", root=str(folder), input_size=56, predict=str(folder / "new"))
    assert len(new.split("predict")) == 3


def test_what_is_there_is_left_alone(tmp_path, monkeypatch, capsys):
    def run(folder):
        monkeypatch.setattr(sys, "argv", ["photos", str(folder)])
        photos.main()

    run(tmp_path)
    assert "153 images of 3 classes" in capsys.readouterr().out
    (tmp_path / "file").write_text("mine")
    for folder, reason in ((tmp_path, "is not empty; name a new folder"), (tmp_path / "file", "Not a directory")):
        with pytest.raises(SystemExit):
            run(folder)
        assert reason in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"
