"""What every backend shares: the metadata that travels inside a deployed file, and the shape rules of a predictor.

A predictor is a callable from images to raw predictions, whatever runs it. Detection runtimes give the decoded
[B, N, 5 + nc] of `model.predict`, or per-image rows when NMS is inside the file (`end2end`); classifiers give logits.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from utils.core.errors import UserError, printable

SCHEMA = 1
METADATA_KEY = "yolov5_spd"
DYNAMIC_CHOICES = ("batch", "hw", "all")
TASKS = ("detect", "classify")
PRECISIONS = ("fp32", "fp16", "int8")
DEFAULT_STRIDES = (8, 16, 32)
DEFAULT_PREPROCESSING = {"color": "RGB", "layout": "NCHW", "range": [0.0, 1.0], "resize": "letterbox", "fill": 114}


@dataclass(frozen=True)
class Metadata:
    """Everything a runtime must know about a file besides its weights. Stored as JSON, read with `json.loads` only."""

    names: tuple[str, ...]
    imgsz: tuple[int, int]  # height, width of the traced input
    strides: tuple[int, ...] = DEFAULT_STRIDES
    task: str = "detect"
    batch: int = 1
    channels: int = 3
    max_stride: int = 32  # sizes of images are multiples of it
    dynamic: str | None = None  # None, or one of DYNAMIC_CHOICES
    precision: str = "fp32"  # one of PRECISIONS: of the weights; inputs and outputs are float32 in every file
    nms: dict[str, Any] | None = None  # None, or the settings of the NMS inside the graph
    preprocessing: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_PREPROCESSING))
    version: str = ""
    licence: str = ""
    schema: int = SCHEMA

    @property
    def dynamic_batch(self) -> bool:
        return self.dynamic in ("batch", "all")

    @property
    def dynamic_hw(self) -> bool:
        return self.dynamic in ("hw", "all")

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> "Metadata":
        """Parses and checks what `to_json` wrote; anything else is a UserError that names the file."""
        try:
            data = json.loads(text)
        except ValueError as e:
            raise UserError(f"{source}: its metadata is no JSON ({e}); export the file again") from e
        if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
            raise UserError(f"{source}: its metadata is not this project's; export the file again")
        if data["schema"] > SCHEMA:
            raise UserError(
                f"{source}: metadata schema {data['schema']} is newer than this program's {SCHEMA}; update the program"
            )
        known: dict[str, Any] = {
            k: tuple(v) if k in LISTS and isinstance(v, list) else v for k, v in data.items() if k in FIELDS
        }
        damaged = [key for key, fine in FIELDS.items() if key not in known or not fine(known[key])]
        if known.get("task") == "detect" and known.get("strides") == ():
            damaged.append("strides")
        if damaged:
            raise UserError(f"{source}: its metadata is damaged ({', '.join(damaged)}); export the file again")
        return cls(**known)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_count, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


LISTS = ("names", "imgsz", "strides")
NMS_KEYS = {"conf_thres", "iou_thres", "max_det", "agnostic", "count"}
FIELDS: dict[str, Callable[[Any], bool]] = {  # of the JSON object, and what each must be
    "names": lambda v: isinstance(v, tuple) and bool(v) and all(map(_is_text, v)),
    "imgsz": lambda v: _are_counts(v) and len(v) == 2,
    "strides": _are_counts,
    "task": lambda v: v in TASKS,
    "batch": _is_count,
    "channels": _is_count,
    "max_stride": _is_count,
    "dynamic": lambda v: v in (None, *DYNAMIC_CHOICES),
    "precision": lambda v: v in PRECISIONS,
    "nms": lambda v: v is None or isinstance(v, dict) and set(v) == NMS_KEYS,
    "preprocessing": lambda v: isinstance(v, dict),
    "version": _is_text,
    "licence": _is_text,
    "schema": _is_count,
}


def refuse_other_names(predictor: "Predictor", names: Sequence[str] | None, source: str) -> None:
    """UserError where class names are given for a file that says others itself."""
    if names is not None and tuple(names) != tuple(predictor.names):
        own = ", ".join(printable(name, 40) for name in predictor.names[:3])
        raise UserError(f"{source} says its {len(predictor.names)} class names itself ({own}, ...); give no others")


def given_metadata(source: str, names: Sequence[str] | None, imgsz: int | Sequence[int] | None) -> Metadata:
    """The metadata of a file that carries none, from what the user says; without that the file is refused."""
    if names is None or imgsz is None:
        raise UserError(
            f"{source}: no metadata of this project inside (class names, image size, preprocessing); "
            "give --data DATA.yaml and --imgsz N, or export the file with export.py"
        )
    return Metadata(names=tuple(names), imgsz=pair(imgsz))


def foreign_metadata(
    source: str,
    names: Sequence[str] | None,
    imgsz: int | Sequence[int] | None,
    shape: Sequence[int | None],
    outputs: Mapping[str, Sequence[int | None]],
) -> Metadata:
    """The same for a file whose graph says what it takes and gives: the shapes (None: any size) are compared."""
    metadata = given_metadata(source, names, imgsz)
    if len(shape) != 4 or shape[1] not in (3, None):
        raise UserError(f"{source}: takes an input of shape {list(shape)}; expected images [batch, 3, height, width]")
    free_batch, free_hw = shape[0] is None, None in shape[2:]
    dynamic = ("all" if free_hw else "batch") if free_batch else ("hw" if free_hw else None)
    if not free_hw and tuple(shape[2:]) != metadata.imgsz:
        raise UserError(f"{source}: takes images of {shape[2]}x{shape[3]}; give --imgsz {shape[2]} {shape[3]}")
    values = len(metadata.names) + 5
    if [len(s) for s in outputs.values()] != [3] or next(iter(outputs.values()))[2] not in (values, None):
        shapes = ", ".join(f"{name} {list(s)}" for name, s in outputs.items())
        raise UserError(f"{source}: outputs {shapes}; expected one of [batch, anchors, {values}] for these names")
    return replace(metadata, dynamic=dynamic, batch=shape[0] or 1)


def need(*packages: str, what: str) -> None:
    """A UserError that names the packages which are not installed. Nothing is ever installed from here."""
    absent = [p for p in packages if importlib.util.find_spec(p) is None]
    if absent:
        raise UserError(f"{what} needs {' and '.join(absent)}, not installed here; pip install {' '.join(absent)}")


def pair(imgsz: int | Sequence[int]) -> tuple[int, int]:
    """An image size as (height, width)."""
    if isinstance(imgsz, int):
        return imgsz, imgsz
    size = [int(v) for v in imgsz]
    if len(size) not in (1, 2):
        raise UserError(f"image size {size} has {len(size)} numbers; expected one, or height and width")
    return size[0], size[-1]


class Predictor:
    """Base of all runtimes: images float [B, 3, H, W] in 0..1 -> Tensor, or a list of [n, 6] where `end2end`.

    A file with a fixed batch takes any number of images: they are cut into its batches and the last one is filled up.
    Subclasses implement `infer`, which sees only batches that the file can take.
    """

    end2end = False

    def __init__(self, metadata: Metadata, device: torch.device, half: bool = False):
        self.metadata = metadata
        self.device = device
        self.half = half
        self.names = list(metadata.names)
        self.strides = list(metadata.strides)
        self.task = metadata.task
        self.max_stride = metadata.max_stride
        self.end2end = metadata.nms is not None
        self.batch: int | None = None if metadata.dynamic_batch else metadata.batch
        self.imgsz: tuple[int, int] | None = None if metadata.dynamic_hw else metadata.imgsz

    def infer(self, images: Tensor) -> Any:
        raise NotImplementedError

    def __call__(self, images: Tensor) -> Any:
        self._check(images)
        if self.batch is None or len(images) == self.batch:
            return self._checked(self.infer(images))
        parts = [self._padded(chunk, self.batch) for chunk in images.split(self.batch)]
        return sum(parts, []) if self.end2end else torch.cat(parts)

    def _padded(self, images: Tensor, batch: int) -> Any:
        n = len(images)
        if n < batch:
            images = torch.cat((images, images.new_zeros(batch - n, *images.shape[1:])))
        return self._checked(self.infer(images))[:n]

    def _checked(self, output: Any) -> Any:
        """`output`, if it has a value for each class name; a file without metadata may have been given others."""
        extra = 0 if self.task == "classify" else 5
        if not self.end2end and not isinstance(output, Tensor):
            kind = f"{len(output)} outputs" if isinstance(output, (tuple, list)) else f"a {type(output).__name__}"
            raise UserError(f"the model gives {kind}; expected one tensor, as files of export.py without --nms have")
        if not self.end2end and output.shape[-1] != extra + len(self.names):
            raise UserError(
                f"the model gives {output.shape[-1]} values a row, which is not {extra} + {len(self.names)} class "
                "names; give the --data that it was trained on"
            )
        return output

    def _check(self, images: Tensor) -> None:
        assert images.ndim == 4 and images.is_floating_point(), f"expected float [B, C, H, W], got {images.shape}"
        hw = tuple(images.shape[-2:])
        if self.imgsz is not None and hw != self.imgsz:
            raise UserError(
                f"images of {hw[0]}x{hw[1]} given to a file exported for {self.imgsz[0]}x{self.imgsz[1]}; "
                f"use --imgsz {self.imgsz[0]} {self.imgsz[1]}, or export with --dynamic hw"
            )

    def warm_up(self, batch: int = 1, hw: tuple[int, int] | None = None) -> None:
        """One run on gray images, so that lazy set-up does not count as latency."""
        h, w = self.imgsz or hw or self.metadata.imgsz
        self(torch.full((self.batch or batch, self.metadata.channels, h, w), 114 / 255, device=self.device))


class ModulePredictor(Predictor):
    """Runs a module that maps images to the outputs of a deployed file: TorchScript, or an exported program's."""

    def __init__(self, module: torch.nn.Module, metadata: Metadata, device: torch.device):
        super().__init__(metadata, device)
        self.module = module

    @torch.no_grad()
    def infer(self, images: Tensor) -> Any:
        outputs = self.module(images.to(self.device, torch.float32, non_blocking=True))
        return rows_from_padded(*outputs) if self.end2end else outputs


def rows_from_padded(boxes: Tensor, scores: Tensor, labels: Tensor) -> list[Tensor]:
    """The outputs of NMS inside a graph, padded with label -1, as a list of [n, 6] x1, y1, x2, y2, conf, cls."""
    table = torch.cat((boxes.float(), scores.float()[..., None], labels.float()[..., None]), -1)
    return [rows[keep] for rows, keep in zip(table, labels >= 0, strict=True)]
