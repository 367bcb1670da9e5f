"""Where a run lives and what it continues: run folders, resuming, elastic restarts."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from utils.core.config import config_from_kwargs
from utils.core.dist import Dist, is_restarted, launched
from utils.core.errors import UserError
from utils.core.files import atomic_write, increment_path
from utils.core.log import LOGGER
from utils.engine.training.settings import RESUMABLE, TrainConfig

LAUNCH_FILE = ".launch.json"  # which torchrun agent owns a run folder, so that an elastic restart finds it again


def newest_checkpoint(project: str | Path) -> Path:
    """The most recently written last.pt below `project`."""
    found = sorted(Path(project).glob("**/weights/last.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError(f"--resume: no weights/last.pt below '{project}'; name a checkpoint, or --project")
    return found[-1]


def find_resume(config: TrainConfig, dist: Dist) -> Path | None:
    """The checkpoint that this start continues: that of --resume, or after an elastic restart the group's own."""
    found = dist.main_decides(lambda: _find_resume(config))
    return None if found is None else Path(found)


def _find_resume(config: TrainConfig) -> Path | None:
    if config.resume is not None:
        path = newest_checkpoint(config.project) if config.resume == "newest" else Path(config.resume)
        path = path / "weights" / "last.pt" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"--resume '{config.resume}': no such checkpoint; expected a last.pt or a run folder")
        if path.resolve().parent.name != "weights":
            raise UserError(
                f"--resume '{config.resume}': a run goes on in its folder; expected RUN/weights/{path.name}, "
                "or start a new run with --weights"
            )
        return path
    if is_restarted():
        for mark in Path(config.project).glob(f"{config.name}*/{LAUNCH_FILE}"):
            if json.loads(mark.read_text(encoding="utf-8")) == _launch_mark():
                last = mark.parent / "weights" / "last.pt"
                return last if last.is_file() else None
    return None


def _launch_mark() -> dict[str, Any]:
    return {"run_id": os.environ.get("TORCHELASTIC_RUN_ID", ""), "agent": os.getppid()}


def resumed_config(given: TrainConfig, checkpoint: dict[str, Any], path: Path, argv_fields: set[str]) -> TrainConfig:
    """The interrupted run's config with what may change taken from the command line; anything else is refused."""
    if "train" not in checkpoint:
        raise UserError(f"'{path}' holds weights only and cannot be resumed; resume last.pt, or start with --weights")
    stored = config_from_kwargs(TrainConfig, **{**checkpoint["train"]["config"], "resume": str(path)})
    changes = {}
    for field in fields(TrainConfig):
        name = field.name
        if name not in argv_fields or name == "resume" or getattr(given, name) == getattr(stored, name):
            continue
        if name == "batch_size" and given.batch_size == -1:  # as large as fits, which the run has measured
            continue
        if name not in RESUMABLE:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(given, name)} differs from the interrupted run's "
                f"{getattr(stored, name)}; at --resume only these may change: "
                f"{', '.join('--' + n.replace('_', '-') for n in RESUMABLE)}; start a new run with --weights instead"
            )
        changes[name] = getattr(given, name)
    done = checkpoint["train"]["progress"]["epoch"]
    if changes.get("epochs", stored.epochs) <= done and "epochs" in changes:
        raise UserError(f"--epochs {changes['epochs']}, but the run has finished {done} epochs; give a larger number")
    if "epochs" in changes:
        LOGGER.info(
            f"--epochs {stored.epochs} -> {changes['epochs']}: the learning-rate schedule is computed anew, so this is "
            "no longer the run that would have gone on uninterrupted"
        )
    return replace(stored, **changes)


def open_run(config: TrainConfig, dist: Dist) -> Path:
    """A new run folder with weights/ in it, the same on all ranks."""
    folder = None
    if dist.is_main:
        folder = increment_path(config.project, config.name, config.exist_ok)
        (folder / "weights").mkdir(exist_ok=True)
        for name in ("last.pt", "best.pt"):  # --exist-ok: what is resumed or measured later must be this run's
            (folder / "weights" / name).unlink(missing_ok=True)
        if launched():
            with atomic_write(folder / LAUNCH_FILE, "w") as file:
                json.dump(_launch_mark(), file)
    return Path(dist.broadcast(str(folder)))
