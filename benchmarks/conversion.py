"""Write the generated parts of docs/conversion.md and its picture: python -m benchmarks.conversion"""

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks import imagenet
from benchmarks.report import DOCS, read
from zoo.figures import STYLE
from zoo.files import write_whole
from zoo.markdown import filled, markdown_table
from zoo.statistics import interval

PAGE, PICTURE = DOCS / "conversion.md", DOCS / "finetune.png"
OK = "ok"


def blocks() -> dict[str, str]:
    """Return the generated parts by name."""
    names = ("timm_sweep", "imagenet", "finetune", "depthwise")
    sweep, kept, tuned, depthwise = (read(f"{name}.json") for name in names)
    return {
        "sweep": sweep_summary(sweep) + "\n\n" + sweep_table(sweep["rows"]),
        "imagenet": imagenet_summary(kept) + "\n\n" + imagenet_table(kept),
        "finetune": curves_table(tuned),
        "depthwise": curves_table(depthwise),
    }


def sweep_summary(record: Mapping[str, Any]) -> str:
    """Say how many modules passed, and why the others did not."""
    rows = record["rows"]
    with_convolutions = {module: row for module, row in rows.items() if "checks" in row}
    failed = {module: failures(row) for module, row in with_convolutions.items() if failures(row)}
    lines = [
        f"timm {record['timm']}, torch {record['torch']}: {len(rows)} modules, {len(with_convolutions)} of them with "
        f"convolutions, of which {len(with_convolutions) - len(failed)} pass every check."
    ]
    lines += [
        "",
        *(f"- `{module}` ({rows[module]['architecture']}): {'; '.join(why)}" for module, why in failed.items()),
    ]
    without = ", ".join(f"`{module}`" for module, row in rows.items() if "checks" not in row)
    return "\n".join([*lines, "", f"Without convolutions: {without}."])


def failures(row: Mapping[str, Any]) -> list[str]:
    return [f"{check} {found}" for check, found in row["checks"].items() if found.startswith("failed")]


def sweep_table(rows: Mapping[str, Any]) -> str:
    """Return a row for each module with convolutions."""
    header = (
        "module",
        "architecture",
        "parameters",
        "converted",
        "left alone",
        "identity",
        "features_only",
        "all checks",
    )
    table = []
    for module, row in rows.items():
        if "checks" not in row:
            continue
        converted = ", ".join(f"{count} {kind}" for kind, count in row["converted"].items())
        skipped = ", ".join(f"{count} {reason}" for reason, count in row["skipped"].items())
        checks = row["checks"]
        cells = (module, row["architecture"], f"{row['parameters']:,}", converted, skipped or "–")
        outcome = "failed" if failures(row) else OK
        table.append((*cells, checks["identity"], checks["features_only"], outcome))
    return markdown_table(header, table)


def imagenet_summary(record: Mapping[str, Any]) -> str:
    """Say what was measured, and how well the plain network does."""
    plain = record["plain"]
    low, high = interval(plain["top1"], record["images"])
    return (
        f"`{record['architecture']}`, weights of ImageNet, {record['fitted']} photographs to fit it to and "
        f"{record['images']} others to measure it on: the plain network names {plain['top1']:.1%} of these "
        f"({low:.1%} to {high:.1%}; {plain['top5']:.1%} among its first five) ({record['hardware']}, torch "
        f"{record['torch']})."
    )


def imagenet_table(record: Mapping[str, Any]) -> str:
    """Return what is left of a trained network, in percent and nats, for each operator."""
    header = (
        "operator",
        "converted",
        "calibrated",
        "divergence",
        "distilled",
        "divergence",
        "all layers: calibrated",
        "divergence",
    )
    table = []
    for operator in imagenet.operators():
        part, whole = (record["rows"][f"{operator} {depthwise}"] for depthwise in imagenet.DEPTHWISE)
        found = (part["calibrated"], part.get("distilled"), whole["calibrated"])
        after = [cell for step in found for cell in _kept(step)]
        table.append((f"`{operator}`", f"{100 * part['converted']['top1']:.1f}", *after))
    return markdown_table(header, table)


def readme_table(record: Mapping[str, Any]) -> str:
    """Return for the README what operators with cosine keep by default: accuracy in percent, divergence in nats."""
    header = ("operator", "plain", "calibrated", "divergence", "distilled", "divergence")
    plain = f"{100 * record['plain']['top1']:.1f}"
    table = []
    for operator in imagenet.operators(imagenet.SHOWN_ANGULARS[:1]):
        row = record["rows"][f"{operator} {imagenet.DEPTHWISE[0]}"]
        after = [cell for step in ("calibrated", "distilled") for cell in _kept(row.get(step))]
        table.append((f"`{operator}`", plain, *after))
    return markdown_table(header, table)


def _kept(step: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return the accuracy after a step, in percent, and the divergence from the plain network, in nats."""
    return ("", "") if step is None else (f"{100 * step['top1']:.1f}", f"{step['divergence']:.3f}")


def curves_table(record: Mapping[str, Any]) -> str:
    """Return the mean validation accuracy after each epoch, in percent, and the range of the last one."""
    curves = _by_variant(record)
    epochs = len(record["rows"][0]["accuracies"])
    header = ("", *(f"epoch {epoch + 1}" for epoch in range(epochs)), "last, least to most", "seconds")
    table = []
    for variant, runs in curves.items():
        means = [_percent(statistics.mean(values)) for values in zip(*(run["accuracies"] for run in runs), strict=True)]
        last = [run["accuracies"][-1] for run in runs]
        seconds = f"{statistics.mean(run['seconds'] for run in runs):.0f}"
        table.append((variant, *means, f"{_percent(min(last))}–{_percent(max(last))}", seconds))
    title = f"{len(runs)} seeds ({record['hardware']}, torch {record['torch']})."
    return f"{title}\n\n" + markdown_table(header, table)


@matplotlib.rc_context(STYLE)
def draw_finetune(record: Mapping[str, Any]) -> None:
    """Write a PNG of the learning curves: each run thin, their means thick."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (variant, runs) in enumerate(_by_variant(record).items()):
        epochs = range(1, len(runs[0]["accuracies"]) + 1)
        curves = [[100 * value for value in run["accuracies"]] for run in runs]
        for curve in curves:
            axes.plot(epochs, curve, color=f"C{number}", linewidth=0.7, alpha=0.5)
        axes.plot(
            epochs, [statistics.mean(values) for values in zip(*curves, strict=True)], f"C{number}o-", label=variant
        )
    axes.set(xlabel="epoch of fine-tuning", ylabel="validation accuracy, %")
    axes.legend(frameon=False)
    figure.savefig(PICTURE, dpi=110)


def _by_variant(record: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the runs of each variant, in the order in which they were measured."""
    variants = dict.fromkeys(row["variant"] for row in record["rows"])
    return {variant: [row for row in record["rows"] if row["variant"] == variant] for variant in variants}


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    draw_finetune(read("finetune.json"))
    write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8"), blocks()))
    print(f"written: {PAGE}, {PICTURE}")


if __name__ == "__main__":
    main()
