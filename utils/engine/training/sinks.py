"""Sinks: where the numbers of a run go. results.csv and TensorBoard always; W&B and MLflow by flag.

A sink that breaks is dropped with a warning: no logger is ever a reason for a run to fail.
"""

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from utils.core.files import atomic_write
from utils.core.log import LOGGER


class Sink(Protocol):
    """Receives one row of numbers per epoch."""

    def write(self, epoch: int, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class CsvSink:
    """results.csv: one line an epoch, rewritten whole and atomically, cut back to what a resumed run has finished."""

    def __init__(self, path: Path, columns: Sequence[str], finished_epochs: int = 0) -> None:
        self.path, self.columns = path, ["epoch", *columns]
        self.rows: list[list[str]] = []
        if finished_epochs and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                lines = list(csv.reader(file))
            self.rows = [line for line in lines[1:] if line and int(line[0]) < finished_epochs]
        self._flush()

    def write(self, epoch: int, row: Mapping[str, float]) -> None:
        values = [f"{row[name]:.6g}" if row.get(name) is not None else "" for name in self.columns[1:]]
        self.rows = [line for line in self.rows if int(line[0]) != epoch]
        self.rows.append([str(epoch), *values])
        self._flush()

    def _flush(self) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        with atomic_write(self.path, "w") as file:
            file.write(text.getvalue())

    def close(self) -> None:
        """Nothing is held open."""


class TensorBoardSink:
    """Event files in the run folder; a resumed run hides the events after its checkpoint."""

    def __init__(self, folder: Path, finished_epochs: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=finished_epochs or None)

    def write(self, epoch: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """Weights & Biases; honors WANDB_MODE=offline."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=folder.parent.name, name=folder.name, dir=str(folder), config=dict(config), resume="allow"
        )

    def write(self, epoch: int, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=epoch)

    def close(self) -> None:
        self.run.finish()


class MlflowSink:
    """MLflow; honors MLFLOW_TRACKING_URI, else writes into the run folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import os

        import mlflow

        self.mlflow = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        mlflow.set_experiment(folder.parent.name)
        mlflow.start_run(run_name=folder.name)
        mlflow.log_params({key: str(value) for key, value in config.items()})

    def write(self, epoch: int, row: Mapping[str, float]) -> None:
        safe = {name.replace(":", "-"): value for name, value in row.items()}
        self.mlflow.log_metrics(safe, step=epoch)

    def close(self) -> None:
        self.mlflow.end_run()


class Sinks:
    """All sinks of a run as one; ranks other than the main one have none."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)

    def write(self, epoch: int, row: Mapping[str, float]) -> None:
        self._each("write", epoch, row)

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *args: Any) -> None:
        for sink in list(self.sinks):
            try:
                getattr(sink, method)(*args)
            except _foreign_errors() as error:
                if isinstance(sink, CsvSink):
                    raise
                LOGGER.warning(f"{type(sink).__name__} stopped: {type(error).__name__}: {error}")
                self.sinks.remove(sink)


def _foreign_errors() -> tuple[type[Exception], ...]:
    """What loggers raise when they break: the usual kinds, and those of the libraries that were imported."""
    kinds: list[type[Exception]] = [OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError]
    for module, name in (("wandb.errors", "Error"), ("mlflow.exceptions", "MlflowException")):
        if module in sys.modules:
            kinds.append(getattr(sys.modules[module], name))
    return tuple(kinds)


OPTIONAL = {"wandb": WandbSink, "mlflow": MlflowSink}


def open_sinks(
    folder: Path, columns: Sequence[str], finished_epochs: int, loggers: Sequence[str], config: Mapping[str, Any]
) -> Sinks:
    """The sinks of a run on the main rank."""
    sinks: list[Sink] = [
        CsvSink(folder / "results.csv", columns, finished_epochs),
        TensorBoardSink(folder, finished_epochs),
    ]
    for name in loggers:
        try:
            sinks.append(OPTIONAL[name](folder, config))
        except ModuleNotFoundError as error:
            LOGGER.warning(f"--loggers {name} is left out: {error}; `pip install {name}` adds it")
        except (ImportError, *_foreign_errors()) as error:  # a broken package, no network, no login
            LOGGER.warning(f"--loggers {name} could not start and is left out: {type(error).__name__}: {error}")
    return Sinks(sinks)
