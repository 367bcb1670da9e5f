"""Rewrite any weights as a checkpoint of this project, on request into an SPD architecture.

python convert.py --weights yolov5n.pt --output yolov5n.safetensors
python convert.py --weights yolov5n.pt --cfg models/yolov5-spd-n.yaml --output yolov5n-spd.pt
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import build_model, find_cfg
from models.conversion import initialise
from models.weights import LoadedModel, load_model, pack_model
from utils.core.checkpoint import save_checkpoint
from utils.core.config import config_from_kwargs, option, parse_config, run_cli
from utils.core.errors import UserError
from utils.core.log import LOGGER

SUFFIXES = (".pt", ".safetensors")


@dataclass(frozen=True)
class ConvertConfig:
    """Options of convert.py."""

    weights: str = option("", "what to convert: an official YOLOv5 .pt, a fork's, the SPD authors', or this project's")
    cfg: str = option("", "architecture to convert to, such as models/yolov5-spd-n.yaml; default: the same")
    output: str = option("", "file to write, .pt or .safetensors; default: <weights>[-<cfg>].safetensors here")
    half: bool = option(False, "store weight matrices in fp16 (they load as fp32)")
    exist_ok: bool = option(False, "overwrite the output file")


@dataclass(frozen=True)
class ConvertReport:
    """What was written, and the lines about how the weights came into it; `exact` if the function is the same."""

    path: Path
    exact: bool
    lines: tuple[str, ...]


def output_path(config: ConvertConfig) -> Path:
    """Where to write; refused before anything is read if it cannot be."""
    source = Path(config.weights)
    name = source.stem + (f"-{find_cfg(config.cfg).stem}" if config.cfg else "")
    path = Path(config.output or f"{name}.safetensors")
    if path.suffix not in SUFFIXES:
        raise UserError(f"--output {path}; expected a name that ends with {' or '.join(SUFFIXES)}")
    if path.exists() and path.resolve() == source.resolve():
        raise UserError(f"--output {path} is the file to convert; give another name")
    if path.exists() and not config.exist_ok:
        raise UserError(f"--output {path} exists; give another name, or --exist-ok to overwrite it")
    return path


def convert(config: ConvertConfig) -> ConvertReport:
    """Read, rebuild or convert, write."""
    if not config.weights:
        raise UserError("no --weights given; expected a checkpoint to convert")
    path = output_path(config)
    loaded = load_model(config.weights)
    lines: tuple[str, ...] = ()
    exact = True
    if config.cfg:
        target = build_model(config.cfg, nc=loaded.model.nc)
        if target.task != loaded.model.task:
            raise UserError(f"--cfg {config.cfg} is for task {target.task}, --weights for task {loaded.model.task}")
        started = initialise(target.eval(), loaded)
        if not started.transfer.fits:
            raise UserError(
                f"--weights {config.weights} cannot become --cfg {config.cfg}: {started.transfer}; expected the same "
                "architecture or one that it converts to; to start a training from what fits, give both to train.py"
            )
        loaded, lines, exact = LoadedModel(target, loaded.names, loaded.meta), started.lines, started.exact
    for line in lines:
        LOGGER.info(line)
    save_checkpoint(path, packed(loaded, config.half))
    LOGGER.info(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return ConvertReport(path, exact, lines)


def packed(loaded: LoadedModel, half: bool) -> dict[str, Any]:
    """The checkpoint of a loaded model, with all that its file said."""
    own = ("task", "imgsz", "strides")
    facts = {key: value for key, value in loaded.meta.items() if key not in own}
    data = pack_model(loaded.model, loaded.names, int(loaded.meta.get("imgsz") or 640), **facts)
    if half:
        matrices = {name for name, parameter in loaded.model.named_parameters() if parameter.ndim > 1}
        data["state"] = {name: t.half() if name in matrices else t for name, t in data["state"].items()}
    return data


def run(**options: Any) -> ConvertReport:
    """Convert with keywords named like the flags: `convert.run(weights="yolov5n.pt", output="yolov5n.safetensors")`."""
    return convert(config_from_kwargs(ConvertConfig, **options))


def main(argv: Sequence[str] | None = None) -> None:
    """Convert as a program."""
    convert(parse_config(ConvertConfig, argv, "convert.py", "Convert weights to this project's checkpoints."))


if __name__ == "__main__":
    run_cli(main)
