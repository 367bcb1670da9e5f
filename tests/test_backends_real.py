"""Real weights on real images: every format gives PyTorch's boxes on bus.jpg and 50 images of COCO val2017. Slow."""

import importlib
from pathlib import Path

import pytest
import torch

from models.backends import FORMATS, load_predictor
from models.backends.base import Metadata
from models.backends.graph import ExportJob, NmsSettings, nms_dict
from models.backends.pictures import Pictures
from models.backends.pytorch import PyTorchPredictor
from models.backends.verify import TOLERANCES, compare
from models.fusion import fuse
from models.weights import load_model

pytestmark = pytest.mark.slow
HW = (320, 320)
IMAGES = 50


class Remembering:
    """PyTorch's raw predictions on each batch, computed once for all formats."""

    def __init__(self, predictor):
        self.predictor, self.known = predictor, {}

    def __call__(self, images):
        key = hash(images.numpy().tobytes())
        if key not in self.known:
            self.known[key] = self.predictor(images)
        return self.known[key]


@pytest.fixture(scope="module")
def loaded(shared_data):
    return load_model(shared_data / "weights" / "yolov5n.pt")


@pytest.fixture(scope="module")
def reference(loaded):
    return Remembering(PyTorchPredictor(loaded.model, loaded.names, fuse=False))


@pytest.fixture(scope="module")
def files(shared_data) -> tuple[Path, ...]:
    coco = sorted((shared_data / "coco-val200" / "images").rglob("*.jpg"))[:IMAGES]
    return (shared_data / "images" / "bus.jpg", *coco)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("dynamic", [None, "all"])
@pytest.mark.parametrize("count", [None, "fixed", "dynamic"])
@pytest.mark.parametrize("fmt", [n for n, f in FORMATS.items() if f.exports and n != "engine"])
def test_boxes_of_pytorch(fmt, count, dynamic, precision, loaded, reference, files, tmp_path):
    for package in FORMATS[fmt].requires:
        pytest.importorskip(package)
    nms = None if count is None else NmsSettings(count=count)
    metadata = Metadata(
        tuple(loaded.names),
        HW,
        strides=tuple(loaded.model.strides),
        dynamic=dynamic,
        precision=precision,
        nms=nms_dict(nms),
    )
    path = tmp_path / f"yolov5n{FORMATS[fmt].suffix.rstrip('/')}"
    importlib.import_module(f"models.backends.{FORMATS[fmt].module}").export(
        ExportJob(fuse(loaded.model), metadata, path, nms)
    )
    with torch.inference_mode():
        found = compare(reference, load_predictor(path), Pictures(files, "", metadata))
    print(fmt, count, dynamic, precision, found)
    assert found.detections >= 100 and not found.failures(TOLERANCES[precision]), found
