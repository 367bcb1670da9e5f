"""Polygons and run-length masks of COCO files: decoding, joining and tracing."""

from typing import Any

import cv2
import numpy as np

from utils.data.labels import NO_POLYGON


def join_rings(rings: list) -> np.ndarray:
    """The rings of a COCO polygon as one, float32 [points, 2]; empty if any is malformed.

    Several rings are joined by bridges that are walked there and back: extents and filled area stay the same.
    """
    parts = []
    for ring in rings:
        if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2 or not set(map(type, ring)) <= {int, float}:
            return NO_POLYGON
        points = np.array(ring, np.float64).reshape(-1, 2)
        if not (np.abs(points) < 1e12).all():  # NaN is not, either
            return NO_POLYGON
        parts.append(points.astype(np.float32))
    if not parts:
        return NO_POLYGON
    points = parts[0]
    for part in parts[1:]:
        points = np.concatenate([points, parts[0][:1], part, part[:1]])
    return points if len(parts) == 1 else np.concatenate([points, parts[0][:1]])


def decode_rle(segmentation: dict[str, Any], hw: tuple[int, int]) -> np.ndarray | None:
    """A COCO run-length mask as bool [H, W]; None if it is malformed or not of the image's size."""
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or size != list(hw):
        return None
    runs = decompress_counts(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and 0 <= run <= hw[0] * hw[1] for run in runs):
        return None
    if sum(runs) != hw[0] * hw[1]:
        return None
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(hw[1], hw[0]).T


def decompress_counts(text: str) -> list[int] | None:
    """The run lengths in COCO's compressed form: 5 bits a character, later runs as differences."""
    runs: list[int] = []
    value, shift = 0, 0
    for code in text.encode("ascii", "replace"):
        bits = code - 48
        if not 0 <= bits < 64 or shift > 40:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    return runs if shift == 0 else None


def rle_box(mask: np.ndarray) -> list[float] | None:
    """The corners of a mask's extents; None for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def mask_polygon(mask: np.ndarray) -> np.ndarray:
    """The outline of a mask, float32 [points, 2], whose extents are those of the mask."""
    box = rle_box(mask)
    if box is None:
        return NO_POLYGON
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    rings = [ring.reshape(-1, 2) for ring in contours if len(ring) >= 3]
    if not rings:
        x1, y1, x2, y2 = box
        return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float32)
    points = join_rings([ring.astype(float).ravel().tolist() for ring in rings])
    low, high = points.min(0), points.max(0)  # contours run through pixel centers: stretch them to the pixels' edges
    scale = (np.array(box[2:]) - box[:2]) / np.maximum(high - low, 1e-6)
    return ((points - low) * np.where(high > low, scale, 1) + box[:2]).astype(np.float32)
