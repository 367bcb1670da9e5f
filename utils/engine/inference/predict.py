"""From pictures to `Detections`: letterbox, batches, slices, NMS; and predictors made of predictors (TTA, ensembles).

A predictor is any callable from images float [B, 3, H, W] in 0..1 to decoded predictions [B, N, 5 + nc] in network
pixels, or to a list of [n, 6] detections where its `end2end` is true. Where it comes from is no concern of this room.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from utils.core.errors import UserError
from utils.core.log import LOGGER
from utils.engine.speed import Clock, Speed
from utils.ops.detections import Detections
from utils.ops.letterbox import FILL, Letterbox, letterbox_geometry, letterbox_image
from utils.ops.nms import non_max_suppression
from utils.ops.tiles import merge_tiles, tile_boxes

TTA_SCALES = (1.0, 0.83, 0.67)
TTA_FLIPS = (False, True, False)
DETECTION_BOUNDS = {"conf_thres": (0, 1), "iou_thres": (0, 1), "max_det": (1, math.inf)}


class Predictor(Protocol):
    """What this room asks of a predictor. `imgsz` and `batch` are None where any that the strides divide will do."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def strides(self) -> Sequence[int]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def half(self) -> bool: ...
    @property
    def end2end(self) -> bool: ...
    @property
    def imgsz(self) -> tuple[int, int] | None: ...
    @property
    def batch(self) -> int | None: ...

    def __call__(self, images: Tensor) -> Any: ...


@dataclass(frozen=True)
class PredictSettings:
    """How pictures are put before a predictor, and what counts as a detection. `imgsz`: one side, or height, width."""

    imgsz: tuple[int, ...] = (640, 640)
    conf_thres: float = 0.25
    iou_thres: float = 0.45
    max_det: int = 1000
    classes: tuple[int, ...] | None = None
    agnostic: bool = False
    multi_label: bool = False
    batch_size: int = 1
    rect: bool = True
    slice_size: int = 0
    overlap: float = 0.2

    def __post_init__(self) -> None:
        check_bounds(self, **DETECTION_BOUNDS, overlap=(0, 0.9), batch_size=(1, math.inf), slice_size=(0, math.inf))


def check_bounds(settings: object, **bounds: tuple[float, float]) -> None:
    """UserError that names the flag of the first field outside its bounds (lowest, highest); NaN is outside of any."""
    for name, (low, high) in bounds.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            expected = f"{low} or more" if high == math.inf else f"a number from {low} to {high}"
            flag = "slice" if name == "slice_size" else name.replace("_", "-")
            raise UserError(f"--{flag} {value}; expected {expected}")


@dataclass(frozen=True, eq=False)
class View:
    """A picture or a tile of one: which picture, where its corner lies in it, and how it is letterboxed."""

    picture: int
    pixels: np.ndarray
    corner: tuple[int, int]  # left, top
    geometry: Letterbox


class Detector:
    """Pictures of any size in, `Detections` in their own pixels out, in the same order. Stateless but for `speed`."""

    def __init__(self, predictor: Predictor, settings: PredictSettings | None = None) -> None:
        settings = settings or PredictSettings()
        nc = len(predictor.names)
        wrong = [c for c in settings.classes or () if not 0 <= c < nc]
        if wrong:
            raise UserError(f"--classes {wrong[0]}; the model has classes 0 to {nc - 1}")
        self.predictor = predictor
        self.settings = settings
        self.imgsz = network_size(predictor, settings.imgsz)
        self.names = tuple(predictor.names)
        self.speed = Speed()

    def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """uint8 [H, W, 3] RGB pictures -> one `Detections` each."""
        views = [view for i, image in enumerate(images) for view in self._views(i, image)]
        rows = [np.zeros((0, 6), np.float32)] * len(views)
        for numbers in self._batches(views):
            found = self._run([views[n] for n in numbers])
            for number, boxes in zip(numbers, found, strict=True):
                rows[number] = boxes
        self.speed.images += len(images)
        return [self._assemble(i, image, views, rows) for i, image in enumerate(images)]

    def warm_up(self) -> None:
        """One run on a gray picture that does not count, so that the first timing is honest."""
        h, w = self.imgsz
        views = list(self._views(0, np.full((h, w, 3), FILL, np.uint8)))[:1]
        self._run(views)
        self.speed = Speed()

    def _views(self, i: int, image: np.ndarray) -> Iterator[View]:
        """The whole picture, and its tiles where slicing is on and the picture is larger than one."""
        assert image.dtype == np.uint8 and image.ndim == 3, f"expected uint8 [H, W, 3], got {image.dtype} {image.shape}"
        for x1, y1, x2, y2 in self._boxes(image.shape[:2]):
            pixels = image[y1:y2, x1:x2]
            auto = self.settings.rect and self.predictor.imgsz is None
            stride = size_step(self.predictor)
            geometry = letterbox_geometry(pixels.shape[:2], self.imgsz, stride=stride, auto=auto)
            yield View(i, pixels, (x1, y1), geometry)

    def _boxes(self, hw: tuple[int, int]) -> list[tuple[int, int, int, int]]:
        if not self.settings.slice_size:
            return [(0, 0, hw[1], hw[0])]
        return tile_boxes(hw, self.settings.slice_size, self.settings.overlap)

    def _batches(self, views: list[View]) -> Iterator[list[int]]:
        """Numbers of views of equal network size, at most `batch_size` at a time."""
        size = self.predictor.batch or self.settings.batch_size
        groups: dict[tuple[int, int], list[int]] = {}
        for number, view in enumerate(views):
            groups.setdefault(view.geometry.target_hw, []).append(number)
        for numbers in groups.values():
            for start in range(0, len(numbers), size):
                yield numbers[start : start + size]

    def _run(self, views: list[View]) -> list[np.ndarray]:
        """One batch of views -> rows [n, 6] in pixels of their pictures."""
        device = self.predictor.device
        clock = Clock(self.speed, device)
        stack = np.stack([letterbox_image(view.pixels, view.geometry) for view in views])
        images = torch.from_numpy(stack).to(device).permute(0, 3, 1, 2)
        images = images.to(torch.float16 if self.predictor.half else torch.float32) / 255
        clock.lap("pre-process")
        with torch.inference_mode():
            output = self.predictor(images)
            clock.lap("inference")
            found = self._select(output)
        rows = [_to_picture(boxes.float().cpu().numpy(), view) for boxes, view in zip(found, views, strict=True)]
        clock.lap("NMS")
        self.speed.shape = tuple(images.shape)
        return rows

    def _select(self, output: Any) -> list[Tensor]:
        """NMS; detections whose NMS lies inside the exported file can only get fewer."""
        s = self.settings
        if not self.predictor.end2end:
            return non_max_suppression(
                output,
                conf_thres=s.conf_thres,
                iou_thres=s.iou_thres,
                classes=s.classes,
                agnostic=s.agnostic,
                multi_label=s.multi_label,
                max_det=s.max_det,
            )
        result = []
        for rows in output:
            keep = rows[:, 4] > s.conf_thres
            if s.classes is not None:
                keep &= torch.isin(rows[:, 5].long(), torch.tensor(s.classes, device=rows.device))
            result.append(rows[keep][: s.max_det])
        return result

    def _assemble(self, i: int, image: np.ndarray, views: list[View], rows: list[np.ndarray]) -> Detections:
        """All rows of picture `i` as one value; tiles are merged."""
        mine = [(view, boxes) for view, boxes in zip(views, rows, strict=True) if view.picture == i]
        if len(mine) == 1:
            return Detections.from_rows(mine[0][1], self.names)
        s = self.settings
        tiles = [(*v.corner, v.corner[0] + v.pixels.shape[1], v.corner[1] + v.pixels.shape[0]) for v, _ in mine]
        merged = merge_tiles([boxes for _, boxes in mine], tiles, image.shape[:2], agnostic=s.agnostic)
        return Detections.from_rows(merged[: s.max_det], self.names)


def _to_picture(rows: np.ndarray, view: View) -> np.ndarray:
    """Rows [n, 6] in network pixels -> pixels of the whole picture."""
    rows = rows.copy()
    left, top = view.corner
    rows[:, :4] = view.geometry.to_source(rows[:, :4]) + np.array([left, top, left, top], np.float32)
    return rows


def size_step(predictor: Predictor) -> int:
    """What heights and widths must be multiples of: the coarsest stride, which the head may leave out."""
    return max(*predictor.strides, getattr(predictor, "max_stride", 1))


def network_size(predictor: Predictor, imgsz: Sequence[int]) -> tuple[int, int]:
    """The (height, width) to run at: a fixed predictor's own, else `imgsz` rounded up to what its network takes."""
    asked = (int(imgsz[0]), int(imgsz[-1]))
    if len(imgsz) not in (1, 2) or min(asked) < 1:
        raise UserError(f"--imgsz {' '.join(map(str, imgsz))}; expected one size in pixels, or height and width")
    if predictor.imgsz is not None:
        if tuple(predictor.imgsz) != asked:
            LOGGER.info(f"the model was exported for {predictor.imgsz[0]}x{predictor.imgsz[1]}: using that size")
        return predictor.imgsz[0], predictor.imgsz[1]
    stride = size_step(predictor)
    usable = tuple(-(-side // stride) * stride for side in asked)
    if usable != asked:
        LOGGER.info(f"--imgsz {asked[0]} {asked[1]} is rounded up to {usable[0]} {usable[1]}, multiples of {stride}")
    return usable[0], usable[1]


class AugmentedPredictor:
    """Test-time augmentation: the images at scales 1, 0.83 and 0.67, the second mirrored; predictions side by side.

    Each scale drops what the others see better: the largest image its coarsest level, the smallest its finest.
    """

    end2end = False
    imgsz: tuple[int, int] | None = None

    def __init__(self, predictor: Predictor) -> None:
        _require_raw(predictor, "--augment")
        if predictor.imgsz is not None:
            raise UserError("--augment runs at three sizes, but the model has a fixed one; export it with --dynamic hw")
        self.predictor = predictor
        self.names, self.strides = predictor.names, list(predictor.strides)
        self.max_stride = size_step(predictor)
        self.device, self.half, self.batch = predictor.device, predictor.half, predictor.batch

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N', 5 + nc] in pixels of `images`."""
        width = images.shape[3]
        parts = []
        for step, (scale, flip) in enumerate(zip(TTA_SCALES, TTA_FLIPS, strict=True)):
            scaled, ratio = self._scaled(images.flip(3) if flip else images, scale)
            output = self.predictor(scaled)
            levels = list(output.split(level_counts(output.shape[1], scaled.shape[2:], self.strides), 1))
            if len(levels) > 1 and step == 0:
                del levels[self.strides.index(max(self.strides))]
            if len(levels) > 1 and step == len(TTA_SCALES) - 1:
                del levels[self.strides.index(min(self.strides))]
            output = torch.cat(levels, 1)
            output[..., :4] /= output.new_tensor([ratio[1], ratio[0], ratio[1], ratio[0]])
            if flip:
                output[..., 0] = width - output[..., 0]
            parts.append(output)
        return torch.cat(parts, 1)

    def _scaled(self, images: Tensor, scale: float) -> tuple[Tensor, tuple[float, float]]:
        """Images resized by `scale`, gray added at the right and bottom up to a multiple of the stride, true ratios."""
        if scale == 1.0:
            return images, (1.0, 1.0)
        h, w = images.shape[2:]
        new = (max(round(h * scale), 1), max(round(w * scale), 1))
        resized = functional.interpolate(images, size=new, mode="bilinear", align_corners=False)
        pad_h, pad_w = -new[0] % self.max_stride, -new[1] % self.max_stride
        return functional.pad(resized, (0, pad_w, 0, pad_h), value=FILL / 255), (new[0] / h, new[1] / w)


class EnsemblePredictor:
    """Several predictors of the same classes as one: their predictions side by side, before NMS."""

    end2end = False

    def __init__(self, predictors: Sequence[Predictor]) -> None:
        assert predictors, "an ensemble needs at least one predictor"
        first = predictors[0]
        for number, other in enumerate(predictors, 1):
            _require_raw(other, "an ensemble")
            if list(other.names) != list(first.names):
                raise UserError(
                    f"--weights: model {number} has {len(other.names)} classes that differ from the {len(first.names)} "
                    "of model 1; an ensemble needs models trained on the same classes"
                )
        self.predictors = list(predictors)
        self.names, self.device = first.names, first.device
        self.strides = max((list(p.strides) for p in predictors), key=max)
        self.max_stride = math.lcm(*map(size_step, predictors))
        self.half = all(p.half for p in predictors)
        self.imgsz = _common([p.imgsz for p in predictors], "image sizes")
        self.batch = _common([p.batch for p in predictors], "batch sizes")

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, N1 + N2 + ..., 5 + nc]."""
        outputs = [p(images if p.half == self.half else images.float()).float() for p in self.predictors]
        return torch.cat([output.to(outputs[0].device) for output in outputs], 1)


def combine(predictors: Sequence[Predictor], *, augment: bool = False) -> Any:
    """One predictor from one or several, each with test-time augmentation where asked."""
    parts = [AugmentedPredictor(p) for p in predictors] if augment else list(predictors)
    return parts[0] if len(parts) == 1 else EnsemblePredictor(parts)


def level_counts(total: int, hw: Sequence[int], strides: Sequence[int]) -> list[int]:
    """How many of `total` predictions come from each level, finest first, for an image of `hw`."""
    cells = [-(-hw[0] // s) * -(-hw[1] // s) for s in strides]
    anchors, rest = divmod(total, sum(cells))
    if rest:
        raise UserError(f"{total} predictions do not divide over levels of {cells} cells; --augment cannot be used")
    return [anchors * c for c in cells]


def _require_raw(predictor: Predictor, what: str) -> None:
    if predictor.end2end:
        raise UserError(f"{what} needs a model without NMS inside; this one was exported with --nms, export it without")


def _common(values: list[Any], what: str) -> Any:
    """The one fixed value among `values` (None means any); a UserError where two differ."""
    fixed = {value for value in values if value is not None}
    if len(fixed) > 1:
        raise UserError(f"--weights: the models have fixed {what} {sorted(fixed)}; an ensemble needs equal ones")
    return fixed.pop() if fixed else None
