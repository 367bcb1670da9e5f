"""What is drawn for a sample, and the point operations on its pixels.

Every transform is a frozen value: drawn first (a function of the random generator alone), applied second, so that it can
be tested, printed and replayed. Coordinates are continuous: pixel (0, 0) covers [0, 1] x [0, 1].
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from utils.core.hyp import Hyp


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

    def apply(self, image: np.ndarray, out: np.ndarray) -> None:
        """RGB uint8 HWC -> `out` (which may be `image`)."""
        if (self.hue, self.saturation, self.value) == (1.0, 1.0, 1.0):
            if out is not image:
                out[...] = image
            return
        levels = np.arange(256)
        tables = (
            np.rint(levels * self.hue) % 180,
            np.minimum(np.rint(levels * self.saturation), 255),
            np.minimum(np.rint(levels * self.value), 255),
        )
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        planes = [cv2.LUT(plane, table.astype(np.uint8)) for plane, table in zip(cv2.split(hsv), tables, strict=True)]
        cv2.cvtColor(cv2.merge(planes, hsv), cv2.COLOR_HSV2RGB, dst=out)


@dataclass(frozen=True)
class Flip:
    """Mirror left-right, up-down."""

    lr: bool = False
    ud: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator, hyp: Hyp) -> "Flip":
        ud, lr = rng.random(2) < (hyp.flipud, hyp.fliplr)
        return cls(bool(lr), bool(ud))

    def apply(self, image: np.ndarray) -> np.ndarray:
        if not (self.lr or self.ud):
            return image
        return cv2.flip(image, -1 if self.lr and self.ud else int(self.lr))


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
