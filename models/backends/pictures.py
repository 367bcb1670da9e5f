"""The pictures that exports are verified and calibrated on: of a data set, of a path, or drawn when there are none."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from models.backends.base import Metadata
from utils.core.errors import UserError
from utils.data.folder import center_crop
from utils.data.images import read_image
from utils.data.listing import list_images
from utils.data.scenes import draw_scene
from utils.data.spec import load_data
from utils.ops.letterbox import letterbox_geometry, letterbox_image

Source = Path | int  # a file, or the number of a drawn scene


@dataclass(frozen=True)
class Pictures:
    """Batches of network input, float [B, C, H, W], made anew at every pass. `origin` says where they come from."""

    sources: tuple[Source, ...]
    origin: str
    metadata: Metadata
    batch: int = 1

    def __len__(self) -> int:
        return len(self.sources) // self.batch

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self) * self.batch, self.batch):
            images = [
                network_image(read(s, self.metadata), self.metadata) for s in self.sources[start : start + self.batch]
            ]
            yield torch.stack(images)


def choose(
    metadata: Metadata, *, data: str = "", source: str = "", split: str = "val", count: int = 8, batch: int = 1
) -> Pictures:
    """Up to `count` pictures, evenly spread: of `source` (a file or folder), else of `data`'s split, else drawn."""
    if source:
        path = Path(source)
        if not path.exists():
            raise UserError(f"--source {source}: no such file or folder; expected an image or a folder of images")
        files = [str(path)] if path.is_file() else list_images((path,))[0]
        origin = source
    elif data:
        spec = load_data(data)
        split = split if spec.has(split) else "val"
        files = list_images(spec.require(split))[0]
        origin = f"{split} of {data}"
    else:
        numbers = range(-(-count // batch) * batch)
        return Pictures(tuple(numbers), "bundled drawn scenes", metadata, batch)
    if not files:
        raise UserError(f"{origin}: no images found")
    picked = [Path(files[i]) for i in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int)]
    picked += [picked[-1]] * (-len(picked) % batch)
    return Pictures(tuple(picked), f"{len(picked)} images of {origin}", metadata, batch)


def read(source: Source, metadata: Metadata) -> np.ndarray:
    """One picture, RGB HWC uint8."""
    if isinstance(source, int):
        return np.ascontiguousarray(draw_scene(0, source, metadata.imgsz).image[..., ::-1])
    return read_image(source)


def network_image(image: np.ndarray, metadata: Metadata) -> Tensor:
    """A picture as the network takes it, float [C, H, W]: letterboxed (detection) or the middle square."""
    hw = metadata.imgsz
    if metadata.task == "detect":
        fitted = letterbox_image(image, letterbox_geometry(image.shape[:2], hw))
    else:
        fitted = center_crop(image, hw[0])
    fitted = _channels(fitted, metadata.channels)
    return (torch.from_numpy(np.ascontiguousarray(fitted)).permute(2, 0, 1).float() / 255).contiguous()


def _channels(image: np.ndarray, channels: int) -> np.ndarray:
    """RGB to the number of channels of the network: gray for one, repeated for others."""
    if channels == 3:
        return image
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    return gray if channels == 1 else np.repeat(gray, channels, axis=2)
