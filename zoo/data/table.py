"""A table of image files and their labels."""

import csv
import io
import os
import re
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from operators.lookup import unknown_name
from zoo.data.augmentation import Augment
from zoo.data.image_files import MOST_UNREADABLE
from zoo.data.labelled_files import CALLED, LabelledFiles, differences
from zoo.data.module import SPLITS, ClassWeights
from zoo.models.spec import composed

# Spreadsheets write one or another of these between columns.
DELIMITERS = ",;\t"


class ImageTable(LabelledFiles):
    """Your own images and a table of their labels: a CSV file whose first line names the columns.

    A row has the path of an image, relative to the table's folder, its label, and, if there is such a column, its split
    ("train", "val" or "test"). Columns stand between commas, semicolons or tabs; others are not looked at. Without
    images of "val", a share of "train" is held out for validation. Without images of "test", the validation images are
    the test images too. Images are read, and those that cannot be left out, as by :class:`ImageFolder`.

    Args:
        table: the CSV file, in UTF-8.
        file_column: the name of the column of paths.
        label_column: the name of the column of labels.
        split_column: the name of the column of splits; the table need not have it if it is called "split".
        input_size: height and width that the network sees, in pixels; by default those that the network one starts
            from (``--model.init_from``) was trained on, else 224.
        in_chans: 3 (RGB) or 1 (grey); by default as the network one starts from takes them, else 3.
        title: the data set's name as shown beside results; the table's by default.
        licence: the terms on which the images are to be had.
        mean: of each channel for pixels in [0, 1]; ImageNet's for RGB and 0.5 for grey by default.
        std: of each channel for pixels in [0, 1]; ImageNet's for RGB and 0.25 for grey by default.
        batch_size: images a batch (and a device).
        val_fraction: share of train held out for validation if there are no images of val, in (0, 0.5].
        augment: of training images: "none", "crop" (random shift), "crop_flip" (and mirroring), "crop_flip_cutout"
            (and a black square), "crop_flip_light" (and other brightness and contrast) or "resized_crop_flip" (random
            resized crop and mirroring); "crop_flip" by default.
        num_workers: processes that read images, for a split too large for memory.
        memory_limit_mb: a split of more MiB than this, once decoded, is read from disk batch by batch.
        max_unreadable: up to so many files of a split that are no readable images are left out with a warning that
            names them; more are an error.
        draft: whether JPEG files of at least six times ``input_size`` are scaled down by the decoder, to no less than
            three times that size: faster, and less than a level of 255 away on average.
        class_weights: factors of the training loss, one for each class in the order of their names; or "auto", by
            which each class counts as much as any other however many images it has. None by default.
        predict: image file or folder for predict; the test images by default.
        corruption: what test images are changed by when the test loader reads them, as "NAME:SEVERITY", e.g. "fog:3"
            (see ``zoo.corruptions``); nothing by default.

    Raises:
        FileNotFoundError: no such table.
        ValueError: a table that is no CSV file in UTF-8, or lacks a column; a row without a file or label, or with an
            unknown split; a file in two rows; fewer than two classes, classes that differ between splits, a number
            outside its range; from reading a split, more than ``max_unreadable`` files that are no readable images, or
            a class that has no other.
    """

    def __init__(
        self,
        table: str,
        file_column: str = "file",
        label_column: str = "label",
        split_column: str = "split",
        input_size: int | None = None,
        in_chans: int | None = None,
        title: str | None = None,
        licence: str = "not stated",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        augment: Augment | None = None,
        num_workers: int = 0,
        memory_limit_mb: int = 2048,
        max_unreadable: int = MOST_UNREADABLE,
        draft: bool = True,
        class_weights: ClassWeights = None,
        predict: str | None = None,
        corruption: str | None = None,
    ) -> None:
        self.table = Path(table)
        super().__init__(
            self.table,
            input_size=input_size,
            in_chans=in_chans,
            title=title or self.table.stem,
            licence=licence,
            mean=mean,
            std=std,
            batch_size=batch_size,
            val_fraction=val_fraction,
            augment=augment,
            num_workers=num_workers,
            memory_limit_mb=memory_limit_mb,
            max_unreadable=max_unreadable,
            draft=draft,
            class_weights=class_weights,
            predict=predict,
            corruption=corruption,
        )
        self.save_hyperparameters()
        # Lightning's command line has recorded what it was told, which may be None.
        self.hparams.update(input_size=self.input_size, in_chans=self.in_chans)
        self.rows = self._rows(file_column, label_column, split_column)
        self.class_names = self._check_classes()

    def has(self, split: str) -> bool:
        return bool(self.rows[split])

    def files_of(self, split: str) -> tuple[list[Path], Tensor]:
        labels = {name: label for label, name in enumerate(self.class_names)}
        rows = sorted(self.rows[split].items(), key=lambda row: (labels[row[1]], row[0]))
        return [file for file, _ in rows], torch.tensor([labels[name] for _, name in rows])

    def _rows(self, file_column: str, label_column: str, split_column: str) -> dict[str, dict[Path, str]]:
        """Return of each split the label of each file, as the table tells them."""
        header, lines = self._lines()
        self._check_header(header, file_column, label_column, split_column)
        rows: dict[str, dict[Path, str]] = {split: {} for split in SPLITS}
        problems, seen = [], {}
        for number, line in lines.items():
            row = {split_column: "train", **dict(zip(header, line, strict=False))}
            file, label, split = (row.get(column, "") for column in (file_column, label_column, split_column))
            split = next((name for name, others in CALLED.items() if split.lower() in others), split)
            path = self._path_of(file)
            if len(line) != len(header):
                problems.append(f"line {number} has {len(line)} cells, the first line {len(header)}")
            elif not file or not label:
                problems.append(f"line {number} has no {label_column if file else file_column}")
            elif split not in SPLITS:
                problems.append(f"line {number}: {unknown_name('split', split, SPLITS)}")
            elif path in seen:
                problems.append(f"line {number} has {file} again, which is in line {seen[path]}")
            else:
                seen[path] = number
                rows[split][path] = composed(label)
        if problems:
            more = f"; ... ({len(problems)} lines in all)" if len(problems) > 10 else ""
            raise ValueError(f"{self.table} is no table of images: {'; '.join(problems[:10])}{more}")
        return rows

    def _path_of(self, file: str) -> Path:
        """Return the path of a file, whose folders a table of Windows parts otherwise."""
        path = Path(os.path.normpath(self.table.parent / file))
        if "\\" in file and not path.exists():
            path = Path(os.path.normpath(self.table.parent / file.replace("\\", "/")))
        return path

    def _check_header(self, header: list[str], file_column: str, label_column: str, split_column: str) -> None:
        """Refuse names of columns that are not there, stand twice, or are spelt as others are but for capitals."""
        needed = {"file_column": file_column, "label_column": label_column}
        alike = [name for name in header if name.lower() == split_column.lower()]
        # A table without this column is all of train.
        if split_column != "split" or alike:
            needed["split_column"] = split_column
        for option, column in needed.items():
            if header.count(column) != 1:
                message = unknown_name(f"column of {self.table}", column, header)
                twice = f"{self.table} has {header.count(column)} columns {column!r}." if column in header else message
                raise ValueError(f"{twice} The column is named by --data.{option}.")

    def _lines(self) -> tuple[list[str], dict[int, list[str]]]:
        """Return the names of the columns, and by its number the cells of each line below, without space around."""
        if not self.table.is_file():
            raise FileNotFoundError(f"no table {self.table}; a CSV file is expected, with a line for each image")
        try:
            # Excel begins its files with a mark that is no part of the first column's name.
            text = self.table.read_text(encoding="utf-8-sig")
            first = next((line for line in text.splitlines() if line.strip()), "")
            # Excel may tell by a line before the others what stands between columns.
            told = re.fullmatch("sep=(.)", first.strip())
            delimiter = told[1] if told else max(DELIMITERS, key=first.count)
            reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
            lines = {}
            for line in reader:
                if told and not lines and "".join(line).startswith("sep="):
                    continue
                if cells := [cell.strip() for cell in line] if any(map(str.strip, line)) else []:
                    lines[reader.line_num] = cells
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self.table} is no CSV file in UTF-8 ({error}); save it as one") from error
        if len(lines) < 2:
            raise ValueError(f"{self.table} has no line below the names of its columns; it needs one for each image")
        return lines.pop(min(lines)), lines

    def _check_classes(self) -> list[str]:
        names = sorted(set(self.rows["train"].values()))
        problems = []
        if len(names) < 2:
            problems.append(f"{self.table} needs two or more labels of train, but has {', '.join(names) or 'none'}")
        for split in filter(self.has, SPLITS[1:]):
            if told := differences("train", names, split, self.rows[split].values()):
                problems.append(
                    f"{split} and train of {self.table} must have the same labels, but {told}; add or remove these"
                )
        if problems:
            raise ValueError("\n".join(problems))
        if not self.has("val") and not self.has("test"):
            rank_zero_info(f"all {len(self.rows['train']):,} images of {self.table} are of train")
        if not self.has("test"):
            rank_zero_info(f"{self.table} has no test images: its validation images are its test images, too")
        return names
