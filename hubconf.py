"""The Python API, also for `torch.hub`: `load(weights)` gives a model to call on pictures.

    model = torch.hub.load("path/to/this/folder", "load", "runs/train/exp/weights/best.pt", source="local")
    results = model(["street.jpg", array])
    results.print(); results.save(); results.pandas().xyxy[0]

`yolov5n(...)`, `yolov5n6(...)`, `yolov5_spd_n(...)`, `yolov5_spdconv_n(...)` and so on build a network by name. No
weights are shipped: those networks start from random numbers and are there to be trained or measured.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import build_model
from models.backends import load_predictor
from models.backends.base import refuse_other_names
from models.backends.pytorch import PyTorchPredictor
from utils.core.device import select_device
from utils.core.errors import UserError
from utils.core.log import LOGGER
from utils.data.frames import redact, url_scheme
from utils.data.images import read_image
from utils.engine.inference.classifying import Classification, PictureClassifier
from utils.engine.inference.predict import Detector, PredictSettings, combine
from utils.engine.inference.results import Results

dependencies = ["torch", "torchvision", "numpy", "cv2", "PIL", "yaml"]


class Model:
    """A detector to call. The settings are plain attributes, to be changed at any time.

    `conf`, `iou`, `agnostic`, `multi_label`, `classes` and `max_det` mean what the flags of detect.py mean.
    """

    def __init__(self, predictor: Any) -> None:
        self.predictor = predictor
        self.names = list(predictor.names)
        self.conf = 0.25
        self.iou = 0.45
        self.agnostic = False
        self.multi_label = False
        self.classes: Sequence[int] | int | None = None
        self.max_det = 1000

    def __call__(
        self,
        ims: Any,
        size: int | Sequence[int] | None = None,
        augment: bool = False,
        *,
        batch_size: int = 8,
        slice: int = 0,
        overlap: float = 0.2,
    ) -> Results | list[Classification]:
        """Detect on a picture or a list of pictures; a classifier gives one `Classification` each instead of `Results`.

        A picture is a path, a PIL image, an array [H, W, 3] or [H, W] (uint8, RGB: `cv2.imread(f)[..., ::-1]`), or a
        tensor [3, H, W] (uint8, or floats in 0..1); a tensor [B, 3, H, W] is B pictures. `size` is the network's;
        by default what the model was trained for.
        """
        images, files = load_pictures(ims)
        imgsz = network_sides(size)
        if self.predictor.task == "classify":
            return PictureClassifier(self.predictor, imgsz, batch_size)(images)
        settings = PredictSettings(
            imgsz=imgsz or self.predictor.imgsz or self.predictor.metadata.imgsz,
            conf_thres=self.conf,
            iou_thres=self.iou,
            max_det=self.max_det,
            classes=None if self.classes is None else class_numbers(self.classes),
            agnostic=self.agnostic,
            multi_label=self.multi_label,
            batch_size=batch_size,
            slice_size=slice,
            overlap=overlap,
        )
        detector = Detector(combine([self.predictor], augment=augment), settings)
        found = [d for i in range(0, len(images), batch_size) for d in detector(images[i : i + batch_size])]
        return Results(found, images, files, detector.speed.ms(), detector.names)

    def __repr__(self) -> str:
        return f"<Model with {len(self.names)} classes on {self.predictor.device}>"


def class_numbers(classes: Any) -> tuple[int, ...]:
    """`classes` as numbers."""
    numbers = np.atleast_1d(np.asarray(classes))
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise UserError(f"classes={classes!r}; expected the number of a class, or a list of numbers")
    return tuple(numbers.tolist())


def network_sides(size: Any) -> tuple[int, ...]:
    """`size` as height and width; nothing where it is not given."""
    if size is None:
        return ()
    sides = np.atleast_1d(np.asarray(size))
    if sides.ndim != 1 or len(sides) > 2 or sides.dtype.kind not in "iu":
        raise UserError(f"size={size!r}; expected a whole number of pixels, or (height, width)")
    return int(sides[0]), int(sides[-1])


def load_pictures(ims: Any) -> tuple[list[np.ndarray], list[str]]:
    """Anything that `Model` takes -> uint8 [H, W, 3] RGB pictures, and a name for each."""
    if isinstance(ims, torch.Tensor) and ims.ndim == 4:
        ims = list(ims)
    if isinstance(ims, np.ndarray) and ims.ndim == 4:
        ims = list(ims)
    if not isinstance(ims, list | tuple):
        ims = [ims]
    images, files = [], []
    for number, item in enumerate(ims):
        path = item if isinstance(item, str | os.PathLike) else getattr(item, "filename", "")
        files.append(str(path) or f"image{number}")
        images.append(picture(item))
    return images, files


def picture(item: Any) -> np.ndarray:
    """One picture as uint8 [H, W, 3] RGB."""
    if isinstance(item, str | os.PathLike):
        if url_scheme(str(item)):
            raise UserError(f"'{redact(str(item))}' is a URL; nothing is downloaded here, give a file or an array")
        return read_image(Path(item))
    if isinstance(item, torch.Tensor):
        item = _tensor_picture(item)
    elif not isinstance(item, np.ndarray):
        if not hasattr(item, "convert"):
            raise UserError(f"a picture is given as {type(item).__name__}; expected a path, array, PIL image or tensor")
        from PIL import ImageOps

        if item.mode[0] in "IF":
            raise UserError(f"a picture is a PIL image of mode {item.mode}; expected 8 bits a channel, or its path")
        item = np.asarray(ImageOps.exif_transpose(item).convert("RGB"))
    if item.ndim == 2:
        item = np.repeat(item[..., None], 3, 2)
    if item.ndim == 3 and item.shape[0] in (1, 3, 4) and item.shape[2] not in (1, 3, 4):
        item = item.transpose(1, 2, 0)
    if item.ndim != 3 or item.shape[2] not in (1, 3, 4) or item.dtype != np.uint8 or not item.size:
        raise UserError(f"a picture is an array of {item.dtype} {item.shape}; expected uint8 (height, width, 3) in RGB")
    item = np.repeat(item, 3, 2) if item.shape[2] == 1 else item[..., :3]
    return np.ascontiguousarray(item)


def _tensor_picture(item: torch.Tensor) -> np.ndarray:
    """A tensor [C, H, W] as array; floats count as 0..1."""
    item = item.detach().cpu()
    if item.is_floating_point():
        if not (item.isfinite().all() and item.min() >= -0.01 and item.max() <= 1.01):
            low, high = item.min().item(), item.max().item()
            raise UserError(f"a picture is a float tensor of values {low:g} to {high:g}; expected 0 to 1, or uint8")
        item = (item.float().clamp(0, 1) * 255).round().to(torch.uint8)
    array = item.numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 and array.shape[0] in (1, 3, 4) else array


def load(
    weights: str | Path,
    device: str = "",
    half: bool = False,
    imgsz: int | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Model:
    """A model from a file: a checkpoint of this project or YOLOv5's (.pt, .safetensors), or an exported one.

    `imgsz` and `names` (of the classes) stand in for what an exported file of another tool does not say itself.
    """
    predictor = load_predictor(weights, device=select_device(device), half=half, names=names, imgsz=imgsz)
    refuse_other_names(predictor, names, str(weights))
    return Model(predictor)


def custom(path: str | Path, autoshape: bool = True, _verbose: bool = True, device: str | None = None) -> Any:
    """`load` under YOLOv5's name; without `autoshape` the bare predictor from tensors to raw predictions."""
    model = load(path, device or "")
    return model if autoshape else model.predictor


def _named(cfg: str) -> Callable[..., Any]:
    def build(
        pretrained: bool = False,
        channels: int = 3,
        classes: int = 80,
        autoshape: bool = True,
        _verbose: bool = True,
        device: str | None = None,
    ) -> Any:
        if pretrained:
            raise UserError(f"{cfg}: no weights are shipped, so pretrained=True cannot be; use load('your/best.pt')")
        network = build_model(cfg, nc=classes, ch=channels).eval()
        if not autoshape:
            return network.to(select_device(device or ""))
        if channels != 3:
            raise UserError(f"{cfg}: pictures are RGB, but channels={channels}; use autoshape=False for the module")
        if _verbose:
            LOGGER.warning(f"{cfg}: random weights, since none are shipped; load('your/best.pt') gives a trained model")
        names = [f"class{i}" for i in range(classes)]
        return Model(PyTorchPredictor(network, names, device=select_device(device or "")))

    build.__name__ = build.__qualname__ = cfg.replace("-", "_")
    build.__doc__ = f"The network of {cfg}.yaml, random weights: a `Model`, or without `autoshape` the module."
    return build


yolov5n, yolov5s, yolov5m, yolov5l, yolov5x = (_named(f"yolov5{size}") for size in "nsmlx")
yolov5n6, yolov5s6, yolov5m6, yolov5l6, yolov5x6 = (_named(f"yolov5{size}6") for size in "nsmlx")
yolov5_spd_n, yolov5_spd_s, yolov5_spd_m, yolov5_spd_l, yolov5_spd_x = (
    _named(f"yolov5-spd-{size}") for size in "nsmlx"
)
yolov5_spdconv_n, yolov5_spdconv_s, yolov5_spdconv_m, yolov5_spdconv_l = (
    _named(f"yolov5-spdconv-{size}") for size in "nsml"
)
