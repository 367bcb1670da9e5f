"""Detect objects in images, videos, cameras and streams with any model file; a classifier names whole images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.backends import Predictor, load_predictor
from models.backends.base import refuse_other_names
from utils.core.config import config_dict, config_from_kwargs, option, parse_config, refuse_changed, run_cli
from utils.core.device import describe, select_device
from utils.core.errors import UserError
from utils.core.files import increment_path
from utils.core.log import LOGGER
from utils.data.frames import Frame, Source
from utils.data.sources import has_sequence, open_source
from utils.data.spec import load_data
from utils.engine.figures.draw import Style
from utils.engine.inference.classifying import PictureClassifier
from utils.engine.inference.pipeline import Behind, ahead
from utils.engine.inference.predict import Detector, PredictSettings, combine
from utils.engine.inference.records import Forms, Result, class_forms, detection_forms
from utils.engine.inference.tracking import TRACKERS, Tracking
from utils.engine.inference.writers import (
    CropWriter,
    CsvWriter,
    NdjsonWriter,
    PictureWriter,
    TextWriter,
    ViewWriter,
    Writer,
    refuse_overwrite,
    require_gui,
    write_all,
)
from utils.engine.options import NMS_INSIDE, NO_WEIGHTS, PredictorOptions, RunFolderOptions, check_overlap
from utils.engine.speed import speed_line
from utils.ops.detections import Detections

Runner = Detector | PictureClassifier
RETIRED = {
    "--visualize": "feature maps are not drawn; use info.py for the shapes of every layer",
    "--update": "checkpoints need no stripping; export.py writes the deployed file",
    "--dnn": "ONNX files run on ONNX Runtime; just give the .onnx file to --weights",
    "--save-format": "--save-txt writes YOLO rows, --save-json and --save-csv boxes in pixels",
}


ABOUT_BOXES = {"save_crop", "save_conf", "track", "slice", "overlap", "augment", "line_thickness"}
ABOUT_BOXES |= {"classes", "conf_thres", "iou_thres", "max_det", "agnostic_nms"}


@dataclass(frozen=True)
class DetectConfig(RunFolderOptions, PredictorOptions):
    """Options of detect.py; names and defaults as YOLOv5 users know them."""

    source: list[str] = option([], "image, video, folder, glob, list file, URL, webcam number, screen", nargs="+")
    data: str = option("", "data YAML with the class names, for model files without metadata")
    conf_thres: float = option(0.25, "smallest confidence", aliases=("conf",))
    iou_thres: float = option(0.45, "NMS IoU", aliases=("iou",))
    max_det: int = option(1000, "most detections per image")
    view_img: bool = option(False, "show the results in windows; q ends")
    save_txt: bool = option(False, "write labels/*.txt, normalized")
    save_conf: bool = option(False, "add the confidence to --save-txt")
    save_json: bool = option(False, "write predictions.ndjson, a line for each frame")
    save_csv: bool = option(False, "write predictions.csv, a row for each box")
    save_crop: bool = option(False, "write crops/<class>/*.jpg")
    nosave: bool = option(False, "write no annotated images and videos")
    classes: list[int] | None = option(None, "only these class numbers", nargs="+")
    agnostic_nms: bool = option(False, "suppress overlaps across classes")
    batch_size: int = option(1, "frames, or tiles with --slice, run at a time", aliases=("batch",))
    track: str = option("", "number the objects of a video", nargs="?", const="bytetrack", choices=tuple(TRACKERS))
    vid_stride: int = option(1, "use every n-th frame")
    stream_timeout: float = option(60.0, "give a stream up after so many seconds without a frame (0: never)")
    project: str = option("runs/detect", "folder of the runs")
    line_thickness: int = option(3, "line width in pixels")
    hide_labels: bool = option(False, "draw boxes without labels")
    hide_conf: bool = option(False, "draw labels without confidences")


@dataclass(frozen=True)
class DetectReport:
    """What a run did: its folder (None when nothing was written), frames and boxes, and the items that failed."""

    save_dir: Path | None
    frames: int
    boxes: int
    failed: tuple[str, ...]
    speed_ms: dict[str, float]


def detect(cfg: DetectConfig) -> DetectReport:
    """Run the whole pipeline; UserError when nothing of the source could be read."""
    if not cfg.weights:
        raise UserError(NO_WEIGHTS)
    if cfg.line_thickness < 1:
        raise UserError(f"--line-thickness {cfg.line_thickness}; expected 1 or more")
    if cfg.save_conf and not cfg.save_txt:
        raise UserError("--save-conf adds the confidence to the files of --save-txt; give that too")
    check_overlap(cfg)
    if cfg.view_img:
        require_gui()
    tracking = Tracking(cfg.track, cfg.conf_thres) if cfg.track else None
    source = open_source(cfg.source, vid_stride=cfg.vid_stride, stream_timeout=cfg.stream_timeout)
    runner = build_runner(cfg)
    if cfg.track and not has_sequence(source):
        raise UserError("--track needs a video or a stream; a folder of pictures is not a sequence: leave --track out")
    forms = make_forms(cfg, runner)
    save_dir = make_folder(cfg, source)
    writers = make_writers(cfg, save_dir, runner.names, forms)
    view = ViewWriter(forms) if cfg.view_img else None
    boxes = 0
    behind: Behind[tuple[Frame, Result]] = Behind(lambda item: write_all(writers, save_dir, *item))
    try:
        for frame, result, ms in results(source, runner, tracking, cfg):
            boxes += len(result) if isinstance(result, Detections) else 0
            LOGGER.info(console_line(frame, result, ms))
            behind.put((frame, result))
            if view is not None:
                view.write(frame, result)
                if view.closed:
                    break
    except KeyboardInterrupt:
        LOGGER.info("interrupted; what was found so far is kept")
    finally:
        finish(behind, writers, view, source)
    return report(source, runner, save_dir, boxes)


def build_runner(cfg: DetectConfig) -> Runner:
    """The model file(s), warmed up: a Detector, or a PictureClassifier where the model is one."""
    device = select_device(cfg.device)
    LOGGER.info(describe(device))
    names = load_data(cfg.data).names if cfg.data else None
    size = cfg.imgsz or None
    predictors = [load_predictor(w, device=device, half=cfg.half, names=names, imgsz=size) for w in cfg.weights]
    for weights, predictor in zip(cfg.weights, predictors, strict=True):
        refuse_other_names(predictor, names, f"--data {cfg.data}: {weights}")
    names_pictures = any(predictor.task == "classify" for predictor in predictors)
    runner = classifier(cfg, predictors) if names_pictures else detector(cfg, predictors)
    runner.warm_up()
    return runner


def detector(cfg: DetectConfig, predictors: list[Predictor]) -> Detector:
    """Detection with all that the flags ask for."""
    if any(predictor.end2end for predictor in predictors):
        refuse_changed(cfg, set(config_dict(cfg)) - {"iou_thres", "agnostic_nms"}, NMS_INSIDE)
    settings = PredictSettings(
        imgsz=tuple(cfg.imgsz) or predictors[0].imgsz or predictors[0].metadata.imgsz,
        conf_thres=cfg.conf_thres,
        iou_thres=cfg.iou_thres,
        max_det=cfg.max_det,
        classes=None if cfg.classes is None else tuple(cfg.classes),
        agnostic=cfg.agnostic_nms,
        batch_size=cfg.batch_size,
        slice_size=cfg.slice,
        overlap=cfg.overlap,
    )
    return Detector(combine(predictors, augment=cfg.augment), settings)


def classifier(cfg: DetectConfig, predictors: list[Predictor]) -> PictureClassifier:
    """The likeliest classes of whole pictures; flags that are about boxes are refused."""
    file = next(w for w, p in zip(cfg.weights, predictors, strict=True) if p.task == "classify")
    if len(predictors) > 1:
        raise UserError(f"'{file}' is a classifier, which cannot be part of an ensemble; give one model")
    refuse_changed(cfg, set(config_dict(cfg)) - ABOUT_BOXES, f"with '{file}', a classifier, which finds no boxes")
    return PictureClassifier(predictors[0], cfg.imgsz, cfg.batch_size)


def make_forms(cfg: DetectConfig, runner: Runner) -> Forms:
    """How this run's results are drawn and written."""
    style = Style(cfg.line_thickness, cfg.hide_labels, cfg.hide_conf)
    return detection_forms(style, cfg.save_conf) if isinstance(runner, Detector) else class_forms(style)


def make_folder(cfg: DetectConfig, source: Source) -> Path | None:
    """The run folder, if anything is to be written into it."""
    if cfg.nosave and not (cfg.save_txt or cfg.save_crop or cfg.save_csv or cfg.save_json):
        return None
    if cfg.exist_ok:
        refuse_overwrite(Path(cfg.project) / cfg.name, source.files)
    return increment_path(cfg.project, cfg.name, cfg.exist_ok)


def make_writers(cfg: DetectConfig, folder: Path | None, names: Sequence[str], forms: Forms) -> list[Writer]:
    """The outputs that the flags ask for."""
    writers: list[Writer] = []
    if folder is None:
        return writers
    if not cfg.nosave:
        writers.append(PictureWriter(folder, forms))
    if cfg.save_txt:
        writers.append(TextWriter(folder, forms))
    if cfg.save_crop:
        writers.append(CropWriter(folder, names))
    if cfg.save_csv:
        writers.append(CsvWriter(folder, forms))
    if cfg.save_json:
        writers.append(NdjsonWriter(folder, forms))
    return writers


def results(
    source: Source, runner: Runner, tracking: Tracking | None, cfg: DetectConfig
) -> Iterator[tuple[Frame, Result, float]]:
    """Every frame with its result and its share of inference time in ms, while the next frames are being read."""
    batches = source.batches(1 if cfg.slice else cfg.batch_size)
    for frames in batches if source.live else ahead(batches):
        before = runner.speed.seconds.get("inference", 0.0)
        found = runner([frame.image for frame in frames])
        ms = (runner.speed.seconds["inference"] - before) * 1000 / len(frames)
        for frame, result in zip(frames, found, strict=True):
            tracked = tracking.update(frame, result) if tracking and isinstance(result, Detections) else result
            yield frame, tracked, ms


def console_line(frame: Frame, result: Result, ms: float) -> str:
    """`image 1/2 street.jpg: 480x640 3 persons, 1 bus, 12.3ms`; sizes are those of the picture, height first."""
    counter = f" ({frame.index}/{frame.frames or '?'})" if frame.kind == "video" else ""
    h, w = frame.image.shape[:2]
    place = f"{frame.kind} {frame.item}/{frame.items}{counter} {frame.name}"
    return f"{place}: {h}x{w} {result.summary()}, {ms:.1f}ms"


def finish(behind: Behind[Any], writers: list[Writer], view: ViewWriter | None, source: Source) -> None:
    """Write what is waiting and close everything, whatever went wrong before."""
    source.close()
    try:
        behind.close()
    finally:
        for writer in [*writers, *([view] if view else [])]:
            writer.close()


def report(source: Source, runner: Runner, save_dir: Path | None, boxes: int) -> DetectReport:
    """The closing lines."""
    tally = source.tally
    if not tally.frames and tally.failed:
        raise UserError(f"none of the {source.items} source files can be read; the lines above say why")
    LOGGER.info(speed_line(runner.speed.ms(), runner.speed.shape))
    if save_dir is not None:
        LOGGER.info(f"Results saved to {save_dir}")
    if tally.failed and not source.live:
        LOGGER.warning(f"{len(tally.failed)} of {source.items} source files could not be read")
    return DetectReport(save_dir, tally.frames, boxes, tuple(tally.failed), runner.speed.ms())


def run(**kwargs: Any) -> DetectReport:
    """Detect with the options of the command line as keywords: `detect.run(weights="best.pt", source="images/")`."""
    return detect(config_from_kwargs(DetectConfig, **kwargs))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 when at least one picture was read."""
    detect(parse_config(DetectConfig, argv, "detect.py", __doc__ or "", RETIRED))
    return 0


if __name__ == "__main__":
    run_cli(main)
