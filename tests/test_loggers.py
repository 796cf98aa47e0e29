"""Lightning's loggers, and where a run writes to."""

import csv
import importlib.util
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.command_line import SHORT, run  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.fixture
def train(run):  # noqa: F811
    def fit(*words):
        status, _, errors = run("fit", *SHORT, *words)
        assert status == 0, errors

    return fit


def test_everything_goes_below_the_trainers_folder(train):
    train("--trainer.default_root_dir", "X")
    written = {str(path) for path in Path("X").rglob("*") if path.is_file()}
    assert {"X/runs/version_0/checkpoints/last.ckpt", "X/runs/version_0/metrics.csv"} <= written
    assert not Path("outputs").exists()


def test_a_folder_for_the_logs_alone_is_kept(train):
    train("--trainer.default_root_dir", "X", "--trainer.logger.save_dir", "Y")
    assert Path("Y/runs/version_0/metrics.csv").is_file() and not Path("outputs").exists()


def test_without_words_runs_go_to_outputs(train):
    train()
    with Path("outputs/runs/version_0/metrics.csv").open() as file:
        assert any(row["val_balanced_accuracy"] for row in csv.DictReader(file))


@pytest.mark.parametrize("folder", ["outputs", "X"])
def test_tensorboard_has_the_curves(train, folder):
    words = [] if folder == "outputs" else ["--trainer.default_root_dir", folder]
    train("--trainer.logger", "TensorBoardLogger", "--trainer.log_every_n_steps", "1", *words)
    (events,) = Path(folder, "runs/version_0").glob("events.out.tfevents.*")
    found = EventAccumulator(str(events))
    found.Reload()
    assert {"train_loss", "val_loss", "val_accuracy", "val_balanced_accuracy"} <= set(found.Tags()["scalars"])
    assert len(found.Scalars("train_loss")) == 2 and 0 <= found.Scalars("val_accuracy")[0].value <= 1


def test_several_loggers_write_below_the_trainers_folder(train):
    loggers = [
        {"class_path": "CSVLogger", "init_args": {"save_dir": "outputs", "name": "csv"}},
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "Y", "name": "tb"}},
    ]
    Path("loggers.yaml").write_text(f"trainer:\n  default_root_dir: X\n  logger: {loggers}\n")
    train("--config", "loggers.yaml")
    assert Path("X/csv/version_0/metrics.csv").is_file() and list(Path("Y/tb/version_0").glob("events*"))


@pytest.mark.parametrize(
    ("logger", "package"), [("WandbLogger --trainer.logger.project x", "wandb"), ("MLFlowLogger", "mlflow")]
)
def test_a_logger_whose_package_is_missing_is_told_with_the_package(run, logger, package):  # noqa: F811
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    status, _, errors = run("fit", *SHORT, "--trainer.logger", *logger.split())
    assert status == 1 and f"error: {logger.split()[0]} is not installed: pip install {package}\n" in errors
    assert not Path("outputs").exists()


def test_a_logger_without_a_folder_is_trained_with(train, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.trainer.trainer.Trainer.log_dir", None)
    train("--trainer.logger", "false", "--trainer.default_root_dir", "X")
    assert list(Path("X").rglob("last.ckpt")) and not list(Path().rglob("config.yaml"))
