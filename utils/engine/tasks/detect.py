"""The detection task: boxes, anchors, the YOLOv5 loss, COCO metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.graph import Network, check_size
from models.weights import pack_model
from models.yolo import DetectionModel
from utils.core.device import loader_workers
from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.hyp import Hyp
from utils.core.log import LOGGER
from utils.data.check import digest, object_sizes
from utils.data.dataset import DetectionDataset
from utils.data.index import LabelIndex, build_index
from utils.data.loader import Batch, EvalLoader, TrainLoader
from utils.data.spec import DataSpec
from utils.engine.evaluation.evaluate import EvalPlan, evaluate
from utils.engine.evaluation.report import MANY_CLASSES, table, write_report
from utils.engine.evaluation.validate import ModelPredictor, ValSettings, to_float, validate
from utils.engine.figures.pictures import BatchPictures, draw_train_batch
from utils.engine.figures.plots import plot_labels
from utils.engine.speed import speed_line
from utils.engine.tasks import Evaluation, LossTerm
from utils.engine.training.settings import TrainConfig, precision
from utils.ops.anchors import check_anchors
from utils.ops.loss import LOSS_NAMES, DetectionLoss

METRICS = {
    "metrics/precision": "P", "metrics/recall": "R", "metrics/mAP_0.5": "AP50", "metrics/mAP_0.5:0.95": "AP",
    "metrics/AP_S": "AP_S", "metrics/AP_M": "AP_M", "metrics/AP_L": "AP_L",
}  # fmt: skip


class DetectTask:
    """Joins a detection data set and a DetectionModel for the training loop."""

    kind = "detect"
    loss_names = LOSS_NAMES
    metric_names = (*METRICS, *(f"val/{name}_loss" for name in LOSS_NAMES))

    def __init__(self, model: DetectionModel, spec: DataSpec, config: TrainConfig, hyp: Hyp, dist: Dist) -> None:
        self.model, self.spec, self.config, self.hyp, self.dist = model, spec, config, hyp, dist
        self.imgsz = config.imgsz
        self.workers = loader_workers(config.workers, config.batch_size)
        self.names: list[str] = ["item"] if config.single_cls else list(spec.names)
        self.stride = model.max_stride
        check_size([config.imgsz], self.stride)
        self.train_index = dist.main_first(lambda: self._index("train"))
        self.val_index = dist.main_first(lambda: self._index("val"))
        if not len(self.val_index):
            raise UserError(f"{spec.yaml}: the validation set has no images; give `val:` a folder with images")
        self.train_index.require_labels(spec.yaml)
        self.val_index.require_labels(f"{spec.yaml}, split val")
        slices = (config.slice, config.overlap) if config.slice else None
        self.dataset = DetectionDataset(
            self.train_index, config.imgsz, hyp, augment=True, seed=config.seed, rect=config.rect,
            stride=self.stride, cache=config.cache, slices=slices,
        )  # fmt: skip
        self.samples = len(self.dataset)
        sizes = self._object_sizes()
        for line in digest(self.train_index, config.imgsz, sizes):
            LOGGER.info(line)
        if not (config.noautoanchor or config.resume):
            self._fit_anchors(sizes)
        self.criterion = DetectionLoss(model.anchors, model.strides, len(self.names), hyp, config.imgsz)
        self._eval_loader: EvalLoader | None = None

    def _index(self, split: str) -> LabelIndex:
        config = self.config
        return build_index(
            self.spec, split, policy=config.label_policy, single_cls=config.single_cls, rebuild=config.rebuild_cache
        )

    def _object_sizes(self) -> np.ndarray:
        """Width and height [m, 2] in network pixels of the objects that are learned from; with --slice in each tile."""
        if not self.config.slice:
            return object_sizes(self.train_index, self.imgsz)[1]
        gains = self.imgsz / self.dataset.shapes.max(1)
        boxes = np.concatenate([self.dataset.objects(i).xyxy * gain for i, gain in enumerate(gains)])
        return boxes[:, 2:] - boxes[:, :2]

    def _fit_anchors(self, wh: np.ndarray) -> None:
        """Fit anchors to sizes [m, 2] in network pixels where the model's own would miss some."""
        counted = bool(self.model.cfg.get("anchors_from_data"))
        own = self.model.anchors.cpu().numpy()
        check = check_anchors(wh, own, self.hyp.anchor_t, self.config.seed, force=counted)
        if check.changed:
            self.model.set_anchors(torch.from_numpy(check.anchors))
            LOGGER.info(f"anchors fitted to the data: recall {check.recall:.4f} -> {check.new_recall:.4f}")
        else:
            LOGGER.info(f"anchors kept: best possible recall {check.recall:.4f}")

    def close(self) -> None:
        """Give back the validation loader and a shared image cache."""
        if self._eval_loader is not None:
            self._eval_loader.close()
        self.dataset.close()

    # ---------------------------------------------------------------- training

    def loader(self, epoch_weights: Sequence[float] | None) -> TrainLoader:
        weights = None
        if epoch_weights is not None:
            weights = self._sample_weights(np.asarray(epoch_weights)) + 1e-6
        return TrainLoader(
            self.dataset, self.config.batch_size, workers=self.workers, seed=self.config.seed,
            rank=self.dist.rank, world_size=self.dist.world_size, weights=weights, shuffle=not self.config.rect,
        )  # fmt: skip

    def file(self, sample: int) -> str:
        return self.train_index.file(int(self.dataset.unit_image[sample])).name

    def _sample_weights(self, class_weights: np.ndarray) -> np.ndarray:
        """The sum over the objects of each image, or with --slice of each tile."""
        if self.config.slice:
            classes = (self.dataset.objects(i).cls.astype(int) for i in range(self.samples))
            return np.array([class_weights[own].sum() for own in classes])
        sums = np.zeros(self.samples)
        np.add.at(sums, self.train_index.image_of_box, class_weights[self.train_index.cls])
        return sums

    def images(self, batch: Batch, device: torch.device, epoch: int, step: int) -> Tensor:
        images = to_float(batch.images, device)
        if not self.config.multi_scale:
            return images
        rng = np.random.default_rng([self.config.seed, 0x5CA1E, epoch, step])
        low, high = int(self.imgsz * 0.5), int(self.imgsz * 1.5 + self.stride)
        size = int(rng.integers(low, high)) // self.stride * self.stride
        gain = size / max(images.shape[2:])
        hw = [max(round(side * gain / self.stride), 1) * self.stride for side in images.shape[2:]]
        return F.interpolate(images, size=hw, mode="bilinear", align_corners=False)

    def loss(self, outputs: list[Tensor] | None, batch: Batch, global_images: int, dist: Dist) -> LossTerm:
        layers = self.criterion.assign(batch.targets, outputs) if outputs else []
        counts = torch.tensor([float(len(layer)) for layer in layers] or [0.0] * len(self.criterion.strides))
        positives = dist.sum(counts.to(dist.device, non_blocking=True))
        if outputs is None:
            zero = torch.zeros(len(LOSS_NAMES), device=dist.device)
            return LossTerm(zero.sum(), zero)
        parts = self.criterion(outputs, layers, positives=positives, images=global_images)
        stacked = torch.stack([parts[name] for name in LOSS_NAMES])
        return LossTerm(stacked.sum() * global_images, stacked.detach())

    # ---------------------------------------------------------------- evaluation

    def evaluate(self, model: Network, dist: Dist, *, folder: Path | None = None) -> Evaluation:
        assert isinstance(model, DetectionModel)
        config = self.config
        amp = precision(config.amp, dist.device) if dist.device.type == "cuda" else None
        predictor = ModelPredictor(model, self.names, device=dist.device, amp=amp)
        criterion = DetectionLoss(model.anchors, model.strides, len(self.names), self.hyp, config.imgsz)
        pictures = BatchPictures(folder, self.names) if folder and not config.noplots else None
        common = (self.val_index, self.names)
        if config.slice:  # as val.py --slice does; losses are of whole images
            plan = EvalPlan(
                (config.imgsz, config.imgsz),
                config.batch_size * 2,
                self.workers,
                slice_size=config.slice,
                overlap=config.overlap,
            )
            result = evaluate(predictor, *common, plan, self._settings, dist, on_batch=pictures)
        else:
            loader = self._validation_loader()
            result = validate(predictor, loader, *common, self._settings, dist, loss=criterion, on_batch=pictures)
        numbers = {column: float(result.metrics[key]) for column, key in METRICS.items()}
        numbers |= {f"val/{name}_loss": value for name, value in result.loss.items()}
        scores = [float(np.nan_to_num(row["AP"])) for row in result.metrics["per_class"]]
        text = table(result.metrics, per_class=folder is not None and len(self.names) < MANY_CLASSES)
        if folder is not None:
            text += "\n" + speed_line(result.speed_ms, result.shape)
            if dist.is_main:
                write_report(folder, result, self._settings.as_dict(), self.names, figures=not config.noplots)
        return Evaluation(numbers, result.fitness, text, scores)

    @property
    def _settings(self) -> ValSettings:
        return ValSettings()

    def _validation_loader(self) -> EvalLoader:
        if self._eval_loader is None:
            dataset = DetectionDataset(
                self.val_index, self.config.imgsz, self.hyp, augment=False, rect=True, pad=0.5, stride=self.stride
            )
            self._eval_loader = EvalLoader(
                dataset, self.config.batch_size * 2, workers=self.workers,
                rank=self.dist.rank, world_size=self.dist.world_size,
            )  # fmt: skip
        return self._eval_loader

    # ---------------------------------------------------------------- pictures and files

    def start_pictures(self, folder: Path) -> None:
        index = self.train_index
        plot_labels(index.cls, index.boxes, index.shapes[index.image_of_box], self.names, folder / "labels.jpg")

    def batch_picture(self, batch: Batch, path: Path) -> None:
        draw_train_batch(batch, self.names, path)

    def pack(self, model: Network) -> dict[str, Any]:
        return pack_model(model, self.names, self.imgsz, data=str(self.spec.yaml.name))
