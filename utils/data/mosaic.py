"""Scenes of several images (mosaics) or of one, and how they are drawn without a canvas.

The classic mosaic resizes each image, pastes it on a canvas of twice the output's size and warps the canvas. Here the
two steps are joined: each image is cropped and resized, or warped, straight to its place in the output. Same geometry,
a fraction of the work: what ends outside the output is never touched.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from utils.core.hyp import Hyp
from utils.data.augment import Warp
from utils.data.objects import Objects, project, survivors
from utils.ops.letterbox import FILL, Letterbox

SNAP = 0.25  # output pixels: how far a resized crop may lie beside its exact place before a wider crop is tried


class Frame(NamedTuple):
    """Decoded pixels: pixel (u, v) of an array of `hw` begins at origin + level * (u, v) of the source."""

    hw: tuple[int, int]
    level: int = 1
    origin: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Tile:
    """One image's place on a canvas: canvas = scale * source + offset, seen inside `rect` (xyxy, canvas pixels)."""

    index: int
    scale: tuple[float, float]
    offset: tuple[float, float]
    rect: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """Tiles on a canvas and the warp from there to the output."""

    tiles: tuple[Tile, ...]
    canvas_hw: tuple[int, int]
    out_hw: tuple[int, int]
    warp: Warp

    @property
    def matrix(self) -> np.ndarray:
        """3x3, canvas to output."""
        return self.warp.matrix(self.canvas_hw, self.out_hw)


def fitted(hw: tuple[int, int], size: int) -> tuple[int, int]:
    """Height and width of an image whose long side becomes `size`."""
    gain = size / max(hw)
    return max(round(hw[0] * gain), 1), max(round(hw[1] * gain), 1)


def _tile(
    index: int, hw: tuple[int, int], size_hw: tuple[int, int], x: float, y: float, bounds: Sequence[float]
) -> Tile:
    """An image of `hw` resized to `size_hw` with its top left corner at (x, y), seen inside `bounds`."""
    h, w = size_hw
    rect = (max(x, bounds[0]), max(y, bounds[1]), min(x + w, bounds[2]), min(y + h, bounds[3]))
    return Tile(index, (w / hw[1], h / hw[0]), (x, y), rect)


def mosaic4(
    indices: Sequence[int], sizes: Sequence[tuple[int, int]], center: tuple[int, int], size: int
) -> tuple[Tile, ...]:
    """Four images that meet at `center` (x, y) of a canvas of 2 x `size`; `sizes` are their heights and widths."""
    x, y = center
    bounds = (0, 0, 2 * size, 2 * size)
    tiles = []
    for slot, (index, hw) in enumerate(zip(indices, sizes, strict=True)):
        h, w = fitted(hw, size)
        left = x - w if slot % 2 == 0 else x
        top = y - h if slot < 2 else y
        tiles.append(_tile(index, hw, (h, w), left, top, bounds))
    return tuple(tiles)


def mosaic9(
    indices: Sequence[int], sizes: Sequence[tuple[int, int]], center: tuple[int, int], size: int
) -> tuple[Tile, ...]:
    """Nine images in three rows on a canvas of 2 x `size`: the fifth is centered at `center` (x, y), the others begin
    at its edges and are cropped to their cell."""
    h0, w0 = fitted(sizes[4], size)
    left, top = center[0] - w0 // 2, center[1] - h0 // 2
    right, bottom = left + w0, top + h0
    columns = ((0, left), (left, right), (right, 2 * size))
    rows = ((0, top), (top, bottom), (bottom, 2 * size))
    tiles = []
    for slot, (index, hw) in enumerate(zip(indices, sizes, strict=True)):
        row, column = divmod(slot, 3)
        h, w = fitted(hw, size)
        x = (left - w, left, right)[column]
        y = (top - h, top, bottom)[row]
        bounds = (columns[column][0], rows[row][0], columns[column][1], rows[row][1])
        tiles.append(_tile(index, hw, (h, w), x, y, bounds))
    return tuple(tiles)


def single(index: int, geometry: Letterbox) -> tuple[Tile, ...]:
    """One letterboxed image; the canvas is the letterbox's target."""
    h, w = geometry.target_hw
    top, left = geometry.pad
    return (_tile(index, geometry.source_hw, geometry.resized_hw, left, top, (0, 0, w, h)),)


class Span(NamedTuple):
    """One axis of a resized crop: pixels [start, stop) of the source become [begin, end) of the output, of which
    [low, high) is kept."""

    start: int
    stop: int
    begin: int
    end: int
    low: int
    high: int

    @property
    def gain(self) -> float:
        return (self.end - self.begin) / (self.stop - self.start)


def _round(x: float) -> int:
    """Halves upward, so that neighboring tiles agree on the pixel where they meet."""
    return math.floor(x + 0.5)


def _edge(at: int, direction: int, scale: float, offset: float, step: int, limit: int) -> tuple[int, int]:
    """A place at or beyond `at` (going in `direction`) that falls close to a whole source pixel, and that pixel.

    When enlarging, the place lies far enough beyond for the pixel next to the crop not to be missed, unless the image
    itself ends there.
    """
    border = 0 if direction < 0 else limit
    best, least = (at, border), math.inf
    for extra in range(4 + math.ceil(1.5 * scale)):
        place = at + direction * extra
        exact = (place - offset) / scale
        pixel = min(max(_round(exact / step) * step, 0), limit)
        if scale > 1 and extra < scale / 2 and pixel != border:
            continue
        error = abs(exact - pixel) * scale
        if error < least - 1e-9:
            best, least = (place, pixel), error
        if least <= SNAP:
            break
    return best


def snap(scale: float, offset: float, low: float, high: float, pixels: int, size: int, step: int) -> Span | None:
    """Round one axis of `output = scale * pixel + offset`, seen in [low, high), to whole source and output pixels.

    Both ends lie within half an output pixel of their exact place. None where nothing is seen.
    """
    first, last = max(_round(low), 0), min(_round(high), size)
    limit = -(-pixels // step) * step
    if last <= first:
        return None
    begin, start = _edge(first, -1, scale, offset, step, limit)
    end, stop = _edge(last, 1, scale, offset, step, limit)
    if stop <= start:
        start, stop = (stop - step, stop) if stop >= step else (start, start + step)
    return Span(start, stop, begin, end, first, last)


@dataclass(frozen=True)
class Placement:
    """Where one tile's pixels go: the spans of x and y, and the whole-number reduction done first."""

    x: Span
    y: Span
    step: int
    frame: Frame

    @property
    def scale(self) -> tuple[float, float]:
        """Output pixels for one source pixel, as really drawn: output = scale * source + offset."""
        return self.x.gain / self.frame.level, self.y.gain / self.frame.level

    @property
    def offset(self) -> tuple[float, float]:
        pairs = zip((self.x, self.y), self.scale, self.frame.origin, strict=True)
        x, y = (span.begin - span.start * span.gain - origin * scale for span, scale, origin in pairs)
        return x, y

    @property
    def rect(self) -> tuple[int, int, int, int]:
        """The part of the output that is drawn, xyxy."""
        return self.x.low, self.y.low, self.x.high, self.y.high

    def draw(self, image: np.ndarray, out: np.ndarray) -> None:
        x, y, step = self.x, self.y, self.step
        crop = image[y.start : y.stop, x.start : x.stop]
        if step > 1:
            crop = halve(crop, (y.stop - y.start, x.stop - x.start), step)
        target = out[y.low : y.high, x.low : x.high]
        size = (x.end - x.begin, y.end - y.begin)
        if size == (target.shape[1], target.shape[0]):
            cv2.resize(crop, size, dst=target, interpolation=cv2.INTER_LINEAR)
        else:
            wide = cv2.resize(crop, size, interpolation=cv2.INTER_LINEAR)
            target[...] = wide[y.low - y.begin : y.high - y.begin, x.low - x.begin : x.high - x.begin]


def halve(image: np.ndarray, hw: tuple[int, int], step: int) -> np.ndarray:
    """`image`, its last row and column repeated up to `hw` (multiples of `step`), averaged over step x step blocks."""
    short = (hw[0] - image.shape[0], hw[1] - image.shape[1])
    if short != (0, 0):
        image = cv2.copyMakeBorder(image, 0, short[0], 0, short[1], cv2.BORDER_REPLICATE)
    return cv2.resize(image, (hw[1] // step, hw[0] // step), interpolation=cv2.INTER_AREA)


def reduction(scale: float) -> int:
    """The largest power of two that leaves at least one pixel for each output pixel."""
    return 2 ** max(math.floor(-math.log2(scale) + 1e-9), 0)


def place(tile: Tile, warp: np.ndarray, out_hw: tuple[int, int], frame: Frame) -> Placement | None:
    """Where the pixels of a tile go under an axis-aligned warp; None where nothing of it is seen."""
    warps = (float(warp[0, 0]), float(warp[0, 2])), (float(warp[1, 1]), float(warp[1, 2]))
    gains = [gain * scale * frame.level for (gain, _), scale in zip(warps, tile.scale, strict=True)]
    step = reduction(max(gains))
    spans = []
    for axis, (gain, shift) in enumerate(warps):
        offset = gain * (tile.offset[axis] + tile.scale[axis] * frame.origin[axis]) + shift
        low, high = gain * tile.rect[axis] + shift, gain * tile.rect[axis + 2] + shift
        span = snap(gains[axis], offset, low, high, frame.hw[1 - axis], out_hw[1 - axis], step)
        if span is None:
            return None
        spans.append(span)
    return Placement(spans[0], spans[1], step, frame)


Frames = Callable[[int], Frame]
Reader = Callable[[int], np.ndarray]


def placements(scene: Scene, frames: Frames) -> list[Placement | None]:
    """The placement of each tile of an axis-aligned scene."""
    warp = scene.matrix
    return [place(tile, warp, scene.out_hw, frames(tile.index)) for tile in scene.tiles]


def draw_warped(tile: Tile, warp: np.ndarray, frame: Frame, image: np.ndarray, out: np.ndarray) -> None:
    """Warp one tile straight into `out` under any homography: only the part seen, only where it lands."""
    sx, sy = (scale * frame.level for scale in tile.scale)
    tx, ty = (tile.offset[a] + tile.scale[a] * frame.origin[a] for a in (0, 1))
    whole = warp @ np.array([[sx, 0, tx], [0, sy, ty], [0, 0, 1.0]])
    corners = np.array([[tile.rect[i], tile.rect[j]] for i, j in ((0, 1), (2, 1), (2, 3), (0, 3))])
    quad = project(corners, warp)
    height, width = out.shape[:2]
    left, top = np.maximum(np.floor(quad.min(0)), 0).astype(int)
    right, bottom = np.minimum(np.ceil(quad.max(0)), (width, height)).astype(int)
    if right <= left or bottom <= top:
        return
    step = reduction(math.sqrt(abs(np.linalg.det(whole[:2, :2])) / abs(whole[2, 2]) ** 3))
    if step > 1:
        image = halve(image, (-(-image.shape[0] // step) * step, -(-image.shape[1] // step) * step), step)
        whole = whole @ np.diag([step, step, 1.0])
    to_centers = np.array([[1, 0, -0.5 - left], [0, 1, -0.5 - top], [0, 0, 1.0]])
    from_centers = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    drawn = cv2.warpPerspective(
        image, to_centers @ whole @ from_centers, (right - left, bottom - top), borderMode=cv2.BORDER_REPLICATE
    )
    mask = np.zeros(drawn.shape[:2], np.uint8)
    cv2.fillConvexPoly(mask, np.rint((quad - (left + 0.5, top + 0.5)) * 16).astype(np.int32), 255, shift=4)
    cv2.copyTo(drawn, mask, out[top:bottom, left:right])


def draw_scene(scene: Scene, places: Sequence[Placement | None], frames: Frames, read: Reader, out: np.ndarray) -> None:
    """Draw a scene into `out` (HWC uint8), by `places` if axis-aligned. `frames(i)` describes what `read(i)` gives."""
    out[...] = FILL
    if not scene.warp.axis_aligned:
        for tile in scene.tiles:
            draw_warped(tile, scene.matrix, frames(tile.index), read(tile.index), out)
        return
    for tile, placement in zip(scene.tiles, places, strict=True):
        if placement is not None:
            placement.draw(read(tile.index), out)


def scene_objects(
    scene: Scene, places: Sequence[Placement | None], objects: Callable[[int], Objects], hyp: Hyp
) -> Objects:
    """The objects of a scene in output pixels, exactly where `draw_scene` draws them: cut, filtered."""
    aligned = scene.warp.axis_aligned
    spots: Sequence[Tile | Placement | None] = places if aligned else scene.tiles
    pairs = [(objects(tile.index), spot) for tile, spot in zip(scene.tiles, spots, strict=True) if spot is not None]
    pairs = [(part, spot) for part, spot in pairs if len(part)]
    if not pairs:
        return Objects.empty()
    joined = Objects.join([part for part, _ in pairs])
    known = joined.counts > 0
    counts = [len(part) for part, _ in pairs]
    scales, offsets, regions = (
        np.repeat(np.array(values, np.float64), counts, 0)
        for values in zip(*((spot.scale, spot.offset, spot.rect) for _, spot in pairs), strict=True)
    )
    placed = joined.scaled(scales, offsets)
    seen, areas = placed.cut(regions), placed.areas
    if not aligned:
        h, w = scene.out_hw
        seen = seen.warped(scene.matrix).cut(np.tile(np.array([[0.0, 0.0, w, h]]), (len(seen), 1)))
        areas = areas * scene.warp.scale**2
    return seen.take(survivors(seen, areas, known, hyp.min_box_px, hyp.min_area_ratio, hyp.max_aspect))
