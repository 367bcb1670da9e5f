"""YOLOv5 checkpoints of releases 5.0 to 7.0, of their forks and of SPD-Conv's authors, as a configuration and tensors.

Such a file is a pickle of modules. `utils.core.legacy` turns it into inert records; this file walks the record of the
module tree, takes the architecture from its `yaml` attribute, and checks module by module that the network built here
computes what that one did. What cannot be rebuilt exactly is refused with the name of the part.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.graph import parse_rows
from models.yolo import KNOWN_KEYS, DetectionModel, resolve
from utils.core.errors import UserError
from utils.core.inert import Foreign, Name, TensorRef
from utils.core.legacy import LegacyFile, read_legacy
from utils.core.log import LOGGER

MAX_MODULES = 50_000
MAX_VALUES = 100_000
MAX_REPEATS = 1000
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
        raise UserError(f"'{path}' holds a {record.kind}; expected a YOLOv5 detector (models.yolo.Model) with its yaml")
    modules = dict(_walk(record, file.path))
    cfg = _configuration(record, modules, file)
    model = _build(cfg, file.path)
    state = _state(modules, model, file)
    _same_function(modules, model, file.path)
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
    return ", ".join(str(key) for key in list(root)[:8]) or "none"


def _walk(record: Foreign, path: Path) -> Iterator[tuple[str, Foreign]]:
    """(dotted name, record) of every module of the tree, the root under ""."""
    todo: list[tuple[str, Foreign]] = [("", record)]
    for _ in range(MAX_MODULES):
        if not todo:
            return
        name, module = todo.pop()
        yield name, module
        children = module.state.get("_modules", {})
        if not isinstance(children, dict):
            raise UserError(f"'{path}' is damaged: module '{name}' has no list of sub-modules")
        prefix = f"{name}." if name else ""
        if len(prefix) > 500:
            break
        todo += [(f"{prefix}{key}", child) for key, child in children.items() if isinstance(child, Foreign)]
    raise UserError(f"'{path}' is refused: its modules are nested without end")


def _plain(value: Any, path: Path) -> Any:
    """`value` as plain lists, dicts and scalars; anything else and structures without end are refused."""
    left = MAX_VALUES

    def convert(item: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > 16:
            raise UserError(f"'{path}' is refused: its model description is nested without end")
        if isinstance(item, (list, tuple)):
            return [convert(x, depth + 1) for x in item]
        if isinstance(item, dict):
            return {str(k): convert(v, depth + 1) for k, v in item.items()}
        if isinstance(item, (str, int, float, type(None))):
            return item
        what = item.dotted if isinstance(item, Name) else getattr(item, "kind", type(item).__name__)
        raise UserError(f"'{path}' is refused: its model description holds a {what}")

    return convert(value, 0)


def _configuration(record: Foreign, modules: dict[str, Foreign], file: LegacyFile) -> dict[str, Any]:
    """The YAML of the file with the class count, anchors and activation that its modules really have."""
    cfg = _plain(record.state["yaml"], file.path)
    if not isinstance(cfg, dict) or not isinstance(cfg.get("backbone"), list) or not isinstance(cfg.get("head"), list):
        raise UserError(f"'{file.path}' has no backbone and head rows in its yaml; expected a YOLOv5 checkpoint")
    cfg = {key: value for key, value in cfg.items() if key in KNOWN_KEYS}
    last = f"model.{len(cfg['backbone']) + len(cfg['head']) - 1}"
    head = modules.get(last)
    if head is None or _short(head.kind) != "Detect":
        found = "nothing" if head is None else head.kind
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


def _build(cfg: dict[str, Any], path: Path) -> DetectionModel:
    """The network of a description, which may give a layer what torch does not take."""
    try:
        _affordable(cfg, path)
        return DetectionModel(cfg)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"'{path}' is refused: its description gives no network ({reason})") from error


def _affordable(cfg: dict[str, Any], path: Path) -> None:
    """Refuse a description whose network could not have been saved in a file of this size, before anything is built."""
    resolved = resolve(cfg, None, 3, None)
    rows = [row for row in (*resolved["backbone"], *resolved["head"]) if isinstance(row, list) and len(row) == 4]
    depth = resolved["depth_multiple"]
    repeats = sum(row[1] * max(depth, 1) for row in rows if isinstance(row[1], int))
    if not 0 < depth <= MAX_REPEATS or not repeats <= MAX_REPEATS or not 0 < resolved["width_multiple"] <= 100:
        raise UserError(f"'{path}' is refused: its description repeats layers without end")
    with torch.device("meta"):
        _, layers = parse_rows(resolved, resolved["ch"], {"nc": resolved["nc"], "anchors": resolved["anchors"]})
    count = sum(parameter.numel() for parameter in layers.parameters())
    if count > path.stat().st_size:
        raise UserError(f"'{path}' is refused: it describes {count} parameters in {path.stat().st_size} bytes")


def _tensor(record: Foreign, name: str, file: LegacyFile) -> Tensor | None:
    """A tensor attribute or buffer of a module, in float32."""
    buffers = record.state.get("_buffers")
    ref = record.state.get(name, buffers.get(name) if isinstance(buffers, dict) else None)
    return file.tensor(ref).float() if isinstance(ref, TensorRef) else None


def _activation(modules: dict[str, Foreign], path: Path) -> str:
    """The activation of the file's Conv layers, as a model YAML writes it."""
    found = set()
    for name, module in modules.items():
        parent = modules.get(name.rpartition(".")[0])
        if name.endswith(".act") and parent is not None and _short(parent.kind) == "Conv":
            kind = _short(module.kind)
            slope = module.state.get("negative_slope")
            found.add(f"nn.{kind}({slope if kind == 'LeakyReLU' else ''})")
    found.discard("nn.Identity()")
    if len(found) > 1:
        raise UserError(f"'{path}' mixes activations ({', '.join(sorted(found))}); expected one for all Conv layers")
    return found.pop() if found else "nn.SiLU()"


def _state(modules: dict[str, Foreign], model: nn.Module, file: LegacyFile) -> dict[str, Tensor]:
    """The tensors under the names of `model`, floating ones in float32; missing and odd-sized ones are refused."""
    refs: dict[str, TensorRef] = {}
    for name, module in modules.items():
        for group in ("_parameters", "_buffers"):
            entries = module.state.get(group)
            for key, ref in entries.items() if isinstance(entries, dict) else ():
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
        raise UserError(f"'{file.path}' has {len(spare)} tensors that its architecture lacks, such as '{spare[0]}'")
    return state


def _same_function(modules: dict[str, Foreign], model: nn.Module, path: Path) -> None:
    """Compare the modules of the file with those built here: type, and the constants that they compute with."""
    for name, own in model.named_modules():
        record = modules.get(name)
        if record is None:
            continue
        kind, ours = RENAMED.get(_short(record.kind), _short(record.kind)), type(own).__name__
        if kind != ours:
            raise UserError(f"'{path}': {name} is a {record.kind}, but its architecture builds a {ours} there")
        for constant in CONSTANTS.get(ours, ()):
            if constant not in record.state or not hasattr(own, constant):
                continue
            theirs, mine = _constant(record.state[constant]), _constant(getattr(own, constant))
            if theirs != mine:
                raise UserError(f"'{path}': {name} has {constant} {theirs!r}; its architecture builds {mine!r}")


def _constant(value: Any) -> Any:
    """A comparable form: 3 and (3, 3) mean the same to torch's layers, 2 and 2.0 too."""
    if isinstance(value, (list, tuple)):
        value = tuple(value)
        return value[0] if value and all(v == value[0] for v in value) else value
    return value


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
        "licence": stated or "unknown",
        "origin": f"a pickled {record.kind}" + (f" of {date[:10]}" if isinstance(date, str) else ""),
    }
    options = root.get("opt")
    options = options.state if isinstance(options, Foreign) else options
    size = options.get("imgsz") if isinstance(options, dict) else None
    size = size[0] if isinstance(size, list) and size else size
    if isinstance(size, int) and 32 <= size <= 8192:
        meta["imgsz"] = size
    return meta
