"""A small folder of real photographs, as a person might have it: python -m benchmarks.photos FOLDER

scikit-learn and matplotlib come with three photographs, a temple, a flower and a portrait. Crops of them, at random
places and of mixed sizes, shapes, formats and colour modes, become FOLDER/train/CLASS, FOLDER/val/CLASS and, without a
class, FOLDER/new. Training and validation crops are of different parts of a photograph, left and right.

Every class is crops of a single photograph, so colours alone tell them apart, and a high accuracy says only that the
path from a folder of files to a trained network works. It says nothing about how well a network recognises temples,
flowers or people.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

# Where each class's subject is in its photograph: left, top, right and bottom, and the column that parts the training
# crops from those of validation, which runs through the subject.
SUBJECTS = {
    "flower": ((130, 50, 500, 427), 335),
    "portrait": ((130, 20, 400, 450), 262),
    "temple": ((70, 30, 375, 427), 235),
}
SPLITS = {"train": 40, "val": 10}
SMALLEST = 96

FORMS = {
    "colour": "jpg",
    "turned": "jpg",  # pixels on their side, and an EXIF entry that says so, as phones write them
    "grey": "jpg",
    "transparent": "png",
    "palette": "png",
}
# EXIF's tag of the orientation, and its value for pixels to be turned clockwise by 90 degrees.
ORIENTATION, CLOCKWISE = 0x0112, 6


def photographs() -> dict[str, Image.Image]:
    """Return the photograph of each class, RGB."""
    return {
        "flower": Image.fromarray(load_sample_image("flower.jpg")),
        "portrait": Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB"),
        "temple": Image.fromarray(load_sample_image("china.jpg")),
    }


def random_crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Return a crop of random height, width and place."""
    width, height = (int(random.integers(SMALLEST, side + 1)) for side in image.size)
    left, top = (int(random.integers(space + 1)) for space in (image.width - width, image.height - height))
    return image.crop((left, top, left + width, top + height))


def save(image: Image.Image, path: Path, form: str) -> None:
    """Write an RGB image in one of ``FORMS``; ``path`` gets the ending of that form."""
    exif = Image.Exif()
    if form == "turned":
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[ORIENTATION] = CLOCKWISE
    elif form == "grey":
        image = image.convert("L")
    elif form == "transparent":
        opaque = Image.new("L", image.size)
        ImageDraw.Draw(opaque).rounded_rectangle((0, 0, image.width - 1, image.height - 1), SMALLEST // 6, fill=255)
        image.putalpha(opaque)
    elif form == "palette":
        image = image.quantize(64)
    image.save(path.with_suffix(f".{FORMS[form]}"), exif=exif, quality=90)


def write_photos(folder: Path, seed: int = 0) -> int:
    """Write FOLDER/train/CLASS, FOLDER/val/CLASS and FOLDER/new, and return how many images these are.

    Raises:
        FileExistsError: the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder")
    random, forms = np.random.default_rng(seed), list(FORMS)
    (folder / "new").mkdir(parents=True)
    for number, (name, photograph) in enumerate(photographs().items()):
        (left, top, right, bottom), border = SUBJECTS[name]
        parts = {"train": (left, top, border, bottom), "val": (border, top, right, bottom)}
        for split, count in SPLITS.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                crop = random_crop(photograph.crop(parts[split]), random)
                save(crop, folder / split / name / f"{index:02}", forms[index % len(forms)])
        save(random_crop(photograph.crop(parts["val"]), random), folder / "new" / f"{number}", forms[number])
    return len(SUBJECTS) * (sum(SPLITS.values()) + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the photographs go; it must be new or empty")
    parser.add_argument("--seed", type=int, default=0, help="of the places and sizes (default: %(default)s)")
    parsed = parser.parse_args()
    try:
        written = write_photos(parsed.folder, parsed.seed)
    except OSError as error:
        parser.error(str(error))
    print(f"{written} images of {len(SUBJECTS)} classes in {parsed.folder}: {', '.join([*SPLITS, 'new'])}")


if __name__ == "__main__":
    main()
