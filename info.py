"""Show what a network costs: rows, shapes, parameters, GFLOPs and activation memory.

python info.py yolov5-spd-n --imgsz 640
python info.py runs/train/exp/weights/best.pt
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models import build_model
from models.graph import check_size
from models.summary import Summary, summarize
from models.weights import load_model
from utils.core.config import config_from_kwargs, option, parse_config, run_cli
from utils.core.errors import UserError

DEFAULT_SIZE = 640
WEIGHTS, YAMLS = (".pt", ".safetensors"), (".yaml", ".yml")


@dataclass(frozen=True)
class InfoConfig:
    """Options of `info.py`; the first argument may stand without `--cfg`."""

    cfg: str = option("yolov5-spd-n", "model YAML, its name, or a checkpoint", aliases=("weights",))
    imgsz: list[int] = option([], "image size: one number, or height and width", aliases=("img", "img_size"), nargs="+")
    nc: int = option(0, "number of classes; 0 for the YAML's own")
    brief: bool = option(False, "totals only")


def measure(config: InfoConfig) -> Summary:
    """The costs of the network that `config` names; the image size defaults to the checkpoint's own or the task's."""
    path = Path(config.cfg)
    if path.suffix in WEIGHTS or (path.is_file() and path.suffix not in YAMLS):
        if config.nc:
            raise UserError(f"--nc {config.nc} is for a model YAML; '{config.cfg}' has its own number of classes")
        loaded = load_model(config.cfg)
        model = loaded.model
        own = loaded.meta.get("imgsz")
    else:
        model = build_model(config.cfg, nc=config.nc or None)
        own = None
    size = _size(config.imgsz, own or model.cfg.get("imgsz") or DEFAULT_SIZE, model.max_stride)
    return summarize(model, size)


def _size(given: Sequence[int], default: int, stride: int) -> tuple[int, int]:
    sizes = list(given) or [default]
    if len(sizes) > 2 or any(s < 1 for s in sizes):
        raise UserError(f"--imgsz is {sizes}; expected one number, or height and width, in pixels")
    height, width = sizes[0], sizes[-1]
    check_size((height, width), stride)
    return height, width


def render(summary: Summary, brief: bool = False) -> str:
    """The table, then the totals."""
    height, width = summary.imgsz
    lines = []
    if not brief:
        head = ("row", "from", "output", "parameters", "GFLOPs", "kept MB")
        table = [head] + [
            (r.label, r.source, r.shape, f"{r.parameters:,}", f"{r.flops / 1e9:.3f}", f"{r.saved / 1e6:.1f}")
            for r in summary.rows
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        left = {0, 1, 2}
        for line in table:
            cells = (c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    lines.append(
        f"{summary.parameters:,} parameters, {summary.gflops:.1f} GFLOPs at {height}x{width},"
        f" {summary.saved / 1e6:.0f} MB of activations kept for the backward pass (one image, float32)"
    )
    return "\n".join(lines)


def run(**kwargs: object) -> Summary:
    """`info.run(cfg="yolov5-spd-n", imgsz=640)` prints the table and returns its figures."""
    return _show(config_from_kwargs(InfoConfig, **kwargs))


def _show(config: InfoConfig) -> Summary:
    summary = measure(config)
    print(render(summary, config.brief))
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args and not args[0].startswith("-"):
        args.insert(0, "--cfg")
    _show(parse_config(InfoConfig, args, "info.py", __doc__ or ""))
    return 0


if __name__ == "__main__":
    run_cli(main)
