"""Check a data set before training: counts, class balance, box sizes at the network's scale, duplicates, problems.

python check.py --data data/coco128.yaml --imgsz 640
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.core.config import config_from_kwargs, option, parse_config, run_cli
from utils.core.errors import UserError
from utils.core.files import atomic_write, increment_path
from utils.core.log import LOGGER
from utils.data.check import check, problem_count, render
from utils.data.check_picture import draw_check
from utils.data.download import fetch
from utils.data.spec import load_data
from utils.engine.options import LabelOptions, RunFolderOptions


@dataclass(frozen=True)
class CheckConfig(RunFolderOptions, LabelOptions):
    """Options of check.py."""

    data: str = option("data/demo.yaml", "data YAML")
    imgsz: int = option(640, "network size in pixels, for the sizes after resizing", aliases=("img", "img_size"))
    splits: list[str] = option(
        [], "splits to check (default: all declared)", nargs="+", choices=("train", "val", "test")
    )
    project: str = option("runs/check", "folder of the runs")
    quick: bool = option(False, "read image headers only: no decoding, no search for duplicates")
    examples: int = option(3, "examples printed of each kind; check.json has one per kind and file, at most 20,000")
    max_problems: int = option(-1, "exit with code 1 above so many problems; -1: never")
    workers: int = option(-1, "processes; -1: all cores for large data sets, 0: this one")
    download: bool = option(False, "fetch what the YAML's 'download:' entry offers if images are missing")
    noplots: bool = option(False, "no picture")


def check_data(config: CheckConfig) -> dict[str, Any]:
    """Check, print the table, write check.json and check.png; returns the content of check.json."""
    if config.imgsz < 1:
        raise UserError(f"--imgsz is {config.imgsz}; expected a positive number of pixels")
    spec = load_data(config.data)
    if config.download:
        fetch(spec)
        spec = load_data(config.data)
    result, indices = check(
        spec,
        config.imgsz,
        config.splits,
        policy=config.label_policy,
        verify=not config.quick,
        workers=None if config.workers < 0 else config.workers,
        rebuild=config.rebuild_cache,
    )
    folder = increment_path(config.project, config.name, config.exist_ok)
    with atomic_write(folder / "check.json", "w") as file:
        json.dump(result, file, indent=1)
    if not config.noplots:
        draw_check(folder / "check.png", indices, config.imgsz)
    LOGGER.info("\n%s\n\nwritten to %s", "\n".join(render(result, config.examples)), folder)
    return {**result, "folder": str(folder)}


def run(**options: Any) -> dict[str, Any]:
    """`check.run(data=..., imgsz=...)`: like the command line; returns the content of check.json."""
    return check_data(config_from_kwargs(CheckConfig, **options))


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(CheckConfig, argv, "check.py", __doc__ or "")
    result = check_data(config)
    return int(0 <= config.max_problems < problem_count(result))


if __name__ == "__main__":
    run_cli(main)
