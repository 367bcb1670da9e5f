"""Experiment files as checked values: which runs there are, and the command line of each step of a run."""

import itertools
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.core.errors import UserError
from utils.core.files import nearest
from utils.core.yamls import load_yaml

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("question", "data", "seeds", "train", "val", "vary", "models", "compare", "picture")
FIGURES = ROOT / "docs" / "figures"
FILES = "published.yaml"  # in the same folder, but no experiment


@dataclass(frozen=True)
class Run:
    """One training and its evaluation; with 0 epochs the evaluation of weights as they are, or as they convert."""

    experiment: str
    name: str  # the model, with what is varied: yolov5n@320
    model: str
    seed: int
    train: dict[str, Any]
    val: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies a row of results.csv."""
        return self.experiment, self.name, str(self.seed)

    def folder(self, project: Path) -> Path:
        return project / self.experiment / f"{self.name}-s{self.seed}"

    @property
    def val_data(self) -> str:
        """The data YAML that is measured on."""
        return self.val.get("data") or self.train["data"]

    def best(self, project: Path) -> Path:
        """The weights that are measured."""
        return self.folder(project) / "train" / "weights" / "best.pt"

    def make(self, project: Path) -> tuple[str, list[str]]:
        """The program that gives `best`, and its arguments."""
        if self.train["epochs"]:
            return "train.py", self.train_args(project)
        wanted = {key: self.train[key] for key in ("weights", "cfg") if self.train.get(key)}
        return "convert.py", [*flags({**wanted, "output": relative(self.best(project))}), "--exist-ok"]

    def train_args(self, project: Path) -> list[str]:
        """Arguments of train.py."""
        folder = self.folder(project)
        own = {"seed": self.seed, "project": relative(folder), "name": "train"}
        return [*flags({**self.train, **own}), "--exist-ok"]

    def val_args(self, project: Path) -> list[str]:
        """Arguments of val.py; --save-json keeps the detections for paired comparisons."""
        folder = self.folder(project)
        own = {
            "weights": relative(self.best(project)),
            "data": self.val_data,
            "imgsz": self.train["imgsz"],
            "project": relative(folder),
            "name": "val",
        }
        kept = {key: self.train[key] for key in ("workers", "device") if key in self.train}
        return [*flags({**kept, **self.val, **own}), "--exist-ok"]


@dataclass(frozen=True)
class Experiment:
    """A file of this folder."""

    name: str
    question: str
    runs: tuple[Run, ...]
    compare: tuple[tuple[str, str], ...] = ()
    vary: tuple[str, ...] = ()  # e.g. 160, 224, 320: what follows the @ in the names
    models: tuple[str, ...] = field(default=())
    picture: bool = False  # the scene in which B is furthest ahead goes into the documentation: its data may be shown

    @property
    def picture_name(self) -> str:
        return f"{self.name}_pair.jpg"

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Names of the runs that are compared with each other."""
        for a, b in self.compare:
            for suffix in [f"@{value}" for value in self.vary] or [""]:
                yield f"{a}{suffix}", f"{b}{suffix}"

    def missing_pairs(self, differences: Sequence[Mapping[str, str]]) -> list[str]:
        """The comparisons that are not recorded, in words."""
        done = {(row["experiment"], row["a"], row["b"], row["seed"]) for row in differences}
        lines = []
        for a, b in self.pairs():
            seeds = dict.fromkeys(str(run.seed) for run in self.runs if run.name == a)
            absent = [seed for seed in seeds if (self.name, a, b, seed) not in done]
            if absent:
                lines.append(f"the paired difference {b} − {a} (seed {', '.join(absent)})")
        return lines


def data_root() -> Path:
    """Where the real data sets are: $YOLOV5_SPD_DATA, else ../shared/data beside the repository."""
    return Path(os.environ.get("YOLOV5_SPD_DATA") or ROOT.parent / "shared" / "data")


def data_path(name: str) -> str:
    """A data set as it stands in commands: a data YAML of the project, else one of the real data sets."""
    own = ROOT / name
    return relative(own if own.is_file() else data_root() / name)


def relative(path: Path) -> str:
    """A path as it stands in recorded commands, which are given in the repository."""
    return os.path.relpath(path, ROOT)


def flags(options: Mapping[str, Any]) -> list[str]:
    """`{imgsz: 64, hyp: [a=1, b=2], rect: true}` as command-line arguments."""
    args: list[str] = []
    for key, value in options.items():
        if value is True:
            args.append(f"--{key}")
        elif isinstance(value, (list, tuple)):
            args += [f"--{key}", *map(str, value)]
        elif value is not False and value != "":
            args += [f"--{key}", str(value)]
    return args


def command(program: str, args: Sequence[str]) -> str:
    """A command line that can be pasted."""
    return shlex.join(["python", *shlex.split(program), *args])


def load_experiment(path: Path) -> Experiment:
    """Read and check one file."""
    data = load_yaml(path)
    for key in data:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key '{key}'{nearest(str(key), KEYS)}")
    for key in ("question", "data", "models"):
        if not data.get(key):
            raise UserError(f"{path}: '{key}:' is missing")
    vary = data.get("vary") or {}
    if len(vary) > 1:
        raise UserError(f"{path}: 'vary:' names {', '.join(vary)}; expected one option")
    values: list[Any] = next(iter(vary.values()), [])
    seeds: list[int] = data.get("seeds") or [0]
    runs = []
    variants: list[tuple[str, dict]] = list(data["models"].items())
    for seed, value, (model, own) in ((s, v, m) for s in seeds for v in values or [None] for m in variants):
        train = {"data": data_path(data["data"]), **(data.get("train") or {}), **own}
        name = model
        if value is not None:
            train[next(iter(vary))], name = value, f"{model}@{value}"
        if train.get("weights"):
            train["weights"] = relative(data_root() / train["weights"])
        val = dict(data.get("val") or {})
        if "data" in val:
            val["data"] = data_path(val["data"])
        runs.append(Run(path.stem, name, model, seed, train, val))
    compare = tuple((str(a), str(b)) for a, b in data.get("compare") or [])
    for model in itertools.chain(*compare):
        if model not in data["models"]:
            raise UserError(f"{path}: 'compare:' names '{model}'{nearest(model, data['models']) or ', not a model'}")
    sizes = {run.model: run.train.get("imgsz") for run in runs}
    if "imgsz" not in vary and any(sizes[a] != sizes[b] for a, b in compare):
        raise UserError(f"{path}: 'compare:' names networks of different 'imgsz'; pairs are measured at one size")
    varied, models = tuple(map(str, values)), tuple(data["models"])
    return Experiment(path.stem, data["question"], tuple(runs), compare, varied, models, bool(data.get("picture")))


def all_experiments(paths: Sequence[str] = ()) -> list[Experiment]:
    """The given files, else all of this folder."""
    files = [Path(path) for path in paths]
    if not files:
        files = sorted(path for path in Path(__file__).parent.glob("*.yaml") if path.name != FILES)
    return [load_experiment(path) for path in files]
