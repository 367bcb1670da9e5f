"""Export a checkpoint to a deployment format, and prove that the file says what PyTorch says.

python export.py --weights runs/train/exp/weights/best.pt --include onnx openvino --data data/demo.yaml
python export.py --weights best.pt --benchmark --data data/demo.yaml
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from models.backends import FORMATS, Format, exportable, load_predictor
from models.backends.base import DEFAULT_PREPROCESSING, DYNAMIC_CHOICES, Metadata, Predictor, pair
from models.backends.graph import ExportJob, NmsSettings, nms_dict
from models.backends.pictures import Pictures, choose
from models.backends.pytorch import PyTorchPredictor
from models.backends.verify import TOLERANCES, Difference, compare, milliseconds
from models.fusion import fuse
from models.graph import check_size
from models.weights import LoadedModel, load_model
from utils.core.config import config_dict, config_from_kwargs, option, parse_config, refuse_changed, run_cli
from utils.core.device import select_device
from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.core.files import existing_file
from utils.core.log import LOGGER
from utils.data.index import LabelIndex, build_index
from utils.data.spec import DataSpec, load_data
from utils.engine.evaluation.classification import validate_classifier
from utils.engine.evaluation.evaluate import EvalPlan, check_classes, evaluate
from utils.engine.evaluation.report import shown
from utils.engine.evaluation.validate import ValSettings
from utils.engine.options import NO_WEIGHTS

VERSION = "1.0"
FEW = 20  # boxes a picture that are compared where none reaches the confidence of the NMS inside
RETIRED = {
    "--simplify": "the exported graph is always simplified",
    "--train": "a file always holds the network in evaluation mode",
    "--inplace": "the graph does not depend on it",
    "--keras": "TensorFlow formats are not written; use onnx or openvino",
    "--optimize": "use --include torch_export, whose graph compiles for mobile",
    "--mlmodel": "Core ML is not written; use onnx",
    "--per-tensor": "int8 weights are quantized per channel",
    "--cache": "TensorRT's timing cache is not used",
    "--verbose": "errors of the exporters are shown as they are",
    "--topk-per-class": "use --max-det",
    "--topk-all": "use --max-det",
}


@dataclass(frozen=True)
class ExportConfig:
    """Options of export.py; names and defaults as YOLOv5 users know them."""

    weights: str = option("", "checkpoint: .pt or .safetensors")
    include: list[str] = option(
        [], "formats to write; default: onnx, with --benchmark all", choices=exportable(), nargs="+"
    )
    data: str = option("", "data YAML: for verification with AP, for int8 calibration")
    source: str = option("", "image or folder to verify on instead of --data or the bundled synthetic scenes")
    imgsz: list[int] = option(
        [], "network size: one number, or height and width; default: what the model was trained for",
        aliases=("img", "img_size"), nargs="+",
    )  # fmt: skip
    batch_size: int = option(1, "images at a time that the file takes", aliases=("batch",))
    device: str = option(
        "cpu", "cpu, mps, or a GPU number: TorchScript files and engines run on what they were made on"
    )
    half: bool = option(False, "16-bit float weights; inputs and outputs stay 32-bit")
    int8: bool = option(False, "8-bit weights and activations, calibrated on --data (ONNX, OpenVINO, TensorRT)")
    dynamic: str = option(
        "", "axes that may vary; without a value: all", choices=DYNAMIC_CHOICES, nargs="?", const="all"
    )
    nms: str = option(
        "", "NMS inside the file: fixed (max-det rows) or dynamic (as many as there are); without a value: fixed",
        choices=("fixed", "dynamic"), nargs="?", const="fixed",
    )  # fmt: skip
    agnostic_nms: bool = option(False, "with --nms: suppress overlaps across classes")
    conf_thres: float | None = option(None, "with --nms: smallest confidence; default: 0.25", aliases=("conf",))
    iou_thres: float | None = option(None, "with --nms: IoU; default: 0.45", aliases=("iou",))
    max_det: int | None = option(None, "with --nms: most detections per image; default: 300")
    opset: int = option(18, "ONNX operator set")
    workspace: float = option(4.0, "memory in GB that TensorRT may use while it builds")
    fuse: bool = option(True, "fold normalization and SPD into convolutions, which changes no result")
    verify: bool = option(True, "compare the file with PyTorch on images")
    images: int = option(8, "images to verify on")
    calibration_images: int = option(128, "images to calibrate int8 on")
    output: str = option("", "folder to write to; default: beside the checkpoint")
    benchmark: bool = option(False, "print a table of the formats: size, AP, AP_S, ms per image")


@dataclass
class Exported:
    """What became of one format. `failure` is empty when the file is there and says what PyTorch says."""

    format: Format
    path: Path
    failure: str = ""
    skipped: str = ""  # why it was not tried
    size_mb: float = float("nan")
    ms: float = float("nan")
    differences: list[Difference] = field(default_factory=list)  # one for each shape that was compared
    metrics: dict[str, float] = field(default_factory=dict)


Measure = Callable[[Predictor, NmsSettings | None], dict[str, float]]


class Export:
    """One checkpoint on its way to its formats: what is the same for all of them."""

    def __init__(self, cfg: ExportConfig):
        self.cfg = cfg
        self.weights = existing_file(cfg.weights, "checkpoint --weights")
        self.device = select_device(cfg.device)
        self.loaded = load_model(self.weights, device=str(self.device))
        self.task = self.loaded.model.task
        self.nms = nms_settings(cfg, self.task)
        self.metadata = describe(self.loaded, cfg, self.nms)
        self.network = self.loaded.model
        if cfg.fuse:
            self.network = fuse(self.network)
            for line in self.network.fusion_report:
                LOGGER.info(f"fusion: {line}")
        self.network.requires_grad_(False)
        names, imgsz = self.loaded.names, self.metadata.imgsz
        self.reference = PyTorchPredictor(self.loaded.model, names, imgsz=imgsz, device=self.device, fuse=False)
        self.pictures = self._choose(self.metadata)
        self.measure: Measure | None = measure_on(cfg.data, self.metadata) if cfg.data else None
        self.expected: dict[str, float] = {}

    def _choose(self, metadata: Metadata) -> Pictures:
        cfg = self.cfg
        return choose(metadata, data=cfg.data, source=cfg.source, count=cfg.images, batch=metadata.batch)

    def shapes(self) -> Iterator[Pictures]:
        """What to verify on: pictures of the traced shape, and where axes are dynamic those of another one."""
        yield self.pictures
        meta = self.metadata
        height, width = meta.imgsz
        if meta.dynamic_hw:
            smaller = -(-3 * height // (4 * meta.max_stride)) * meta.max_stride
            height = smaller if smaller < height else height + meta.max_stride
            width = height if meta.task == "classify" else width
        if meta.dynamic:
            yield self._choose(replace(meta, imgsz=(height, width), batch=meta.batch + meta.dynamic_batch))

    def write(self, fmt: Format) -> Exported:
        """Writes, reads back and compares one format; a failure is reported, not raised, so that the others follow."""
        folder = Path(self.cfg.output) if self.cfg.output else self.weights.parent
        done = Exported(fmt, folder / (self.weights.stem + fmt.suffix.rstrip("/")))
        if self.cfg.int8 and not fmt.int8:
            done.failure = f"--int8 does not exist for {fmt.title}; it does for {', '.join(_int8_formats())}"
            return done
        try:
            _make(folder)
            fmt.load_module().export(self._job(done.path))
            done.size_mb = size_mb(done.path)
            LOGGER.info(f"{fmt.title}: {done.path} ({done.size_mb:.1f} MB), {self._shapes()}")
            if self.cfg.verify:
                self._verify(done)
        except (UserError, OSError, RuntimeError, ValueError) as error:  # the exporters' own are among these
            done.failure = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {str(error)[:300]}"
        return done

    def _job(self, path: Path) -> ExportJob:
        calibration = None
        if self.cfg.int8:
            if not self.cfg.data:
                raise UserError("--int8 needs images to calibrate on: add --data DATA.yaml")
            calibration = choose(
                self.metadata, data=self.cfg.data, split="train",
                count=self.cfg.calibration_images, batch=self.metadata.batch,
            )  # fmt: skip
            LOGGER.info(f"int8 calibration on {calibration.origin}")
        return ExportJob(self.network, self.metadata, path, self.nms, calibration, self.cfg.opset, self.cfg.workspace)

    def _shapes(self) -> str:
        batch, channels, (height, width) = self.metadata.batch, self.metadata.channels, self.metadata.imgsz
        free = f", dynamic {self.metadata.dynamic}" if self.metadata.dynamic else ""
        return f"input images float32 [{batch}, {channels}, {height}, {width}]{free}"

    def _verify(self, done: Exported) -> None:
        predictor = load_predictor(done.path, device=self.device)
        tolerance = TOLERANCES[self.metadata.precision]
        failures: list[str] = []
        for pictures in self.shapes():
            difference = compare(self.reference, predictor, pictures)
            if self.nms and not difference.problem and not (difference.boxes or difference.detections):
                difference = self._at_any_confidence(done, pictures)
            shape = f"[{pictures.batch}, {pictures.metadata.channels}, {', '.join(map(str, pictures.metadata.imgsz))}]"
            LOGGER.info(f"{done.format.title}: verified on {pictures.origin} at {shape}: {difference}")
            failures += [f"{failure} at {shape}" for failure in difference.failures(tolerance)]
            done.differences.append(difference)
        if self.measure is not None:
            self.expected = self.expected or self.measure(self.reference, self.nms)
            done.metrics = self.measure(predictor, self.nms)
            both = {key: (value, self.expected[key]) for key, value in done.metrics.items()}
            text = ", ".join(f"{key} {own:.4f} (PyTorch {expected:.4f})" for key, (own, expected) in both.items())
            LOGGER.info(f"{done.format.title}: {text} on {self.cfg.data}")
            name, (own, expected) = next(iter(both.items()))
            if abs(own - expected) > tolerance.ap or math.isnan(own) != math.isnan(expected):
                failures.append(f"{name} {own:.4f} is not PyTorch's {expected:.4f}")
        if self.cfg.benchmark:
            done.ms = milliseconds(predictor, next(iter(self.pictures)))
        done.failure = "; ".join(failures)

    def _at_any_confidence(self, done: Exported, pictures: Pictures) -> Difference:
        """The comparison for a copy that lets more pass, where no box reaches --conf-thres and nothing was compared."""
        assert self.nms is not None
        confidence = self._confidence_of_a_few(pictures)
        LOGGER.info(
            f"no box of these pictures reaches --conf-thres {self.nms.conf_thres:g}: compared at {confidence:.2g}"
        )
        nms = replace(self.nms, conf_thres=confidence)
        metadata = replace(self.metadata, nms=nms_dict(nms))
        with TemporaryDirectory() as folder:
            path = Path(folder) / done.path.name
            done.format.load_module().export(replace(self._job(path), metadata=metadata, nms=nms))
            return compare(self.reference, load_predictor(path, device=self.device), pictures)

    def _confidence_of_a_few(self, pictures: Pictures) -> float:
        """A confidence that some boxes of each picture reach."""
        least = 1.0
        for images in pictures:
            for rows in self.reference(images):
                best = (rows[:, 4:5] * rows[:, 5:]).amax(1)
                least = min(least, float(best.topk(min(FEW, len(best))).values[-1]))
        return least


def nms_settings(cfg: ExportConfig, task: str) -> NmsSettings | None:
    """The NMS that goes into the file, None without --nms; its options are refused where they would do nothing."""
    options = {"conf_thres": cfg.conf_thres, "iou_thres": cfg.iou_thres, "max_det": cfg.max_det}
    given = {key: value for key, value in options.items() if value is not None}
    if not cfg.nms:
        idle = [*given, *(["agnostic_nms"] if cfg.agnostic_nms else [])]
        if idle:
            raise UserError(f"--{idle[0].replace('_', '-')} is about the NMS inside the file; add --nms")
        return None
    if task != "detect":
        raise UserError(f"--nms with a model of task {task}; it belongs to detectors")
    return NmsSettings(**given, agnostic=cfg.agnostic_nms, count=cfg.nms)


def describe(loaded: LoadedModel, cfg: ExportConfig, nms: NmsSettings | None) -> Metadata:
    """The metadata of the files to be written; refuses sizes that the network cannot take."""
    model, meta = loaded.model, loaded.meta
    if cfg.half and cfg.int8:
        raise UserError("--half and --int8 together; choose one precision")
    if cfg.batch_size < 1:
        raise UserError(f"--batch-size {cfg.batch_size}; expected 1 or more")
    size = pair(cfg.imgsz or meta.get("imgsz") or 640)
    stride = model.max_stride
    check_size(size, stride)
    if model.task == "classify" and size[0] != size[1]:
        raise UserError(f"--imgsz {size[0]} {size[1]}; expected one side, since a classifier sees squares")
    return Metadata(
        names=tuple(loaded.names),
        imgsz=size,
        strides=tuple(model.strides),
        task=model.task,
        batch=cfg.batch_size,
        channels=model.cfg.get("ch", 3),
        max_stride=stride,
        dynamic=cfg.dynamic or None,
        precision="int8" if cfg.int8 else "fp16" if cfg.half else "fp32",
        nms=nms_dict(nms),
        preprocessing=dict(meta.get("preprocessing") or DEFAULT_PREPROCESSING),
        version=VERSION,
        licence=str(meta.get("licence", "")),
    )


def measure_on(data: str, metadata: Metadata) -> Measure | None:
    """A function from a predictor to its AP (or top-1) on the validation split, with one letterbox size for all."""
    spec = load_data(data)
    check_classes(metadata, spec.names, spec.yaml.name)
    if metadata.task == "classify":
        return lambda predictor, nms: measure_classifier(predictor, spec)
    index: LabelIndex = build_index(spec, "val")
    if not len(index.cls):
        LOGGER.warning(f"{data}: the images of 'val:' have no labels, so no AP is measured")
        return None
    plan = EvalPlan(imgsz=metadata.imgsz, batch_size=max(metadata.batch, 8), workers=0, rect=False)

    def measure(predictor: Predictor, nms: NmsSettings | None) -> dict[str, float]:
        settings = ValSettings() if nms is None else ValSettings().inside(asdict(nms))
        result = evaluate(predictor, index, list(index.names), plan, settings, Dist.single(predictor.device))
        return {key: float(result.metrics[key]) for key in ("AP", "AP50", "AP_S")}

    return measure


def measure_classifier(predictor: Predictor, spec: DataSpec) -> dict[str, float]:
    """Top-1 and top-5 accuracy on the validation split."""
    result, _ = validate_classifier(predictor, spec, Dist.single(predictor.device))
    return {key: float(result.metrics[key]) for key in ("top1", "top5")}


def _make(folder: Path) -> None:
    """The folder to write to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"the folder '{folder}' cannot be made ({e.strerror}); choose another --output") from e


def size_mb(path: Path) -> float:
    """Size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files) / 1e6


def _int8_formats() -> list[str]:
    return [f.name for f in FORMATS.values() if f.int8]


def benchmark_table(rows: Sequence[Exported]) -> str:
    """The table of --benchmark."""
    columns = ("top1", "top5") if any("top1" in row.metrics for row in rows) else ("AP", "AP_S")
    lines = [f"{'format':<14}{'MB':>8}{columns[0]:>9}{columns[1]:>9}{'ms/image':>10}  note"]
    for row in rows:
        first, second = (row.metrics.get(key, float("nan")) for key in columns)
        note = row.failure or row.skipped
        cells = ((row.size_mb, 8, 1), (first, 9, 4), (second, 9, 4), (row.ms, 10, 1))
        numbers = "".join(shown(value, digits).rjust(width) for value, width, digits in cells)
        lines.append(f"{row.format.title:<14}{numbers}  {note}".rstrip())
    return "\n".join(lines)


def benchmark(export: Export, kinds: Sequence[str]) -> list[Exported]:
    """Those of the formats `kinds` that this machine can run, PyTorch first."""
    native = Exported(FORMATS["pytorch"], export.weights, size_mb=size_mb(export.weights))
    predictor = PyTorchPredictor(
        export.loaded.model, export.loaded.names, imgsz=export.metadata.imgsz, device=export.device
    )
    native.ms = milliseconds(predictor, next(iter(export.pictures)))
    if export.measure is not None:
        native.metrics = export.expected = export.measure(export.reference, export.nms)
    rows = [native]
    for fmt in (FORMATS[name] for name in kinds):
        absent = [p for p in fmt.requires if importlib.util.find_spec(p) is None]
        if absent or (export.cfg.int8 and not fmt.int8):
            reason = f"not tried: {', '.join(absent)} not installed" if absent else "not tried: no int8"
            rows.append(Exported(fmt, Path(), skipped=reason))
        else:
            rows.append(export.write(fmt))
    return rows


def export_with(cfg: ExportConfig) -> list[Exported]:
    """Whatever the options ask for; the caller looks at `failure`."""
    if not cfg.weights:
        raise UserError(NO_WEIGHTS)
    if cfg.benchmark and not cfg.verify:
        raise UserError("--benchmark measures what it verifies; leave --no-verify out")
    kinds = [*dict.fromkeys(cfg.include or (exportable() if cfg.benchmark else ["onnx"]))]
    idle = {"opset"} if not {*kinds} & {"onnx", "openvino", "engine"} else set()
    idle |= {"workspace"} if "engine" not in kinds else set()
    refuse_changed(cfg, set(config_dict(cfg)) - idle, f"with --include {' '.join(kinds)}")
    if cfg.calibration_images != ExportConfig.calibration_images and not cfg.int8:
        raise UserError("--calibration-images is about --int8; give that too")
    if cfg.images < 1 or cfg.calibration_images < 1:
        raise UserError("--images and --calibration-images need at least 1")
    export = Export(cfg)
    if cfg.benchmark:
        rows = benchmark(export, kinds)
        LOGGER.info(benchmark_table(rows))
        return rows
    return [export.write(FORMATS[name]) for name in kinds]


def run(**kwargs: Any) -> list[Exported]:
    """Export from Python: the keywords are the flags, `export.run(weights="best.pt", include=["onnx"])`."""
    rows = export_with(config_from_kwargs(ExportConfig, **kwargs))
    failed = [f"{row.format.title}: {row.failure}" for row in rows if row.failure]
    if failed:
        raise UserError(" | ".join(failed))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; a failed export or a mismatch ends with a non-zero exit code."""
    rows = export_with(parse_config(ExportConfig, argv, "export.py", __doc__ or "", RETIRED))
    for row in rows:
        if row.failure:
            print(f"error: {row.format.title}: {' '.join(row.failure.split())}", file=sys.stderr, flush=True)
    return int(any(row.failure for row in rows))


if __name__ == "__main__":
    run_cli(main)
