"""Makes checkpoints as other projects save them: pickles of modules whose classes live in foreign files."""

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

FOREIGN_NAMES = {"SPD": "space_to_depth", "DetectionModel": "Model"}


@contextmanager
def foreign_classes(prefix: str = "") -> Iterator[Callable[[str, str], type]]:
    """Yields `make(module, name)`: importable dummy classes for the time of pickling, gone afterwards."""
    before = dict(sys.modules)

    def make(module: str, name: str) -> type:
        parts = (prefix + module).split(".")
        for package in (".".join(parts[:i]) for i in range(1, len(parts))):
            sys.modules.setdefault(package, types.ModuleType(package))
        home = sys.modules.get(prefix + module)
        if home is None or home is before.get(prefix + module):
            home = sys.modules[prefix + module] = types.ModuleType(prefix + module)
        if not hasattr(home, name):
            setattr(home, name, type(name, (), {"__module__": prefix + module, "__qualname__": name}))
        return getattr(home, name)

    try:
        yield make
    finally:
        for name in [n for n in sys.modules if n not in before]:
            del sys.modules[name]
        sys.modules.update(before)


def as_foreign(model: nn.Module, make: Callable[[str, str], type], names: Any = None) -> Any:
    """The module tree with every class of this project replaced by a foreign one that has the same attributes."""

    def convert(module: nn.Module) -> Any:
        kind = type(module)
        if kind.__module__.startswith("torch."):
            twin = kind.__new__(kind)
        else:
            name = FOREIGN_NAMES.get(kind.__name__, kind.__name__)
            twin = make("models.yolo" if name in ("Detect", "Model") else "models.common", name)()
        own = dict(module.__dict__)
        twin.__dict__.update({k: v for k, v in own.items() if not k.startswith("_") and k not in ("rows", "cfg")})
        twin.__dict__["_parameters"], twin.__dict__["_buffers"] = own["_parameters"], own["_buffers"]
        twin.__dict__["_modules"] = {k: convert(child) for k, child in own["_modules"].items()}
        if kind.__name__ == "Detect":
            twin.stride = torch.tensor([float(s) for s in module.strides])
        return twin

    root = convert(model)
    cfg = dict(model.cfg)
    root.yaml = {k: cfg[k] for k in ("nc", "depth_multiple", "width_multiple", "backbone", "head", "anchors")}
    root.names = names if names is not None else [f"n{i}" for i in range(model.nc)]
    return root


def save_foreign(
    model: nn.Module,
    path: Path,
    *,
    half: bool = True,
    stream: bool = False,
    prefix: str = "",
    names: Any = None,
    **more: Any,
) -> Path:
    """Write `model` as YOLOv5 would: a dictionary with the pickled modules, in torch's zip or its earlier format."""
    with foreign_classes(prefix) as make:
        root = as_foreign(model.half() if half else model, make, names)
        data = {"epoch": -1, "best_fitness": None, "model": root, "ema": None, "optimizer": None, **more}
        torch.save(data, path, _use_new_zipfile_serialization=not stream)
    return path
