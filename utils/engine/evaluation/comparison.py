"""Two models on one data set: bars of AP by size, the images on which they differ most, and what that difference is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.errors import UserError
from utils.core.log import LOGGER
from utils.engine.evaluation.bootstrap import Interval
from utils.engine.evaluation.coco_eval import Truth
from utils.engine.evaluation.report import shown
from utils.engine.figures.pictures import draw_boxes_in, mosaic, save_picture, titled
from utils.engine.figures.plots import figure, legend_text, save
from utils.ops.letterbox import letterbox_geometry, letterbox_image
from utils.ops.metrics import Found, match

PANEL = 720
RIGHT, WRONG, MISSED, OBJECT = (60, 200, 60), (235, 60, 50), (255, 200, 0), (40, 150, 255)
BARS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")


@dataclass(frozen=True)
class Verdict:
    """A model's detections at one confidence, judged at one IoU."""

    name: str
    confidence: float
    found: Found  # at or above the confidence
    right: np.ndarray  # bool, of `found`
    counted: np.ndarray  # bool, of `found`: neither on a crowd nor beyond the limit of an image
    missed: np.ndarray  # bool, of the objects

    def errors(self, truth: Truth) -> np.ndarray:
        """False detections plus missed objects of each image, int64[n]."""
        wrong = self.found.image[self.counted & ~self.right]
        missed = truth.objects.image[self.missed]
        return np.bincount(wrong, minlength=len(truth)) + np.bincount(missed, minlength=len(truth))

    def line(self, truth: Truth, image: int) -> str:
        """`spd-n: 7 right, 3 wrong, 5 missed`."""
        mine = self.found.image == image
        right, wrong = (self.right & mine).sum(), (self.counted & ~self.right & mine).sum()
        missed = (self.missed & (truth.objects.image == image)).sum()
        return f"{self.name}: {right} right, {wrong} wrong, {missed} missed"


def judge(name: str, truth: Truth, found: Found, confidence: float, iou: float, max_det: int) -> Verdict:
    """Which detections at or above `confidence` are right, and which objects are missed."""
    kept = found.take(found.score >= confidence)
    matches = match(truth.objects, kept, truth.nc, np.array([iou]), max_det=max_det)
    right, counted = np.zeros(len(kept), bool), np.zeros(len(kept), bool)
    right[matches.det] = matches.hit[0]
    counted[matches.det] = ~matches.ignored[0]
    missed = matches.counted.copy()
    missed[matches.gt[0][matches.hit[0]]] = False
    return Verdict(name, confidence, kept, right, counted, missed)


def most_different(truth: Truth, a: Verdict, b: Verdict, count: int) -> list[tuple[int, int]]:
    """(image, errors of A minus errors of B) where they differ most: half for B, half for A, where there are any."""
    gain = a.errors(truth) - b.errors(truth)
    order = np.argsort(-np.abs(gain), kind="stable")
    for_b = [int(i) for i in order if gain[i] > 0]
    for_a = [int(i) for i in order if gain[i] < 0]
    half = max(count - count // 2, count - len(for_a))
    picked = for_b[:half]
    picked += for_a[: count - len(picked)]
    return [(i, int(gain[i])) for i in picked]


def region(truth: Truth, a: Verdict, b: Verdict, image: int, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part to show of an image of this height and width, xyxy: around what only one model gets right; the whole,
    where that is wide."""
    height, width = shape
    at = truth.objects.image == image
    boxes = [truth.objects.xywh[at & (a.missed != b.missed)]]
    boxes += [v.found.xywh[(v.found.image == image) & v.counted & ~v.right] for v in (a, b)]
    xywh = np.concatenate(boxes)
    if not len(xywh):
        return 0, 0, width, height
    low, high = xywh[:, :2].min(0), (xywh[:, :2] + xywh[:, 2:]).max(0)
    side = max(1.3 * float((high - low).max()), 0.2 * max(height, width), 64.0)
    if side > 0.7 * max(height, width):
        return 0, 0, width, height
    x, y = (low + high) / 2 - side / 2
    left, top = max(int(min(x, width - side)), 0), max(int(min(y, height - side)), 0)
    return left, top, min(int(left + side), width), min(int(top + side), height)


def draw_pair(image: np.ndarray, truth: Truth, a: Verdict, b: Verdict, number: int) -> np.ndarray:
    """Ground truth, A and B side by side: objects blue, right detections green, wrong ones red, misses yellow."""
    x1, y1, x2, y2 = region(truth, a, b, number, image.shape[:2])
    geometry = letterbox_geometry((y2 - y1, x2 - x1), PANEL, auto=True, stride=2)
    part = letterbox_image(image[y1:y2, x1:x2], geometry)
    at = truth.objects.image == number

    def place(xywh: np.ndarray) -> np.ndarray:
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1) - [x1, y1, x1, y1]
        return geometry.to_network(corners)

    zoom = "" if (x2 - x1, y2 - y1) == (image.shape[1], image.shape[0]) else f", part {x2 - x1} x {y2 - y1} px"
    objects = at & ~truth.objects.crowd
    names = [truth.names[c] for c in truth.objects.cls[objects]]
    panels = [draw_boxes_in(part, place(truth.objects.xywh[objects]), [OBJECT] * len(names), names, 2)]
    panels = [titled(panels[0], f"ground truth: {len(names)} objects{zoom}", 14)]
    for verdict in (a, b):
        missed = at & verdict.missed
        mine = (verdict.found.image == number) & verdict.counted
        order = np.flatnonzero(mine)
        boxes = np.concatenate([truth.objects.xywh[missed], verdict.found.xywh[order]])
        shades = [MISSED] * int(missed.sum()) + [RIGHT if verdict.right[i] else WRONG for i in order]
        texts = [""] * int(missed.sum())
        texts += [f"{truth.names[verdict.found.cls[i]]} {verdict.found.score[i]:.2f}" for i in order]
        panels.append(titled(draw_boxes_in(part, place(boxes), shades, texts, 2), verdict.line(truth, number), 14))
    return mosaic(panels, columns=3, gap=4)


def save_pairs(
    truth: Truth,
    a: Verdict,
    b: Verdict,
    picked: Sequence[tuple[int, int]],
    read: Callable[[int], np.ndarray],
    stem: Callable[[int], str],
    folder: Path,
) -> list[Path]:
    """One picture for each picked image that can be read; the name says who is better by how many errors."""
    paths, left_out = [], []
    for rank, (image, gain) in enumerate(picked, 1):
        better = f"{'B' if gain > 0 else 'A'}_better_by_{abs(gain)}"
        try:
            pixels = read(image)
        except UserError as error:
            left_out.append(str(error))
            continue
        expected = tuple(map(int, truth.shapes[image]))
        if pixels.shape[:2] != expected and expected != (0, 0):  # a record without sizes
            sizes = f"{pixels.shape[1]} x {pixels.shape[0]} px, its record says {expected[1]} x {expected[0]}"
            left_out.append(f"{stem(image)} has {sizes}")
            continue
        picture = draw_pair(pixels, truth, a, b, image)
        paths.append(save_picture(picture, folder / f"{rank:02d}_{better}_{stem(image)}.jpg"))
    if left_out:
        LOGGER.warning(f"{len(left_out)} of {len(picked)} pictures left out: {'; '.join(left_out)}")
    return paths


def plot_bars(
    names: Sequence[str], metrics: Sequence[Mapping[str, Any]], intervals: Mapping[str, Interval], path: str | Path
) -> Path:
    """AP_S as the paper's Fig. 1 shows it, and all sizes beside; whiskers are the bootstrap intervals of each model."""
    fig, axes = figure(1, 2, (12, 5))
    small, sizes = axes[0]
    for number, (name, numbers) in enumerate(zip(names, metrics, strict=True)):
        color = f"C{number}"
        value = numbers["AP_S"]
        small.bar(number, value, color=color, width=0.6, yerr=_whiskers(intervals.get("AP_S"), number), capsize=6)
        small.text(number, np.nan_to_num(value) / 2, shown(value), ha="center", color="white", fontsize=12)
        for place, key in enumerate(BARS):
            sizes.bar(
                place + 0.4 * number - 0.2,
                np.nan_to_num(numbers[key]),
                color=color,
                width=0.38,
                yerr=_whiskers(intervals.get(key), number),
                capsize=3,
                label=legend_text(name) if place == 0 else None,
            )
    small.set_xticks(range(len(names)), list(names))
    small.set(ylabel="AP_S", title="small objects", xlim=(-0.6, len(names) - 0.4))
    sizes.set_xticks(range(len(BARS)), BARS)
    sizes.set(title="all sizes")
    sizes.legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3, axis="y")
        axis.set_axisbelow(True)
    return save(fig, path)


def _whiskers(interval: Interval | None, number: int) -> np.ndarray | None:
    """Distances down and up from a bar, [2, 1]."""
    if interval is None:
        return None
    value, (low, high) = (interval.a, interval.a_range) if number == 0 else (interval.b, interval.b_range)
    if not np.isfinite([value, low, high]).all():
        return None
    return np.array([[max(value - low, 0)], [max(high - value, 0)]])


def comparison_table(
    names: Sequence[str], metrics: Sequence[Mapping[str, Any]], intervals: Mapping[str, Interval]
) -> str:
    """The numbers of both models, their difference, and the bootstrap interval where there is one."""
    width = max(12, *(len(name) + 2 for name in names))
    lines = [f"{'':>8}" + "".join(f"{name:>{width}}" for name in names) + f"{'B - A':>9}  bootstrap interval"]
    for key in (*BARS, "P", "R", "F1"):
        a, b = (numbers[key] for numbers in metrics)
        difference = "-" if np.isnan(a) or np.isnan(b) else f"{b - a:+.3f}"
        line = f"{key:>8}{shown(a):>{width}}{shown(b):>{width}}{difference:>9}"
        i = intervals.get(key)
        if i is not None and not np.isnan(i.difference):
            clear = "beyond chance" if i.clear else "within chance"
            line += f"  {100 * i.level:g} % [{i.low:+.3f}, {i.high:+.3f}], {clear}"
        lines.append(line)
    return "\n".join(lines)
