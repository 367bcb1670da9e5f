"""Networks that files describe: plain data of bounded size, and nothing is built that the file could not have held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models import build_model
from models.graph import UNFIT, Network, parse_rows
from models.resnet import resolve as resolve_classifier
from models.yolo import resolve
from utils.core.errors import UserError, printable

MAX_VALUES = 100_000
MAX_TEXT = 1000
MAX_REPEATS = 1000


def build_described(cfg: Any, size: int, source: str | Path) -> Network:
    """The network of the configuration in a file with `size` bytes of weights, or a UserError that names the file."""
    try:
        cfg = _plain(cfg)
        classify = cfg.get("task") == "classify"
        resolved = resolve_classifier(cfg, None, 3) if classify else resolve(cfg, None, 3, None)
        _check_size(resolved, size)
        return build_model(resolved)
    except UserError as error:
        raise UserError(f"'{source}' is refused: {error}") from error
    except UNFIT as error:
        raise UserError(f"'{source}' is refused: its description gives no network ({printable(error)})") from error


def _plain(value: Any) -> Any:
    """`value` as plain lists, dicts and scalars; anything else and structures without end are refused."""
    left = MAX_VALUES

    def convert(item: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > 16:
            raise UserError("its model description is nested without end")
        if isinstance(item, (list, tuple)):
            return [convert(x, depth + 1) for x in item]
        if isinstance(item, dict) and all(isinstance(key, (str, int)) for key in item):
            return {convert(k, depth + 1): convert(v, depth + 1) for k, v in item.items()}
        if isinstance(item, (str, int, float, type(None))):
            if isinstance(item, str) and len(item) > MAX_TEXT:
                raise UserError(f"its model description holds a text of {len(item)} characters")
            return item
        what = getattr(item, "kind", type(item).__name__)
        raise UserError(f"its model description holds a {printable(what)}; expected plain values under short names")

    return convert(value, 0)


def _check_size(cfg: dict[str, Any], size: int) -> None:
    """Refuse a network whose weights could not have been saved in `size` bytes, before anything is built."""
    depth, width = (float(cfg.get(f"{name}_multiple", 1)) for name in ("depth", "width"))
    rows = [row for row in (*cfg["backbone"], *cfg["head"]) if isinstance(row, list) and len(row) == 4]
    repeats = sum(max(row[1], 1) * max(depth, 1) for row in rows if isinstance(row[1], int))
    if not 0 < depth <= MAX_REPEATS or not repeats <= MAX_REPEATS or not 0 < width <= 100:
        raise UserError("its description repeats layers without end")
    with torch.device("meta"):
        _, layers = parse_rows(cfg)
    count = sum(parameter.numel() for parameter in layers.parameters())
    if count > size:
        raise UserError(f"it describes {count} parameters in {size} bytes of weights")
