"""Hyper-parameters: YOLOv5's keys with the defaults of release 6.0, as one frozen, self-checking value."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from utils.core.errors import UserError
from utils.core.files import nearest
from utils.core.yamls import load_yaml


@dataclasses.dataclass(frozen=True)
class Hyp:
    """Values of a `data/hyps/*.yaml`.

    Gains `box`, `cls`, `obj` are for 3 layers, 80 classes and 640 px (see `DetectionLoss`). `step_decay` > 0 multiplies
    the learning rate by it at 30, 60 and 80 % of the epochs, in place of the smooth fall to lrf. Mosaic partners are
    among the `mosaic_window` images before a sample's own in the epoch's order (0: anywhere in it).
    """

    lr0: float = 0.01
    lrf: float = 0.1
    step_decay: float = 0.0
    momentum: float = 0.937
    weight_decay: float = 0.0005
    warmup_epochs: float = 3.0
    warmup_momentum: float = 0.8
    warmup_bias_lr: float = 0.1
    nominal_batch: int = 64
    grad_clip: float = 0.0
    box: float = 0.05
    cls: float = 0.5
    cls_pw: float = 1.0
    obj: float = 1.0
    obj_pw: float = 1.0
    iou_t: float = 0.2
    anchor_t: float = 4.0
    anchors: float = 0.0
    fl_gamma: float = 0.0
    label_smoothing: float = 0.0
    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    degrees: float = 0.0
    translate: float = 0.1
    scale: float = 0.5
    shear: float = 0.0
    perspective: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.5
    mosaic: float = 1.0
    mosaic9: float = 0.0
    mosaic_window: int = 128
    mixup: float = 0.0
    cutmix: float = 0.0
    copy_paste: float = 0.0
    min_box_px: float = 2.0
    min_area_ratio: float = 0.1
    max_aspect: float = 20.0
    ema_decay: float = 0.9999
    ema_tau: float = 2000.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
                raise UserError(f"hyper-parameter {field.name} is {value!r}; expected a number")
            object.__setattr__(self, field.name, int(value) if field.type in (int, "int") else float(value))
        probabilities = ("flipud", "fliplr", "mosaic", "mosaic9", "mixup", "cutmix", "copy_paste")
        for name in (*probabilities, "hsv_h", "hsv_s", "hsv_v", "label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"hyper-parameter {name} is {getattr(self, name)}; expected 0 to 1")
        for name in ("lr0", "nominal_batch", "anchor_t", "lrf", "ema_tau"):
            if getattr(self, name) <= 0:
                raise UserError(f"hyper-parameter {name} is {getattr(self, name)}; expected more than 0")
        if self.mosaic_window < 0:
            raise UserError(f"hyper-parameter mosaic_window is {self.mosaic_window}; expected 0 (any image) or more")
        if not 0 <= self.scale < 1:
            raise UserError(f"hyper-parameter scale is {self.scale}; expected 0 to below 1 (a gain of 1 +- scale)")

    def replace(self, **values: float) -> "Hyp":
        """A copy with some values changed."""
        return dataclasses.replace(self, **values)


HYP_KEYS = tuple(field.name for field in dataclasses.fields(Hyp))
# iou_t is a key of YOLOv5's files that none of its code reads; it is accepted so that those files load unchanged.


def _pair(text: str) -> tuple[str, float]:
    key, sep, value = text.partition("=")
    try:
        return key.strip(), float(value)
    except ValueError:
        raise UserError(f"hyper-parameter override '{text}'; expected key=number") from None


def load_hyp(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Hyp:
    """Read a hyp YAML (None: the defaults) and apply `key=value` overrides. Unknown keys are refused."""
    own = dict(load_yaml(source)) if source else {}
    given = dict(_pair(text) for text in overrides)
    for origin, values in ((source, own), ("--hyp", given)):
        for key in values:
            if key not in HYP_KEYS:
                raise UserError(f"{origin}: unknown hyper-parameter '{key}'{nearest(str(key), HYP_KEYS)}")
    return Hyp(**{**own, **given})
