"""Trained weights into a new architecture: the same function in an SPD network, and what can be kept otherwise.

`initialise` is what training calls. Where the target has a stride-1 convolution and SPD (or SPD and a convolution) in
the place of a strided convolution, the weights are rewritten so that in eval mode the outputs stay equal. Sites where
that is impossible are started as near as possible, and named.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.convert_rows import NotConvertible, Plan, plan_rows
from models.graph import Network
from models.spd import replace_strides
from models.weights import LoadedModel, Transfer, transfer
from models.yolo import DetectionModel

EQUAL = 1e-4  # of the outputs' magnitude: what rounding in float32 explains

__all__ = ["Initialization", "NotConvertible", "convert_to_spd", "initialise", "replace_strides"]


@dataclass(frozen=True)
class Initialization:
    """What `initialise` did; iterating gives the lines to print.

    `exact` tells whether the target now computes what the source computes in eval mode.
    """

    kind: str  # "copy", "conversion" or "transfer"
    exact: bool
    lines: tuple[str, ...]
    transfer: Transfer

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)


def initialise(model: Network, loaded: LoadedModel) -> Initialization:
    """Start `model` from `loaded`: a copy, a function-preserving conversion, or a partial transfer, with a report."""
    source, plan, lines = copy.deepcopy(loaded.model).cpu(), Plan(), []
    detectors = (model, source) if isinstance(model, DetectionModel) and isinstance(source, DetectionModel) else None
    if detectors and not _same_rows(*detectors):
        plan = plan_rows(detectors[1], detectors[0])
        if not plan.stopped:
            return _converted(detectors[1], detectors[0], plan)
        lines.append(f"no function-preserving conversion: {plan.stopped}")
    result = _transfer_rows(model, source, plan)
    whole = _is_whole(result) and not plan.stopped
    lines += [*_by_rows(model, result, plan), str(result), *_named(result)]
    if detectors:
        whole &= _take_anchors(*detectors, lines)
        acts = [_activations(m) for m in detectors]
        if acts[0] != acts[1]:
            whole = False
            lines.append(f"activations: {', '.join(acts[0])}, those of the source are {', '.join(acts[1])}")
    elif model.task == source.task == "classify":
        _take_normalization(model, source, lines)
    if whole:
        whole, measured = _measured(source, model)
        lines += [] if whole else [f"not the same function: {measured}"]
    return Initialization("copy" if whole else "transfer", whole, tuple(lines), result)


def convert_to_spd(state: Mapping[str, Tensor], src_cfg: dict[str, Any], dst_model: DetectionModel) -> Initialization:
    """Write the detector (`src_cfg`, `state`) into `dst_model`, of SPD's architecture, with an equal function.

    Raises NotConvertible, and leaves `dst_model` as it is, where the rows do not correspond.
    """
    source = DetectionModel(src_cfg)
    source.load_state_dict(state)
    source.eval()
    plan = plan_rows(source, dst_model)
    if plan.stopped:
        raise NotConvertible(plan.stopped)
    return _converted(source, dst_model, plan)


def _converted(source: DetectionModel, dst_model: DetectionModel, plan: Plan) -> Initialization:
    """Write a plan for all rows into `dst_model`."""
    result = transfer(dst_model, plan.state)
    lines = [f"function-preserving conversion of {len(plan.sites)} sites: {'; '.join(plan.sites)}"]
    lines += [f"not preserved, started as near as possible: {text}" for text in plan.approximate]
    if not _is_whole(result):
        lines += [str(result), *_named(result)]
    exact = _take_anchors(dst_model, source, lines) and _is_whole(result) and not plan.approximate
    if exact:
        exact, measured = _measured(source, dst_model)
        lines.append(measured if exact else f"not the same function: {measured}")
    lines.append("in training mode BatchNorm sees more positions than in the source, so training does not start equal")
    return Initialization("conversion", exact, tuple(lines), result)


def _transfer_rows(model: Network, source: Network, plan: Plan) -> Transfer:
    """The planned tensors, and by name those of the rows behind that have the same number and type in both networks."""
    pairs = list(zip(source.rows, model.rows, strict=False))[max(plan.source_rows, plan.target_rows) :]
    alike = {a.index for a, b in pairs if a.name == b.name}
    state, unused = dict(plan.state), []
    for key, tensor in source.state_dict().items():
        if _row(key) in alike:
            state[key] = tensor
        elif _row(key) >= plan.source_rows:
            unused.append(key)
    result = transfer(model, state)
    return replace(result, unused=(*result.unused, *unused))


def _row(key: str) -> int:
    """The row to which a tensor `model.<row>.<name>` belongs."""
    return int(key.split(".")[1])


def _by_rows(model: Network, result: Transfer, plan: Plan) -> list[str]:
    """What became of the rows of `model`: those converted, those that got tensors by name, and those that start new."""
    lines = []
    if plan.target_rows:
        kept = "preserved except as named" if plan.approximate else "preserved exactly"
        sites = f"; {len(plan.sites)} sites converted: {'; '.join(plan.sites)}" if plan.sites else ""
        lines.append(f"{kept}: rows 0-{plan.source_rows - 1} of the source in rows 0-{plan.target_rows - 1}{sites}")
        lines += [f"not preserved, started as near as possible: {text}" for text in plan.approximate]
    behind = {_row(key) for key in model.state_dict() if _row(key) >= plan.target_rows}
    named = behind & {_row(key) for key in (*result.loaded, *result.partial)}
    for rows, what in ((named, "copied by name and shape, as far as they fit"), (behind - named, "started new")):
        if rows and (plan.stopped or not result.fits):
            lines.append(f"{what}: rows {', '.join(map(str, sorted(rows)))}")
    return lines


def _is_whole(result: Transfer) -> bool:
    return result.fits and not result.partial


def _named(result: Transfer) -> list[str]:
    """The tensors of a partial transfer that were not simply copied, by kind."""
    lines = []
    for names, what in (
        (result.partial, "copied in part"),
        (result.mismatched, "of another shape, or for weights of another shape, left new"),
        (result.missing, "not in the source, left new"),
        (result.unused, "of the source not used"),
    ):
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            lines.append(f"{what}: {', '.join(names[:6])}{more}")
    return lines


def _same_rows(a: DetectionModel, b: DetectionModel) -> bool:
    """Whether the two graphs have the same layers in the same order; widths and depths may differ."""
    own, other = ([(row.name, row.sources) for row in model.rows] for model in (a, b))
    strides = ([m.stride for m in model.modules() if isinstance(m, nn.Conv2d)] for model in (a, b))
    return own == other and next(strides)[:1] == next(strides)[:1]


def _activations(model: nn.Module) -> list[str]:
    """The kinds of activation in a network, sorted."""
    acts = {repr(m.act) for m in model.modules() if isinstance(getattr(m, "act", None), nn.Module)}
    return sorted(acts - {repr(nn.Identity())})


def _take_anchors(model: DetectionModel, source: DetectionModel, lines: list[str]) -> bool:
    """Take the source's anchors, to which its head belongs, unless the model's come from data; True if equal now."""
    if model.anchors.shape == source.anchors.shape and torch.allclose(model.anchors, source.anchors, rtol=1e-3):
        return True
    if model.anchors.shape != source.anchors.shape or model.cfg.get("anchors_from_data"):
        lines.append("anchors: the model's own, which differ from the source's")
        return False
    model.set_anchors(source.anchors)
    lines.append("anchors: the source's, which its head was trained with")
    return True


def _take_normalization(model: Any, source: Any, lines: list[str]) -> None:
    """Take the source's mean and deviation, unless the model's YAML has its own."""
    own, other = ((m.cfg["mean"], m.cfg["std"]) for m in (model, source))
    if own == other or len(own[0]) != len(other[0]):
        return
    if any(own[0]):
        lines.append("normalization: the model's own, which differs from the source's")
    else:
        model.set_normalization(*other)
        lines.append("normalization: the source's, which its weights were trained with")


def _measured(source: Network, target: Network) -> tuple[bool, str]:
    """Whether the two networks' raw outputs agree on one image of noise, and by how much they differ."""
    side = 8 * max(source.max_stride, target.max_stride)
    device, training = next(target.parameters()).device, target.training
    image = torch.rand(1, source.cfg["ch"], side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = source.eval()(image), target.eval()(image.to(device))
    target.train(training)
    if isinstance(expected, Tensor):
        expected, found = [expected], [found]
    difference = max(float((a - b.cpu()).abs().max()) for a, b in zip(expected, found, strict=True))
    magnitude = max(float(a.abs().max()) for a in expected)
    text = f"raw outputs differ by at most {difference:.1e} at magnitude {magnitude:.1f} (eval mode, an image of noise)"
    return difference <= EQUAL * magnitude, text
