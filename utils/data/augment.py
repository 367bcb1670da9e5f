"""What is drawn for a sample, and the point operations on its pixels.

Every transform is a frozen value: drawn first (a function of the random generator alone), applied second, so that it
can be tested, printed and replayed. Coordinates are continuous: pixel (0, 0) covers [0, 1] x [0, 1].
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

from utils.core.hyp import Hyp

BAND = 64  # rows that are recolored at a time


def generator(seed: int, *where: int) -> np.random.Generator:
    """A counter-based generator that depends on the seed and a place (stream, epoch, position) alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=where)))


@dataclass(frozen=True)
class Hsv:
    """Gains of hue, saturation and value."""

    hue: float = 1.0
    saturation: float = 1.0
    value: float = 1.0

    @classmethod
    def draw(cls, rng: np.random.Generator, hyp: Hyp) -> "Hsv":
        gains = 1 + rng.uniform(-1, 1, 3) * (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v)
        return cls(*gains.tolist())

    @property
    def neutral(self) -> bool:
        return (self.hue, self.saturation, self.value) == (1.0, 1.0, 1.0)

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """New values of the 256 old ones for OpenCV's 8-bit hue (half degrees, circular), saturation and value."""
        levels = np.arange(256)
        return (
            (np.rint(levels * self.hue) % 180).astype(np.uint8),
            np.minimum(np.rint(levels * self.saturation), 255).astype(np.uint8),
            np.minimum(np.rint(levels * self.value), 255).astype(np.uint8),
        )

    def recolor(self, hsv: np.ndarray) -> np.ndarray:
        """The gains on an 8-bit HSV image, rounded and saturated. The result's hue may be 180 to 255 for 0 to 75, which
        the way back to RGB understands."""
        if self.hue * 179 < 255:
            return cv2.transform(hsv, np.diag((self.hue, self.saturation, self.value)).astype(np.float32))
        planes = cv2.split(hsv)
        return cv2.merge([cv2.LUT(plane, table) for plane, table in zip(planes, self.tables(), strict=True)])


@dataclass(frozen=True)
class Flip:
    """Mirror left-right, up-down."""

    lr: bool = False
    ud: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, hyp: Hyp) -> "Flip":
        ud, lr = rng.random(2) < (hyp.flipud, hyp.fliplr)
        return cls(bool(lr), bool(ud))


def finish(image: np.ndarray, hsv: Hsv, flip: Flip, out: np.ndarray) -> None:
    """Mirror and recolor RGB uint8 [H, W, 3] into `out`, band by band so that a band stays in the CPU's cache."""
    height = image.shape[0]
    for start in range(0, height, BAND):
        stop = min(start + BAND, height)
        band = image[height - stop : height - start][::-1] if flip.ud else image[start:stop]
        target = out[start:stop]
        if flip.lr:
            band = cv2.flip(band, 1)
        if hsv.neutral:
            target[...] = band
            continue
        changed = hsv.recolor(cv2.cvtColor(np.ascontiguousarray(band), cv2.COLOR_RGB2HSV))
        cv2.cvtColor(changed, cv2.COLOR_HSV2RGB, dst=target)


@dataclass(frozen=True)
class Warp:
    """The random affine or perspective of a canvas: angles in degrees, translation in parts of the output's sides."""

    angle: float = 0.0
    scale: float = 1.0
    shear_x: float = 0.0
    shear_y: float = 0.0
    translate_x: float = 0.0
    translate_y: float = 0.0
    perspective_x: float = 0.0
    perspective_y: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator, hyp: Hyp) -> "Warp":
        u = rng.uniform(-1, 1, 8)
        return cls(
            angle=float(u[0] * hyp.degrees),
            scale=float(1 + u[1] * hyp.scale),
            shear_x=float(u[2] * hyp.shear),
            shear_y=float(u[3] * hyp.shear),
            translate_x=float(u[4] * hyp.translate),
            translate_y=float(u[5] * hyp.translate),
            perspective_x=float(u[6] * hyp.perspective),
            perspective_y=float(u[7] * hyp.perspective),
        )

    @property
    def axis_aligned(self) -> bool:
        return not (self.angle or self.shear_x or self.shear_y or self.perspective_x or self.perspective_y)

    def matrix(self, canvas_hw: tuple[int, int], out_hw: tuple[int, int]) -> np.ndarray:
        """3x3 homography from canvas to output, in continuous pixels: the canvas center goes to the output's center
        plus the translation; perspective, then rotation and scale, then shear happen around it."""
        center = np.array([[1, 0, -canvas_hw[1] / 2], [0, 1, -canvas_hw[0] / 2], [0, 0, 1]])
        tilt = np.array([[1, 0, 0], [0, 1, 0], [self.perspective_x, self.perspective_y, 1]])
        c, s = self.scale * math.cos(math.radians(self.angle)), self.scale * math.sin(math.radians(self.angle))
        turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        sx, sy = math.tan(math.radians(self.shear_x)), math.tan(math.radians(self.shear_y))
        shear = np.array([[1, sx, 0], [sy, 1, 0], [0, 0, 1]])
        x, y = (0.5 + self.translate_x) * out_hw[1], (0.5 + self.translate_y) * out_hw[0]
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]]) @ shear @ turn @ tilt @ center

    def meeting(self, point: tuple[float, float], canvas_hw: tuple[int, int], out_hw: tuple[int, int]) -> "Warp":
        """The same, shifted by at most half a pixel so that a canvas point (x, y) lands on a whole output pixel, where
        images that meet there can be cut exactly."""
        x, y, w = self.matrix(canvas_hw, out_hw) @ (*point, 1.0)
        x, y = x / w, y / w
        return replace(
            self,
            translate_x=self.translate_x + float(np.rint(x) - x) / out_hw[1],
            translate_y=self.translate_y + float(np.rint(y) - y) / out_hw[0],
        )
