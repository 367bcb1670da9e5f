"""The value that the Python API gives back: detections of one or more pictures, in the forms that people ask for."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.core.errors import UserError
from utils.core.files import increment_path
from utils.core.log import LOGGER
from utils.data.frames import Frame
from utils.engine.figures.draw import Style, annotate
from utils.engine.inference.records import detection_forms
from utils.engine.inference.writers import CropWriter, PictureWriter, crop, refuse_overwrite, write_all
from utils.engine.speed import speed_line
from utils.ops.boxes import xyxy_to_cxcywh
from utils.ops.detections import Detections

BOX_COLUMNS = {
    "xyxy": ("xmin", "ymin", "xmax", "ymax"),
    "xywh": ("xcenter", "ycenter", "width", "height"),
}


@dataclass(frozen=True, eq=False)
class Results:
    """Detections of pictures, with the pictures (uint8 [H, W, 3] RGB) and their names, all of one length.

    `xyxy`, `xywh` (center), `xyxyn` and `xywhn` (normalized) are lists of float32 [n, 6] tensors: box, confidence,
    class.
    """

    detections: list[Detections]
    images: list[np.ndarray]
    files: list[str]
    speed: dict[str, float]  # milliseconds per picture
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.detections)

    def __iter__(self) -> Iterator["Results"]:
        """One `Results` for each picture, as `tolist` gives them."""
        return iter(self.tolist())

    def __getitem__(self, i: int) -> Detections:
        """The boxes of picture `i`; iterating gives `Results` instead."""
        return self.detections[i]

    @property
    def xyxy(self) -> list[Tensor]:
        return [torch.from_numpy(d.to_rows()) for d in self.detections]

    @property
    def xywh(self) -> list[Tensor]:
        return [torch.cat((xyxy_to_cxcywh(rows[:, :4]), rows[:, 4:]), 1) for rows in self.xyxy]

    @property
    def xyxyn(self) -> list[Tensor]:
        return self._normalized(self.xyxy)

    @property
    def xywhn(self) -> list[Tensor]:
        return self._normalized(self.xywh)

    @property
    def pred(self) -> list[Tensor]:
        """The same as `xyxy`."""
        return self.xyxy

    @property
    def n(self) -> int:
        """Number of pictures."""
        return len(self)

    @property
    def t(self) -> tuple[float, ...]:
        """Milliseconds per picture: pre-process, inference, NMS."""
        return tuple(self.speed.values())

    def _normalized(self, tables: list[Tensor]) -> list[Tensor]:
        sizes = [(w, h, w, h, 1, 1) for h, w in (image.shape[:2] for image in self.images)]
        return [rows / rows.new_tensor(size) for rows, size in zip(tables, sizes, strict=True)]

    def tolist(self) -> list["Results"]:
        """One `Results` for each picture."""
        return [
            replace(self, detections=[d], images=[image], files=[file])
            for d, image, file in zip(self.detections, self.images, self.files, strict=True)
        ]

    def pandas(self) -> "Tables":
        """Tables with named columns: `results.pandas().xyxy[0]`."""
        return Tables(self)

    def to_supervision(self) -> list[Any]:
        """One `supervision.Detections` for each picture."""
        try:
            import supervision
        except ModuleNotFoundError:
            raise UserError(
                "to_supervision() needs the package supervision, which is not installed; pip install supervision"
            ) from None
        return [
            supervision.Detections(
                xyxy=d.xyxy.copy(),
                confidence=d.conf.copy(),
                class_id=d.cls.astype(int),
                tracker_id=None if d.track_id is None else d.track_id.astype(int),
                data={"class_name": np.array([d.name(i) for i in range(len(d))], dtype=str)},
            )
            for d in self.detections
        ]

    def render(self, labels: bool = True) -> list[np.ndarray]:
        """Copies of the pictures with boxes drawn."""
        style = Style(hide_labels=not labels)
        return [annotate(image, d, style) for image, d in zip(self.images, self.detections, strict=True)]

    def save(self, labels: bool = True, save_dir: str | Path | None = None, exist_ok: bool = False) -> Path:
        """Write annotated pictures, by default into a new runs/detect/exp; the folder is returned."""
        folder = self._folder(save_dir, exist_ok)
        writer = PictureWriter(folder, detection_forms(Style(hide_labels=not labels)))
        for frame, d in zip(self._frames(), self.detections, strict=True):
            write_all([writer], folder, frame, d)
        writer.close()
        LOGGER.info(f"Saved {len(self)} picture{'s' if len(self) != 1 else ''} to {folder}")
        return folder

    def crop(
        self, save: bool = True, save_dir: str | Path | None = None, exist_ok: bool = False
    ) -> list[dict[str, Any]]:
        """Every box cut out: dicts of box, conf, cls, label and im (RGB); with `save` also files under crops/."""
        if save:
            folder = self._folder(save_dir, exist_ok)
            writer = CropWriter(folder, self.names)
            for frame, d in zip(self._frames(), self.detections, strict=True):
                write_all([writer], folder, frame, d)
            LOGGER.info(f"Saved {sum(map(len, self.detections))} crops to {folder / 'crops'}")
        return [
            {
                "box": d.xyxy[i].copy(),
                "conf": float(d.conf[i]),
                "cls": int(d.cls[i]),
                "label": f"{d.name(i)} {d.conf[i]:.2f}",
                "im": crop(image, d.xyxy[i]).copy(),
            }
            for image, d in zip(self.images, self.detections, strict=True)
            for i in range(len(d))
        ]

    def show(self, labels: bool = True) -> None:
        """Show the annotated pictures: inline in a notebook, else in the system's image viewer."""
        from PIL import Image

        display = _notebook_display()
        for picture in self.render(labels):
            image = Image.fromarray(picture)
            display(image) if display else image.show()

    def print(self) -> None:
        """Log the text that `str(results)` gives."""
        LOGGER.info(str(self))

    def __str__(self) -> str:
        lines = [
            f"image {i}/{len(self)} {file}: {image.shape[0]}x{image.shape[1]} {d.summary()}"
            for i, (file, image, d) in enumerate(zip(self.files, self.images, self.detections, strict=True), 1)
        ]
        return "\n".join([*lines, speed_line(self.speed)])

    def __repr__(self) -> str:
        return f"<Results of {len(self)} pictures, {sum(map(len, self.detections))} boxes>"

    def _frames(self) -> list[Frame]:
        return [
            Frame(image, file, "image", i, len(self), path=Path(file))
            for i, (image, file) in enumerate(zip(self.images, self.files, strict=True), 1)
        ]

    def _folder(self, save_dir: str | Path | None, exist_ok: bool) -> Path:
        target = Path(save_dir) if save_dir is not None else Path("runs/detect/exp")
        refuse_overwrite(target, [Path(file) for file in self.files if os.path.isfile(file)])
        return increment_path(target.parent, target.name, exist_ok)


class Tables:
    """The boxes of `Results` as pandas tables: `xyxy`, `xywh`, `xyxyn`, `xywhn`, one DataFrame for each picture."""

    def __init__(self, results: Results) -> None:
        try:
            import pandas
        except ModuleNotFoundError:
            raise UserError("pandas() needs the package pandas, which is not installed; pip install pandas") from None
        self._pandas, self._results = pandas, results

    @property
    def xyxy(self) -> list[Any]:
        return self._tables("xyxy", self._results.xyxy)

    @property
    def xywh(self) -> list[Any]:
        return self._tables("xywh", self._results.xywh)

    @property
    def xyxyn(self) -> list[Any]:
        return self._tables("xyxy", self._results.xyxyn)

    @property
    def xywhn(self) -> list[Any]:
        return self._tables("xywh", self._results.xywhn)

    def _tables(self, kind: str, tables: Sequence[Tensor]) -> list[Any]:
        frames = []
        for rows, d in zip(tables, self._results.detections, strict=True):
            columns: dict[str, Any] = {name: rows[:, i].numpy() for i, name in enumerate(BOX_COLUMNS[kind])}
            columns |= {"confidence": d.conf, "class": d.cls, "name": [d.name(i) for i in range(len(d))]}
            frames.append(self._pandas.DataFrame(columns))
        return frames


def _notebook_display() -> Any:
    """IPython's `display` when running in a notebook, else None."""
    import sys

    ipython: Any = sys.modules.get("IPython")
    if ipython is None:
        return None
    shell = ipython.get_ipython()
    return ipython.display.display if shell is not None and "IPKernelApp" in shell.config else None
