"""How long loading and publishing take, and how much memory loading needs: python -m benchmarks.loading

Embedded checkpoints, a commit in a warm cache of the Hub, and a folder of 20 MB on its way to a Hub on loopback
(tests.hub_server); how long until a Hub that refuses or hangs is given up. Writes results/loading.json and the table
in docs/checkpoints.md.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zoo
from benchmarks import measure
from benchmarks.report import DOCS, read
from tests.hub_server import Fault, drip, serving, silence, status
from zoo.files import write_whole
from zoo.hub.repository import WEIGHTS
from zoo.markdown import filled, markdown_table

OUTPUT = measure.RESULTS / "loading.json"
PAGE = DOCS / "checkpoints.md"
EMBEDDED = ("digits_cnn6_tanh_cosine", "cifar10_resnet20_tanh_cosine")
REPEATS = 20
# 20 MB and 94 MB of weights.
WIDTHS = (69, 138, 276)
LARGE = "resnet50"


def seconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the median time of a call, after a first one."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def in_process(code: str, **environment: str) -> float:
    """Return the number that Python code prints last, run in a process of its own."""
    settings = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


MEMORY = """
import zoo
from pathlib import Path

def kilobytes(what):
    return int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0])

zoo.load({small!r})
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
model = zoo.load({folder!r})
weights = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1024
print((kilobytes("VmHWM") - before) / weights)
"""

PINNED = """
import time, zoo
zoo.load({small!r})
began = time.perf_counter()
zoo.load({repository!r}, revision={commit!r})
print(time.perf_counter() - began)
"""

PUBLISH = """
import time
from zoo.checkpoints.publishing import publish
began = time.perf_counter()
commit = publish({folder!r}, {repository!r})
print(time.perf_counter() - began)
"""


REFUSED = """
import time, zoo
zoo.load({small!r})
began = time.perf_counter()
try:
    zoo.load("me/noise")
except zoo.HubError:
    print(time.perf_counter() - began)
"""

# Longer than we wait for anything.
LONG = 60
FAULTS = {
    "refused with 401": ("GET", "/api/models", status(401)),
    "refused with 503": ("GET", "/api/models", status(503)),
    "no description": ("GET", "/api/models", silence(LONG)),
    "no answer to a HEAD": ("HEAD", WEIGHTS, silence(LONG)),
    "weights at ten bytes a second": ("GET", WEIGHTS, drip(LONG)),
}


def table() -> str:
    """Return what was measured last, in Markdown."""
    record = read(OUTPUT.name)
    header = (f"{record['hardware']}, torch {record['torch']}", "")
    return markdown_table(header, [(what, f"{value:.3g}") for what, value in record["rows"].items()])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = {f"loading {name}, s": seconds(lambda name=name: zoo.load(name)) for name in EMBEDDED}
    with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch) / "hub") as server:
        large = zoo.save(zoo.build(LARGE, "tanh_cosine", input_size=224).eval(), Path(scratch) / "large")
        rows[f"peak memory of loading {LARGE} (tanh_cosine), times its weights"] = in_process(
            MEMORY.format(small=EMBEDDED[0], folder=str(large))
        )
        told = {"command": "none", "commit": "none", "hardware": "none"}
        model = zoo.build("resnet20", "tanh_cosine", input_size=32, widths=WIDTHS).eval()
        metric = zoo.Metric("accuracy", 0.1, "noise", "test", 1)
        folder = Path(scratch) / "noise_resnet20_tanh_cosine"
        zoo.save(model, folder, metrics=[metric], training=told, licence="CC0-1.0")
        environment = {
            "HF_ENDPOINT": server.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_anything",
            "HF_HOME": f"{scratch}/home",
        }
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        rows[f"publishing a folder of {size:.0f} MB, s"] = in_process(
            PUBLISH.format(folder=str(folder), repository="me/noise"), **environment
        )
        commit = server.hub.find("me/noise", "main")
        code = PINNED.format(small=EMBEDDED[0], repository="me/noise", commit=commit)
        rows["loading it from the Hub on loopback, cold, s"] = in_process(code, **environment)
        server.hub.requests.clear()
        rows["loading its commit from the warm cache, s"] = in_process(code, **environment)
        rows["requests made for that"] = len(server.hub.requests)
        code = REFUSED.format(small=EMBEDDED[0])
        for number, (what, (method, path, act)) in enumerate(FAULTS.items()):
            server.hub.faults[:] = [Fault(method, path, act)]
            rows[f"until the error, {what}, s"] = in_process(code, **{**environment, "HF_HOME": f"{scratch}/{number}"})
    environment["HF_HOME"] = f"{scratch}/gone"
    rows["until the error, no server, s"] = in_process(code, **environment)
    measure.write({**measure.describe("cpu", os.cpu_count()), "rows": rows}, OUTPUT)
    write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8"), {"loading": table()}))
    print(f"written: {PAGE}\n\n{table()}")


if __name__ == "__main__":
    main()
