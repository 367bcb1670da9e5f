"""Tasks: what a network is trained for. A task gives the loop a model, batches, named loss parts and an evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from models.graph import Network
from utils.core.dist import Dist


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation says: numbers for results.csv, the fitness that `best.pt` is chosen by, a table to print.

    `class_score` (one value per class, higher is better) feeds --image-weights.
    """

    metrics: dict[str, float]
    fitness: float
    table: str
    class_score: Sequence[float] | None = None


@dataclass(frozen=True)
class LossTerm:
    """Loss of one process's share of a batch: the sum to back-propagate and its named parts (per image, detached)."""

    total: Tensor
    parts: Tensor  # [len(task.loss_names)]


class Loader(Protocol):
    """Training batches of one process."""

    def __len__(self) -> int:
        """Steps of one epoch."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Any]:
        """Batches of `epoch` from step `start_step` on; they depend on seed, epoch and position alone."""
        ...

    def close(self) -> None:
        """End the worker processes."""
        ...


class Task(Protocol):
    """Joins data, network, loss and evaluation; everything that differs between detection and classification."""

    kind: str
    names: Sequence[str]
    model: Network
    loss_names: Sequence[str]
    metric_names: Sequence[str]
    imgsz: int
    samples: int  # training images

    def loader(self, epoch_weights: Sequence[float] | None) -> Loader: ...

    def file(self, sample: int) -> str:
        """Name of the file that a training sample comes from."""
        ...

    def images(self, batch: Any, device: torch.device, epoch: int, step: int) -> Tensor:
        """The network's input for a batch, on the device."""
        ...

    def loss(self, outputs: Any, batch: Any, global_images: int, dist: Dist) -> LossTerm:
        """Loss of this process's share; summed over the processes it is that of the whole batch.

        Called by every rank for every batch; a rank without samples passes `outputs=None` and takes part in the
        counting only.
        """
        ...

    def evaluate(self, model: Network, dist: Dist, *, folder: Path | None = None) -> Evaluation:
        """Measure on the validation set; with a folder, the final evaluation: a fuller table, files and pictures."""
        ...

    def close(self) -> None:
        """Give back what is held beyond memory: loader processes, shared caches."""
        ...

    def start_pictures(self, folder: Path) -> None: ...

    def batch_picture(self, batch: Any, path: Path) -> None: ...

    def pack(self, model: Network) -> dict[str, Any]:
        """The checkpoint's model part (see models.weights.pack_model)."""
        ...
