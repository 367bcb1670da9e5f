"""Does an exported file say what PyTorch says? Numbers on the same pictures, and how far apart they may be."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.backends.base import Predictor
from models.backends.graph import NmsSettings
from utils.core.device import synchronize
from utils.ops.boxes import box_iou, cxcywh_to_xyxy
from utils.ops.nms import non_max_suppression

CONFIDENT = 0.25
NEAR_PX = 2.0
LOOSE = 0.1  # how far scores may be apart where a precision does not judge them one by one
NOT_FINITE = "output holds NaN or infinity"
LEAST_ROWS = 100  # the best rows of an image that are compared even where nothing is confident


@dataclass(frozen=True)
class Tolerance:
    """Allowed differences: boxes in pixels, scores, and AP (either way). None: not judged by it."""

    px: float | None
    score: float | None
    ap: float
    found: float  # share of PyTorch's confident detections that must be found again


TOLERANCES = {
    "fp32": Tolerance(px=0.05, score=0.001, ap=0.001, found=1.0),
    "fp16": Tolerance(px=2.0, score=0.02, ap=0.01, found=1.0),
    "int8": Tolerance(px=None, score=None, ap=0.02, found=0.7),
}


@dataclass
class Difference:
    """What a comparison found, in network pixels and probability. `worst` is over all values of the output."""

    px: float = 0.0
    score: float = 0.0
    worst: float = 0.0
    boxes: int = 0
    detections: int = 0
    found: int = 0
    unsuppressed: int = 0  # pairs of detections of which NMS should have left one
    images: int = 0
    problem: str = ""  # what made a comparison impossible
    what: str = "detections"  # which of these are counted; of a classifier: classes

    def add(self, other: "Difference") -> None:
        self.px = max(self.px, other.px)
        self.score = max(self.score, other.score)
        self.worst = max(self.worst, other.worst)
        self.boxes += other.boxes
        self.detections += other.detections
        self.found += other.found
        self.unsuppressed += other.unsuppressed
        self.images += 1
        self.problem = self.problem or other.problem

    def failures(self, tolerance: Tolerance) -> list[str]:
        """What is beyond the tolerance, in words; empty when all is well."""
        out = [self.problem] if self.problem else []
        if tolerance.px is not None and self.px > tolerance.px:
            out.append(f"boxes differ by {self.px:.3g} px, allowed are {tolerance.px:g}")
        if tolerance.score is not None and self.score > tolerance.score:
            out.append(f"scores differ by {self.score:.3g}, allowed are {tolerance.score:g}")
        if self.unsuppressed:
            out.append(f"{self.unsuppressed} pairs of detections overlap by more than the IoU of the NMS inside")
        if self.found < tolerance.found * self.detections:
            out.append(f"{self.found} of {self.detections} {self.what} found again, expected {tolerance.found:.0%}")
        return out

    def __str__(self) -> str:
        text = f"largest difference {self.worst:.2g} over all outputs"
        if self.boxes:
            text += f"; {self.px:.2g} px and {self.score:.2g} in score over {self.boxes} boxes"
        if self.detections:
            text += f"; {self.found} of {self.detections} {self.what} found again"
        return text


def compare(reference: Predictor, candidate: Predictor, batches: Iterable[Tensor]) -> Difference:
    """Runs both on the same batches. `reference` gives raw predictions or logits, `candidate` what its file gives."""
    total, precision = Difference(), candidate.metadata.precision
    total.what = "classes" if candidate.task == "classify" else "detections"
    tie = 2 * (TOLERANCES[precision].score or LOOSE)
    for images in batches:
        expected, given = reference(images).cpu(), candidate(images)
        for i in range(len(images)):
            if candidate.task == "classify":
                total.add(_compare_values(expected[i], given[i].cpu()))
            elif candidate.end2end:
                total.add(compare_detections(expected[i], given[i].cpu(), _settings(candidate), tie))
            else:
                total.add(compare_raw(expected[i], given[i].cpu(), tie, exact=precision == "fp32"))
    return total


def _settings(candidate: Predictor) -> NmsSettings:
    assert candidate.metadata.nms is not None
    return NmsSettings(**candidate.metadata.nms)


def _compare_values(expected: Tensor, given: Tensor) -> Difference:
    """Logits: the largest difference, that of scores after softmax, and whether the first class is the same."""
    if problem := _problem(expected, given):
        return Difference(problem=problem)
    score = (expected.softmax(-1) - given.softmax(-1)).abs().max().item()
    same = int(expected.argmax() == given.argmax())
    best = expected.softmax(-1).topk(min(2, len(expected))).values
    sure = int(len(best) == 1 or best[0] - best[1] > 0.05)
    return Difference(score=score, worst=_worst(expected, given), detections=sure, found=same * sure)


def _problem(expected: Tensor, given: Tensor) -> str:
    """Why two outputs cannot be compared value by value; empty where they can."""
    if expected.shape != given.shape:
        return f"the output has shape {list(given.shape)}, expected {list(expected.shape)}"
    return _not_finite(expected, given)


def _not_finite(expected: Tensor, given: Tensor) -> str:
    """Says so where PyTorch or the file gives no number; empty where all are numbers."""
    if not expected.isfinite().all():
        return f"PyTorch's own {NOT_FINITE}: the weights are damaged"
    return "" if given.isfinite().all() else f"the {NOT_FINITE}"


def _worst(expected: Tensor, given: Tensor) -> float:
    return (expected - given).abs().max().item() if expected.numel() else 0.0


def compare_raw(expected: Tensor, given: Tensor, tie: float = 0.0, *, exact: bool = True) -> Difference:
    """Decoded predictions [N, 5 + nc] of one image: row against row, on PyTorch's confident and best rows.

    Where not `exact` (16 and 8 bits), on its confident rows, and on the best ones only where none is. Scores less than
    `tie` apart may change places.
    """
    if problem := _problem(expected, given):
        return Difference(problem=problem)
    conf = expected[:, 4] * expected[:, 5:].max(1).values
    sure, least = int((conf >= CONFIDENT).sum()), min(LEAST_ROWS, len(conf))
    rows = conf.topk(max(sure, least) if exact else sure or least).indices
    px = (cxcywh_to_xyxy(expected[rows, :4]) - cxcywh_to_xyxy(given[rows, :4])).abs().max().item()
    own, other = (t[rows, 4:5] * t[rows, 5:] for t in (expected, given))
    result = Difference(px, (own - other).abs().max().item(), _worst(expected, given), len(rows))
    if sure:
        kept, again = (non_max_suppression(t[None], conf_thres=CONFIDENT, max_det=sure)[0] for t in (expected, given))
        alike = _alike(kept, again, expected, tie)
        result.detections, result.found = _found(kept, again, alike, margin=CONFIDENT + 0.02, iou_thres=0.4)
    return result


def compare_detections(expected: Tensor, given: Tensor, nms: NmsSettings, tie: float = 0.0) -> Difference:
    """Raw predictions [N, 5 + nc] of PyTorch against rows [n, 6] of a file with NMS inside, for one image.

    Where two scores are less than `tie` apart, rounding may decide which box suppresses the other, and which class a
    box has. So a given box must equal one of PyTorch's boxes before NMS, no two given boxes may overlap as NMS forbids,
    and each of PyTorch's boxes after NMS must be there or be suppressed by one that is.
    """
    if problem := _not_finite(expected, given):
        return Difference(problem=problem)
    scores, boxes = expected[:, 4:5] * expected[:, 5:], cxcywh_to_xyxy(expected[:, :4])
    best_score = scores.amax(1)
    result = Difference(boxes=len(given))
    for row in given:
        conf = scores[:, int(row[5])]
        likely = (conf >= best_score - tie) & (conf > nms.conf_thres / 2)
        if not likely.any():
            return Difference(px=float("inf"), score=1.0, worst=float("inf"), boxes=len(given))
        px, score = (boxes[likely] - row[:4]).abs().amax(1), (conf[likely] - row[4]).abs()
        best = (px + 100 * score).argmin()
        result.px, result.score = max(result.px, px[best].item()), max(result.score, score[best].item())
    result.worst = max(result.px, result.score)
    own = non_max_suppression(
        expected[None], conf_thres=nms.conf_thres, iou_thres=nms.iou_thres, max_det=nms.max_det, agnostic=nms.agnostic
    )[0]
    full = len(given) >= nms.max_det
    margin = max(nms.conf_thres + 0.02, float(given[:, 4].min()) + tie if full else 0.0)  # no room for lower ones
    alike = torch.ones(len(own), len(given), dtype=torch.bool) if nms.agnostic else _alike(own, given, expected, tie)
    result.detections, result.found = _found(own, given, alike, margin=margin, iou_thres=0.95 * nms.iou_thres)
    rivals = box_iou(given[:, :4], given[:, :4]) > nms.iou_thres + 1e-3
    if not nms.agnostic:
        rivals &= given[:, None, 5] == given[None, :, 5]
    result.unsuppressed = int(rivals.triu(1).sum())
    return result


def _alike(own: Tensor, given: Tensor, expected: Tensor, tie: float) -> Tensor:
    """Which `given` rows have a class that PyTorch's `expected` scores as high as that of an `own` row, but for `tie`:
    bool [len(own), len(given)]."""
    source = torch.cdist(own[:, :4], cxcywh_to_xyxy(expected[:, :4]), p=float("inf")).argmin(1)
    scores = expected[source, 4:5] * expected[source, 5:]
    return (scores >= own[:, 4:5] - tie)[:, given[:, 5].long()]


def _found(own: Tensor, given: Tensor, alike: Tensor, margin: float, iou_thres: float) -> tuple[int, int]:
    """How many of `own` [n, 6] are above `margin`, and how many of those overlap, or nearly equal, a `given` box that
    is `alike`. Boxes are grown first: the IoU of small ones falls to nothing at shifts that are allowed."""
    sure = own[:, 4] > margin
    grow = own.new_tensor((-1, -1, 1, 1)) * NEAR_PX / 2
    overlap = box_iou(own[:, :4] + grow, given[:, :4] + grow) >= iou_thres
    overlap |= (own[:, None, :4] - given[None, :, :4]).abs().amax(-1) <= NEAR_PX
    return int(sure.sum()), int((overlap & alike).any(1)[sure].sum())


def milliseconds(predictor: Predictor, images: Tensor, runs: int = 10) -> float:
    """Median time of one call per image, after a warm-up."""
    predictor(images)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        predictor(images)
        synchronize(predictor.device)
        times.append(time.perf_counter() - start)
    return 1000 * sorted(times)[len(times) // 2] / len(images)
