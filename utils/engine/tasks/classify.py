"""The classification task: image folders, cross-entropy, top-1 and top-5."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.graph import Network, check_size
from models.weights import pack_model
from utils.core.config import config_dict, refuse_changed
from utils.core.device import loader_workers
from utils.core.dist import Dist
from utils.core.hyp import Hyp
from utils.core.log import LOGGER
from utils.data.folder import ClassDataset, build_class_index, channel_statistics
from utils.data.loader import Batch, EvalLoader, TrainLoader
from utils.data.spec import DataSpec
from utils.engine.evaluation.class_report import class_table, draw_class_batch, write_class_report
from utils.engine.evaluation.classification import measure
from utils.engine.evaluation.report import MANY_CLASSES
from utils.engine.evaluation.validate import to_float
from utils.engine.speed import speed_line
from utils.engine.tasks import Evaluation, LossTerm
from utils.engine.training.optim import batches_per_step
from utils.engine.training.settings import TrainConfig, precision

METRICS = {"metrics/accuracy_top1": "top1", "metrics/accuracy_top5": "top5", "val/cls_loss": "loss"}
ABOUT_BOXES = {"single_cls", "slice", "overlap", "rect", "multi_scale", "noautoanchor", "label_policy", "cache"}
PREPROCESSING = {"color": "RGB", "layout": "NCHW", "range": [0.0, 1.0], "resize": "short side, center crop"}


class ClassifyTask:
    """Joins a classification data set and a Classifier for the training loop."""

    kind = "classify"
    loss_names = ("cls",)
    metric_names = tuple(METRICS)

    def __init__(self, model: Network, spec: DataSpec, config: TrainConfig, hyp: Hyp, dist: Dist) -> None:
        from models.resnet import Classifier  # as in build_model: detectors do without its layers

        assert isinstance(model, Classifier)
        self.model, self.spec, self.config, self.hyp, self.dist = model, spec, config, hyp, dist
        self.imgsz = config.imgsz
        self.workers = loader_workers(config.workers, config.batch_size)
        self._check_options()
        self.train_index = dist.main_first(lambda: build_class_index(spec, "train"))
        self.val_index = dist.main_first(lambda: build_class_index(spec, "val"))
        self.names = list(self.train_index.names)
        self._check_size()
        self.dataset = ClassDataset(self.train_index, config.imgsz, hyp, augment=True, seed=config.seed)
        self.samples = len(self.dataset)
        if not config.resume and model.cfg["mean"] == [0.0] * model.cfg["ch"]:
            mean, std = dist.main_first(lambda: channel_statistics(self.train_index))
            model.set_normalization(mean, std)
            LOGGER.info(f"images are normalized by the training set's mean {mean} and deviation {std}")
        self._eval_loader: EvalLoader | None = None

    def _check_options(self) -> None:
        config = self.config
        check_size([config.imgsz], self.model.max_stride)
        refuse_changed(config, set(config_dict(config)) - ABOUT_BOXES, "with a classifier")

    def _check_size(self) -> None:
        """Say so when the images would only be blown up (train.py's default size is that of detectors)."""
        h, w = self.train_index.image(0).shape[:2]
        if self.imgsz > 2 * min(h, w):
            LOGGER.warning(
                f"images of {h}x{w} are enlarged to {self.imgsz}; --imgsz {min(h, w)} would take them as they are"
            )

    def close(self) -> None:
        """Give back the validation loader."""
        if self._eval_loader is not None:
            self._eval_loader.close()

    # ---------------------------------------------------------------- training

    def loader(self, epoch_weights: Sequence[float] | None) -> TrainLoader:
        weights = None if epoch_weights is None else np.asarray(epoch_weights)[self.train_index.labels] + 1e-6
        return TrainLoader(
            self.dataset, self.config.batch_size, workers=self.workers, seed=self.config.seed,  # type: ignore[arg-type]
            rank=self.dist.rank, world_size=self.dist.world_size, weights=weights,
        )  # fmt: skip

    def images(self, batch: Batch, device: torch.device, epoch: int, step: int) -> Tensor:
        return to_float(batch.images, device)

    def loss(self, outputs: Tensor | None, batch: Batch, global_images: int, dist: Dist) -> LossTerm:
        if outputs is None:
            zero = torch.zeros(1, device=dist.device)
            return LossTerm(zero.sum(), zero)
        labels = batch.targets[:, 1].long().to(outputs.device, non_blocking=True)
        smoothing = self.hyp.label_smoothing
        mean = F.cross_entropy(outputs.float(), labels, reduction="sum", label_smoothing=smoothing) / global_images
        batches = batches_per_step(self.hyp, self.config.batch_size)  # a step takes the mean over all of them
        return LossTerm(mean / batches, mean.detach().reshape(1))

    def file(self, sample: int) -> str:
        return self.train_index.title(sample)

    # ---------------------------------------------------------------- evaluation

    def evaluate(self, model: Network, dist: Dist, *, folder: Path | None = None) -> Evaluation:
        amp = precision(self.config.amp, dist.device) if dist.device.type == "cuda" else None
        model.eval()

        def network(images: Tensor) -> Tensor:
            with torch.autocast(dist.device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
                return model(images)

        result = measure(network, self._validation_loader(), self.val_index, dist)
        metrics = result.metrics
        text = class_table(result, per_class=folder is not None and len(self.names) < MANY_CLASSES)
        if folder is not None:
            text += "\n" + speed_line(result.speed_ms)
            if dist.is_main:
                settings = {"data": str(self.spec.yaml), "imgsz": self.imgsz, "split": "val"}
                write_class_report(folder, result, self.val_index, settings, figures=not self.config.noplots)
        scores = [float(np.nan_to_num(row["top1"])) for row in metrics["per_class"]]
        return Evaluation({column: metrics[key] for column, key in METRICS.items()}, metrics["top1"], text, scores)

    def _validation_loader(self) -> EvalLoader:
        if self._eval_loader is None:
            dataset = ClassDataset(self.val_index, self.imgsz, self.hyp, augment=False)
            self._eval_loader = EvalLoader(
                dataset, self.config.batch_size * 2, workers=self.workers,  # type: ignore[arg-type]
                rank=self.dist.rank, world_size=self.dist.world_size,
            )  # fmt: skip
        return self._eval_loader

    # ---------------------------------------------------------------- pictures and files

    def start_pictures(self, folder: Path) -> None:
        """Nothing: the class counts are in metrics.json."""

    def batch_picture(self, batch: Batch, path: Path) -> None:
        draw_class_batch(batch, self.names, path)

    def pack(self, model: Network) -> dict[str, Any]:
        return pack_model(model, self.names, self.imgsz, data=str(self.spec.yaml.name), preprocessing=PREPROCESSING)
