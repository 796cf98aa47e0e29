"""What the paper's tables measure on test images, each as one number."""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from zoo.arithmetic import exact_arithmetic
from zoo.models.image_model import ImageModel
from zoo.robustness.probes import PROBES, ModelUnderAttack
from zoo.robustness.protocol import EPS

ATTACKED_BATCH = 50

# Features of so many images are enough to see their shape in a plot.
DRAWN = 1000


@dataclasses.dataclass(frozen=True)
class ModelOutputs:
    """What a network says of images.

    Attributes:
        logits: (N, num_classes).
        features: what the classifier reads, (N, num_features).
        labels: (N,).
        model: the network, in evaluation mode.
        attacked: images of the test split, and their labels, that are attacked.
    """

    logits: Tensor
    features: Tensor
    labels: Tensor
    model: ImageModel | None = None
    attacked: tuple[Tensor, Tensor] | None = None

    @classmethod
    def collect(
        cls,
        model: ImageModel,
        batches: Iterable[tuple[Tensor, Tensor]],
        attacked: tuple[Tensor, Tensor] | None = None,
    ) -> "ModelOutputs":
        """Return the outputs for each batch, in evaluation mode on the model's device; the tensors are on the CPU."""
        logits, features, labels = [], [], []
        classifier = model.eval().network.get_classifier()
        hook = classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].cpu()))
        try:
            with torch.inference_mode():
                for images, wanted in batches:
                    logits.append(model(images.to(model.mean.device)).cpu())
                    labels.append(wanted)
        finally:
            hook.remove()
        return cls(torch.cat(logits), torch.cat(features), torch.cat(labels), model, attacked)

    def error(self, top: int = 1) -> float:
        """Return the share of images whose class is not among the ``top`` likeliest, in percent."""
        likeliest = self.logits.topk(min(top, self.logits.shape[1]), dim=1).indices
        return 100 * (1 - (likeliest == self.labels.unsqueeze(1)).any(1).double().mean().item())

    def accuracy(self) -> float:
        """Return the share of images whose class is the likeliest, in percent."""
        return 100 - self.error()

    def attack(self, probe: str) -> Tensor:
        """Return what a probe of ``zoo.robustness.probes`` finds of each attacked image, at ε = 8/255."""
        images, labels = (tensor.to(self.model.mean.device) for tensor in self.attacked)
        attacked = ModelUnderAttack(self.model)
        parts = zip(images.split(ATTACKED_BATCH), labels.split(ATTACKED_BATCH), strict=True)
        with exact_arithmetic(images.device):
            return torch.cat([PROBES[probe](attacked, *part, EPS, seed).cpu() for seed, part in enumerate(parts)])

    def effort(self) -> float:
        """Return the median L2 distance to the nearest mistake that DeepFool or DDN finds, of images named right."""
        found = torch.stack([self.attack("deepfool"), self.attack("ddn")]).amin(0)
        return found[found > 0].median().item()

    def top5_error(self) -> float:
        """Return the share of images whose class is not among the five likeliest, in percent."""
        return self.error(top=5)

    def spread(self) -> float:
        """Return how far features scatter within a class, over how far apart the classes lie.

        The mean distance of a feature to the mean of its class, averaged over classes, divided by the mean distance
        between the means of two classes; NaN if all means are the same.
        """
        classes = [self.features[self.labels == label] for label in self.labels.unique()]
        centres = [members.mean(0) for members in classes]
        within = [(members - centre).norm(dim=1).mean() for members, centre in zip(classes, centres, strict=True)]
        return (torch.stack(within).mean() / torch.pdist(torch.stack(centres)).mean()).item()

    def drawn_features(self) -> list[list[float]]:
        """Return [feature, ..., label] of at most a thousand images, evenly spaced among all, for a plot."""
        chosen = torch.linspace(0, len(self.labels) - 1, min(DRAWN, len(self.labels))).long()
        points, labels = self.features[chosen].tolist(), self.labels[chosen].tolist()
        return [[*(round(value, 3) for value in point), label] for point, label in zip(points, labels, strict=True)]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measure's function and its title in a table."""

    of: Callable[[ModelOutputs], float]
    title: str


MEASURES = {
    "error": Measure(ModelOutputs.error, "test error, %"),
    "top5_error": Measure(ModelOutputs.top5_error, "top-5 error, %"),
    "accuracy": Measure(ModelOutputs.accuracy, "accuracy without an attack, %"),
    "fgsm": Measure(lambda outputs: 100 * outputs.attack("fgsm").mean().item(), "under FGSM, %"),
    "bim": Measure(lambda outputs: 100 * outputs.attack("bim").mean().item(), "under BIM, %"),
    "pgd": Measure(lambda outputs: 100 * outputs.attack("curve").mean().item(), "under PGD-50, two losses, %"),
    "effort": Measure(ModelOutputs.effort, "median L2 distance to the nearest mistake"),
    "spread": Measure(ModelOutputs.spread, "spread within a class ÷ distance between classes"),
}
