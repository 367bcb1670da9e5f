"""What `train.py` can be told: one frozen config, from which flags, help and `train.run(**kw)` are made."""

import re
from dataclasses import dataclass

import torch

from utils.core.config import option
from utils.core.errors import UserError
from utils.engine.options import LabelOptions, RunFolderOptions, check_overlap

PRESETS = ("v6.0", "v7.0")

# Flags of YOLOv5 that do not exist here, and what to use.
RETIRED = {
    "--evolve": "search hyper-parameters with tune.py",
    "--evolve-population": "search hyper-parameters with tune.py",
    "--resume-evolve": "tune.py continues from its SQLite storage",
    "--quad": "use --multi-scale or a larger --imgsz",
    "--bucket": "copy runs/ with a tool of your own; nothing is uploaded",
    "--adam": "use --optimizer Adam",
    "--entity": "set WANDB_ENTITY in the environment and use --loggers wandb",
    "--upload-dataset": "nothing is uploaded",
    "--bbox-interval": "pictures lie in the run folder",
    "--artifact-alias": "nothing is uploaded",
    "--local-rank": "start with torchrun, which sets LOCAL_RANK",
    "--nosave": "checkpoints are what makes a run resumable; use --save-every to write fewer",
}


@dataclass(frozen=True)
class TrainConfig(RunFolderOptions, LabelOptions):
    """Options of train.py; names and defaults are those of YOLOv5 6.0 where it has them."""

    weights: str = option("", "checkpoint to start from ('' = from scratch): this project's, or an official YOLOv5 .pt")
    cfg: str = option("", "model YAML; default: the architecture of --weights")
    data: str = option("data/demo.yaml", "data YAML")
    hyp: list[str] = option(
        [], "hyper-parameter YAML and/or key=value overrides; default: the preset's file", nargs="+"
    )
    preset: str = option("v6.0", "recipe: v6.0 (the paper's) or v7.0", choices=PRESETS)
    epochs: int = option(300, "number of epochs")
    batch_size: int = option(16, "images per step over all processes; -1 measures what fits (CUDA)", aliases=("batch",))
    imgsz: int = option(
        640, "image size in pixels, a multiple of the model's largest stride", aliases=("img", "img-size")
    )
    resume: str | None = option(
        None, "continue a run: a checkpoint, or nothing for the newest", nargs="?", const="newest"
    )
    device: str = option("", "cpu, mps, 0, or 0,1,2,3 (starts torchrun)")
    workers: int = option(8, "loader processes per rank; 0 loads in the training process")
    project: str = option("runs/train", "folder of runs")
    seed: int = option(0, "seed of everything random")
    deterministic: str = option("off", "deterministic algorithms on GPUs", choices=("off", "warn", "error"))
    optimizer: str = option("SGD", "optimizer", choices=("SGD", "Adam", "AdamW"))
    cos_lr: bool = option(False, "cosine schedule (the default of preset v6.0)")
    linear_lr: bool = option(False, "linear schedule (the default of preset v7.0)")
    amp: str = option("auto", "mixed precision", choices=("auto", "fp16", "bf16", "off"))
    compile: bool = option(False, "torch.compile the network (not bit-exact)")
    sync_bn: bool = option(False, "BatchNorm statistics over all GPUs")
    save_every: str = option(
        "10m", "checkpoint within an epoch: minutes (10m), seconds (30s) or steps (500); 0 = never"
    )
    save_period: int = option(-1, "also keep epochN.pt every N epochs")
    patience: int = option(100, "stop after this many epochs without a better fitness; 0 = never")
    noval: bool = option(False, "validate after the last epoch only")
    noplots: bool = option(False, "write no pictures")
    noautoanchor: bool = option(False, "keep the YAML's anchors whatever the data")
    rect: bool = option(False, "rectangular batches by aspect ratio (no mosaic, no shuffling)")
    multi_scale: bool = option(False, "every batch at a random size of 0.5 to 1.5 x imgsz")
    image_weights: bool = option(False, "draw images of hard classes more often")
    single_cls: bool = option(False, "treat all classes as one")
    freeze: list[int] = option([0], "freeze the first N layers, or the layers listed", nargs="+")
    label_smoothing: float | None = option(None, "label smoothing; default: that of --hyp")
    cache: str | None = option(
        None, "cache images in ram (shared by all workers) or on disk", nargs="?", const="ram", choices=("ram", "disk")
    )
    slice: int = option(0, "read large images as tiles of this size; 0 = whole images")
    overlap: float = option(0.2, "overlap of neighboring tiles, as a fraction of --slice")
    download: bool = option(False, "allow the data YAML's download: entry to fetch and check files")
    loggers: list[str] = option(
        [], "loggers beside results.csv and TensorBoard", nargs="*", choices=("wandb", "mlflow")
    )
    max_bad_steps: int = option(20, "stop after this many non-finite steps in a row")
    timeout: int = option(600, "seconds that a rank waits for the others")

    def __post_init__(self) -> None:
        lowest = {"epochs": 1, "imgsz": 1, "max_bad_steps": 1, "workers": 0, "patience": 0, "seed": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}; expected {low} or more")
        if self.batch_size < 1 and self.batch_size != -1:
            raise UserError(f"--batch-size {self.batch_size}; expected 1 or more, or -1 to measure what fits")
        if min(self.freeze, default=0) < 0:
            raise UserError(f"--freeze {' '.join(map(str, self.freeze))}; expected numbers of 0 or more")
        if self.cos_lr and self.linear_lr:
            raise UserError("--cos-lr and --linear-lr exclude each other")
        if self.resume is None and not (self.weights or self.cfg):
            raise UserError("nothing to train: give --cfg models/yolov5-spd-n.yaml, or --weights, or both")
        for one, other in (("rect", "image_weights"), ("noval", "image_weights")):
            if getattr(self, one) and getattr(self, other):
                raise UserError(f"--{one} and --{other.replace('_', '-')} exclude each other")
        if self.noval and self.patience != type(self).patience:
            raise UserError("--noval and --patience exclude each other: without validation there is no fitness")
        check_overlap(self)
        self.save_interval()

    def save_interval(self) -> tuple[float, int]:
        """`save_every` as (seconds, steps); zero means not by that measure."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([ms])|(\d+)", str(self.save_every).strip().lower())
        if match is None:
            raise UserError(f"--save-every {self.save_every}; expected 10m, 30s or a whole number of steps, 0 or more")
        number, unit, steps = match.groups()
        return (0.0, int(steps)) if steps else (float(number) * (60 if unit == "m" else 1), 0)

    @property
    def cosine(self) -> bool:
        """Whether the learning rate falls as a cosine."""
        return self.cos_lr or (self.preset == "v6.0" and not self.linear_lr)

    @property
    def warmup_floor(self) -> int:
        """Least number of warm-up iterations."""
        return 1000 if self.preset == "v6.0" else 100

    @property
    def hyp_file(self) -> str:
        """The hyper-parameter file: the one given, else the preset's."""
        files = [text for text in self.hyp if "=" not in text]
        if len(files) > 1:
            raise UserError(f"--hyp names {len(files)} files; expected one file and key=value overrides")
        return files[0] if files else ""

    @property
    def hyp_overrides(self) -> list[str]:
        """The key=value parts of --hyp."""
        extra = [] if self.label_smoothing is None else [f"label_smoothing={self.label_smoothing}"]
        return [text for text in self.hyp if "=" in text] + extra


def precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of --amp: fp16 on CUDA by default, off elsewhere."""
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "off"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; on a CPU use --amp bf16 or off")
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[name]


# What may differ from the interrupted run at --resume; everything else is part of what is being continued.
RESUMABLE = (
    "resume", "device", "workers", "epochs", "project", "save_every", "save_period", "loggers",
    "timeout", "cache", "deterministic", "noplots", "patience", "max_bad_steps", "rebuild_cache", "download",
)  # fmt: skip
