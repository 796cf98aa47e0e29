"""Write docs/performance.md and docs/growth.png from the measured numbers: python -m benchmarks.report"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks import models, operators
from benchmarks.measure import PLAIN, RESULTS
from zoo.figures import STYLE
from zoo.files import write_whole
from zoo.markdown import markdown_table

DOCS = RESULTS.parent / "docs"
PAGE, PICTURE = DOCS / "performance.md", DOCS / "growth.png"

TEXT = """# What decoupled networks cost

Times are ratios to the plain convolution or network, unless marked ms, measured in the same run: the competitors took
turns in a new order each round, and the median of the ratios of {rounds} rounds is shown.
Half the distance between the quartiles of these ratios is {spread}. A training step is a forward and a backward pass.
Machine: {hardware}; torch {torch}; float32 unless marked, channels_last. `make bench` measures all of it again and
writes this page; `results/` holds the numbers with their quartiles. No GPU was at hand. Where convolutions are faster
than here, the same passes weigh more.

## Where the time goes

A decoupled convolution reads its input once more, for the sums of squares; the norms themselves are maps, one number
for each patch and group. With the angular functions `cosine` and `square_cosine` and one radius for the layer,
magnitude and angle are one map, by which the output is multiplied in place (or a copy of the input, where the kernel
is 1×1 and the input is smaller). Other angular functions and a radius for each channel cost a pass over the output
with the function in it, and its derivative in training, and the inner products are kept for it. So does a depthwise
layer, whose map is as large as its input, and whose convolution is so cheap that this is the worst case.
`linear_cosine` needs no norm at all.

On Linux CPUs these passes are loops in C++, `operators/kernels.cpp`. The first eager layer of the first process
compiles them, in some seconds, with the compiler that `CXX` names, or `c++` (GCC with OpenMP). They are kept in
`~/.cache/decoupled-zoo` (`XDG_CACHE_HOME`), which may be deleted at any time; where nothing can be kept, each process
compiles them. Where there is no compiler and nothing kept, on Windows and macOS, and with
`DECOUPLED_ZOO_KERNELS=off`, torch's own operations compute the same, to rounding. A compiler that fails is told by a
warning. A compiled graph has the loops of its compiler.

Under autocast to bfloat16 or float16 the convolution is in that precision, and so is the result; sums of squares, norms
and angles are in float32. Half precision that the processor does not have is convolved in float32, which is many times
as fast as what torch does with the plain layer.

A *learned radius* is one for the layer, a *radius by channel* one for each output channel, and *the authors' radius* is
by channel and relative to the running mean of the norms.

## Single layers, eager

Batches of {batch}; `bfloat16` is autocast to it. {extremes} *Estimate* is what `tanh_cosine` would cost if its extra
passes moved each byte once, at the {bandwidth:.0f} GB/s at which this machine copies a large tensor; tensors that fit
its cache move faster. *Literal* is the formula written down with torch's operations, the norm by a convolution with a
filter of ones, with automatic gradients; `BcosConv2d` is the B-cos package's layer, which computes what
`linear_square_cosine` computes.

{eager_layers}

## Single layers, compiled

Ratios to the compiled plain layer. Compiling a single 1×1 layer that has little to be joined with can make it slower
than eager mode makes it.

{compiled_layers}

## The overhead beside BcosConv2d

What a training step takes beyond that of the plain layer, as a share of it, for equal mathematics. Shares of a few per
cent are within the noise.

{overhead}

## Networks

{networks}

Every convolution is decoupled, but for *depthwise plain*. Only two networks are compiled on a CPU, since compiling
takes minutes. *Folded* is the network after `operators.fold`: filters normalised once, BatchNorm inside the
convolutions. The plain network has its BatchNorm still, which could be folded likewise.

`operators.calibrate` takes as long as {passes:.1f} passes of the plain `{calibrated}` over its {calibration_images}
images of {calibration_size}×{calibration_size}.

## Training

What a training step of `resnet20` spends outside forward, backward and optimiser (with its check of the gradient), on
generated images of CIFAR's size with crop, flip and cutout, the set lying on the device ({pipeline_setting};
`python -m benchmarks.pipeline`):

{pipeline}

## Memory

The most memory that a training step holds, parameters included, as a ratio to the plain network's. Single layers and
small networks, whose largest temporary tensor counts for more, hold up to {layer_memory} times as much; `results/` has
them all.

{memory}

## How the cost grows

A training step of `tanh_cosine` and of its plain twin, a residual network of depth 20 and widths 32-64-128 on batches
of 8 images of 64×64 unless the axis says otherwise.

![Milliseconds of a training step over batch, resolution, width and depth, decoupled and plain](growth.png)

| series | ratios |
| --- | --- |
{growth}

## Deployment

```python
from operators import fold

folded, report = fold(model, example=images)
print(report)
```

`fold` returns a copy for inference, which answers what `model` answers in evaluation mode, to rounding; given images as
an example, it makes sure.
"""


def page(layers: Mapping[str, Any], networks: Mapping[str, Any], pipeline: Mapping[str, Any]) -> str:
    """Return the page in Markdown for the records that the three benchmarks wrote."""
    return TEXT.format(
        rounds=f"{networks['rounds']} (networks) or {layers['rounds']} (layers)",
        spread=_spread([*layers["rows"], *networks["rows"]]),
        hardware=layers["hardware"],
        torch=layers["torch"],
        batch=layers["batch"],
        extremes=extremes(layers["rows"]),
        bandwidth=layers["gb_per_second"],
        eager_layers=layer_table(layers["rows"], [*operators.OPERATORS, operators.LITERAL, operators.BCOS], False),
        compiled_layers=layer_table(layers["rows"], [*operators.COMPILED, operators.BCOS], True),
        overhead=overhead_table(layers["rows"]),
        networks=network_table(networks["rows"]),
        passes=networks["calibration"]["ratio"],
        calibrated=networks["calibration"]["network"],
        calibration_images=networks["calibration"]["images"],
        calibration_size=networks["calibration"]["size"],
        pipeline=pipeline_table(pipeline["rows"]),
        pipeline_setting=", ".join(
            [
                f"{pipeline['steps']} steps",
                pipeline["hardware"],
                f"torch {pipeline['torch']}",
                pipeline["precision"],
                "compiled" if pipeline["compiled"] else "eager",
            ]
        ),
        memory=memory_table(networks["rows"]),
        layer_memory=f"{max(row['numbers']['tanh_cosine']['memory'] for row in layers['rows'] if row['training']):.1f}",
        growth="\n".join(_growth_rows(networks["growth"])),
    )


def layer_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], compiled: bool) -> str:
    """Return the ratios of layers; a competitor that was not measured is left out."""
    chosen = [row for row in rows if row["compiled"] == compiled]
    names = [name for name in names if any(name in row["numbers"] for row in chosen)]
    return markdown_table(
        ("layer", "step", "plain, ms", "estimate", *names),
        [
            (
                row["layer"],
                _step(row),
                _plain_ms(row),
                f"{row['estimate']:.2f}",
                *_ratios(row, names),
            )
            for row in chosen
        ],
    )


def extremes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say which eager layers cost least and most with tanh_cosine."""
    eager = [row for row in rows if not row["compiled"]]
    least, most = (choose(eager, key=lambda row: row["numbers"]["tanh_cosine"]["ratio"]) for choose in (min, max))
    told = [f"{row['layer']} ({_step(row)}) {row['numbers']['tanh_cosine']['ratio']:.2f}" for row in (least, most)]
    return f"With `tanh_cosine`, {told[0]} is the least of all, {told[1]} the most."


def overhead_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the overhead of a training step beside that of BcosConv2d."""
    cells = []
    for row in rows:
        if row["training"] and operators.BCOS in row["numbers"]:
            mine, theirs = (row["numbers"][name]["ratio"] - 1 for name in ("linear_square_cosine", operators.BCOS))
            variant = "compiled" if row["compiled"] else "eager"
            cells.append((row["layer"], variant, f"{mine:.2f}", f"{theirs:.2f}", f"{mine / theirs:.2f}"))
    return markdown_table(("layer", "", "linear_square_cosine", "BcosConv2d", "first / second"), cells)


def network_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the ratios of networks."""
    names = [*models.OPERATORS, models.PARTIAL, models.FOLDED]
    return markdown_table(
        ("network", "step", "", "plain, ms", *names),
        [
            (
                f"{row['network']}, {row['batch']} × {row['size']}×{row['size']}",
                _step(row),
                "compiled" if row["compiled"] else "eager",
                _plain_ms(row),
                *_ratios(row, names),
            )
            for row in rows
        ],
    )


def pipeline_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the milliseconds of a training step inside and outside forward, backward and optimiser."""
    return markdown_table(
        ("convolutions", "batch", "inside, ms", "outside, ms", "share outside"),
        [
            (
                row["operator"],
                str(row["batch"]),
                f"{row['inside_ms']:.1f}",
                f"{row['outside_ms']:.2f}",
                f"{row['share']:.1%}",
            )
            for row in rows
        ],
    )


def memory_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the ratios of the peak memory of training steps."""
    return markdown_table(
        ("network", "", *models.OPERATORS),
        [
            (
                f"{row['network']}, {row['batch']} × {row['size']}×{row['size']}",
                "compiled" if row["compiled"] else "eager",
                *(f"{row['numbers'][name]['memory']:.2f}" for name in models.OPERATORS),
            )
            for row in rows
            if row["training"]
        ],
    )


@matplotlib.rc_context(STYLE)
def draw_growth(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of the milliseconds of both networks over each series."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, series in zip(figure.subplots(1, len(models.SERIES), sharey=True), models.SERIES, strict=True):
        chosen = [row for row in rows if row["series"] == series]
        values = [row["value"] for row in chosen]
        for name, style in ((PLAIN, "k--"), ("tanh_cosine", "tab:blue")):
            axes.plot(values, [row["numbers"][name]["ms"] for row in chosen], style, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel=series)
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("milliseconds a training step")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def _growth_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for series in models.SERIES:
        chosen = [row for row in rows if row["series"] == series]
        ratios = ", ".join(f"{row['value']}: {row['numbers']['tanh_cosine']['ratio']:.2f}" for row in chosen)
        yield f"| {series} | {ratios} |"


def _spread(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how far the quartiles are from one another, as shares of the ratio."""
    numbers = [number for row in rows for name, number in row["numbers"].items() if name != PLAIN]
    shares = [(number["high"] - number["low"]) / 2 / number["ratio"] for number in numbers]
    return f"{100 * statistics.median(shares):.0f} % in the median cell and {100 * max(shares):.0f} % in the worst one"


def _ratios(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{row['numbers'][name]['ratio']:.2f}" if name in row["numbers"] else "" for name in names]


def _plain_ms(row: Mapping[str, Any]) -> str:
    return f"{row['numbers'][PLAIN]['ms']:.1f}"


def _step(row: Mapping[str, Any]) -> str:
    return "train" if row["training"] else "infer"


def read(name: str) -> dict[str, Any]:
    """Return a record of ``results/``."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    layers, networks, pipeline = read("operators.json"), read("models.json"), read("pipeline.json")
    draw_growth(networks["growth"], PICTURE)
    write_whole(PAGE, page(layers, networks, pipeline))
    print(f"written: {PAGE}, {PICTURE}")


if __name__ == "__main__":
    main()
