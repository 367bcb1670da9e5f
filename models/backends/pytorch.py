"""The native format: a checkpoint of this project run by PyTorch itself, and the path of the model under training."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.backends.base import DEFAULT_PREPROCESSING, Metadata, Predictor, pair
from models.backends.graph import shrink
from models.fusion import fuse as fuse_network
from models.graph import Network
from models.weights import load_model
from models.winograd import use_winograd
from models.yolo import DetectionModel
from utils.core.device import warn_of_emulated_bfloat16


class PyTorchPredictor(Predictor):
    """A network as predictor. The given model is left as it is: a fused (or plain) copy in evaluation mode runs.

    Channels-last memory is used on every device: it is the layout that oneDNN and cuDNN convolutions are fastest in. In
    float32 on the CPU, a fused network computes its wide 3x3 convolutions by Winograd's method.
    `half` is float16 on a GPU and bfloat16 on the CPU, which is fast where the processor has avx512_bf16 or AMX. Boxes
    are decoded in float32 even so, since float16 cannot hold coordinates above 512 px to a pixel.
    """

    def __init__(
        self,
        model: Network,
        names: Sequence[str],
        *,
        imgsz: int | Sequence[int] = 640,
        device: torch.device | str | None = None,
        half: bool = False,
        fuse: bool = True,
        preprocessing: dict[str, Any] | None = None,
    ):
        metadata = Metadata(
            names=tuple(names),
            imgsz=pair(imgsz),
            strides=tuple(model.strides),
            task=model.task,
            channels=model.cfg.get("ch", 3),
            max_stride=model.max_stride,
            dynamic="all",
            preprocessing=dict(preprocessing or DEFAULT_PREPROCESSING),
        )
        device = next(model.parameters()).device if device is None else torch.device(device)
        on_cpu = device.type == "cpu"
        super().__init__(metadata, device, half and not on_cpu)
        self.dtype = torch.float32 if not half else torch.bfloat16 if on_cpu else torch.float16
        network = fuse_network(model) if fuse else copy.deepcopy(model).eval()
        self.network = network.float().to(device).requires_grad_(False)
        if fuse and on_cpu:
            use_winograd(self.network)
        if half:
            if on_cpu:
                warn_of_emulated_bfloat16("--half")
            shrink(self.network, self.dtype)
        self.network.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def infer(self, images: Tensor) -> Tensor:
        images = images.to(self.device, self.dtype, non_blocking=True).contiguous(memory_format=torch.channels_last)
        outputs = self.network(images)
        if isinstance(self.network, DetectionModel):
            return self.network.decode([m.float() for m in outputs])
        return outputs.float()


def load(
    path: Path,
    *,
    device: torch.device,
    half: bool = False,
    fuse: bool = True,
    imgsz: int | Sequence[int] | None = None,
    **_: Any,
) -> PyTorchPredictor:
    """A .pt or .safetensors checkpoint (ours, or a legacy one that `models.weights` can import) as predictor.

    `imgsz` is the default size of its input, instead of the one that it was trained for.
    """
    loaded = load_model(path, device=str(device))
    meta = loaded.meta
    return PyTorchPredictor(
        loaded.model,
        loaded.names,
        imgsz=imgsz or meta.get("imgsz", 640),
        device=device,
        half=half,
        fuse=fuse,
        preprocessing=meta.get("preprocessing"),
    )
