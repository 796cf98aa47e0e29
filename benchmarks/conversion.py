"""Write the generated parts of docs/conversion.md and its picture: python -m benchmarks.conversion"""

import argparse
import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks import calibration, finetune
from benchmarks.report import DOCS, read
from zoo.figures import STYLE
from zoo.files import write_whole
from zoo.markdown import filled, markdown_table
from zoo.models.spec import PLAIN

PAGE, PICTURE = DOCS / "conversion.md", DOCS / "finetune.png"
OK = "ok"


def blocks() -> dict[str, str]:
    """Return the generated parts by name."""
    sweep, calibrated, tuned = (read(f"{name}.json") for name in ("timm_sweep", "calibration", "finetune"))
    return {
        "sweep": sweep_summary(sweep) + "\n\n" + sweep_table(sweep["rows"]),
        "calibration": "\n\n".join(calibration_table(calibrated, twin) for twin in calibration.TWINS),
        "finetune": finetune_table(tuned),
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


def calibration_table(record: Mapping[str, Any], twin: str) -> str:
    """Return the accuracies of one trained network, converted to each magnitude, in percent."""
    rows = [row for row in record["rows"].values() if row["twin"] == twin]
    header = ("magnitude", "quantile", "beyond the radius", "error of a layer", "converted", "calibrated", "one epoch")
    table = []
    for row in rows:
        has_radius = "beyond" in row
        table.append(
            (
                row["magnitude"],
                f"{row['quantile']:g}" if has_radius else "",
                f"{100 * row['beyond']:.1f} %" if has_radius else "",
                f"{row['error']:.3f}" if "error" in row else "",
                _percent(row.get("converted")),
                _percent(row.get("calibrated")),
                _percent(row.get("trained")),
            )
        )
    plain = next(row for row in rows if row["magnitude"] == PLAIN)
    title = f"`{twin}`: {_percent(plain['before'])} % of {plain['images']:,} test images before conversion"
    return f"{title} ({record['hardware']}, torch {record['torch']}).\n\n" + markdown_table(header, table)


def finetune_table(record: Mapping[str, Any]) -> str:
    """Return the mean validation accuracy after each epoch, in percent, and the range of the last one."""
    header = ("", *(f"epoch {epoch + 1}" for epoch in range(finetune.TARGET_EPOCHS)), "last, least to most", "seconds")
    table = []
    for variant, runs in _by_variant(record).items():
        means = [_percent(statistics.mean(values)) for values in zip(*(run["accuracies"] for run in runs), strict=True)]
        last = [run["accuracies"][-1] for run in runs]
        seconds = f"{statistics.mean(run['seconds'] for run in runs):.0f}"
        table.append((variant, *means, f"{_percent(min(last))}–{_percent(max(last))}", seconds))
    return markdown_table(header, table)


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
    return {variant: [row for row in record["rows"] if row["variant"] == variant] for variant in finetune.VARIANTS}


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    draw_finetune(read("finetune.json"))
    write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8"), blocks()))
    print(f"written: {PAGE}, {PICTURE}")


if __name__ == "__main__":
    main()
