"""YOLO label files, and the label policy that every format shares.

A line is `class x-center y-center width height`, or `class x1 y1 x2 y2 x3 y3 ...` (a polygon, whose extents are the
box), normalized to 0..1 by the upright image; both may stand in one file. Nothing is dropped in silence: what the
policy does to a box is an `Issue`.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.images import read_regular
from utils.data.problems import CLIPPED, DROPPED, LEFT_OUT, LINES_KEPT, REMOVED, STOPS, Problem

POLICIES = ("clip", "drop-box", "drop-image", "error")
TOLERANCE_PX, TOLERANCE_SHARE = 1.0, 0.01  # a box may hang over the edge by the larger of the two and is clipped
ROUNDING_PX = 0.1  # clipped without a word: labels have six decimals or fewer
MAX_LABEL_BYTES = 64_000_000
NO_POLYGON = np.zeros((0, 2), np.float32)


class Issue(NamedTuple):
    """Something wrong at a line (or with the n-th record) of one file."""

    kind: str
    line: int
    detail: str


@dataclass
class Labels:
    """The objects of one image, in pixels of the upright picture."""

    cls: np.ndarray  # int32 [k]
    xyxy: np.ndarray  # float64 [k, 4]
    lines: np.ndarray  # int32 [k]: where each object stands in its file
    area: np.ndarray | None = None  # float64 [k]; None: width x height
    crowd: np.ndarray | None = None  # bool [k]; None: all false
    polygons: list[np.ndarray] | None = None  # k arrays [points, 2], empty without a polygon; None: no polygon at all

    def __len__(self) -> int:
        return len(self.cls)

    def take(self, keep: np.ndarray) -> "Labels":
        """The objects under a boolean mask [k]."""
        return Labels(
            self.cls[keep],
            self.xyxy[keep],
            self.lines[keep],
            None if self.area is None else self.area[keep],
            None if self.crowd is None else self.crowd[keep],
            None if self.polygons is None else [p for p, kept in zip(self.polygons, keep, strict=True) if kept],
        )


def no_labels() -> Labels:
    """The labels of an image without objects."""
    return Labels(np.zeros(0, np.int32), np.zeros((0, 4)), np.zeros(0, np.int32))


def read_yolo(path: str | Path, hw: tuple[int, int], nc: int) -> tuple[Labels, list[Issue], bool]:
    """Labels of an image of height and width `hw`, what is wrong with the file, and whether there is a file.

    Class numbers from `nc` on are issues; pass 0 to accept any (single-class training).
    """
    try:
        data = read_regular(path, MAX_LABEL_BYTES)
    except FileNotFoundError:
        if os.path.islink(path):
            return no_labels(), [Issue("label-unreadable", 0, "is a link to nothing")], True
        return no_labels(), [], False
    except OSError as error:
        return no_labels(), [Issue("label-unreadable", 0, f"cannot be read ({error.strerror or error})")], True
    if not data:
        return no_labels(), [], True
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        return no_labels(), [Issue("label-unreadable", 0, "is not a text file")], True
    labels, issues = parse_yolo(text, hw, nc)
    return labels, issues, True


@np.errstate(over="ignore", invalid="ignore")
def parse_yolo(text: str, hw: tuple[int, int], nc: int) -> tuple[Labels, list[Issue]]:
    """Parse the lines of a label file; malformed lines and class numbers out of range become issues."""
    issues: list[Issue] = []
    source = text.splitlines()
    polygons = None
    plain = _plain_rows(text, source)
    if plain is not None:
        array, lines = plain, np.arange(1, len(plain) + 1, dtype=np.int32)
    else:
        array, lines, polygons = _mixed_rows(source, hw, issues)
    if not len(array):
        return no_labels(), issues
    classes = array[:, 0]
    known = (classes >= (0 if nc else -(2**31))) & (classes < (nc or 2**31)) & (classes == np.floor(classes))
    if not known.all() or not math.isfinite(array.sum()) or "_" in text:
        good = np.isfinite(array).all(1) & (classes == np.floor(classes))
        good &= ["_" not in source[line - 1] for line in lines]
        for i in np.flatnonzero(~good):
            issues.append(_malformed(int(lines[i]), source[lines[i] - 1], "has a value that is not a plain number"))
        for i in np.flatnonzero(good & ~known):
            issues.append(Issue("label-class", int(lines[i]), f"has class {classes[i]:.0f}; expected 0 to {nc - 1}"))
        known &= good
        array, lines = array[known], lines[known]
        polygons = polygons and [p for p, kept in zip(polygons, known, strict=True) if kept]
    height, width = hw
    half = array[:, 3:5] / 2
    xyxy = np.concatenate([array[:, 1:3] - half, array[:, 1:3] + half], 1) * (width, height, width, height)
    return Labels(array[:, 0].astype(np.int32), xyxy, lines, polygons=polygons), issues


def _plain_rows(text: str, source: list[str]) -> np.ndarray | None:
    """The values [k, 5] of a file in which every line is five numbers between single spaces; None for any other."""
    tokens = text.split()
    if len(tokens) != 5 * len(source) or any(line.count(" ") != 4 for line in source):
        return None
    try:
        return np.array(list(map(float, tokens))).reshape(-1, 5)
    except ValueError:
        return None


def _mixed_rows(
    source: list[str], hw: tuple[int, int], issues: list[Issue]
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray] | None]:
    """Boxes [k, 5], line numbers [k] and polygons (None without any) of lines that may be anything."""
    rows: list[list[float]] = []
    lines: list[int] = []
    polygons: list[np.ndarray] = []
    height, width = hw
    for number, line in enumerate(source, 1):
        tokens = line.split()
        if not tokens:
            continue
        try:
            values = [float(token) for token in tokens]
        except ValueError:
            issues.append(_malformed(number, line, "is not all numbers"))
            continue
        polygon = NO_POLYGON
        if len(values) >= 7 and len(values) % 2:
            points = np.array(values[1:]).reshape(-1, 2)
            (x1, y1), (x2, y2) = points.min(0).tolist(), points.max(0).tolist()
            values = [values[0], (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
            polygon = (points * (width, height)).astype(np.float32)
        if len(values) != 5:
            hint = " (a prediction with its confidence?)" if len(values) == 6 else ""
            expected = "expected 5, or 7, 9, 11, ... for a polygon"
            issues.append(_malformed(number, line, f"has {len(values)} values{hint}; {expected}"))
            continue
        rows.append(values)
        lines.append(number)
        polygons.append(polygon)
    array = np.array(rows, np.float64).reshape(-1, 5)
    return array, np.array(lines, np.int32), polygons if any(len(p) for p in polygons) else None


def _malformed(number: int, line: str, what: str) -> Issue:
    line = line.strip()
    return Issue("label-format", number, f"'{line[:40]}{'...' if len(line) > 40 else ''}' {what}")


def settle(labels: Labels, hw: tuple[int, int], policy: str) -> tuple[Labels, list[Issue]]:
    """Apply the policy's geometry: drop repeated, empty and outside boxes, clip what hangs over by little.

    With any policy but "clip", a box that would need clipping by more than a rounding error is dropped.
    """
    issues: list[Issue] = []
    if not len(labels):
        return labels, issues
    if len(labels) > 1:
        labels = _without_repeats(labels, issues)
    height, width = hw
    x1, y1, x2, y2 = labels.xyxy.T
    over_x = np.maximum(-x1, x2 - width)
    over_y = np.maximum(-y1, y2 - height)
    over = np.maximum(over_x, over_y)
    sized = (x2 > x1) & (y2 > y1)
    if sized.all() and over.max() <= 0:
        return labels, issues
    allowed_x, allowed_y = (max(TOLERANCE_PX, TOLERANCE_SHARE * side) for side in (width, height))
    near = (over_x <= allowed_x) & (over_y <= allowed_y)
    overhang = sized & near & (over > ROUNDING_PX)
    for i in np.flatnonzero(~sized):
        size = f"{x2[i] - x1[i]:.4g} x {y2[i] - y1[i]:.4g}"
        issues.append(Issue("box-empty", int(labels.lines[i]), f"has a box of {size} px"))
    for i in np.flatnonzero(sized & ~near):
        corners = ", ".join(f"{v:.6g}" for v in labels.xyxy[i])
        detail = f"has a box ({corners}) px in an image of {width} x {height}"
        issues.append(Issue("box-outside", int(labels.lines[i]), detail))
    for i in np.flatnonzero(overhang):
        issues.append(Issue("box-overhang", int(labels.lines[i]), f"has a box {over[i]:.2f} px over the edge"))
    keep = sized & near & (~overhang if policy != "clip" else True)
    labels = _clip(labels.take(keep), hw)
    left = (labels.xyxy[:, 2] > labels.xyxy[:, 0]) & (labels.xyxy[:, 3] > labels.xyxy[:, 1])
    for line in labels.lines[~left].tolist():
        issues.append(Issue("box-empty", line, "has a box without area inside the image"))
    return (labels if left.all() else labels.take(left)), issues


def _clip(labels: Labels, hw: tuple[int, int]) -> Labels:
    limit = np.array([hw[1], hw[0], hw[1], hw[0]], np.float64)
    labels.xyxy = np.clip(labels.xyxy, 0, limit)
    if labels.polygons is not None:
        labels.polygons = [np.clip(p, 0, limit[:2]).astype(np.float32) for p in labels.polygons]
    return labels


def _without_repeats(labels: Labels, issues: list[Issue]) -> Labels:
    """Drop objects equal to an earlier one in class, box, crowd flag and polygon."""
    keys: list[tuple] = list(zip(labels.cls.tolist(), *labels.xyxy.T.tolist(), strict=True))
    if len(set(keys)) == len(keys):
        return labels
    seen: dict[tuple, int] = {}
    keep = np.ones(len(labels), bool)
    for i, key in enumerate(keys):
        crowd = labels.crowd is not None and bool(labels.crowd[i])
        full = (*key, crowd, labels.polygons[i].tobytes() if labels.polygons is not None else b"")
        line = int(labels.lines[i])
        if seen.setdefault(full, line) != line:
            keep[i] = False
            issues.append(Issue("box-repeated", line, f"repeats the box at {seen[full]}"))
    return labels.take(keep)


def judge(file: str, issues: Iterable[Issue], policy: str) -> tuple[list[Problem], bool]:
    """Issues of one label file as problems (one per kind), and whether the image is to be left out."""
    grouped: dict[str, list[Issue]] = {}
    for issue in issues:
        grouped.setdefault(issue.kind, []).append(issue)
    out = "label-unreadable" in grouped or (policy == "drop-image" and any(kind != "box-repeated" for kind in grouped))
    problems = []
    for kind, found in grouped.items():
        found.sort(key=lambda issue: issue.line)
        lines = tuple(issue.line for issue in found[:LINES_KEPT] if issue.line)
        if kind == "box-repeated":
            action = REMOVED
        elif kind == "label-class":
            action = STOPS
        elif out:
            action = LEFT_OUT
        else:
            action = CLIPPED if kind == "box-overhang" and policy == "clip" else DROPPED
        images = int(not any(problem.action == LEFT_OUT for problem in problems))  # the first one stands for the image
        problems.append(Problem(kind, file, action, found[0].detail, lines, len(found), images))
    return problems, out
