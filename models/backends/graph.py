"""What is exported: a network with its decoding, and on request its NMS, as one module from images to outputs."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from models.backends.base import Metadata
from models.graph import Network
from models.yolo import DetectionModel
from utils.core.errors import UserError
from utils.ops.boxes import cxcywh_to_xyxy

MAX_CANDIDATES = 3000  # boxes an image that reach the NMS of a graph; TensorRT's TopK ends at 3840


@dataclass(frozen=True)
class NmsSettings:
    """NMS inside a graph. `count`: "fixed" (max_det rows, label -1 where empty) or "dynamic" (the fullest image's)."""

    conf_thres: float = 0.25
    iou_thres: float = 0.45
    max_det: int = 300
    agnostic: bool = False
    count: str = "fixed"

    def __post_init__(self) -> None:
        if not (0 <= self.conf_thres <= 1 and 0 <= self.iou_thres <= 1 and 1 <= self.max_det <= MAX_CANDIDATES):
            raise UserError(
                f"NMS in the graph with --conf-thres {self.conf_thres} --iou-thres {self.iou_thres} "
                f"--max-det {self.max_det}; expected thresholds within 0..1 and at most {MAX_CANDIDATES} detections"
            )
        if self.count not in ("fixed", "dynamic"):
            raise UserError(f"--nms {self.count!r}; expected fixed or dynamic")


class Batches(Protocol):
    """Batches of network input, which may be iterated more than once."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class ExportJob:
    """What an exporter gets: the deployed network (float32, evaluation mode, fused), what the file shall be, where."""

    model: Network
    metadata: Metadata
    path: Path
    nms: NmsSettings | None = None
    calibration: Batches | None = None  # for int8
    opset: int = 18
    workspace_gb: float = 4.0

    @property
    def half(self) -> bool:
        return self.metadata.precision == "fp16"

    @property
    def int8(self) -> bool:
        return self.metadata.precision == "int8"

    @property
    def output_names(self) -> tuple[str, ...]:
        return output_names(self.metadata)

    def example(self) -> Tensor:
        """Noise of the traced size. Dynamic axes trace with two images and two cells at least: 1 would be frozen."""
        batch = max(self.metadata.batch, 2) if self.metadata.dynamic_batch else self.metadata.batch
        device = next(self.model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        least = 2 * self.metadata.max_stride if self.metadata.dynamic_hw else 1
        size = [max(side, least) for side in self.metadata.imgsz]
        return torch.rand(batch, self.metadata.channels, *size, generator=generator).to(device)

    def dynamic_shapes(self) -> dict[str, dict[int, Any]] | None:
        """The dynamic axes in torch.export's terms: any batch; heights and widths in multiples of the stride."""
        axes: dict[int, Any] = {}
        if self.metadata.dynamic_batch:
            axes[0] = torch.export.Dim("batch")
        if self.metadata.dynamic_hw:
            stride = self.metadata.max_stride
            axes[2] = stride * torch.export.Dim("rows", max=8192 // stride)
            axes[3] = stride * torch.export.Dim("columns", max=8192 // stride)
        return {"images": axes} if axes else None

    def module(self, *, with_nms: bool = True, channels_last: bool = False) -> "DeployGraph":
        """The module to trace, in float16 inside where the file shall be; the job's network stays as it is."""
        nms = self.nms if with_nms else None
        return DeployGraph(self.model, half=self.half, nms=nms, channels_last=channels_last).eval()


def nms_dict(nms: NmsSettings | None) -> dict | None:
    return None if nms is None else asdict(nms)


def output_names(metadata: Metadata) -> tuple[str, ...]:
    if metadata.nms is not None:
        return "boxes", "scores", "labels"
    return ("output0",) if metadata.task == "detect" else ("logits",)


def shrink(model: nn.Module, dtype: torch.dtype = torch.float16) -> None:
    """Weights and statistics to a 16-bit type in place; the anchors of the head stay float32, as decoding does."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name != "anchors":
                setattr(module, name, buffer.to(dtype))


class DeployGraph(nn.Module):
    """Images float32 [B, 3, H, W] -> output0 [B, N, 5 + nc], or logits [B, nc], or boxes, scores, labels. All float32.

    With `half` the convolutions compute in float16 between two casts; decoding and NMS stay float32. `channels_last` is
    for files that PyTorch runs, whose convolutions are faster in that layout.
    """

    def __init__(
        self, model: Network, *, half: bool = False, nms: NmsSettings | None = None, channels_last: bool = False
    ):
        super().__init__()
        self.model = copy.deepcopy(model) if half else model
        self.half_inside = half
        self.channels_last = channels_last
        if half:
            shrink(self.model)
        self.nms = GraphNms(nms, model.nc) if nms is not None else None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        images = images.half() if self.half_inside else images
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        outputs = self.model(images)
        if not isinstance(self.model, DetectionModel):
            return outputs.float()
        decoded = self.model.decode([m.float() for m in outputs])
        return decoded if self.nms is None else self.nms(decoded)


class GraphNms(nn.Module):
    """Greedy NMS per class as tensor operations that trace and export, for any batch in one call.

    Decoded [B, N, 5 + nc] -> boxes [B, M, 4] xyxy px, scores [B, M], labels [B, M] int64; best first. Rows beyond an
    image's detections are boxes 0, score 0, label -1.
    """

    def __init__(self, settings: NmsSettings, nc: int):
        super().__init__()
        self.settings = settings
        self.nc = nc

    def forward(self, decoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, conf, labels = self._candidates(decoded)
        keep = self._suppress(boxes, conf, labels) & (conf > self.settings.conf_thres)
        first = torch.argsort(keep.to(torch.int32), dim=1, descending=True, stable=True)[:, : self.settings.max_det]
        keep = keep.gather(1, first)
        boxes = boxes.gather(1, first[..., None].expand(-1, -1, 4)) * keep[..., None]
        conf = conf.gather(1, first) * keep
        labels = torch.where(keep, labels.gather(1, first), -1)
        if self.settings.count == "dynamic":
            filled = keep.any(0)
            return boxes[:, filled], conf[:, filled], labels[:, filled]
        return boxes, conf, labels

    def _candidates(self, decoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best boxes of each image, [B, K, 4], [B, K], [B, K], best first; equal ones keep their order."""
        conf, labels = (decoded[..., 5:] * decoded[..., 4:5]).max(-1)
        # empty rows make K a constant also where N is small or unknown
        conf = functional.pad(conf, (0, MAX_CANDIDATES))
        labels = functional.pad(labels, (0, MAX_CANDIDATES))
        boxes = functional.pad(cxcywh_to_xyxy(decoded[..., :4]), (0, 0, 0, MAX_CANDIDATES))
        order = torch.argsort(conf, dim=1, descending=True, stable=True)[:, :MAX_CANDIDATES]
        return boxes.gather(1, order[..., None].expand(-1, -1, 4)), conf.gather(1, order), labels.gather(1, order)

    def _suppress(self, boxes: Tensor, conf: Tensor, labels: Tensor) -> Tensor:
        """Which candidates survive, [B, K]: images and classes are shifted apart in float64 and suppressed together.

        Candidates under the threshold become one and the same box far from the others, so that they cost nothing.
        """
        wide = boxes.double()
        low, span = wide.min(), wide.max() - wide.min() + 2
        groups = torch.zeros_like(labels) if self.settings.agnostic else labels
        images = torch.ones_like(labels).cumsum(0) - 1
        shifted = wide + ((groups + images * self.nc).double() * span)[..., None]
        unit = torch.cat((torch.zeros_like(wide[:1, :1, :2]), torch.ones_like(wide[:1, :1, :2])), -1)
        shifted = torch.where((conf > self.settings.conf_thres)[..., None], shifted, unit + (low - 2)).reshape(-1, 4)
        # two boxes of no image always survive: an exported program takes a count of 0 or 1 for a special case
        extra = torch.cat((unit + (low - 4), unit + (low - 6)), 1)[0]
        boxes_and_extra = torch.cat((shifted, extra))
        scores = functional.pad(conf.double().reshape(-1), (0, 2), value=-1.0)
        kept = torchvision.ops.nms(boxes_and_extra, scores, self.settings.iou_thres)
        survives = torch.zeros_like(scores).index_fill(0, kept, 1.0) > 0
        return survives[:-2].view_as(conf)
