"""Attacks that change each pixel by at most ε: white box, untargeted, on images in [0, 1] of a model in eval mode."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image, (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``max_{k≠y} z_k − z_y`` of each image, (N,): how far the likeliest wrong class is ahead."""
    own = labels.unsqueeze(1)
    others = logits.scatter(1, own, -torch.inf).amax(1)
    return others - logits.gather(1, own).squeeze(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cross_entropy": cross_entropy, "margin": margin}


def is_right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return of each image whether its class has the largest logit, (N,)."""
    with torch.no_grad():
        return model(images).argmax(1) == labels


def logits_and_gradient(model: nn.Module, images: Tensor, labels: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Return the logits, and the gradient of each image's loss with respect to that image."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(images)
        (gradient,) = torch.autograd.grad(LOSSES[loss](logits, labels).sum(), images)
    return logits.detach(), gradient


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, eps: float, loss: str = "cross_entropy") -> Tensor:
    """Return ``clamp(x + ε sign ∇ₓ L)`` (Goodfellow et al., 2015, equation in section 4)."""
    return pgd(model, images, labels, eps, step=eps, steps=1, loss=loss, random_start=False, stop_early=False)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    step: float,
    steps: int,
    restarts: int = 1,
    loss: str = "cross_entropy",
    random_start: bool = True,
    stop_early: bool = True,
    seed: int | None = 0,
) -> Tensor:
    """Return images after gradient ascent: ``x ← clamp(Π(x + step · sign ∇ₓ L))`` (Madry et al., 2018, section 2.1).

    ``Π`` projects on the cube of half edge ε around the image. Without a random start it is BIM (Kurakin et al., 2017).

    Args:
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        eps, step: in units of the pixels.
        restarts: the next one is begun for images that no earlier one made the model mistake.
        loss: a name of ``LOSSES``.
        stop_early: leave an image where it is as soon as the model mistakes it.
        seed: of the random starts; None draws them from torch's own generator.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    result = images.clone()
    left = torch.arange(len(images), device=images.device)
    if stop_early:
        left = left[is_right(model, images, labels)]
    for _ in range(restarts):
        # Noise is drawn for all images, so that one's start does not depend on how the others fared.
        noise = 2 * torch.rand(images.shape, generator=generator) - 1
        chosen, clean, truth = left, images[left], labels[left]
        moved = (clean + eps * noise.to(images)[left]).clamp(0, 1) if random_start else clean
        for _ in range(steps):
            logits, gradient = logits_and_gradient(model, moved, truth, loss)
            if stop_early and not (right := logits.argmax(1) == truth).all():
                result[chosen[~right]] = moved[~right]
                chosen, clean, truth, moved, gradient = (
                    tensor[right] for tensor in (chosen, clean, truth, moved, gradient)
                )
            if not len(chosen):
                break
            moved = (clean + (moved + step * gradient.sign() - clean).clamp(-eps, eps)).clamp(0, 1)
        result[chosen] = moved
        left = chosen[is_right(model, moved, truth)] if len(chosen) else chosen
    return result


def noise(model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, draws: int = 100, seed: int = 0) -> Tensor:
    """Return images with the first of ``draws`` uniform noises of at most ε that the model mistakes, or the last."""
    generator = torch.Generator().manual_seed(seed)
    result, left = images.clone(), is_right(model, images, labels)
    for _ in range(draws):
        moved = (images + eps * (2 * torch.rand(images.shape, generator=generator).to(images) - 1)).clamp(0, 1)
        if not left.any():
            break
        result[left] = moved[left]
        left[left.clone()] = is_right(model, moved[left], labels[left])
    return result
