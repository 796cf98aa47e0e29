"""Entry points of ``torch.hub``: one for each checkpoint, one for each architecture, and ``checkpoint``.

torch.hub.load("ORG/decoupled-zoo", "digits_cnn6_tanh_cosine", trust_repo=True)
torch.hub.load("path/of/this/folder", "resnet20", operator="ball_cosine", source="local")
"""

import json as _json
import sys as _sys
from pathlib import Path as _Path

dependencies = ["torch", "torchvision", "timm", "safetensors", "huggingface_hub", "PIL"]

_HERE = _Path(__file__).resolve().parent

_ARCHITECTURES = {
    "cnn6": "Three blocks of two 3×3 convolutions, 32-64-128 filters, for small images.",
    "cnn9": "The paper's plain CNN: three blocks of three 3×3 convolutions and a 512-wide hidden layer.",
    "cnn9_no_batchnorm": "The paper's plain CNN without batch normalisation.",
    "resnet20": "ResNet-20 for 32×32 images, 16-32-64 filters.",
    "resnet32": "ResNet-32 for 32×32 images, 16-32-64 filters.",
    "resnet32_wide": "The authors' ResNet-32, 96-192-384 filters.",
    "resnet18_modified": "The authors' modified ResNet-18 for ImageNet.",
}


def checkpoint(where, num_classes=None, in_chans=None, revision=None, device=None):
    """Load a checkpoint in evaluation mode: a folder, one of this repository by name, or a Hub repository.

    Args:
        where: the folder's path, the name, or "owner/name".
        num_classes: another number than the checkpoint's gives a fresh, untrained classifier.
        in_chans: another number spreads the first convolution's filters over that many channels.
        revision: of a Hub repository: a commit, branch or tag.
        device: where the model is put; the CPU by default.
    """
    return _zoo().load(where, num_classes=num_classes, in_chans=in_chans, revision=revision, device=device)


def _zoo():
    """Import this folder's ``zoo``, or say which other module took its name."""
    for name in ("operators", "zoo"):
        module = _sys.modules.get(name)
        if module is None:
            continue
        place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
        if place is None or _HERE not in _Path(place).resolve().parents:
            raise RuntimeError(
                f"another module named {name!r} was imported first, from {place}; decoupled-zoo needs its own. "
                f"Load the model in a fresh Python process before importing yours, rename yours, or forget it first: "
                f"import sys; [sys.modules.pop(m) for m in list(sys.modules) if m.split('.')[0] == {name!r}]"
            )
    import zoo

    return zoo


def _checkpoint_entry(name, description):
    def entry(pretrained=True, num_classes=None, device=None):
        zoo = _zoo()
        if pretrained:
            return zoo.load(name, num_classes=num_classes, device=device)
        return zoo.load_untrained(name, num_classes=num_classes, device=device)

    entry.__name__ = name
    entry.__doc__ = f"""{description}

    ``model.transform`` makes what it takes from a PIL image.

    Args:
        pretrained: load the trained weights (evaluation mode), or start afresh (training mode).
        num_classes: another number than its own gives a fresh, untrained classifier.
        device: where the model is put; the CPU by default.
    """
    return entry


def _description(config):
    measured = "; ".join(
        f"{m['name']} {m['value']:.4f} on {m['dataset']}, {m['split']} split, {m['images']:,} images"
        for m in config["metrics"]
    )
    shape = f"(N, {config['in_chans']}, {config['input_size']}, {config['input_size']})"
    classes = len(config["class_names"])
    # A decoupled network's config.json has the name of its architecture among the arguments.
    architecture = config["model_args"].get("architecture", config["architecture"])
    return f"{architecture} for {classes} classes. {measured}.\n\n    It takes images {shape} in [0, 1]."


def _architecture_entry(name, description):
    def entry(operator="conv", num_classes=None, in_chans=3, device=None, **arguments):
        model = _zoo().build(name, operator, num_classes=num_classes, in_chans=in_chans, **arguments)
        return model.to(device)

    entry.__name__ = name
    entry.__doc__ = f"""{description} Freshly initialised, in training mode.

    Args:
        operator: "conv" for ordinary convolutions, or a decoupled operator such as "tanh_cosine".
        num_classes: number of logits; 10 by default.
        in_chans: channels of the images.
        device: where the model is put; the CPU by default.
        arguments: further arguments of ``zoo.build``.
    """
    return entry


for _name, _text in _ARCHITECTURES.items():
    globals()[_name] = _architecture_entry(_name, _text)
_PRETRAINED = _HERE / "zoo" / "pretrained"
for _path in sorted(_PRETRAINED.glob("*/config.json")):
    _name = _path.parent.name
    globals()[_name] = _checkpoint_entry(_name, _description(_json.loads(_path.read_text(encoding="utf-8"))))
# Checkpoints too large for this repository come from the Hub, each at one commit.
for _name, _source in _json.loads((_PRETRAINED / "published.json").read_text(encoding="utf-8")).items():
    globals()[_name] = _checkpoint_entry(_name, f"The Hub's {_source['repository']}, commit {_source['commit']}.")
