"""Convert a data set to another label format: YOLO txt, COCO JSON or Pascal VOC XML.

python convert_data.py --data coco.yaml --to yolo --output datasets/coco-yolo
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.core.config import config_from_kwargs, option, parse_config, run_cli
from utils.core.errors import UserError
from utils.core.log import LOGGER
from utils.data.convert import IMAGES, TARGETS, Converted, convert
from utils.data.spec import load_data
from utils.engine.options import LabelOptions


@dataclass(frozen=True)
class ConvertConfig(LabelOptions):
    """Options of convert_data.py."""

    data: str = option("", "data YAML of the source")
    to: str = option("yolo", "target format", choices=TARGETS)
    output: str = option("", "new folder for the result")
    splits: list[str] = option(
        [], "splits to convert (default: all declared)", nargs="+", choices=("train", "val", "test")
    )
    images: str = option("link", "how the images get there", choices=IMAGES)
    polygons: bool = option(False, "write polygons to YOLO files instead of boxes, where there are any")


def convert_data(config: ConvertConfig) -> dict[str, Converted]:
    """Convert, and say what was kept and what was lost."""
    for name in ("data", "output"):
        if not getattr(config, name):
            raise UserError(f"--{name} is missing; expected {'a data YAML' if name == 'data' else 'a new folder'}")
    if config.polygons and config.to != "yolo":
        raise UserError(f"--polygons has no meaning with --to {config.to}: COCO files always have them, VOC never")
    results = convert(
        load_data(config.data),
        config.to,
        config.output,
        config.splits,
        images=config.images,
        polygons=config.polygons,
        policy=config.label_policy,
    )
    for split, result in results.items():
        lost = ", ".join(f"{count:,} {what}" for what, count in result.lost.items()) or "nothing"
        renamed = f"; {result.renamed:,} images renamed" if result.renamed else ""
        LOGGER.info(
            "%s: %s images, %s boxes; lost: %s%s", split, f"{result.images:,}", f"{result.boxes:,}", lost, renamed
        )
    LOGGER.info("written: %s/data.yaml", config.output)
    return results


def run(**options: Any) -> dict[str, Converted]:
    """`convert_data.run(data=..., to=..., output=...)`: like the command line."""
    return convert_data(config_from_kwargs(ConvertConfig, **options))


def main(argv: Sequence[str] | None = None) -> int:
    convert_data(parse_config(ConvertConfig, argv, "convert_data.py", __doc__ or ""))
    return 0


if __name__ == "__main__":
    run_cli(main)
