"""Compare two models on one data set: AP by size, a bootstrap of the difference, pictures where they differ most.

python compare.py --weights yolov5n.pt spd-n.pt --data data/demo.yaml
python compare.py --predictions a.json b.json --annotations instances.json --images images/
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.backends import Predictor, load_predictor
from utils.core.config import config_dict, config_from_kwargs, option, parse_config, refuse_changed, run_cli
from utils.core.device import select_device
from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.files import increment_path, short_names
from utils.core.log import LOGGER
from utils.data.frames import safe_name
from utils.data.images import read_image
from utils.data.index import LabelIndex, build_index
from utils.data.spec import DataSpec, load_data
from utils.engine.evaluation.bootstrap import Interval, check_bootstrap, paired_bootstrap
from utils.engine.evaluation.class_comparison import compare_classes, comparison_lines
from utils.engine.evaluation.classification import validate_classifier
from utils.engine.evaluation.coco_eval import MetricSettings, Truth, coco_metrics, found_from_rows
from utils.engine.evaluation.coco_files import found_from_coco, truth_from_coco
from utils.engine.evaluation.comparison import comparison_table, judge, most_different, plot_bars, save_pairs
from utils.engine.evaluation.evaluate import EvalPlan, check_classes, evaluate
from utils.engine.evaluation.report import write_json
from utils.engine.evaluation.validate import ValSettings, detection_limit
from utils.engine.inference.predict import check_bounds, combine, network_size
from utils.engine.options import (
    NMS_INSIDE,
    LabelOptions,
    MetricOptions,
    PredictorOptions,
    RunFolderOptions,
    check_overlap,
    names_of,
)
from utils.ops.metrics import Found

# The options that mean something with result files, and with classifiers.
FOLDER, METRICS = names_of(RunFolderOptions), names_of(MetricOptions) - {"max_det"}
PICTURES = {"conf", "pictures"}
WITH_PREDICTIONS = (
    FOLDER | METRICS | PICTURES | {"predictions", "annotations", "images", "labels", "replicates", "level", "seed"}
)
WITH_CLASSIFIERS = FOLDER | {
    "weights",
    "data",
    "task",
    "imgsz",
    "batch_size",
    "device",
    "half",
    "labels",
    "workers",
    "pictures",
}
NO_IMAGES = ("with --predictions", "with --predictions and without --images")


@dataclass(frozen=True)
class CompareConfig(RunFolderOptions, LabelOptions, MetricOptions, PredictorOptions):
    """Options of compare.py."""

    weights: list[str] = option([], "the two model files, A and B", nargs="+")
    data: str = option("data/demo.yaml", "data YAML")
    task: str = option("val", "split", choices=("val", "test", "train"))
    predictions: list[str] = option([], "two files in COCO's result format instead of models", nargs="+")
    annotations: str = option("", "COCO annotation file for --predictions")
    images: str = option("", "folder of the pictures for --predictions")
    labels: list[str] = option([], "names of A and B in figures; default: their files", nargs="+")
    workers: int = option(8, "loader processes; 0 loads in the main process")
    iou_thres: float = option(0.6, "NMS IoU", aliases=("iou",))
    conf: float | None = option(None, "confidence of the pictures; default: each model's best F1")
    pictures: int = option(8, "how many images to show side by side")
    replicates: int = option(1000, "bootstrap replicates; 0: no bootstrap")
    level: float = option(0.95, "level of the bootstrap intervals")
    seed: int = option(0, "seed of the bootstrap")
    project: str = option("runs/compare", "folder of the runs")


@dataclass(frozen=True)
class CompareReport:
    """What the comparison says and where it lies."""

    save_dir: Path
    metrics: tuple[dict[str, Any], dict[str, Any]]
    intervals: dict[str, Interval]
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class Sides:
    """Ground truth, both models' detections, and how to read an image of the data set."""

    truth: Truth
    found: tuple[Found, Found]
    read: Callable[[int], np.ndarray] | None
    stem: Callable[[int], str]
    max_det: int | None = None  # most detections per image; None where they come from files
    sizes: tuple[tuple[int, int], ...] = ()  # network height and width of A and B; empty where they come from files
    rect: bool | None = None  # whether both are given the padded shapes of `val.py`; None where they come from files
    nms: tuple[dict[str, Any] | None, ...] = ()  # that inside the model files, if any


def from_files(cfg: CompareConfig) -> Sides:
    """Both sides from result files."""
    if not cfg.annotations:
        raise UserError("--predictions needs the ground truth: add --annotations INSTANCES.json")
    folder = Path(cfg.images)
    if cfg.images and not folder.is_dir():
        raise UserError(f"--images '{cfg.images}' is not a folder; expected the one that 'file_name' is relative to")
    truth = truth_from_coco(cfg.annotations, area_from=cfg.area_from, area_pixels=cfg.area_pixels)
    a, b = (found_from_coco(path, truth) for path in cfg.predictions)
    read = (lambda i: read_image(folder / truth.file_names[i])) if cfg.images else None
    return Sides(truth, (a, b), read, lambda i: safe_name(Path(truth.file_names[i]).stem))


def load_models(cfg: CompareConfig, spec: DataSpec) -> list[Predictor]:
    """Both model files as predictors of one task."""
    device, size = select_device(cfg.device), cfg.imgsz or None
    found = [load_predictor(w, device=device, half=cfg.half, names=spec.names, imgsz=size) for w in cfg.weights]
    if found[0].task != found[1].task:
        one, other = (f"'{w}' is for the task {p.task}" for w, p in zip(cfg.weights, found, strict=True))
        raise UserError(f"{one}, {other}; compare two of a kind")
    return found


def labels_to_compare_by(cfg: CompareConfig, spec: DataSpec, predictors: Sequence[Predictor]) -> LabelIndex:
    """The labels of the split; UserError where the models cannot be compared by them."""
    index = build_index(spec, cfg.task, policy=cfg.label_policy, rebuild=cfg.rebuild_cache)
    if not len(index.cls):
        raise UserError(
            f"{spec.yaml}: the {len(index)} images of '{cfg.task}:' have no labels; there is nothing to compare by"
        )
    if any(predictor.end2end for predictor in predictors):
        refuse_changed(cfg, set(config_dict(cfg)) - {"iou_thres"}, NMS_INSIDE)
    for predictor in predictors:
        check_classes(predictor, spec.names, spec.yaml.name)
    return index


def sizes_of(cfg: CompareConfig, predictors: Sequence[Predictor]) -> list[tuple[int, int]]:
    """Height and width of the images that each model is given."""
    a, b = (network_size(p, cfg.imgsz or p.imgsz or p.metadata.imgsz) for p in predictors)
    if cfg.area_pixels == "network" and a != b:
        raise UserError(
            f"--area-pixels network: the models see images at {a[0]}x{a[1]} and {b[0]}x{b[1]} px; give both one --imgsz"
        )
    return [a, b]


def from_models(
    cfg: CompareConfig,
    spec: DataSpec,
    predictors: Sequence[Predictor],
    sizes: Sequence[tuple[int, int]],
    index: LabelIndex,
) -> Sides:
    """Both sides by running the models."""
    dist = Dist.single(predictors[0].device)
    metrics = MetricSettings.from_options(cfg)
    settings = ValSettings(iou_thres=cfg.iou_thres, max_det=detection_limit(cfg.max_det, metrics), metrics=metrics)
    rect = all(predictor.imgsz is None for predictor in predictors)  # a margin that one of them lacks moves AP
    found, truths = [], []
    for predictor, label, size in zip(predictors, labels_of(cfg), sizes, strict=True):
        plan = EvalPlan(size, cfg.batch_size, cfg.workers, rect, cfg.slice, cfg.overlap)
        model = combine([predictor], augment=cfg.augment)
        result = evaluate(model, index, list(spec.names), plan, settings.for_file(predictor), dist, title=label)
        assert result.truth is not None
        truths.append(result.truth)
        found.append(found_from_rows(result.detections, result.truth))
    return Sides(
        truths[0],
        (found[0], found[1]),
        lambda i: read_image(index.file(i)),
        lambda i: safe_name(index.file(i).stem),
        settings.max_det,
        tuple(sizes),
        rect,
        tuple(predictor.metadata.nms if predictor.end2end else None for predictor in predictors),
    )


def labels_of(cfg: CompareConfig) -> list[str]:
    """Names of A and B: those given, else the file names, else the paths where these are equal."""
    files = cfg.predictions or cfg.weights
    if cfg.labels:
        if len(cfg.labels) != 2:
            raise UserError(f"--labels names {len(cfg.labels)} models; expected two")
        return list(cfg.labels)
    return short_names(files)


def check(cfg: CompareConfig) -> None:
    """UserError for options that cannot be, before any model runs."""
    if cfg.predictions:
        refuse_changed(cfg, WITH_PREDICTIONS if cfg.images else WITH_PREDICTIONS - PICTURES, NO_IMAGES[not cfg.images])
    else:
        refuse_changed(cfg, set(config_dict(cfg)) - {"annotations", "images"}, "without --predictions")
    check_overlap(cfg)
    if len(cfg.predictions or cfg.weights) != 2:
        count = len(cfg.predictions or cfg.weights)
        raise UserError(f"{count} files given; expected two with --weights A B (or --predictions A B)")
    if len(cfg.imgsz) > 2:
        raise UserError(f"--imgsz {' '.join(map(str, cfg.imgsz))}; expected one number, or height and width")
    check_bounds(cfg, pictures=(0, math.inf), seed=(0, math.inf), **({} if cfg.conf is None else {"conf": (0, 1)}))
    if cfg.replicates:
        check_bootstrap(cfg.replicates, cfg.level)


def compare(cfg: CompareConfig) -> CompareReport:
    """The whole comparison."""
    check(cfg)
    files = cfg.predictions or cfg.weights
    names, settings = labels_of(cfg), MetricSettings.from_options(cfg)
    if cfg.predictions:
        sides = from_files(cfg)
        folder = increment_path(cfg.project, cfg.name, cfg.exist_ok)
    else:
        spec = load_data(cfg.data)
        predictors = load_models(cfg, spec)
        if predictors[0].task == "classify":
            return compare_classifiers(cfg, spec, predictors)
        index = labels_to_compare_by(cfg, spec, predictors)
        sizes = sizes_of(cfg, predictors)
        folder = increment_path(cfg.project, cfg.name, cfg.exist_ok)
        sides = from_models(cfg, spec, predictors, sizes, index)
    truth, (a, b) = sides.truth, sides.found
    metrics_a, _ = coco_metrics(truth, a, settings)
    metrics_b, _ = coco_metrics(truth, b, settings)
    intervals: dict[str, Interval] = {}
    if cfg.replicates:
        intervals = paired_bootstrap(
            truth, a, b, settings=settings, replicates=cfg.replicates, level=cfg.level, seed=cfg.seed
        )
    content = {
        "A": {"name": names[0], "file": files[0], **metrics_a},
        "B": {"name": names[1], "file": files[1], **metrics_b},
        "difference": {key: interval.as_dict() for key, interval in intervals.items()},
        "pictures": [],
        "settings": {
            **config_dict(cfg),
            "max_det": sides.max_det,
            "imgsz": sides.sizes,
            "rect": sides.rect,
            "nms_inside": sides.nms,
            **settings.as_dict(),
        },
    }
    write_json(folder / "compare.json", content)
    LOGGER.info(comparison_table(names, (metrics_a, metrics_b), intervals))
    plot_bars(names, (metrics_a, metrics_b), intervals, folder / "ap_by_size.png")
    pictures: list[Path] = []
    if sides.read is not None and cfg.pictures > 0:
        verdicts = [
            judge(
                name,
                truth,
                found,
                numbers["confidence"] if cfg.conf is None else cfg.conf,
                settings.pr_iou,
                settings.max_dets[-1],
            )
            for name, found, numbers in zip(names, (a, b), (metrics_a, metrics_b), strict=True)
        ]
        picked = most_different(truth, verdicts[0], verdicts[1], cfg.pictures)
        pictures = save_pairs(truth, verdicts[0], verdicts[1], picked, sides.read, sides.stem, folder / "pairs")
        write_json(folder / "compare.json", {**content, "pictures": [path.name for path in pictures]})
    LOGGER.info(f"Results saved to {folder}")
    return CompareReport(folder, (metrics_a, metrics_b), intervals, tuple(pictures))


def compare_classifiers(cfg: CompareConfig, spec: DataSpec, predictors: Sequence[Predictor]) -> CompareReport:
    """Two classifiers: accuracies, the images that only one of them gets right, and pictures of those."""
    refuse_changed(cfg, WITH_CLASSIFIERS, "with classifiers")
    dist = Dist.single(predictors[0].device)
    results = []
    for predictor in predictors:
        result, index = validate_classifier(
            predictor, spec, dist, split=cfg.task, imgsz=cfg.imgsz, batch_size=cfg.batch_size, workers=cfg.workers
        )
        results.append(result)
    folder = increment_path(cfg.project, cfg.name, cfg.exist_ok)
    content = compare_classes((results[0], results[1]), labels_of(cfg), index, folder, cfg.pictures)
    write_json(folder / "compare.json", {**content, "settings": config_dict(cfg)})
    LOGGER.info(comparison_lines(content))
    LOGGER.info(f"Results saved to {folder}")
    return CompareReport(
        folder, (results[0].metrics, results[1].metrics), {}, tuple(folder / name for name in content["pictures"])
    )


def run(**kwargs: Any) -> CompareReport:
    """Compare from Python: the keywords are the flags, `compare.run(weights=["a.pt", "b.pt"], data="x.yaml")`."""
    return compare(config_from_kwargs(CompareConfig, **kwargs))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; an error ends with a non-zero exit code."""
    compare(parse_config(CompareConfig, argv, "compare.py", __doc__ or ""))
    return 0


if __name__ == "__main__":
    run_cli(main)
