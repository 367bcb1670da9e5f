"""The whole pipeline on a synthetic data set: train, validate, detect, export, verify; no download.

python demo.py            (what `make demo` runs: minutes on two CPU cores)
python demo.py --draw     (only make the data set of data/demo.yaml)
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detect
import export
import info
import train
import val
from utils.core.config import config_from_kwargs, option, parse_config, run_cli
from utils.core.device import describe, select_device
from utils.core.errors import UserError
from utils.core.files import increment_path
from utils.core.log import LOGGER
from utils.data.scenes import write_dataset, write_video
from utils.engine.evaluation.report import write_json
from utils.engine.training.trainer import EXIT_INTERRUPTED, Interrupted

HERE = Path(__file__).resolve().parent
COLUMNS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L")


@dataclass(frozen=True)
class DemoConfig:
    """Options of demo.py."""

    cfg: str = option("models/yolov5-spd-n.yaml", "model YAML")
    epochs: int = option(28, "number of epochs")
    train: int = option(400, "scenes to train on")
    val: int = option(100, "scenes to validate on")
    imgsz: int = option(160, "side of a scene and of the network's input in pixels")
    batch_size: int = option(8, "images per step", aliases=("batch",))
    device: str = option("", "cpu, mps, or a GPU number")
    workers: int = option(2, "loader processes")
    seed: int = option(0, "seed of the scenes and of the training")
    frames: int = option(60, "frames of the video")
    datasets: str = option(str(HERE / "datasets"), "where the synthetic data set goes")
    project: str = option("runs/demo", "folder of the runs")
    name: str = option("exp", "name of this run's folder")
    draw: bool = option(False, "only make the data set")

    def __post_init__(self) -> None:
        for name, low in (("train", 1), ("val", 1), ("imgsz", 32), ("seed", 0), ("frames", 1), ("epochs", 1)):
            if getattr(self, name) < low:
                raise UserError(f"--{name} {getattr(self, name)}; expected {low} or more")


@dataclass(frozen=True)
class DemoReport:
    """The run's folder, one row of numbers per runtime, and the images and videos worth a look."""

    folder: Path
    rows: dict[str, dict[str, float]]
    pictures: tuple[Path, ...]


def demo(config: DemoConfig) -> DemoReport | None:
    """Everything, in order."""
    start = time.monotonic()
    LOGGER.info("1. making a synthetic data set of small objects")
    data = write_dataset(
        Path(config.datasets) / "demo", train=config.train, val=config.val, size=config.imgsz, seed=config.seed
    )
    LOGGER.info(f"{config.train} + {config.val} scenes of {config.imgsz} px in {data.parent}")
    if config.draw:
        return None
    folder = increment_path(config.project, config.name)

    LOGGER.info(f"\n2. training {Path(config.cfg).stem} from scratch, {config.epochs} epochs")
    best = train.run(
        data=data, cfg=config.cfg, imgsz=config.imgsz, epochs=config.epochs, batch_size=config.batch_size,
        hyp=["hyp.short.yaml"], optimizer="AdamW", seed=config.seed,
        device=config.device, workers=config.workers, project=folder, name="train",
    ).best  # fmt: skip

    LOGGER.info("\n3. exporting ONNX and comparing it with PyTorch")
    onnx = export.run(weights=best, include=["onnx"], imgsz=[config.imgsz])[0].path

    LOGGER.info("\n4. validating both files")
    rows = {name: measure(config, weights, data, folder, name) for name, weights in (("PyTorch", best), ("ONNX", onnx))}

    LOGGER.info("\n5. detecting on images and on a video")
    pictures = look(config, best, data, folder)
    report = DemoReport(folder, rows, pictures)
    summary = info.measure(config_from_kwargs(info.InfoConfig, cfg=best, imgsz=[config.imgsz]))
    for row in rows.values():
        row |= {"parameters": summary.parameters, "gflops": summary.gflops}
    write_json(folder / "demo.json", {"rows": rows, "seconds": time.monotonic() - start})
    LOGGER.info(f"\n{table(rows, config)}\n\nlook at:")
    for path in pictures:
        LOGGER.info(f"  {path}")
    LOGGER.info(f"\n{(time.monotonic() - start) / 60:.1f} minutes on {describe(select_device(config.device))}")
    return report


def measure(config: DemoConfig, weights: Path, data: Path, folder: Path, name: str) -> dict[str, float]:
    """AP of a model file on the validation scenes, and its milliseconds per image one at a time."""
    common: dict[str, Any] = {
        "weights": [str(weights)], "data": data, "imgsz": [config.imgsz], "device": config.device,
        "workers": 0, "project": folder,
    }  # fmt: skip
    metrics = val.run(**common, name=f"val-{name.lower()}", rect=False, noplots=name != "PyTorch").metrics
    speed = val.run(**common, name=f"speed-{name.lower()}", task="speed", runs=40).speed_ms
    return {**{key: float(metrics[key]) for key in COLUMNS}, "ms": sum(speed.values())}


def look(config: DemoConfig, best: Path, data: Path, folder: Path) -> tuple[Path, ...]:
    """Detections drawn on six validation scenes and on a video twice their size; what else is worth a look."""
    scenes = [str(data.parent / "images" / "val" / f"{number:05d}.png") for number in range(min(6, config.val))]
    video = write_video(folder / "drive.mp4", frames=config.frames, seed=config.seed)
    common: dict[str, Any] = {"weights": [str(best)], "device": config.device, "line_thickness": 1, "project": folder}
    found = detect.run(**common, source=scenes, imgsz=[config.imgsz], name="detect-pictures", save_txt=True)
    filmed = detect.run(**common, source=[str(video)], imgsz=[320], name="detect-video", save_json=True)
    made = [folder / "train" / "results.png", folder / "train" / "labels.jpg", folder / "train" / "train_batch0.jpg"]
    made += sorted((folder / "val-pytorch").glob("val_batch0_*.jpg"))
    for report in (found, filmed):
        assert report.save_dir is not None
        made += sorted(path for path in report.save_dir.iterdir() if path.suffix in (".png", ".jpg", ".mp4"))
    return tuple(path for path in made if path.is_file())


def table(rows: dict[str, dict[str, float]], config: DemoConfig) -> str:
    """The closing table: a row per runtime."""
    head = f"{Path(config.cfg).stem:<16}" + "".join(f"{name:>8}" for name in COLUMNS)
    lines = [f"{head}{'parameters':>12}{'GFLOPs':>8}{'ms/image':>10}"]
    for name, row in rows.items():
        numbers = "".join(f"{'-' if math.isnan(row[key]) else format(row[key], '.3f'):>8}" for key in COLUMNS)
        lines.append(f"{name:<16}{numbers}{row['parameters']:>12,.0f}{row['gflops']:>8.2f}{row['ms']:>10.1f}")
    return "\n".join(lines)


def run(**kwargs: Any) -> DemoReport | None:
    """The demo from Python: the keywords are the flags."""
    return demo(config_from_kwargs(DemoConfig, **kwargs))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    config = parse_config(DemoConfig, argv, "demo.py", __doc__ or "")
    try:
        demo(config)
    except Interrupted:
        LOGGER.info("interrupted")
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    run_cli(main)
