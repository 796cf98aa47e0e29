"""Folders of images as people have them: links, every kind of image, names in two Unicode forms; nothing is lost."""

import sys
import unicodedata
import warnings

import pytest
import torch
from PIL import Image

from tests.image_files import noise, write_images
from zoo.commands.console import main
from zoo.data import build_data
from zoo.data.contents import Contents, class_folders
from zoo.data.image_files import find_images, read_files
from zoo.models.image_formats import image_endings
from zoo.models.transform import ImageTransform

TWO = {"train/a": 2, "train/b": 2}


def image_folder(root, **arguments):
    return build_data("ImageFolder", root=str(root), **{"input_size": 8, **arguments})


def files_of(data, *splits):
    return {str(file) for split in splits for file in data.split(split).files}


def test_links_to_folders_and_images_are_followed(tmp_path):
    write_images(tmp_path, {**TWO, "elsewhere": 3, "elsewhere/deep": 1, "shared/c": 2})
    (tmp_path / "train/a/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/c").symlink_to(tmp_path / "shared/c")
    (tmp_path / "train/b/one.png").symlink_to(tmp_path / "elsewhere/0.png")
    data = image_folder(tmp_path)
    assert data.class_names == ["a", "b", "c"]
    found = files_of(data, "train", "val")
    assert len(found) == 2 + 4 + 3 + 2 and str(tmp_path / "train/a/more/deep/0.png") in found
    files = find_images(tmp_path)
    pixels, read = read_files(files, ImageTransform(3, 8))
    assert len(find_images(tmp_path / "train/a")) == 6 and len(pixels) == 17 and read == files


@pytest.mark.parametrize(("link", "target"), [("a/up", ""), ("a/self", "a"), ("a/over", "b"), ("b/deep/up", "b/deep")])
def test_a_link_in_a_circle_is_refused_by_name(tmp_path, link, target):
    write_images(tmp_path, {**TWO, "train/b/deep": 1})
    (tmp_path / "train/b/back").symlink_to(tmp_path / "train/a")
    (tmp_path / "train" / link).symlink_to(tmp_path / "train" / target)
    named = rf"(train/{link}|train/a/over/back|train/b/back/.*) is a link to .*, a folder that it lies in"
    for read in (image_folder, lambda root: find_images(root / "train")):
        with pytest.raises(ValueError, match=named):
            read(tmp_path)


def test_a_link_that_leads_nowhere_is_told(tmp_path):
    write_images(tmp_path, TWO)
    (tmp_path / "train/a/gone.png").symlink_to(tmp_path / "nowhere.png")
    data = image_folder(tmp_path, val_fraction=0.5)
    with pytest.warns(UserWarning, match="gone.png: .*No such file"):
        data.setup("fit")
    for target in (tmp_path / "nowhere", tmp_path / "train/b/gone"):
        (tmp_path / "train/b/gone").symlink_to(target)
        with pytest.raises(ValueError, match="train/b/gone is a link to .*, which is not there; mend the link, or rem"):
            image_folder(tmp_path)
        (tmp_path / "train/b/gone").unlink()


def test_files_without_an_ending_are_told(tmp_path):
    write_images(tmp_path, TWO)
    (tmp_path / "train/a/0.png").rename(tmp_path / "train/a/image")
    with pytest.warns(UserWarning, match="1 without any .rename them to .jpg or .png if they are images"):
        image_folder(tmp_path)


def test_no_other_program_is_run_for_an_image(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("Ghostscript was called"))
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="no image of a known kind"):
        ImageTransform(3, 8).read(tmp_path / "a.jpg")


def can_be_written():
    """Return the endings that Pillow writes, each with a mode that its kind has."""
    found = {}
    for ending in sorted(image_endings()):
        form = Image.registered_extensions()[ending]
        if form in Image.SAVE:
            found[ending] = {"XBM": "1", "MSP": "1", "BLP": "P"}.get(form, "RGB")
    return found


@pytest.mark.filterwarnings("ignore:IM image format is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("ending", "mode"), can_be_written().items())
def test_what_pillow_reads_is_read(tmp_path, ending, mode):
    write_images(tmp_path, TWO)
    file = tmp_path / f"train/a/new{ending}"
    image = Image.fromarray(noise(16, 16, 3)).convert(mode)
    image.save(file)
    assert str(file) in files_of(image_folder(tmp_path), "train", "val")
    with Image.open(file) as stored:
        expected = ImageTransform(3, 8)(stored)
    assert torch.equal(ImageTransform(3, 8).read(file).float() / 255, expected)


def test_many_kinds_of_images_can_be_written():
    assert {".heic", ".avif", ".gif", ".jfif", ".jp2", ".tga", ".webp"} <= can_be_written().keys()


@pytest.fixture
def without_heif(monkeypatch):
    """Have Pillow as it is without pillow-heif."""
    monkeypatch.setattr(Image, "OPEN", {form: opener for form, opener in Image.OPEN.items() if form != "HEIF"})
    endings = {ending: form for ending, form in Image.EXTENSION.items() if form != "HEIF"}
    monkeypatch.setattr(Image, "EXTENSION", endings)
    monkeypatch.setattr(Image, "ID", [form for form in Image.ID if form != "HEIF"])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image_endings.cache_clear()
    yield
    monkeypatch.undo()
    image_endings.cache_clear()


def write_heic(file):
    image_endings()
    Image.fromarray(noise(16, 16, 3)).save(file)


def test_heic_without_its_library_is_told_with_the_cure(tmp_path, request):
    write_images(tmp_path, TWO)
    write_heic(tmp_path / "train/a/new.heic")
    write_heic(tmp_path / "train/a/other.HEIC")
    (tmp_path / "train/b/notes.txt").write_text("no image")
    request.getfixturevalue("without_heif")
    told = r"files left out for their endings: 2 in .heic \(pip install pillow-heif .*\); 1 in .txt \(convert them to"
    with pytest.warns(UserWarning, match=told):
        assert len(files_of(image_folder(tmp_path), "train", "val")) == 4
    with pytest.raises(ValueError, match="new.heic is no readable image .no image of a known kind; pip install pillow"):
        ImageTransform(3, 8).read(tmp_path / "train/a/new.heic")
    for file in (tmp_path / "train/a").glob("*.png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no image in the class folders a of .*train \(files left out .* 2 in .heic"):
        image_folder(tmp_path)
    with pytest.raises(
        ValueError, match=r"no image in .* \(files left out for their endings: 2 in .heic \(pip install"
    ):
        find_images(tmp_path / "train/a")


def test_no_limit_of_pixels_is_none(tmp_path, monkeypatch):
    write_images(tmp_path, TWO)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert len(files_of(image_folder(tmp_path), "train", "val")) == 4
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match="8×8 pixels are more than 32: .*MAX_IMAGE_PIXELS = None lifts"):
            ImageTransform(3, 8).read(tmp_path / "train/a/0.png")


NAMES = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]


@pytest.mark.parametrize("train", NAMES, ids=ascii)
@pytest.mark.parametrize("val", NAMES, ids=ascii)
def test_a_class_name_is_one_in_both_unicode_forms(tmp_path, train, val):
    write_images(tmp_path, {f"train/{train}": 2, "train/tea": 2, f"val/{val}": 1, "val/tea": 3})
    data = image_folder(tmp_path)
    assert data.class_names == [NAMES[0], "tea"]
    assert data.split("train").labels.tolist() == [0, 0, 1, 1] and data.split("val").labels.tolist() == [0, 1, 1, 1]


def test_two_folders_of_one_class_are_refused(tmp_path):
    write_images(tmp_path, {f"train/{name}": 2 for name in NAMES})
    with pytest.raises(ValueError, match=r"two folders for the class café, 'cafe\\u0301' and 'caf\\xe9': .*into one"):
        image_folder(tmp_path)
    assert list(class_folders(tmp_path)) == ["train"]


@pytest.mark.parametrize(("name", "split"), [("valid", "val"), ("Val", "val"), ("dev", "val"), ("Test", "test")])
def test_a_split_by_another_name_is_told(tmp_path, name, split):
    write_images(tmp_path, {**TWO, f"{name}/a": 1, f"{name}/b": 1, "new": 1})
    with pytest.warns(UserWarning, match=f"{name} is not used; call it {split} if it has the {split} images") as told:
        image_folder(tmp_path)
    assert len(told) == 1
    write_images(tmp_path, {f"{split}/a": 1, f"{split}/b": 1})
    assert len(image_folder(tmp_path).split(split)) == 2


def test_training_images_by_another_name_are_told(tmp_path):
    write_images(tmp_path, {"Training/a": 1, "Training/b": 1})
    with pytest.raises(FileNotFoundError, match=r"no folder .*train \(is it .*/Training\?\)"):
        image_folder(tmp_path)


@pytest.mark.parametrize("place", ["val", "train/c"])
def test_a_link_to_a_folder_that_is_not_there_is_refused(tmp_path, place):
    write_images(tmp_path, TWO)
    (tmp_path / place).symlink_to(tmp_path / "disk/that/is/gone")
    with pytest.raises(ValueError, match=f"{place} is a link to .*gone, which is not there; mend the link, or remove"):
        image_folder(tmp_path)


def test_preflight_tells_what_is_left_out(tmp_path, monkeypatch, capsys):
    write_images(tmp_path, TWO)
    (tmp_path / "train/a/film.mp4").write_text("no image")
    monkeypatch.setattr("sys.argv", ["zoo", "preflight", str(tmp_path)])
    with pytest.warns(UserWarning, match="1 in .mp4"), pytest.raises(SystemExit):
        main()
    assert "cannot be read" in capsys.readouterr().out


def test_hidden_files_are_not_looked_at(tmp_path):
    write_images(tmp_path, {**TWO, "train/a/.cache": 1})
    for name in (".DS_Store", "._0.png", ".hidden.txt"):
        (tmp_path / "train/a" / name).write_text("")
    (tmp_path / "train/.#lock").symlink_to("me@machine.1")
    assert list(class_folders(tmp_path / "train")) == ["a", "b"]
    assert len(Contents.of(tmp_path / "train/a").images) == 2 and not Contents.of(tmp_path / "train/a").others
