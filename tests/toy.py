"""A task small enough to train in milliseconds: the training loop's guarantees are tested on it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from utils.core.dist import Dist
from utils.core.hyp import Hyp
from utils.engine.tasks import Evaluation, LossTerm
from utils.engine.training.settings import TrainConfig
from utils.engine.training.sinks import Sinks
from utils.engine.training.trainer import Interrupted, Trainer

SAMPLES = 22


@dataclass
class ToyBatch:
    images: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor


class ToyLoader:
    """Images are random numbers of (epoch, position); rank r gets rows r, r + world, ... of each global batch."""

    def __init__(self, batch_size, dist, poison=()):
        self.batch_size, self.dist, self.poison = batch_size, dist, poison

    def __len__(self):
        return -(-SAMPLES // self.batch_size)

    def epoch(self, epoch, start_step=0):
        for step in range(start_step, len(self)):
            positions = np.arange(step * self.batch_size, min((step + 1) * self.batch_size, SAMPLES))
            mine = positions[self.dist.rank :: self.dist.world_size]
            images = torch.zeros(len(mine), 3, 4, 4)
            for row, position in enumerate(mine):
                rng = np.random.default_rng([7, epoch, position])
                images[row] = torch.from_numpy(rng.standard_normal((3, 4, 4)))
                if (epoch, step) in self.poison:
                    images[row, 0, 0, 0] = float("nan")
            yield ToyBatch(images, torch.zeros(len(mine), 1), torch.from_numpy(mine))

    def close(self):
        pass


class ToyTask:
    kind = "toy"
    names = ("a", "b")
    loss_names = ("box", "cls")
    metric_names = ("metrics/score",)
    imgsz = 4
    samples = SAMPLES

    def __init__(self, batch_size=4, dist=None, norm=True, poison=(), stop_at=None):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, padding=1, bias=not norm), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.SiLU()]
        self.model = nn.Sequential(*layers, nn.Dropout(0.2 if norm else 0.0), nn.Flatten(), nn.Linear(128, 2))
        self.batch_size, self.dist, self.poison = batch_size, dist or Dist.single(), poison
        self.stop_at, self.trainer, self.evaluations = stop_at, None, 0

    def loader(self, epoch_weights):
        return ToyLoader(self.batch_size, self.dist, self.poison)

    def file(self, sample):
        return f"{sample}.jpg"

    def images(self, batch, device, epoch, step):
        if self.stop_at == (epoch, step):
            self.trainer.stop.number = 15
        return batch.images

    def loss(self, outputs, batch, global_images, dist):
        if outputs is None:
            return LossTerm(torch.zeros(()), torch.zeros(2))
        wanted = batch.images.mean((2, 3))[:, :2]
        parts = ((outputs - wanted) ** 2).sum(0) / global_images
        return LossTerm(parts.sum() * global_images, parts.detach())

    def evaluate(self, model, dist, *, folder=None):
        self.evaluations += 1
        score = float(model(torch.ones(1, 3, 4, 4)).sum().sigmoid())
        return Evaluation({"metrics/score": score}, score, "table", [0.5, 0.9])

    def start_pictures(self, folder): ...

    def batch_picture(self, batch, path): ...

    def pack(self, model):
        state = {name: t.detach().clone() for name, t in model.state_dict().items()}
        return {"format": "yolov5-spd", "state": state, "names": list(self.names), "meta": {}}


def config(**changes):
    values = {"cfg": "toy", "epochs": 3, "batch_size": 4, "noplots": True, "save_every": "0", "device": "cpu"}
    return TrainConfig(**{**values, **changes})


def trainer(folder, task, settings=None, hyp=None):
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    # Few images an optimizer step, so that warm-up, accumulation and incomplete groups all occur.
    hyp = hyp or Hyp(nominal_batch=8, lr0=0.02, warmup_epochs=1)
    made = Trainer(task, settings or config(), hyp, task.dist, folder)
    task.trainer = made
    return made


def weights(made):
    """All weights, averaged weights and statistics of a trainer."""
    states = (made.model.state_dict(), made.ema.model.state_dict())
    return {f"{i}.{k}": v.clone() for i, state in enumerate(states) for k, v in state.items()}


__all__ = ["Interrupted", "Sinks", "ToyTask", "config", "trainer", "weights"]
