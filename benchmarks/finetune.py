"""Fine-tuning a converted network beside its plain twin: python -m benchmarks.finetune WEIGHTS IMAGES

WEIGHTS is a file with the weights of a network of timm, IMAGES a folder of train/CLASS/* and val/CLASS/*. By the recipe
configs/finetune.yaml the network is fine-tuned as it is, converted alone, and converted and calibrated. What
results/finetune.json already has is kept.
"""

import argparse
import os
import tempfile
from pathlib import Path

import zoo
from benchmarks import learning_curves, measure
from zoo.checkpoints.starting_points import start_from

OUTPUT = measure.RESULTS / "finetune.json"
ARCHITECTURE, OPERATOR, SIZE, EPOCHS = "tf_efficientnet_lite0", "tanh_cosine", 160, 10
CONFIG = measure.RESULTS.parent / "configs" / "finetune.yaml"
CONVERTED = ("--model.operator", OPERATOR)
# What is compared, as options of train.py.
VARIANTS = {
    "plain": (),
    "converted": (*CONVERTED, "--model.calibrate", "null"),
    "converted and calibrated": CONVERTED,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="a file (.safetensors, .pth)")
    parser.add_argument("images", type=Path, help="a folder of train/CLASS/* and val/CLASS/*")
    parser.add_argument("--architecture", default=ARCHITECTURE, help="of timm (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parsed = parser.parse_args()
    settings = {"architecture": parsed.architecture, "operator": OPERATOR, "precision": "32-true"}
    with tempfile.TemporaryDirectory() as scratch:
        plain = start_from(f"timm:{parsed.architecture}", weights=parsed.weights)
        source = zoo.save(plain, Path(scratch) / f"imagenet_{parsed.architecture}_conv")
        common = ["--config", str(CONFIG), "--model.init_from", str(source), "--data.root", str(parsed.images)]
        common += ["--data.input_size", str(SIZE), "--trainer.max_epochs", str(EPOCHS)]
        variants = {name: [*common, *words] for name, words in VARIANTS.items()}
        learning_curves.fill(OUTPUT, settings, variants, parsed.seeds, parsed.threads)


if __name__ == "__main__":
    main()
