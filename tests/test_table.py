"""A table of image files and labels in place of class folders, with the same checks."""

import csv
import re
import unicodedata

import pytest
import torch

from tests.command_line import SHORT, run  # noqa: F401
from tests.image_files import write_images
from zoo.commands import console as command_line
from zoo.data import build_data
from zoo.models.transform import ImageTransform

SPLITS = ("train", "val", "test")


def write_table(folder, rows, header=("file", "label"), delimiter=",", encoding="utf-8"):
    folder.mkdir(exist_ok=True)
    with (folder / "labels.csv").open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return folder / "labels.csv"


def image_table(table, **arguments):
    return build_data("ImageTable", table=str(table), **{"input_size": 8, **arguments})


def rows_of(images, *others):
    return [(name, name.split("/")[-2], *others) for name in images]


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8")])
def test_a_table_is_what_its_folders_would_be(tmp_path, delimiter, encoding):
    images = write_images(tmp_path, {"train/ant": 4, "train/bee, wild": 6})
    rows = [(f" {name} ", label) for name, label in reversed(rows_of(images))]
    table = write_table(tmp_path, rows, delimiter=delimiter, encoding=encoding)
    data, folder = image_table(table), build_data("ImageFolder", root=str(tmp_path), input_size=8)
    assert data.class_names == ["ant", "bee, wild"] and data.title == "labels"
    for split in SPLITS:
        for mine, theirs in zip(data.evaluation_batches(split), folder.evaluation_batches(split), strict=True):
            assert all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


def test_columns_are_named_and_splits_are_told(tmp_path):
    images = write_images(tmp_path / "pictures", {f"{split}/{name}": 2 for split in SPLITS for name in "ab"})
    rows = [("x", name.split("/")[1], f"pictures/{name}", name.split("/")[0]) for name in images]
    table = write_table(tmp_path, rows, ("id", "species", "path", "part"))
    data = image_table(table, file_column="path", label_column="species", split_column="part", in_chans=1)
    for split in SPLITS:
        chosen = data.split(split)
        assert chosen.labels.tolist() == [0, 0, 1, 1]
        read = [ImageTransform(1, 8).read(tmp_path / "pictures" / name) for name in images if name.startswith(split)]
        assert torch.equal(chosen.images, torch.stack(read))


GOOD = [("a/0.png", "a"), ("a/1.png", "a"), ("b/0.png", "b"), ("b/1.png", "b")]


@pytest.mark.parametrize(
    ("rows", "header", "arguments", "message"),
    [
        (GOOD, ("path", "label"), {}, "unknown column of .* 'file'. Choose one of: label, path. .*--data.file_col"),
        (GOOD, ("file", "labels"), {}, "unknown column of .* 'label'. Did you mean 'labels'"),
        (GOOD, ("file", "label"), {"split_column": "part"}, "unknown column of .*labels.csv 'part'"),
        ([*GOOD, ("c/0.png", "")], ("file", "label"), {}, "line 6 has no label"),
        ([*GOOD, ("", "b")], ("file", "label"), {}, "line 6 has no file"),
        ([*GOOD, ("a/0.png", "b")], ("file", "label"), {}, "line 6 has a/0.png again, which is in line 2"),
        ([*GOOD, ("c/0.png", "Smith", "John")], ("file", "label"), {}, "line 6 has 3 cells, the first line 2"),
        (
            [(*row, "train") for row in GOOD],
            ("file", "label", "Split"),
            {},
            "'split'. Did you mean 'Split'",
        ),
        ([(*row, "x") for row in GOOD], ("file", "label", "label"), {}, "has 2 columns 'label'. .*--data.label_column"),
        ([("x", "") for _ in range(12)], ("file", "label"), {}, r"line 11 has no label; \.\.\. .12 lines in all."),
        ([*GOOD, ("b/../a/0.png", "a")], ("file", "label"), {}, "line 6 has b/../a/0.png again, which is in line 2"),
        (GOOD[:2], ("file", "label"), {}, "needs two or more labels of train, but has a"),
        ([], ("file", "label"), {}, "has no line below the names of its columns"),
        (
            [(*row, "tarin") for row in GOOD],
            ("file", "label", "split"),
            {},
            "line 2: unknown split 'tarin'. Did you me",
        ),
        (
            [*((*row, "train") for row in GOOD), ("c/0.png", "c", "val"), ("c/1.png", "a", "val")],
            ("file", "label", "split"),
            {},
            "val and train of .*labels.csv must have the same labels, but only train has b and only val has c",
        ),
    ],
)
def test_tables_that_are_no_data_set_are_told(tmp_path, rows, header, arguments, message):
    table = write_table(tmp_path, rows, header)
    with pytest.raises(ValueError, match=message):
        image_table(table, **arguments)


def test_files_that_are_no_table_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no table .*nowhere.csv; a CSV file is expected"):
        image_table(tmp_path / "nowhere.csv")
    (tmp_path / "labels.csv").write_bytes("file,label\ncafé.png,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match="labels.csv is no CSV file in UTF-8 .*; save it as one"):
        image_table(tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no CSV file in UTF-8"):
        image_table(tmp_path / "labels.csv")


def test_missing_and_broken_images_of_a_table_are_left_out_or_refused(tmp_path):
    images = write_images(tmp_path, {"a": 4, "b": 4})
    table = write_table(tmp_path, [*rows_of({f"{tmp_path}/{name}": 0 for name in images}), ("gone.png", "a")])
    (tmp_path / "b/0.png").write_bytes(b"no image")
    data = image_table(table, val_fraction=0.4)
    with pytest.warns(UserWarning, match="cannot be read and are left out"):
        kept = {str(file) for split in ("train", "val") for file in data.split(split).files}
    assert kept == {f"{tmp_path}/{name}" for name in images if name != "b/0.png"}
    with pytest.raises(ValueError, match=r"cannot be read; .*python -m zoo preflight .*labels.csv lists all"):
        image_table(table, max_unreadable=0, val_fraction=0.4).setup("fit")


def test_tables_of_excel_on_windows_are_read(tmp_path):
    write_images(tmp_path, {"a": 4, "b": 4})
    rows = [(f"{name}\\{place}.png", name, "Train" if place else "VALIDATION") for name in "ab" for place in range(4)]
    write_table(tmp_path, rows, ("file", "label", "split"), delimiter=";")
    text = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text("\ufeffsep=;\r\n" + text, encoding="utf-8")
    data = image_table(tmp_path / "labels.csv")
    assert len(data.split("train")) == 6 and len(data.split("val")) == 2
    with pytest.raises(FileNotFoundError, match="labels.csv is a file; is it a table .--data ImageTable --data.table"):
        build_data("ImageFolder", root=str(tmp_path / "labels.csv"))


def test_empty_lines_are_skipped(tmp_path):
    write_images(tmp_path, {"a": 4, "b": 4})
    rows = [(f"{name}/{place}.png", name) for name in "ab" for place in range(4)]
    write_table(tmp_path, rows, delimiter=";")
    text = (tmp_path / "labels.csv").read_text()
    (tmp_path / "labels.csv").write_text("\n;\n" + text.replace("b/0", "\n\nb/0"))
    assert len(image_table(tmp_path / "labels.csv").rows["train"]) == 8


def test_labels_in_both_unicode_forms_are_one_class(tmp_path):
    images = write_images(tmp_path, {"a": 4, "b": 2})
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    rows = [(name, forms[place % 2] if name[0] == "a" else "tea") for place, name in enumerate(images)]
    data = image_table(write_table(tmp_path, rows), val_fraction=0.4)
    assert data.class_names == [forms[0], "tea"] and len(data.split("train")) + len(data.split("val")) == 6


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_network_is_trained_exported_and_measured_with_a_table(run, tmp_path):  # noqa: F811
    images = write_images(tmp_path / "pictures", {"a": 6, "b": 6})
    write_table(tmp_path / "pictures", rows_of(images))
    words = (
        "fit --data ImageTable --data.table pictures/labels.csv --data.input_size 8 --checkpoint.dirpath run".split()
    )
    status, _, errors = run(*words, *SHORT)
    assert status == 0, errors
    words = "export run/last.ckpt table_cnn6_tanh_cosine".split()
    status, printed, errors = run(*words, main=command_line.main)
    assert status == 0 and re.search(r"^accuracy \d.\d+ on labels, val split, 2 images", printed, re.M), errors
    folder = "outputs/table_cnn6_tanh_cosine"
    for words in (f"measure {folder} --root pictures/labels.csv --title Pictures", f"verify {folder} --accuracy"):
        status, printed, errors = run(*words.split(), main=command_line.main)
        assert status == 0, errors
    assert "as recorded" in printed
    status, _, errors = run("preflight", "pictures/labels.csv", main=command_line.main)
    assert status == 0, errors
    status, _, errors = run("fit", "--data", "ImageTable", "--data.table", "nowhere.csv")
    assert status == 1 and "no table nowhere.csv" in errors
    status, _, errors = run("fit", "--data", "ImageTable")
    assert status == 1 and "required: table" in errors, errors
