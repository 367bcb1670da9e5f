"""Boxes and labels on pictures, with the font that Pillow brings along: nothing is downloaded."""

import colorsys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.ops.detections import Detections

Color = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class Style:
    """How boxes are drawn: line width in pixels, labels and confidences or not."""

    line_width: int = 3
    hide_labels: bool = False
    hide_conf: bool = False


@lru_cache(maxsize=4096)
def color_of(number: int) -> Color:
    """A stable RGB color for a class or track number; neighbors differ strongly in hue (golden-ratio steps)."""
    hue = (0.02 + number * 0.618033988749895) % 1.0
    value, saturation = (1.0, 0.82) if number % 2 == 0 else (0.88, 0.95)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def text_color(background: Color) -> Color:
    """Black or white, whichever reads better on `background`."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


@lru_cache(maxsize=64)
def font_of(size: int) -> Font:
    """Pillow's bundled font at `size` pixels."""
    return ImageFont.load_default(size)


def font_size(hw: tuple[int, int], line_width: int) -> int:
    """Label height in pixels: it grows with the picture and the line, and stays small on small pictures."""
    return int(np.clip(max(hw) / 60, 9, 28) * (0.7 + 0.1 * min(line_width, 6)))


def label_of(detections: Detections, i: int, hide_conf: bool = False) -> str:
    """`#7 person 0.83`: track number where there is one, class name, confidence."""
    parts = [detections.name(i)]
    if detections.track_id is not None and detections.track_id[i] >= 0:
        parts.insert(0, f"#{detections.track_id[i]}")
    if not hide_conf:
        parts.append(f"{detections.conf[i]:.2f}")
    return " ".join(parts)


def annotate(image: np.ndarray, detections: Detections, style: Style | None = None) -> np.ndarray:
    """A copy of uint8 [H, W, 3] RGB `image` with the boxes drawn, the surest on top, labels over lines.

    Lines get thinner on boxes smaller than ten line widths, so that a small object stays visible in its box. Tracked
    boxes are colored by track, others by class.
    """
    style = style or Style()
    canvas = Image.fromarray(np.ascontiguousarray(image[:, :, :3]))
    draw = ImageDraw.Draw(canvas)
    font = font_of(font_size(image.shape[:2], style.line_width))
    order = np.argsort(detections.conf, kind="stable")
    colors = [color_of(_number_for_color(detections, i)) for i in range(len(detections))]
    for i in order:
        draw_box(draw, detections.xyxy[i], colors[i], style.line_width)
    if not style.hide_labels:
        for i in order:
            draw_label(draw, detections.xyxy[i], label_of(detections, i, style.hide_conf), colors[i], font)
    return np.array(canvas)


def draw_lines(image: np.ndarray, lines: list[str]) -> np.ndarray:
    """A copy of uint8 [H, W, 3] RGB `image` with lines of text on dark ground in the upper left corner."""
    canvas = Image.fromarray(np.ascontiguousarray(image[:, :, :3]))
    draw = ImageDraw.Draw(canvas)
    font = font_of(font_size(image.shape[:2], 3))
    y = 0
    for line in lines:
        left, top, right, bottom = draw.textbbox((0, 0), line, font=font)
        draw.rectangle((0, y, right - left + 4, y + bottom - top + 4), fill=(0, 0, 0))
        draw.text((2 - left, y + 2 - top), line, fill=(255, 255, 255), font=font)
        y += bottom - top + 5
    return np.array(canvas)


def _number_for_color(detections: Detections, i: int) -> int:
    tracked = detections.track_id is not None and detections.track_id[i] >= 0
    return int(detections.track_id[i] if tracked else detections.cls[i])  # type: ignore[index]


def draw_box(draw: ImageDraw.ImageDraw, box: np.ndarray, color: Color, line_width: int) -> None:
    """One rectangle, xyxy in pixels, its line outside the object where there is room."""
    x1, y1, x2, y2 = (int(round(float(v))) for v in box)
    width = max(1, min(line_width, min(x2 - x1, y2 - y1) // 10))
    draw.rectangle((x1, y1, max(x2, x1), max(y2, y1)), outline=color, width=width)


def draw_label(draw: ImageDraw.ImageDraw, box: np.ndarray, text: str, color: Color, font: Font) -> None:
    """A filled label above the box, below it where the picture ends, inside it where neither fits."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = 1 + (bottom - top) // 8
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    picture_w, picture_h = draw.im.size
    x = max(min(int(round(float(box[0]))), picture_w - width), 0)
    above, below = int(round(float(box[1]))) - height, int(round(float(box[3]))) + 1
    y = above if above >= 0 else below if below + height <= picture_h else max(int(round(float(box[1]))), 0)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    draw.text((x + pad - left, y + pad - top), text, fill=text_color(color), font=font)
