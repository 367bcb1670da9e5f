"""Groups of options that several verbs share, each declared once; a verb's config inherits them."""

from dataclasses import dataclass, fields
from typing import Any

from utils.core.config import option
from utils.core.errors import UserError
from utils.data.labels import POLICIES

NO_WEIGHTS = "no --weights given; train.py writes runs/train/exp/weights/best.pt (no weights are shipped)"
NMS_INSIDE = "with a file that has its NMS inside"


def names_of(*groups: type) -> frozenset[str]:
    """The options of these groups."""
    return frozenset(field.name for group in groups for field in fields(group))


@dataclass(frozen=True)
class RunFolderOptions:
    """Where a run writes."""

    project: str = option("runs", "folder of the runs")
    name: str = option("exp", "name of this run's folder")
    exist_ok: bool = option(False, "use an existing run folder instead of a new one")


@dataclass(frozen=True)
class PredictorOptions:
    """How model files are run."""

    weights: list[str] = option([], "model file(s): .pt, .onnx, ...; several are an ensemble", nargs="+")
    imgsz: list[int] = option(
        [], "network size: one number, or height and width; default: what the model was trained for",
        aliases=("img", "img_size"), nargs="+",
    )  # fmt: skip
    batch_size: int = option(32, "images (or slices) at a time", aliases=("batch",))
    device: str = option("", "cpu, mps, or a GPU number")
    half: bool = option(False, "16-bit floats where the runtime has them")
    augment: bool = option(False, "test-time augmentation: three sizes, one mirrored")
    slice: int = option(0, "cut images into tiles of this many pixels (0: do not)")
    overlap: float = option(0.2, "share of a tile that its neighbor sees too")


def check_overlap(options: Any) -> None:
    """UserError for an overlap of slices where there are none, in the config of any verb that slices."""
    if options.overlap != PredictorOptions.overlap and not options.slice:
        raise UserError("--overlap is about the slices of --slice; give that too")


@dataclass(frozen=True)
class LabelOptions:
    """How labels are read."""

    label_policy: str = option("clip", "what to do with bad labels", choices=POLICIES, aliases=("policy",))
    rebuild_cache: bool = option(False, "read all labels again")


@dataclass(frozen=True)
class MetricOptions:
    """How detections are measured."""

    max_det: int | None = option(
        None, "most detections per image; default: 300, or the last of --max-dets if larger; 1000 with --task speed"
    )
    iou_thrs: list[float] = option([], "IoU thresholds of AP; default 0.5 to 0.95 in steps of 0.05", nargs="+")
    max_dets: list[int] = option([1, 10, 100], "detections per image and class that AP and AR count", nargs="+")
    area_bins: list[float] = option([32.0, 96.0], "sides in pixels that separate small, medium and large", nargs="+")
    area_from: str = option(
        "annotation", "object size: the annotation's area, or the box", choices=("annotation", "box")
    )
    area_pixels: str = option(
        "source", "sizes in pixels of the image file, or of the network", choices=("source", "network")
    )
