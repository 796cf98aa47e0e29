"""Results on corrupted images as tables in Markdown, and what a card says of them."""

import functools
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.corruptions.corruption import CORRUPTIONS, SEVERITIES
from zoo.corruptions.ways import CLEAN, SCALED, SCALES, scale_key, severity_key
from zoo.markdown import markdown_table
from zoo.robustness.corruption_result import COUNTED, CorruptionResult, twin_among

# How strong bad light is where it is told in one number, and in some.
TOLD_FACTOR = 0.25
TOLD_FACTORS = (0.5, TOLD_FACTOR, 0.1)


def corruption_report(result: CorruptionResult, twin: CorruptionResult | None) -> str:
    """Return what was measured of a checkpoint, beside its plain twin if that was measured on the same images."""
    about = result.about
    lines = [
        f"# {about['checkpoint']} on corrupted images",
        f"{about['images']:,} test images of {about['data']}. Accuracy in percent; severities 1 to 5.",
        _table(result, twin),
        scale_table({each.about["checkpoint"]: each for each in (result, twin) if each}),
    ]
    return "\n\n".join(lines) + "\n"


def _table(result: CorruptionResult, twin: CorruptionResult | None) -> str:
    header = ["corruption", *map(str, SEVERITIES), "mean"] + (["twin", "difference (95 %)"] if twin else [])
    rows = []
    for name, corruption in CORRUPTIONS.items():
        cells = [f"{result.accuracy(severity_key(name, severity)):.1f}" for severity in SEVERITIES]
        rows.append([f"{name} (spare)" if corruption.spare else name, *cells, *_compared(result, twin, [name])])
    blank = [""] * len(SEVERITIES)
    rows.append(["mean of the fifteen", *blank, *_compared(result, twin, COUNTED)])
    clean = [f"{each.accuracy(CLEAN):.1f}" for each in (result, twin) if each]
    rows.append(["clean", *blank, *clean, *([""] if twin else [])])
    table = markdown_table(header, rows)
    if twin and math.isfinite(error := result.corruption_error(twin)):
        table += f"\n\nMean corruption error relative to the twin: {error:.1f} %."
    elif twin:
        table += "\n\nThe twin errs nowhere under a corruption, so there is no mean corruption error."
    return table


def _compared(result: CorruptionResult, twin: CorruptionResult | None, names: Sequence[str]) -> list[str]:
    mean = f"{result.mean_accuracy(names):.1f}"
    if twin is None:
        return [mean]
    return [mean, f"{twin.mean_accuracy(names):.1f}", signed(*result.difference(twin, names))]


def signed(mean: float, low: float, high: float) -> str:
    """Return a difference with its interval."""
    # Added to -0.0, 0.0 gives 0.0.
    mean, low, high = (round(value, 1) + 0.0 for value in (mean, low, high))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def told(key: str) -> str:
    """Return the key of a way as people read it."""
    return key.replace(" x ", " × ")


def _ratio(error: float) -> str:
    """Return a corruption error; a twin that errs nowhere under a corruption gives none."""
    return f"{error:.1f}" if math.isfinite(error) else "–"


def scale_table(results: Mapping[str, CorruptionResult]) -> str:
    """Return the accuracies of networks as contrast and brightness are lowered."""
    rows = [[told(key), *(f"{result.accuracy(key):.1f}" for result in results.values())] for key in (CLEAN, *SCALED)]
    return markdown_table(["", *results], rows)


def light_table(networks: Mapping[str, Sequence[CorruptionResult]]) -> str:
    """Return the accuracy of each network in bad light, mean ± standard deviation of the seeds."""
    keys = [CLEAN, *(scale_key(scale, factor) for scale in SCALES for factor in TOLD_FACTORS)]
    rows = [
        [name, str(len(results)), *(spread([result.accuracy(key) for result in results]) for key in keys)]
        for name, results in networks.items()
    ]
    return markdown_table(["network", "seeds", *map(told, keys)], rows)


def overview(results: Sequence[CorruptionResult]) -> str:
    """Return one line for each checkpoint of a family: clean, corrupted, and in bad light."""
    header = ("checkpoint", "images", "clean", "mean of 15 corruptions", "difference to the twin (95 %)")
    header += ("mean corruption error", *(f"{scale} × {TOLD_FACTOR}" for scale in SCALES))
    rows = []
    for result in results:
        compared = ["–", "–"]
        if twin := twin_among(result, results):
            compared = [signed(*result.difference(twin)), _ratio(result.corruption_error(twin))]
        cells = [result.about["checkpoint"], f"{result.about['images']:,}", f"{result.accuracy(CLEAN):.1f}"]
        light = [f"{result.accuracy(scale_key(scale, TOLD_FACTOR)):.1f}" for scale in SCALES]
        rows.append([*cells, f"{result.mean_accuracy():.1f}", *compared, *light])
    return markdown_table(header, rows)


def seeds_table(networks: Mapping[str, Sequence[CorruptionResult]]) -> str:
    """Return for each corruption the accuracy of each network over five severities: mean ± standard deviation of seeds.

    Args:
        networks: the results of all seeds, by the network's name.
    """
    of_key, of_names = CorruptionResult.accuracy, CorruptionResult.mean_accuracy
    ways = {
        CLEAN: functools.partial(of_key, key=CLEAN),
        **{name: functools.partial(of_names, names=[name]) for name in CORRUPTIONS},
        "mean of the fifteen": of_names,
        **{told(key): functools.partial(of_key, key=key) for key in SCALED},
    }
    rows = [
        [way, *(spread([of(result) for result in results]) for results in networks.values())]
        for way, of in ways.items()
    ]
    return markdown_table(["", *networks], rows)


def pairs_table(networks: Mapping[str, Sequence[CorruptionResult]]) -> str:
    """Return by how many points networks are righter than the twin of their seed, for each corruption.

    A cell has the mean ± standard deviation of the seeds, and for how many of them the 95 % interval of the difference,
    image by image, does not hold 0.
    """
    every = [result for results in networks.values() for result in results]
    pairs = {
        name: [(result, twin) for result in results if (twin := twin_among(result, _of_seed(every, result)))]
        for name, results in networks.items()
    }
    pairs = {name: found for name, found in pairs.items() if found}
    ways = {**{name: [name] for name in CORRUPTIONS}, "mean of the fifteen": COUNTED}
    rows = []
    for way, names in ways.items():
        cells = []
        for found in pairs.values():
            differences = [result.difference(twin, names) for result, twin in found]
            resolved = sum(low > 0 or high < 0 for _, low, high in differences)
            cells.append(f"{spread([mean for mean, *_ in differences], '+.1f')} ({resolved} of {len(found)})")
        rows.append([way, *cells])
    return markdown_table(["", *pairs], rows)


def _of_seed(results: Sequence[CorruptionResult], one: CorruptionResult) -> list[CorruptionResult]:
    return [result for result in results if result.about["seed"] == one.about["seed"]]


def severities_table(networks: Mapping[str, Sequence[CorruptionResult]]) -> str:
    """Return the accuracy of each network for each corruption and severity, the mean of the seeds."""
    rows = []
    for name, severity in itertools.product(CORRUPTIONS, SEVERITIES):
        key = severity_key(name, severity)
        means = [statistics.mean(result.accuracy(key) for result in results) for results in networks.values()]
        rows.append([name, str(severity), *(f"{mean:.1f}" for mean in means)])
    return markdown_table(["corruption", "severity", *networks], rows)


def spread(values: Sequence[float], style: str = ".1f") -> str:
    """Return the mean of values of several seeds, and their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{round(statistics.mean(values), 1) + 0.0:{style}}{deviation}"


def card_record(result: CorruptionResult, twin: CorruptionResult | None) -> dict[str, Any]:
    """Return what a card says of a result, accuracies as shares."""
    record = {
        "images": result.about["images"],
        "clean": _share(result.accuracy(CLEAN)),
        "mean": _share(result.mean_accuracy()),
        "by_corruption": {name: _share(result.mean_accuracy([name])) for name in CORRUPTIONS},
        "by_light": {key: _share(result.accuracy(key)) for key in SCALED},
    }
    # A twin that errs nowhere under a corruption gives no ratio.
    if twin is not None and math.isfinite(error := result.corruption_error(twin)):
        record["corruption_error"] = _share(error)
    return record


def _share(percent: float) -> float:
    return round(percent / 100, 4)
