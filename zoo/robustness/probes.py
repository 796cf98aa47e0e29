"""What is measured of each image to judge a network's robustness: attacks, the shortest way to a mistake, gradients."""

import copy
import dataclasses
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from zoo.robustness.attacks import fgsm, is_right, logits_and_gradient, noise, pgd

# Iterations and queries of the protocol.
STEPS, RESTARTS, LONG_STEPS, LONG_RESTARTS, SQUARE_QUERIES = 50, 5, 100, 10, 5000
PIXEL = 1 / 255


@dataclasses.dataclass(frozen=True)
class ModelUnderAttack:
    """The network that is judged, and those that help to.

    Attributes:
        model: in evaluation mode, on images in [0, 1].
        others: networks for the same images, by title, whose adversarial images are tried on ``model``.
        flags: what AutoAttack found suspicious, as it says it.
    """

    model: nn.Module
    others: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    flags: list[str] = dataclasses.field(default_factory=list)


# A probe gives one number for each image, from images, labels, ε and a seed.
Probe = Callable[[ModelUnderAttack, Tensor, Tensor, float, int], Tensor]


def step_size(eps: float, steps: int) -> float:
    """Return the step of PGD: one grey level, or what gets two and a half times as far as ε if that is more."""
    return max(PIXEL, 2.5 * eps / steps)


def attack(perturb: Callable[[nn.Module, Tensor, Tensor, float, int], Tensor]) -> Probe:
    """Return a probe: 1 where the model still names the class of the perturbed image, else 0."""

    def probe(attacked: ModelUnderAttack, images: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
        moved = perturb(attacked.model, images, labels, eps, seed)
        farthest = (moved - images).abs().max().item()
        if farthest > eps + 1e-5 or moved.min() < 0 or moved.max() > 1:
            raise ArithmeticError(f"an attack moved a pixel by {farthest}, which may be {eps}, or out of [0, 1]")
        return (is_right(attacked.model, images, labels) & is_right(attacked.model, moved, labels)).float()

    return probe


def gradient_ascent(steps: int, restarts: int, *losses: str) -> Probe:
    """Return the probe of PGD with each of the losses: 1 where none of them makes the model mistake the image."""

    def probe(attacked: ModelUnderAttack, images: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
        settings = {"steps": steps, "step": step_size(eps, steps), "restarts": restarts, "seed": seed}
        left = is_right(attacked.model, images, labels)
        for loss in losses:
            left = left & is_right(
                attacked.model, pgd(attacked.model, images, labels, eps, loss=loss, **settings), labels
            )
        return left.float()

    return probe


def in_double(probe: Probe) -> Probe:
    """Return a probe that measures the same with a copy of the network in float64."""

    def precise(attacked: ModelUnderAttack, images: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
        double = dataclasses.replace(attacked, model=copy.deepcopy(attacked.model).double())
        return probe(double, images.double(), labels, eps, seed)

    return precise


def transfer(attacked: ModelUnderAttack, images: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
    """Return 1 where the model names the class of the image that PGD made for each of the other networks, else 0."""
    left = is_right(attacked.model, images, labels)
    for other in attacked.others.values():
        settings = {"step": step_size(eps, STEPS), "steps": STEPS, "stop_early": False, "seed": seed}
        left = left & is_right(attacked.model, pgd(other, images, labels, eps, **settings), labels)
    return left.float()


def square(model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
    """Return the images of the Square attack, which asks for logits only (Andriushchenko et al., 2020)."""
    settings = {"p_init": 0.8, "n_queries": SQUARE_QUERIES, "n_restarts": 1, "resc_schedule": False, "verbose": False}
    kind = optional("pyautoattack.square").SquareAttack
    return kind(model, norm="Linf", eps=eps, seed=seed, device=images.device, **settings).perturb(images, labels)


def auto_attack(attacked: ModelUnderAttack, images: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
    """Return 1 where standard AutoAttack does not make the model mistake the image (Croce and Hein, 2020), else 0."""
    kind = optional("pyautoattack").AutoAttack
    with torch.no_grad():
        classes = attacked.model(images[:1]).shape[1]
    with listening("auto-attack") as said:
        tool = kind(attacked.model, norm="Linf", eps=eps, seed=seed, device=images.device, version="standard")
        tool.verbose = False
        # The standard has nine target classes beside the right one, and a loss of four logits.
        tool.apgd_targeted.n_target_classes = tool.fab.n_target_classes = min(9, classes - 1)
        if classes < 4:
            tool.attacks_to_run = [name for name in tool.attacks_to_run if name != "apgd-t"]

        def perturb(model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
            return tool.run_standard_evaluation(images, labels, batch_size=len(images))[0]

        left = attack(perturb)(attacked, images, labels, eps, seed)
    attacked.flags.extend(said)
    return left


def shortest(make: Callable[[ModuleType], Callable]) -> Probe:
    """Return the probe of an attack of foolbox: how far, in L2, the nearest mistake is that it finds; ∞ for none.

    Images that the model mistakes as they are have 0.
    """

    def probe(attacked: ModelUnderAttack, images: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
        foolbox = optional("foolbox")
        torch.manual_seed(seed)
        right = is_right(attacked.model, images, labels)
        distances = torch.zeros(len(images))
        if right.any():
            model = foolbox.PyTorchModel(attacked.model, bounds=(0, 1), device=images.device)
            moved, *_ = make(foolbox.attacks)(model, images[right], labels[right], epsilons=None)
            lengths = (moved - images[right]).flatten(1).norm(dim=1)
            lengths[is_right(attacked.model, moved, labels[right])] = torch.inf
            distances[right.cpu()] = lengths.cpu()
        return distances

    return probe


def gradient_norm(loss: str) -> Probe:
    """Return the probe of the L2 norm of a loss's gradient with respect to the image."""

    def probe(attacked: ModelUnderAttack, images: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
        return logits_and_gradient(attacked.model, images, labels, loss)[1].flatten(1).norm(dim=1)

    return probe


def batch_dependence(attacked: ModelUnderAttack, images: Tensor, labels: Tensor, eps: float, seed: int) -> Tensor:
    """Return by how much, relative to the largest logit, the logits of an image alone differ from those in a batch."""
    with torch.no_grad():
        together = attacked.model(images)
        alone = torch.cat([attacked.model(image.unsqueeze(0)) for image in images])
    return (together - alone).abs().amax(1) / together.abs().amax()


PROBES: dict[str, Probe] = {
    "clean": attack(lambda model, images, labels, eps, seed: images),
    "noise": attack(lambda model, images, labels, eps, seed: noise(model, images, labels, eps, seed=seed)),
    "fgsm": attack(lambda model, images, labels, eps, seed: fgsm(model, images, labels, eps)),
    "bim": attack(
        lambda model, images, labels, eps, seed: pgd(
            model, images, labels, eps, step=PIXEL, steps=10, random_start=False
        )
    ),
    "bim_quarter": attack(
        lambda model, images, labels, eps, seed: pgd(
            model, images, labels, eps, step=eps / 4, steps=10, random_start=False
        )
    ),
    "pgd": gradient_ascent(STEPS, RESTARTS, "cross_entropy"),
    "pgd_margin": gradient_ascent(STEPS, RESTARTS, "margin"),
    "pgd_long": gradient_ascent(LONG_STEPS, LONG_RESTARTS, "cross_entropy"),
    "pgd_double": in_double(gradient_ascent(STEPS, RESTARTS, "cross_entropy")),
    "curve": gradient_ascent(STEPS, 1, "cross_entropy", "margin"),
    "transfer": transfer,
    "square": attack(square),
    "autoattack": auto_attack,
    "gradient_norm": gradient_norm("margin"),
    "cross_entropy_gradient": gradient_norm("cross_entropy"),
    "batch_dependence": batch_dependence,
    "deepfool": shortest(lambda attacks: attacks.L2DeepFoolAttack()),
    "ddn": shortest(lambda attacks: attacks.DDNAttack(steps=1000)),
    "carlini_wagner": shortest(lambda attacks: attacks.L2CarliniWagnerAttack(binary_search_steps=9, steps=1000)),
}

TITLES = {
    "clean": "none",
    "noise": "best of 100 random noises",
    "fgsm": "FGSM",
    "bim": "BIM, 10 steps of 1/255",
    "bim_quarter": "BIM, 10 steps of ε/4",
    "pgd": f"PGD-{STEPS} × {RESTARTS}, cross-entropy",
    "pgd_margin": f"PGD-{STEPS} × {RESTARTS}, margin",
    "pgd_long": f"PGD-{LONG_STEPS} × {LONG_RESTARTS}, cross-entropy",
    "pgd_double": f"PGD-{STEPS} × {RESTARTS} in float64",
    "curve": f"PGD-{STEPS}, cross-entropy and margin",
    "transfer": "transfer from other networks",
    "square": f"Square, {SQUARE_QUERIES:,} queries",
    "autoattack": "AutoAttack",
    "deepfool": "DeepFool",
    "ddn": "DDN, 1,000 steps",
    "carlini_wagner": "Carlini-Wagner, 9 × 1,000 steps",
}

# Attacks that follow the gradient, or none, and all that are run at the ε of the headline.
GRADIENT_ATTACKS = ("clean", "noise", "fgsm", "bim", "pgd", "pgd_margin")
ATTACKS = (*GRADIENT_ATTACKS, "pgd_long", "pgd_double", "transfer", "square", "autoattack")
# These are run at other ε, too.
AT_SEVERAL_EPS = ("fgsm", "bim", "bim_quarter", "curve")
EFFORTS = ("deepfool", "ddn", "carlini_wagner")
# The packages of the extra ``robustness``, and what is measured with them.
NEEDS = {"foolbox": EFFORTS, "pyautoattack": ("square", "autoattack")}


def optional(name: str) -> ModuleType:
    """Import a module of the extra ``robustness``.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name.partition('.')[0]} is not installed; pip install 'decoupled-zoo[robustness]' (in a clone: "
            "pip install --editable '.[robustness]') brings the attacks"
        ) from error


def require_packages(probes: Iterable[str]) -> None:
    """Import what some probes need of the extra ``robustness``, so that a run does not begin without it.

    Raises:
        ModuleNotFoundError: as :func:`optional`.
    """
    wanted = set(probes)
    for package, needing in NEEDS.items():
        if wanted.intersection(needing):
            optional(package)


@contextmanager
def listening(name: str) -> Iterator[list[str]]:
    """Collect the warnings that a logger gives, each once, instead of showing them."""
    said: list[str] = []
    logger, handler = logging.getLogger(name), logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage()) if record.getMessage() not in said else None
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
