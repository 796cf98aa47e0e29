"""What ``python -m zoo robustness`` tells of a result: tables in Markdown, and the record of a card."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from zoo.markdown import markdown_table
from zoo.robustness.masking import checks, suspected, unlooked_for
from zoo.robustness.probes import ATTACKS, EFFORTS, TITLES
from zoo.robustness.protocol import COMPARED, CURVE_EPS, PAPER_EPS, compared_eps
from zoo.robustness.result import Result
from zoo.statistics import interval

# The attacks that a card names, by the names of their probes.
ON_CARDS = {"fgsm": "FGSM", "bim": "BIM", "pgd": "PGD-50×5", "autoattack": "AutoAttack"}

# Under these attacks, two networks are compared image by image, beside the worst case.
PAIRED = ("fgsm", "pgd")
WORST = "worst case of each image"

# Beside the largest change of a pixel, accuracy is told for whole changes of at most this length.
L2_EPS = 0.5


def name_of(result: Result) -> str:
    """Return the name of the checkpoint that was attacked."""
    return result.about["checkpoint"]


def efforts_of(result: Result) -> list[str]:
    """Return the L2 attacks that were run."""
    return [name for name in EFFORTS if result.of(name) is not None]


def columns(results: Sequence[Result]) -> list[str]:
    """Return the names of checkpoints without what they have in common: of a family, the operators."""
    names = list(map(name_of, results))
    common = os.path.commonprefix(names).rpartition("_")[0] if len(names) > 1 else ""
    return [name.removeprefix(f"{common}_") for name in names]


def level(eps: float) -> str:
    """Return ε as people write it: in grey levels of 255, if it is a whole number of them."""
    grey = round(255 * eps)
    return f"{grey}/255" if abs(255 * eps - grey) < 1e-6 else f"{eps:g}"


def with_interval(values: Tensor) -> str:
    """Return the share of ones in percent, with Wilson's 95 % interval."""
    share = values.mean().item()
    low, high = interval(share, len(values))
    return f"{100 * share:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def headline(result: Result) -> str:
    """Return in one sentence how many images are named right in the worst case, and whether to believe it."""
    doubts = suspected(result)
    believed = f"; masked gradients are suspected ({'; '.join(check.told for check in doubts)})" if doubts else ""
    left_out = f" that was run (not {', '.join(result.unmeasured())})" if result.unmeasured() else ""
    return (
        f"{result.about['checkpoint']}: {with_interval(result.worst())} % of {result.about['images']} test images of "
        f"{result.about['data']} are named right under every attack{left_out}, with pixels changed by at most "
        f"{level(result.eps)}{believed}."
    )


def masking(result: Result) -> str:
    """Return whether masked gradients are suspected, and how many signs were not looked for."""
    if suspected(result):
        return "SUSPECTED"
    if unlooked_for(result):
        return f"only {len(checks(result))} signs looked for" if checks(result) else "not looked for"
    return "not suspected"


def attack_table(results: Sequence[Result]) -> str:
    """Return the accuracy under each attack at each result's ε, one column a checkpoint, and the worst case."""
    header = ("accuracy, %", *columns(results))
    rows = []
    for attack in ATTACKS:
        cells = [result.of(attack) for result in results]
        if any(values is not None for values in cells):
            rows.append((TITLES[attack], *("–" if values is None else with_interval(values) for values in cells)))
    rows.append((f"**{WORST}**", *(f"**{with_interval(result.worst())}**" for result in results)))
    rows.append(("masked gradients", *map(masking, results)))
    return markdown_table(header, rows)


def check_table(results: Sequence[Result]) -> str:
    """Return every check of masking, one column a checkpoint."""
    found = [{check.what: check for check in checks(result)} for result in results]
    names = list(dict.fromkeys(name for one in found for name in one))
    rows = []
    for name in names:
        cells = [one.get(name) for one in found]
        limit = next(check.row()[2] for check in cells if check)
        told = ("–" if check is None else f"{check.row()[1]}, {check.verdict}" for check in cells)
        rows.append((name, limit, *told))
    return markdown_table(("sign of masked gradients", "at most", *columns(results)), rows)


def paired_table(results: Sequence[Result]) -> str:
    """Return how many images a network alone names right, and how many the first one alone, attack by attack.

    With the p-value of the exact sign test (McNemar's): of a difference at least as large if which of two networks that
    disagree on an image keeps it were a matter of chance. Attacks under which no two disagree are left out.
    """
    alike = [result.is_of_the_same_images(results[0]) for result in results]
    kept = {TITLES[name]: [result.of(name) for result in results] for name in PAIRED}
    kept |= {
        f"{TITLES['curve']}, {level(eps)}": [result.of("curve", eps) for result in results] for eps in CURVE_EPS[1:]
    }
    kept[WORST] = [result.worst() for result in results]
    rows = [
        (attack, *(paired(first, other) if same else "–" for other, same in zip(others, alike[1:], strict=True)))
        for attack, (first, *others) in kept.items()
    ]
    rows = [row for row in rows if set(row[1:]) != {"–"}]
    first, *others = columns(results)
    return markdown_table((f"images that this network alone, {first} alone names right", *others), rows)


def paired(theirs: Tensor | None, mine: Tensor | None) -> str:
    """Return how many images of the second only, of the first only are right, and the p-value of the sign test."""
    if theirs is None or mine is None or theirs.equal(mine):
        return "–"
    more, fewer = int((mine > theirs).sum()), int((mine < theirs).sum())
    p = binomtest(more, more + fewer).pvalue
    return f"{more}, {fewer} (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'})"


def paper_table(results: Sequence[Result]) -> str:
    """Return the accuracy at several ε under FGSM and BIM, as the paper has them, whose ε is not known, and PGD."""
    rows = []
    for eps in sorted({*compared_eps(results[0].eps), *CURVE_EPS[1:]}):
        for attack in (*COMPARED, "curve"):
            shares = [result.accuracy(attack, eps) for result in results]
            if any(share is not None for share in shares):
                cells = ("–" if share is None else f"{100 * share:.1f}" for share in shares)
                rows.append((level(eps), TITLES[attack], *cells))
    return markdown_table(("ε", "accuracy, %", *columns(results)), rows)


def effort_table(results: Sequence[Result], twins: Mapping[str, Result]) -> str:
    """Return how far the nearest mistake is, and how many times as far as the plain twin's.

    Of the images that both name right; the interval of the ratio of medians is that of 2,000 bootstrap samples of
    images. What is right within a distance is the share of all images for which no nearer mistake was found, with
    Wilson's interval.
    """
    quartiles = ("lower quartile", "median", "upper quartile")
    header = ("L2 effort", "images", *quartiles, "times the twin's (95 %)", "found", f"right within {L2_EPS}, %")
    rows = []
    for result in results:
        effort = result.effort()
        if effort is None:
            continue
        right = effort > 0
        found = effort[right].isfinite().float().mean().item() if right.any() else 1.0
        twin = twins.get(name_of(result))
        alike = twin and efforts_of(twin) == efforts_of(result) and twin.is_of_the_same_images(result)
        comparable = alike and len(twin.effort()) == len(effort)
        compared = ratio_to_twin(effort, twin.effort()) if comparable else "–"
        lengths = (f"{effort[right].quantile(q).item():.3f}" for q in (0.25, 0.5, 0.75))
        within = with_interval((effort > L2_EPS).float())
        images = f"{int(right.sum())} of {len(effort)}"
        rows.append((name_of(result), images, *lengths, compared, f"{100 * found:.0f} %", within))
    return markdown_table(header, rows)


def ratio_to_twin(effort: Tensor, twin: Tensor) -> str:
    """Return the ratio of the median efforts over the images that both name right, with its bootstrap interval."""
    both = (effort > 0) & (twin > 0)
    # A mistake that was not found may be anywhere.
    if not both.any() or not (effort.isfinite() & twin.isfinite()).all():
        return "–"
    mine, theirs = effort[both], twin[both]
    drawn = torch.randint(len(mine), (2000, len(mine)), generator=torch.Generator().manual_seed(0))
    ratios = mine[drawn].median(1).values / theirs[drawn].median(1).values
    low, high = ratios.quantile(0.025).item(), ratios.quantile(0.975).item()
    return f"{(mine.median() / theirs.median()).item():.2f} ({low:.2f}–{high:.2f})"


def card_record(result: Result) -> dict[str, Any]:
    """Return what the card says of a result, as JSON-able values."""
    shares = {title: result.accuracy(attack) for attack, title in ON_CARDS.items()}
    return {
        "eps": level(result.eps),
        "images": result.about["images"],
        "accuracy": {title: share for title, share in shares.items() if share is not None},
        "worst_case": result.worst().mean().item(),
        "suspected": [check.told for check in suspected(result)],
    }


def report(result: Result, twin: Result | None) -> str:
    """Return everything about one result in Markdown, beside its plain twin's if that was measured."""
    both = [result, *([twin] if twin else [])]
    twins = {name_of(result): twin} if twin else {}
    bound = "A network is as robust as the worst case says, and no more."
    if result.unmeasured():
        bound = "As a part of the attacks only was run, this is an upper bound, and no robustness."
    parts = [
        f"# How robust is {result.about['checkpoint']}?",
        headline(result),
        f"Images evenly spaced over the test split; {result.about['hardware']}, torch {result.about['torch']}. In "
        f"brackets Wilson's 95 % intervals. {bound}",
        f"## Accuracy with pixels changed by at most {level(result.eps)}",
        attack_table(both),
        "## Are gradients masked?",
        check_table(both),
    ]
    if result.of("bim_quarter", PAPER_EPS[0]) is not None:
        parts += ["## FGSM and BIM, for comparison with the paper", paper_table(both)]
    if result.effort() is not None:
        attacks = ", ".join(TITLES[name] for name in efforts_of(result))
        parts += ["## The nearest mistake in L2", f"The smallest of {attacks}.", effort_table(both, twins)]
    return "\n\n".join(parts) + "\n"
