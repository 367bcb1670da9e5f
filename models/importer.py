"""YOLOv5 checkpoints of releases 5.0 to 7.0, of their forks and of SPD-Conv's authors, as a configuration and tensors.

Such a file is a pickle of modules. `utils.core.legacy` turns it into inert records; this file walks the record of the
module tree, takes the architecture from its `yaml` attribute, and checks module by module that the network built here
computes what that one did. What cannot be rebuilt exactly is refused with the name of the part.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.heads import Detect
from models.untrusted import build_described
from models.yolo import KNOWN_KEYS, DetectionModel
from utils.core.errors import UserError, printable
from utils.core.inert import Foreign, TensorRef
from utils.core.legacy import LegacyFile, read_legacy
from utils.core.log import LOGGER

MAX_MODULES = 50_000
DETECTORS = ("Model", "DetectionModel")
RENAMED = {"space_to_depth": "SPD", "Model": "DetectionModel"}  # foreign class -> class here
# What a module of this type computes with, besides its tensors.
CONSTANTS: dict[str, tuple[str, ...]] = {
    "Conv2d": ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    "ConvTranspose2d": ("kernel_size", "stride", "padding", "dilation", "groups", "output_padding"),
    "BatchNorm2d": ("eps", "affine", "track_running_stats"),
    "MaxPool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "AvgPool2d": ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    "Upsample": ("size", "scale_factor", "mode"),
    "LeakyReLU": ("negative_slope",),
    "Bottleneck": ("add",),
    "CrossConv": ("add",),
    "Concat": ("d",),
    "ZeroPad2d": ("padding",),
}


def import_legacy(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], list[str], dict[str, Any]]:
    """Read a foreign checkpoint: (configuration, float32 state dict, class names, facts about the file).

    Nothing in the file is executed. The state dict has exactly the names of `build_model(configuration)`. The facts are
    `licence` (as the file states it, else "unknown"), `origin`, and `imgsz` where the file tells its training size.
    """
    file = read_legacy(path)
    root = file.root if isinstance(file.root, dict) else {"model": file.root}
    record = next((root[key] for key in ("ema", "model") if isinstance(root.get(key), Foreign)), None)
    if record is None:
        raise UserError(f"'{path}' holds no model (keys: {_keys(root)}); expected a YOLOv5 checkpoint with its modules")
    if _short(record.kind) not in DETECTORS or "yaml" not in record.state:
        kind = printable(record.kind)
        raise UserError(f"'{path}' holds a {kind}; expected a YOLOv5 detector (models.yolo.Model) with its yaml")
    modules = dict(_walk(record, file.path))
    cfg = _configuration(record, modules, file)
    model = build_described(cfg, file.path.stat().st_size, file.path)
    state = _state(modules, model, file)
    _same_function(modules, model, file)
    names = _names(record.state.get("names"), model.nc)
    meta = _facts(root, record, file)
    LOGGER.info(
        f"{file.path.name}: imported {meta['origin']} with {model.nc} classes; its weights keep their own licence "
        f"({meta['licence']}{', the file names none' if meta['licence'] == 'unknown' else ''})"
    )
    return model.cfg, state, names, meta


def _short(kind: str) -> str:
    return kind.rpartition(".")[2]


def _keys(root: dict[Any, Any]) -> str:
    return ", ".join(printable(key, 40) for key in list(root)[:8]) or "none"


def _walk(record: Foreign, path: Path) -> Iterator[tuple[str, Foreign]]:
    """(dotted name, record) of every module of the tree, the root under ""."""
    todo: list[tuple[str, Foreign]] = [("", record)]
    for _ in range(MAX_MODULES):
        if not todo:
            return
        name, module = todo.pop()
        yield name, module
        children = _entries(module, "_modules", path)
        prefix = f"{name}." if name else ""
        if len(prefix) > 500 or len(todo) > MAX_MODULES:
            break
        todo += [(f"{prefix}{key}", child) for key, child in children.items() if isinstance(child, Foreign)]
    raise UserError(f"'{path}' is refused: its modules are nested without end")


def _entries(module: Foreign, group: str, path: Path) -> dict[str, Any]:
    """The `_modules`, `_parameters` or `_buffers` of a module by name."""
    entries = module.state.get(group, {})
    if not isinstance(entries, dict) or not all(isinstance(key, str) and len(key) <= 100 for key in entries):
        raise UserError(f"'{path}' is damaged: the {group} of a module have no short names; fetch or save it again")
    return entries


def _configuration(record: Foreign, modules: dict[str, Foreign], file: LegacyFile) -> dict[str, Any]:
    """The YAML of the file with the class count, anchors and activation that its modules really have."""
    cfg = record.state["yaml"]
    if not isinstance(cfg, dict) or not isinstance(cfg.get("backbone"), list) or not isinstance(cfg.get("head"), list):
        raise UserError(f"'{file.path}' has no backbone and head rows in its yaml; expected a YOLOv5 checkpoint")
    cfg = {key: value for key, value in cfg.items() if key in KNOWN_KEYS}
    last = f"model.{len(cfg['backbone']) + len(cfg['head']) - 1}"
    head = modules.get(last)
    if head is None or _short(head.kind) != "Detect":
        found = "nothing" if head is None else printable(head.kind)
        raise UserError(f"'{file.path}' ends in {found} ({last}); expected Detect: only detectors can be imported")
    anchors, strides = _tensor(head, "anchors", file), _tensor(head, "stride", file)
    if strides is None:
        strides = _tensor(record, "stride", file)
    if anchors is None or strides is None or anchors.ndim != 3 or len(anchors) != strides.numel():
        raise UserError(f"'{file.path}' has no anchors and strides in {last}; expected a trained YOLOv5 checkpoint")
    cfg["anchors"] = (anchors * strides.view(-1, 1, 1)).flatten(1).tolist()
    cfg["nc"] = head.state.get("nc", cfg.get("nc"))
    activation = _activation(modules, file.path)
    if activation != "nn.SiLU()":
        cfg["activation"] = activation
    return cfg


def _tensor(record: Foreign, name: str, file: LegacyFile) -> Tensor | None:
    """A tensor attribute or buffer of a module, in float32."""
    ref = record.state.get(name, _entries(record, "_buffers", file.path).get(name))
    return file.tensor(ref).float() if isinstance(ref, TensorRef) else None


def _activation(modules: dict[str, Foreign], path: Path) -> str:
    """The activation of the file's Conv layers, as a model YAML writes it."""
    found = set()
    for name, module in modules.items():
        parent = modules.get(name.rpartition(".")[0])
        if name.endswith(".act") and parent is not None and _short(parent.kind) == "Conv":
            kind = _short(module.kind)
            slope = _constant(module.state.get("negative_slope"), f"'{path}': {name}.negative_slope")
            found.add(f"nn.{kind}({slope if kind == 'LeakyReLU' else ''})")
    found.discard("nn.Identity()")
    if len(found) > 1:
        kinds = printable(", ".join(sorted(found)))
        raise UserError(f"'{path}' mixes activations ({kinds}); expected one for all Conv layers")
    return found.pop() if found else "nn.SiLU()"


def _state(modules: dict[str, Foreign], model: nn.Module, file: LegacyFile) -> dict[str, Tensor]:
    """The tensors under the names of `model`, floating ones in float32; missing and odd-sized ones are refused."""
    refs: dict[str, TensorRef] = {}
    for name, module in modules.items():
        for group in ("_parameters", "_buffers"):
            for key, ref in _entries(module, group, file.path).items():
                if isinstance(ref, TensorRef):
                    refs[f"{name}.{key}".removeprefix(".")] = ref
    state = {}
    for name, own in model.state_dict().items():
        ref = refs.pop(name, None)
        if ref is None:
            raise UserError(f"'{file.path}' has no tensor '{name}', which its architecture needs (was it saved fused?)")
        if ref.shape != tuple(own.shape):
            need = list(own.shape)
            raise UserError(f"'{file.path}': tensor '{name}' is {list(ref.shape)}; its architecture needs {need}")
        state[name] = file.tensor(ref).to(own.dtype)
    spare = [name for name in refs if not name.endswith(".anchor_grid")]
    if spare:
        first = printable(spare[0])
        raise UserError(f"'{file.path}' has {len(spare)} tensors that its architecture lacks, such as '{first}'")
    return state


def _same_function(modules: dict[str, Foreign], model: nn.Module, file: LegacyFile) -> None:
    """Compare the modules of the file with those built here: type, strides, and the constants they compute with."""
    path = file.path
    for name, own in model.named_modules():
        record = modules.get(name)
        if record is None:
            continue
        kind, ours = RENAMED.get(_short(record.kind), _short(record.kind)), type(own).__name__
        if kind != ours:
            theirs = printable(record.kind)
            raise UserError(f"'{path}': {name} is a {theirs}, but its architecture builds a {ours} there")
        if isinstance(own, (DetectionModel, Detect)):
            strides = _tensor(record, "stride", file)
            if strides is not None and strides.tolist() != own.strides:
                theirs = printable(strides.tolist())
                raise UserError(f"'{path}' has strides {theirs}; its architecture has {own.strides}")
        for constant in CONSTANTS.get(ours, ()):
            if constant not in record.state or not hasattr(own, constant):
                continue
            where = f"'{path}': {name}.{constant}"
            theirs, mine = _constant(record.state[constant], where), _constant(getattr(own, constant), where)
            if theirs != mine:
                raise UserError(f"'{path}': {name} has {constant} {printable(theirs)}; its architecture builds {mine}")


def _constant(value: Any, where: str) -> Any:
    """A comparable form: 3 and (3, 3) mean the same to torch's layers, 2 and 2.0 too."""
    items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(items) > 8 or not all(isinstance(v, (str, int, float, type(None))) for v in items):
        raise UserError(f"{where} is a {type(value).__name__}; expected a number, or a short list of numbers")
    return items[0] if items and all(v == items[0] for v in items) else items


def _names(value: Any, nc: int) -> list[str]:
    """Class names from a list or an {id: name} map; numbered ones, with a warning, where they do not fit."""
    if isinstance(value, dict):
        value = [value.get(i, value.get(str(i))) for i in range(len(value))]
    if isinstance(value, (list, tuple)) and len(value) == nc and all(isinstance(v, str) for v in value):
        return list(value)
    LOGGER.warning(f"the file has no {nc} class names; they are called class0 to class{nc - 1}")
    return [f"class{i}" for i in range(nc)]


def _facts(root: dict[Any, Any], record: Foreign, file: LegacyFile) -> dict[str, Any]:
    stated = next((root[key] for key in ("license", "licence") if isinstance(root.get(key), str)), None)
    date = root.get("date")
    meta: dict[str, Any] = {
        "licence": printable(stated or "unknown"),
        "origin": f"a pickled {record.kind}" + (f" of {printable(date[:10])}" if isinstance(date, str) else ""),
    }
    options = root.get("opt")
    options = options.state if isinstance(options, Foreign) else options
    size = options.get("imgsz") if isinstance(options, dict) else None
    size = size[0] if isinstance(size, list) and size else size
    if isinstance(size, int) and 32 <= size <= 8192:
        meta["imgsz"] = size
    return meta
