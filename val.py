"""Measure a detector (or a classifier) on a data set, or existing predictions against an annotation file.

python val.py --weights runs/train/exp/weights/best.pt --data data/demo.yaml
python val.py --predictions results.json --annotations instances.json
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.backends import load_predictor
from utils.core.config import config_dict, config_from_kwargs, option, parse_config, refuse_changed, run_cli
from utils.core.device import describe
from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.files import increment_path, short_names
from utils.core.log import LOGGER, quiet
from utils.data.frames import distinct
from utils.data.index import LabelIndex, build_index
from utils.data.spec import DataSpec, load_data
from utils.engine.evaluation.class_report import class_table, write_class_report
from utils.engine.evaluation.classification import validate_classifier
from utils.engine.evaluation.coco_eval import MetricSettings, coco_metrics
from utils.engine.evaluation.coco_files import (
    coco_annotations,
    coco_results,
    found_from_coco,
    ids_from_names,
    truth_from_coco,
)
from utils.engine.evaluation.evaluate import EvalPlan, check_classes, evaluate, iterate_images, predict_settings
from utils.engine.evaluation.report import MANY_CLASSES, summary, table, write_json, write_report, write_rows
from utils.engine.evaluation.studies import latency, latency_table, study_line, study_row, write_study
from utils.engine.evaluation.validate import EvalResult, ValSettings, detection_limit
from utils.engine.figures.pictures import BatchPictures
from utils.engine.inference.classifying import classifier_side
from utils.engine.inference.predict import Detector, PredictSettings, check_bounds, combine, network_size, size_step
from utils.engine.options import (
    NMS_INSIDE,
    NO_WEIGHTS,
    LabelOptions,
    MetricOptions,
    PredictorOptions,
    RunFolderOptions,
    check_overlap,
    names_of,
)
from utils.engine.speed import STAGES, speed_line
from utils.ops.metrics import confusion_matrix

ONE_CLASS = "--single-cls: the ids in predictions.json are those of annotations.json beside it, which has the one class"
ROTATED = (
    "the annotation file has {} images as they were before EXIF rotation, the boxes in predictions.json are of upright "
    "ones: their ids are those of annotations.json beside it, whose boxes are upright too"
)
TASKS = ("val", "test", "train", "speed", "study")
# The options that mean something in each mode; --workers and --noplots never change what is measured.
ALWAYS = names_of(RunFolderOptions) | {"workers", "noplots"}
METRICS = names_of(MetricOptions) - {"max_det"}
NMS = {"conf_thres", "iou_thres", "max_det", "agnostic_nms", "single_cls"}
DETECTOR = ALWAYS | names_of(PredictorOptions, LabelOptions) | NMS | {"data", "task"}
USED = {
    "val": DETECTOR | METRICS | {"verbose", "rect", "save_txt", "save_conf", "save_json"},
    "speed": DETECTOR | {"runs"},
    "study": (DETECTOR | METRICS | {"sizes", "rect"}) - {"imgsz"},
    "predictions": ALWAYS | METRICS | {"predictions", "annotations", "verbose"},
    "classifier": ALWAYS | {"weights", "data", "task", "imgsz", "batch_size", "device", "half", "verbose"},
}
RETIRED = {
    "--save-hybrid": "use --save-txt; the labels are in the data set already, and mixing them in inflates AP",
    "--dnn": "ONNX files run on ONNX Runtime; just give the .onnx file to --weights",
}


@dataclass(frozen=True)
class ValConfig(RunFolderOptions, LabelOptions, MetricOptions, PredictorOptions):
    """Options of val.py; names and defaults as YOLOv5 users know them."""

    data: str = option("data/demo.yaml", "data YAML")
    conf_thres: float | None = option(
        None, "smallest confidence; default: 0.001, and 0.25 with --task speed", aliases=("conf",)
    )
    iou_thres: float | None = option(None, "NMS IoU; default: 0.6, and 0.45 with --task speed", aliases=("iou",))
    task: str = option("val", "split to measure on, or speed (latency) or study (AP over image sizes)", choices=TASKS)
    workers: int = option(8, "loader processes per rank; 0 loads in the main process")
    single_cls: bool = option(False, "treat all classes as one")
    verbose: bool = option(False, f"a row per class also with {MANY_CLASSES} classes and more")
    save_txt: bool = option(False, "write labels/*.txt, normalized")
    save_conf: bool = option(False, "add the confidence to --save-txt")
    save_json: bool = option(False, "write predictions.json in COCO's result format")
    predictions: str = option("", "measure this file in COCO's result format instead of a model")
    annotations: str = option("", "COCO annotation file for --predictions")
    project: str = option("runs/val", "folder of the runs")
    rect: bool = option(True, "batches of similar shape with little padding, where the model takes any shape")
    agnostic_nms: bool = option(False, "suppress overlaps across classes")
    sizes: list[int] = option(list(range(256, 1537, 128)), "image sizes of --task study", nargs="+")
    runs: int = option(100, "timed runs of --task speed")
    noplots: bool = option(False, "write numbers only, no pictures")


@dataclass(frozen=True)
class ValReport:
    """What a validation says and where it lies. `metrics` is what metrics.json holds, NaN where undefined."""

    save_dir: Path
    metrics: dict[str, Any]
    speed_ms: dict[str, float] = field(default_factory=dict)
    result: EvalResult | None = None


def val_settings(cfg: ValConfig, predictor: Any) -> ValSettings:
    """What counts as a detection. `--task speed` times what detect.py does: its thresholds, one class a box."""
    if predictor.end2end:
        refuse_changed(cfg, set(config_dict(cfg)) - {"iou_thres", "agnostic_nms"}, NMS_INSIDE)
    metrics = MetricSettings.from_options(cfg)
    speed = cfg.task == "speed"
    common = PredictSettings if speed else ValSettings
    limit = PredictSettings.max_det if speed and cfg.max_det is None else detection_limit(cfg.max_det, metrics)
    settings = ValSettings(
        conf_thres=common.conf_thres if cfg.conf_thres is None else cfg.conf_thres,
        iou_thres=common.iou_thres if cfg.iou_thres is None else cfg.iou_thres,
        max_det=limit,
        multi_label=not speed,
        agnostic=cfg.agnostic_nms,
        single_cls=cfg.single_cls,
        metrics=metrics,
    )
    return settings.for_file(predictor)


def measure_predictions(cfg: ValConfig) -> ValReport:
    """--predictions and --annotations: no model, no images."""
    if not cfg.annotations:
        raise UserError("--predictions needs the ground truth: add --annotations INSTANCES.json")
    refuse_changed(cfg, USED["predictions"], "with --predictions")
    settings = MetricSettings.from_options(cfg)
    truth = truth_from_coco(cfg.annotations, area_from=cfg.area_from, area_pixels=cfg.area_pixels)
    found = found_from_coco(cfg.predictions, truth)
    metrics, curves = coco_metrics(truth, found, settings)
    defaults = ValSettings()
    confusion = confusion_matrix(
        truth.objects, found, truth.nc, confidence=defaults.confusion_conf, iou=defaults.confusion_iou
    )
    result = EvalResult(metrics, {}, {}, (), found.as_rows(), curves, confusion, truth)
    folder = increment_path(cfg.project, cfg.name, cfg.exist_ok)
    used = {"predictions": cfg.predictions, "annotations": cfg.annotations, **settings.as_dict()}
    used |= {"confusion_conf": defaults.confusion_conf, "confusion_iou": defaults.confusion_iou}
    write_report(folder, result, used, truth.names, figures=not cfg.noplots)
    LOGGER.info(table(metrics, per_class=cfg.verbose or truth.nc < MANY_CLASSES))
    LOGGER.info(summary(metrics, settings.pr_iou))
    LOGGER.info(f"Results saved to {folder}")
    return ValReport(folder, metrics, {}, result)


def load_models(cfg: ValConfig, spec: DataSpec, dist: Dist) -> list[Any]:
    """The model files as predictors."""
    if not cfg.weights:
        raise UserError(NO_WEIGHTS)
    size = cfg.imgsz or None
    found = [load_predictor(w, device=dist.device, half=cfg.half, names=spec.names, imgsz=size) for w in cfg.weights]
    classifier = next((w for w, model in zip(cfg.weights, found, strict=True) if model.task != "detect"), None)
    if classifier and (len(found) > 1 or cfg.task in ("speed", "study") or cfg.slice or cfg.augment):
        raise UserError(
            f"'{classifier}' is a classifier: val.py measures one at a time, with --task val, test or train and "
            "without --slice and --augment"
        )
    return found


def plan_for(cfg: ValConfig, predictor: Any) -> EvalPlan:
    """How the images are put before this model."""
    size = cfg.imgsz or list(predictor.imgsz or predictor.metadata.imgsz)
    if len(size) > 2:
        raise UserError(f"--imgsz {' '.join(map(str, size))}; expected one number, or height and width")
    rect = cfg.rect and predictor.imgsz is None
    return EvalPlan(network_size(predictor, size), cfg.batch_size, cfg.workers, rect, cfg.slice, cfg.overlap)


def read_labels(cfg: ValConfig, spec: DataSpec, dist: Dist, split: str) -> LabelIndex:
    """The labels of a split, read once."""
    return dist.main_first(
        lambda: build_index(spec, split, policy=cfg.label_policy, single_cls=cfg.single_cls, rebuild=cfg.rebuild_cache)
    )


def measure(cfg: ValConfig, dist: Dist) -> ValReport:
    """--task val, test or train."""
    spec = load_data(cfg.data)
    predictors = load_models(cfg, spec, dist)
    if predictors[0].task == "classify":
        return measure_classifier(cfg, spec, predictors[0], dist)
    index = read_labels(cfg, spec, dist, cfg.task)
    labeled = bool(len(index.cls))
    if not labeled and not (cfg.save_json or cfg.save_txt):
        raise UserError(
            f"{spec.yaml}: the {len(index)} images of '{cfg.task}:' have no labels, so nothing can be measured; "
            "add --save-json or --save-txt to write predictions"
        )
    check_classes(predictors[0], spec.names, spec.yaml.name, cfg.single_cls)
    plan, settings = plan_for(cfg, predictors[0]), val_settings(cfg, predictors[0])
    predictor = combine(predictors, augment=cfg.augment)
    folder = new_folder(cfg, dist)
    names = list(index.names)
    pictures = None if cfg.noplots else BatchPictures(folder, names)
    result = evaluate(predictor, index, names, plan, settings, dist, on_batch=pictures, labeled=labeled)
    if dist.is_main:
        used = {**describe_run(cfg, plan, dist), **settings.as_dict()}
        write_report(folder, result, used, names, figures=not cfg.noplots)
        save_predictions(cfg, folder, result, index, spec)
        if labeled:
            LOGGER.info(table(result.metrics, per_class=cfg.verbose or len(names) < MANY_CLASSES))
            LOGGER.info(summary(result.metrics, settings.metrics.pr_iou))
        LOGGER.info(speed_line(result.speed_ms, result.shape))
        LOGGER.info(f"Results saved to {folder}")
    return ValReport(folder, result.metrics, result.speed_ms, result)


def new_folder(cfg: ValConfig, dist: Dist) -> Path:
    """The run folder, made once and the same on all ranks."""
    return Path(dist.broadcast(str(increment_path(cfg.project, cfg.name, cfg.exist_ok)) if dist.is_main else ""))


def describe_run(cfg: ValConfig, plan: EvalPlan, dist: Dist) -> dict[str, Any]:
    """What else decides the numbers, for metrics.json."""
    keys = ("data", "weights", "task", "augment", "half", "label_policy")
    used = {key: value for key, value in config_dict(cfg).items() if key in keys}
    sliced = {"slice": plan.slice_size, "overlap": plan.overlap} if plan.slice_size else {}
    shape = {"imgsz": list(plan.imgsz), "rect": plan.rect, "batch_size": plan.batch_size, **sliced}
    return {**used, **shape, "device": describe(dist.device)}


def save_predictions(cfg: ValConfig, folder: Path, result: EvalResult, index: LabelIndex, spec: DataSpec) -> None:
    """--save-json and --save-txt. Without usable ids in annotation files, one with the same ids is written beside."""
    assert result.truth is not None
    files = [index.file(i) for i in range(len(index))]
    if cfg.save_json:
        truth = result.truth
        rotated = index.report.counts.get("coco-rotated", 0)
        if not index.own_ids or cfg.single_cls or rotated:
            LOGGER.info(ONE_CLASS if cfg.single_cls else ROTATED.format(rotated) if rotated else own_numbers(spec))
            truth = replace(truth, image_ids=ids_from_names([file.stem for file in files]))
            write_json(folder / "annotations.json", coco_annotations(truth, relative_names(files)))
        write_json(folder / "predictions.json", coco_results(result.detections, truth))
    if cfg.save_txt:
        stems = distinct([file.stem for file in files])
        write_rows(folder / "labels", result.detections, stems, index.shapes, with_conf=cfg.save_conf)


def relative_names(files: Sequence[Path]) -> list[str]:
    """Paths of images from the folder that holds them all."""
    home = os.path.commonpath([file.parent for file in files])
    return [file.relative_to(home).as_posix() for file in files]


def own_numbers(spec: DataSpec) -> str:
    """What the ids of predictions.json are where they are not those of annotation files."""
    ids = "the ids in predictions.json are those of annotations.json beside it"
    if spec.format == "coco":
        return f"{ids}: the data set's annotation files have ids that are text, or share them between files"
    if len(spec.names) == 80 and (spec.names[0], spec.names[-1]) == ("person", "toothbrush"):
        return f"{ids}: category_id is the class number, COCO's own ids need 'annotations:' files as in data/coco.yaml"
    return ids


def measure_classifier(cfg: ValConfig, spec: DataSpec, predictor: Any, dist: Dist) -> ValReport:
    """Top-1 and top-5 accuracy of an image classifier."""
    refuse_changed(cfg, USED["classifier"], f"with a classifier, which '{cfg.weights[0]}' is")
    size = classifier_side(predictor, cfg.imgsz)
    result, index = validate_classifier(
        predictor, spec, dist, split=cfg.task, imgsz=[size], batch_size=cfg.batch_size, workers=cfg.workers
    )
    folder = new_folder(cfg, dist)
    if dist.is_main:
        used = {"data": cfg.data, "weights": list(cfg.weights), "task": cfg.task, "imgsz": size}
        write_class_report(folder, result, index, used, figures=not cfg.noplots)
        LOGGER.info(class_table(result, per_class=cfg.verbose or len(index.names) < MANY_CLASSES))
        LOGGER.info(speed_line(result.speed_ms))
        LOGGER.info(f"Results saved to {folder}")
    return ValReport(folder, result.metrics, result.speed_ms)


def measure_speed(cfg: ValConfig, dist: Dist) -> ValReport:
    """--task speed: single images, square, at detect.py's thresholds."""
    check_bounds(cfg, runs=(1, math.inf))
    spec = load_data(cfg.data)
    predictors = load_models(cfg, spec, dist)
    for weights, predictor in zip(cfg.weights, predictors, strict=True):
        if predictor.batch not in (None, 1) and not cfg.slice:
            raise UserError(
                f"'{weights}' takes batches of {predictor.batch}, --task speed times single images; export it with "
                "--batch-size 1 or --dynamic batch"
            )
    plan = replace(plan_for(cfg, predictors[0]), batch_size=cfg.batch_size if cfg.slice else 1, rect=False)
    settings = val_settings(cfg, predictors[0])
    index = read_labels(cfg, spec, dist, "val")
    images = list(iterate_images(index, min(cfg.runs, 100)))
    detector = Detector(combine(predictors, augment=cfg.augment), predict_settings(plan, settings))
    folder = increment_path(cfg.project, cfg.name, cfg.exist_ok)
    result = latency(detector, images, runs=cfg.runs)
    write_json(folder / "speed.json", {**result, "settings": {**describe_run(cfg, plan, dist), **settings.as_dict()}})
    LOGGER.info(f"{describe(dist.device)}\n{latency_table(result)}\nResults saved to {folder}")
    return ValReport(folder, {}, {stage: result[stage]["mean"] for stage in STAGES})


def measure_study(cfg: ValConfig, dist: Dist) -> ValReport:
    """--task study: every model on its own, at all sizes."""
    spec = load_data(cfg.data)
    predictors = load_models(cfg, spec, dist)
    index = read_labels(cfg, spec, dist, "val")
    if not len(index.cls):
        raise UserError(f"{spec.yaml}: the {len(index)} images of 'val:' have no labels, so nothing can be measured")
    rows: list[dict[str, Any]] = []
    all_settings = [val_settings(cfg, predictor) for predictor in predictors]
    labels = short_names(cfg.weights)
    for label, predictor in zip(labels, predictors, strict=True):
        check_classes(predictor, spec.names, spec.yaml.name, cfg.single_cls)
        if predictor.imgsz is not None:
            raise UserError(f"{label} was exported for one size; --task study needs a model that takes any")
    folder = new_folder(cfg, dist)
    for label, predictor, settings in zip(labels, predictors, all_settings, strict=True):
        stride, model = size_step(predictor), combine([predictor], augment=cfg.augment)
        for size in sorted({max(-(-s // stride), 1) * stride for s in cfg.sizes}):
            plan = replace(plan_for(cfg, predictor), imgsz=(size, size))
            result = evaluate(model, index, list(index.names), plan, settings, dist, title=f"{label} at {size}")
            rows.append(study_row(label, size, result.metrics, result.speed_ms))
            LOGGER.info(study_line(rows[-1]))
            if dist.is_main:
                write_study(rows, folder, figures=False)
    if dist.is_main:
        write_study(rows, folder, figures=not cfg.noplots)
        used = {**describe_run(cfg, plan_for(cfg, predictors[0]), dist), "imgsz": list(cfg.sizes)}
        used |= all_settings[0].as_dict()
        write_json(folder / "study.json", {"rows": rows, "settings": used})
        LOGGER.info(f"Results saved to {folder}")
    return ValReport(folder, {"study": rows})


def validate_with(cfg: ValConfig) -> ValReport:
    """Whatever the options ask for."""
    if cfg.predictions or cfg.annotations:
        if not cfg.predictions:
            raise UserError("--annotations goes with --predictions RESULTS.json; with a model, use --data")
        return measure_predictions(cfg)
    check_overlap(cfg)
    refuse_changed(cfg, USED.get(cfg.task, USED["val"]), f"with --task {cfg.task}")
    if cfg.save_conf and not cfg.save_txt:
        raise UserError("--save-conf adds the confidence to the files of --save-txt; give that too")
    if not cfg.sizes or min(cfg.sizes) < 1:
        raise UserError(f"--sizes {' '.join(map(str, cfg.sizes))}; expected image sizes of at least 1 pixel")
    dist = Dist.start(cfg.device)
    quiet(dist.is_main)
    try:
        return {"speed": measure_speed, "study": measure_study}.get(cfg.task, measure)(cfg, dist)
    finally:
        dist.stop()


def run(**kwargs: Any) -> ValReport:
    """Validate from Python: the keywords are the flags, `val.run(weights="best.pt", data="data/demo.yaml")`."""
    return validate_with(config_from_kwargs(ValConfig, **kwargs))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; an error ends with a non-zero exit code."""
    validate_with(parse_config(ValConfig, argv, "val.py", __doc__ or "", RETIRED))
    return 0


if __name__ == "__main__":
    run_cli(main)
