"""Networks: YAML rows to modules, the SPD layers, weights, exact deploy fusion and export formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import attention, blocks, heads, spd
from models.graph import UNFIT, Network
from models.yolo import DetectionModel
from utils.core.errors import UserError, printable
from utils.core.files import nearest
from utils.core.yamls import load_yaml

__all__ = ["DetectionModel", "Network", "attention", "blocks", "build_model", "find_cfg", "heads", "spd"]

HOME = Path(__file__).resolve().parent
AUTHORS_NAMES = {f"space_depth_{size}": f"yolov5-spd-{size}" for size in "nsml"}  # in the paper's published commands


def find_cfg(cfg: str | Path) -> Path:
    """The model YAML that a user means: a path, or the name of one that comes with the project (`yolov5-spd-n`)."""
    path = Path(cfg)
    if path.is_file():
        return path
    stem = path.name.removesuffix(".yaml").removesuffix(".yml")
    stem = AUTHORS_NAMES.get(stem, stem)
    known = {p.stem: p for folder in (HOME, HOME / "hub") for p in sorted(folder.glob("*.yaml"))}
    if stem in known:
        return known[stem]
    raise UserError(f"model YAML {str(cfg)!r} does not exist{nearest(stem, list(known))}; known: {', '.join(known)}")


def build_model(cfg: str | Path | dict[str, Any], nc: int | None = None, ch: int = 3, anchors: Any = None) -> Network:
    """A network from a YAML path, the name of one that comes with the project, or a configuration as a dict.

    `nc` overrides the class count, `anchors` ([levels, anchors, 2] in pixels, or a count) those of the YAML. Gives a
    `DetectionModel`, or a `Classifier` where the YAML says `task: classify`.
    """
    config = cfg if isinstance(cfg, dict) else load_yaml(find_cfg(cfg))
    try:
        if config.get("task", "detect") == "classify":
            from models.resnet import Classifier

            return Classifier(config, nc=nc, ch=ch)
        return DetectionModel(config, nc=nc, ch=ch, anchors=anchors)
    except UserError:
        raise
    except UNFIT as error:
        name = "the model description" if isinstance(cfg, dict) else f"model YAML '{cfg}'"
        raise UserError(f"{name} gives no network ({printable(error)})") from error
