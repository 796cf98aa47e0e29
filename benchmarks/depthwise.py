"""Whether depthwise convolutions should be decoupled in a network trained from scratch: python -m benchmarks.depthwise

starnet_s050 is trained on CIFAR-10 (JPEG) at 64 pixels, a thousand images a class, as it is, with its depthwise
convolutions plain, and with all of them decoupled. CIFAR-10 is expected in data/cifar10/{train,test}/CLASS. What
results/depthwise.json already has is kept.
"""

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks import learning_curves, measure
from zoo.data.contents import class_folders

OUTPUT = measure.RESULTS / "depthwise.json"
IMAGES = Path("data/cifar10")
ARCHITECTURE, OPERATOR, SIZE, EPOCHS = "starnet_s050", "tanh_cosine", 64, 6
# So many images a class are taken from CIFAR-10.
TRAINED, VALIDATED = 1000, 200
# What is compared, as options of train.py.
VARIANTS = {
    "plain": ("--model.operator", "conv"),
    "depthwise convolutions plain": ("--model.operator", OPERATOR),
    "all decoupled": ("--model.operator", OPERATOR, "--model.depthwise", "true"),
}


def link_images(folder: Path) -> None:
    """Make folder/train and folder/val of links to some of CIFAR's training and test images."""
    for split, source, images in (("train", "train", TRAINED), ("val", "test", VALIDATED)):
        for name in class_folders(IMAGES / source):
            target = folder / split / name
            target.mkdir(parents=True)
            for file in sorted((IMAGES / source / name).iterdir())[:images]:
                (target / file.name).symlink_to(file.resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parsed = parser.parse_args()
    settings = {"architecture": ARCHITECTURE, "operator": OPERATOR, "precision": "32-true"}
    with tempfile.TemporaryDirectory() as scratch:
        link_images(Path(scratch))
        common = ["--data", "ImageFolder", "--data.root", scratch, "--data.input_size", str(SIZE)]
        common += ["--data.batch_size", "32", "--model.architecture", ARCHITECTURE, "--model.learning_rate", "0.002"]
        common += ["--trainer.max_epochs", str(EPOCHS)]
        variants = {name: [*common, *words] for name, words in VARIANTS.items()}
        learning_curves.fill(OUTPUT, settings, variants, parsed.seeds, parsed.threads)


if __name__ == "__main__":
    main()
