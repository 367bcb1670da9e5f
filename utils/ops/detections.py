"""The `Detections` value: what a detector found in one image, validated, immutable, in source pixels."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Detections:
    """Boxes of one image: xyxy float32 [n, 4] in source pixels, conf float32 [n], cls int64 [n], names by class id."""

    xyxy: np.ndarray
    conf: np.ndarray
    cls: np.ndarray
    names: tuple[str, ...] = ()
    track_id: np.ndarray | None = field(default=None)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "xyxy", np.ascontiguousarray(self.xyxy, np.float32))
        set_(self, "conf", np.ascontiguousarray(self.conf, np.float32))
        set_(self, "cls", np.ascontiguousarray(self.cls, np.int64))
        set_(self, "names", tuple(self.names))
        n = len(self.xyxy)
        if self.xyxy.shape != (n, 4):
            raise ValueError(f"xyxy has shape {self.xyxy.shape}; expected (n, 4)")
        for name in ("conf", "cls", "track_id"):
            value = getattr(self, name)
            if value is not None and value.shape != (n,):
                raise ValueError(f"{name} has shape {value.shape}; expected ({n},)")
        if self.names and n and not 0 <= int(self.cls.min()) <= int(self.cls.max()) < len(self.names):
            raise ValueError(f"class ids {self.cls.min()} to {self.cls.max()}; expected 0 to {len(self.names) - 1}")

    @classmethod
    def from_rows(cls, rows: np.ndarray, names: tuple[str, ...] | list[str] = ()) -> "Detections":
        """From NMS rows [n, 6]: x1, y1, x2, y2, confidence, class."""
        rows = np.asarray(rows, np.float32).reshape(-1, 6)
        return cls(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64), tuple(names))

    def __len__(self) -> int:
        return len(self.xyxy)

    def filter(self, mask: np.ndarray) -> "Detections":
        """The detections that a boolean mask or an index array selects."""
        ids = None if self.track_id is None else self.track_id[mask]
        return Detections(self.xyxy[mask], self.conf[mask], self.cls[mask], self.names, ids)

    def name(self, i: int) -> str:
        """Class name of detection `i`, or its class id where no names are known."""
        cls = int(self.cls[i])
        return self.names[cls] if cls < len(self.names) else str(cls)

    def to_rows(self) -> np.ndarray:
        """NMS rows [n, 6] float32: x1, y1, x2, y2, confidence, class."""
        return np.concatenate([self.xyxy, self.conf[:, None], self.cls[:, None].astype(np.float32)], 1)

    def summary(self) -> str:
        """`3 persons, 1 bus`, or `(no detections)`."""
        parts = []
        for cls, count in zip(*np.unique(self.cls, return_counts=True), strict=True):
            name = self.names[cls] if cls < len(self.names) else f"class {cls}"
            plural = "es" if name.endswith(("s", "x", "ch", "sh")) else "s"
            parts.append(f"{count} {name}{plural if count > 1 else ''}")
        return ", ".join(parts) or "(no detections)"
