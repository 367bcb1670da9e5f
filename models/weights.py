"""Weights in and out of models: what a checkpoint says about a network, loading it, and partial transfer.

A checkpoint's model part is a plain dictionary (`pack_model`); the network is rebuilt from the configuration inside.
Files of other projects go through `models.importer`, which never executes anything from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.graph import Network
from models.heads import Detect
from models.untrusted import build_described
from models.yolo import DetectionModel
from utils.core.checkpoint import FORMAT, is_native, load_checkpoint
from utils.core.errors import UserError, printable

VERSION = 1
PARTS = {"version": int, "model_cfg": dict, "names": list, "meta": dict, "state": dict}
FACTS = {"imgsz": int | None, "preprocessing": dict | None, "licence": str, "origin": str}
EXPORTED = (".pt2", ".torchscript", ".onnx", ".xml", "_openvino_model", ".engine")  # what a network cannot be read from
BOX_OUTPUTS = 5  # x, y, w, h, objectness: what a head keeps when its classes change


@dataclass(frozen=True)
class LoadedModel:
    """A network in float32 and eval mode, its class names, and what its file says (task, imgsz, licence, ...)."""

    model: Network
    names: list[str]
    meta: dict[str, Any]


def lineage(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says about where its weights come from; it holds for whatever is trained from them too."""
    return {key: meta[key] for key in ("licence", "origin") if key in meta}


def pack_model(model: Network, names: Sequence[str], imgsz: int, **meta: Any) -> dict[str, Any]:
    """The model part of a checkpoint: configuration, names, image size, further facts as `meta`, and the tensors."""
    if len(names) != model.nc:
        raise UserError(f"{len(names)} class names for a model of {model.nc} classes; give one name for each class")
    facts = {"task": model.task, "imgsz": imgsz, "strides": list(model.strides), **meta}
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": model.task,
        "model_cfg": model.cfg,
        "names": [str(name) for name in names],
        "imgsz": imgsz,
        "meta": facts,
        "state": {key: tensor.detach().cpu().clone() for key, tensor in model.state_dict().items()},
    }


def unpack_model(data: Mapping[str, Any], source: str | Path) -> LoadedModel:
    """The inverse of `pack_model`; `data` may hold more keys (a training checkpoint)."""
    absent = [key for key in ("version", "model_cfg", "names", "state") if key not in data]
    if data.get("format") != FORMAT or absent:
        raise UserError(
            f"'{source}' is no model checkpoint of this project (it lacks {', '.join(absent) or 'the format mark'});"
            " expected a file written by train.py or convert.py"
        )
    _check_kinds(data, PARTS, source)
    if data["version"] > VERSION:
        raise UserError(
            f"'{source}' has format version {data['version']}; expected at most {VERSION}; update this program"
        )
    facts = {"task": data.get("task"), "imgsz": data.get("imgsz"), **data.get("meta", {})}
    _check_kinds(facts, FACTS, source)
    return _rebuild(data["model_cfg"], data["state"], data["names"], facts, source)


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> LoadedModel:
    """A network from a .pt or .safetensors file of this project, or from a checkpoint of YOLOv5 or the SPD authors."""
    path = Path(path)
    if path.name.lower().endswith(EXPORTED):
        raise UserError(f"'{path}' is an exported file; expected the checkpoint that it was made from")
    if not path.is_file():
        raise UserError(f"weights '{path}' not found in {Path.cwd()}; give a file, no weights come with the project")
    if is_native(path):
        loaded = unpack_model(load_checkpoint(path), path)
    else:
        from models.importer import import_legacy

        cfg, state, names, meta = import_legacy(path)
        loaded = _rebuild(cfg, state, names, meta, path)
    loaded.model.to(device)
    return loaded


def _check_kinds(data: Mapping[str, Any], kinds: Mapping[str, Any], source: str | Path) -> None:
    for key, kind in kinds.items():
        if key in data and not isinstance(data[key], kind):
            raise UserError(
                f"'{source}' is damaged: its {key} is a {type(data[key]).__name__}; expected "
                f"{getattr(kind, '__name__', kind)}; fetch or save it again"
            )


def _rebuild(
    cfg: dict[str, Any], state: Mapping[str, Tensor], names: Sequence[str], facts: dict[str, Any], source: str | Path
) -> LoadedModel:
    model = build_described(cfg, _bytes(state, source), source)
    wrong = _differences(model.state_dict(), state)
    if wrong:
        what = printable("; ".join(wrong[:3]), 500)
        raise UserError(f"'{source}': its tensors do not fit its model configuration: {what}")
    model.load_state_dict(state)
    if isinstance(model, DetectionModel):
        if not ((model.anchors > 0) & model.anchors.isfinite()).all():
            raise UserError(f"'{source}' has anchors that are no sizes; expected widths and heights above 0")
        model.cfg = {**model.cfg, "anchors": model.anchors.flatten(1).tolist()}
    if len(names) != model.nc or not all(isinstance(name, str) for name in names):
        raise UserError(f"'{source}' names {len(names)} classes but its model has {model.nc}; expected a text for each")
    facts = {key: printable(value) if isinstance(value, str) else value for key, value in facts.items()}
    facts |= {"task": model.task, "strides": list(model.strides)}
    return LoadedModel(model.float().eval(), [printable(name) for name in names], facts)


def _bytes(state: Mapping[str, Any], source: str | Path) -> int:
    """The memory behind the tensors of a file, shared parts counted once; whatever is no plain tensor is refused."""
    for key, tensor in state.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(key, str) or not plain or tensor.is_quantized or tensor.is_nested:
            raise UserError(
                f"'{source}': '{printable(key)}' is no dense tensor with values; expected a file written by train.py"
                " or convert.py"
            )
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in state.values())}
    return sum(storages.values())


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    wrong = [f"{key} is missing" for key in own if key not in given]
    wrong += [f"{key} is unknown" for key in given if key not in own]
    wrong += [
        f"{key} has shape {list(given[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in given and given[key].shape != own[key].shape
    ]
    wrong += [
        f"{key} holds {given[key].dtype}, expected {own[key].dtype}"
        for key in own
        if key in given and (given[key].is_complex() or given[key].is_floating_point() != own[key].is_floating_point())
    ]
    return wrong


@dataclass(frozen=True)
class Transfer:
    """What `transfer` did, by tensor name. `partial`: box and objectness outputs of a head whose classes differ."""

    loaded: tuple[str, ...]
    partial: tuple[str, ...]
    mismatched: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every tensor had its counterpart; the heads may differ in their classes."""
        return not (self.mismatched or self.missing or self.unused)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.partial) + len(self.mismatched) + len(self.missing)
        text = f"transferred {len(self.loaded)} of {total} tensors"
        for count, what in (
            (len(self.partial), "in part (box and objectness outputs of the head)"),
            (len(self.mismatched), "not for their shape or that of their weights"),
            (len(self.missing), "not in the source"),
            (len(self.unused), "of the source unused"),
        ):
            if count:
                text += f", {count} {what}"
        return text


def transfer(model: nn.Module, state: Mapping[str, Tensor]) -> Transfer:
    """Copy from `state` what fits `model` by name and shape. Anchors stay the model's own.

    Biases and BatchNorm go with their weights: where those are not copied, they count as mismatched. Where only the
    class count of a Detect head differs, its box and objectness outputs are copied.
    """
    own = {key: tensor for key, tensor in model.state_dict().items() if not _is_anchors(key)}
    given = {key: tensor for key, tensor in state.items() if not _is_anchors(key)}
    heads = {f"{name}.": m for name, m in model.named_modules() if isinstance(m, Detect)}
    weights = _weights_before(own)
    loaded, partial, mismatched = [], [], []
    with torch.no_grad():
        for key in own:
            if key not in given:
                continue
            target, source = own[key], given[key].to(own[key].device)
            head = next((m for prefix, m in heads.items() if key.startswith(prefix)), None)
            if key in weights and weights[key] not in (*loaded, *partial):
                mismatched.append(key)
            elif target.shape == source.shape:
                target.copy_(source)
                loaded.append(key)
            else:
                (partial if head is not None and _copy_boxes(target, source, head) else mismatched).append(key)
    return Transfer(
        loaded=tuple(loaded),
        partial=tuple(partial),
        mismatched=tuple(mismatched),
        missing=tuple(key for key in own if key not in given),
        unused=tuple(key for key in given if key not in own),
    )


def _weights_before(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Biases and BatchNorm tensors, each with the weight (of a convolution or linear layer) whose outputs it is for."""
    pairs, weight = {}, ""
    for key, tensor in state.items():
        layer = key.rpartition(".")[0]
        if key.endswith(".weight") and tensor.ndim > 1:
            weight = key
        elif weight and (f"{layer}.running_mean" in state or key == weight.removesuffix("weight") + "bias"):
            pairs[key] = weight
    return pairs


def _is_anchors(key: str) -> bool:
    return key.endswith((".anchors", ".anchor_grid"))


def _copy_boxes(target: Tensor, source: Tensor, head: Detect) -> bool:
    """Copy the first outputs of each anchor, where the two tensors differ only in their number of classes."""
    per_cell = head.per_cell
    if target.shape[1:] != source.shape[1:] or source.shape[0] % per_cell or source.shape[0] // per_cell <= BOX_OUTPUTS:
        return False
    to = target.view(per_cell, -1, *target.shape[1:])
    to[:, :BOX_OUTPUTS] = source.view(per_cell, -1, *source.shape[1:])[:, :BOX_OUTPUTS].to(target.dtype)
    return True
