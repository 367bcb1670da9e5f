"""The rules that every predictor follows, and the native one: fused or not, it gives the model's boxes."""

import copy
import json

import pytest
import torch

from benchmarks import inference
from models.backends import load_predictor
from models.backends.base import Metadata, Predictor
from models.backends.pytorch import PyTorchPredictor
from models.weights import pack_model
from tests.backend_models import HW, NAMES, pictures, tiny_detector
from utils.core.checkpoint import save_checkpoint
from utils.core.errors import UserError


class Counting(Predictor):
    """Gives the mean of each image, and remembers the shapes it was called with."""

    def __init__(self, **facts):
        super().__init__(Metadata(names=("a",), imgsz=(8, 8), **facts), torch.device("cpu"))
        self.shapes = []

    def infer(self, images):
        self.shapes.append(tuple(images.shape))
        means = images.mean((1, 2, 3))
        rows = means[:, None, None].expand(-1, 1, 6)  # four sides, objectness, one class
        return list(rows) if self.end2end else rows


@pytest.mark.parametrize("nms", [None, {"max_det": 1}])
@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_a_fixed_batch_takes_any_number_of_images(nms, count):
    predictor = Counting(batch=3, nms=nms)
    images = torch.rand(count, 3, 8, 8)
    given = predictor(images)
    assert len(given) == count and predictor.shapes == [(3, 3, 8, 8)] * -(-count // 3)
    torch.testing.assert_close(torch.stack([g[0, 0] for g in given]), images.mean((1, 2, 3)))


def test_a_model_of_other_classes_than_its_names_is_refused():
    with pytest.raises(UserError, match=r"gives 8 values a row, which is not 5 \+ 1 class names; give the --data"):
        PyTorchPredictor(tiny_detector(), NAMES[:1])(pictures())


def test_fixed_and_free_axes():
    fixed, free = Counting(), Counting(dynamic="all")
    assert (fixed.batch, fixed.imgsz, fixed.end2end) == (1, (8, 8), False)
    assert (free.batch, free.imgsz) == (None, None)
    with pytest.raises(UserError, match="--imgsz 8 8, or export with --dynamic hw"):
        fixed(torch.rand(1, 3, 16, 8))
    free(torch.rand(5, 3, 16, 8))
    assert free.shapes == [(5, 3, 16, 8)]
    with pytest.raises(AssertionError):
        free(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    free.warm_up()


@pytest.mark.parametrize("fuse", [True, False])
def test_the_native_predictor_gives_the_boxes_of_the_model_and_leaves_it_alone(fuse):
    model = tiny_detector().train()
    before = copy.deepcopy(model.state_dict())
    predictor = PyTorchPredictor(model, NAMES, imgsz=64, fuse=fuse)
    given = predictor(pictures())
    assert model.training and all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(given, model.eval().predict(pictures()), atol=5e-3, rtol=1e-5)
    assert predictor.names == list(NAMES) and predictor.strides == [4, 8] and predictor.metadata.imgsz == (64, 64)


def test_half_on_the_cpu_computes_in_bfloat16_and_decodes_in_float32():
    model, seen = tiny_detector().eval(), []
    predictor = PyTorchPredictor(model, NAMES, half=True)
    predictor.network.model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    given = predictor(pictures())
    assert seen == [torch.bfloat16] and given.dtype == torch.float32 and not predictor.half
    with torch.no_grad():
        expected = model.predict(pictures())
    near = torch.isclose(given, expected, atol=2, rtol=0.02)
    assert near.float().mean() > 0.99 and not torch.equal(given, expected)


@pytest.mark.parametrize("has_it", [True, False])
def test_half_on_a_cpu_without_16_bit_arithmetic_is_told(monkeypatch, capsys, has_it):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_it)
    PyTorchPredictor(tiny_detector(), NAMES, half=True)
    told = "--half: this processor has no 16-bit arithmetic; float32 is several times faster here"
    assert (told in "".join(capsys.readouterr())) is not has_it


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_checkpoints_load_as_predictors(tmp_path, suffix):
    model = tiny_detector()
    path = tmp_path / f"best{suffix}"
    save_checkpoint(path, pack_model(model, NAMES, 96))
    predictor = load_predictor(path)
    assert predictor.metadata.imgsz == (96, 96) and tuple(predictor.names) == NAMES and predictor.imgsz is None
    with torch.no_grad():
        torch.testing.assert_close(predictor(pictures()), model.predict(pictures()), atol=5e-3, rtol=1e-5)
    assert predictor(pictures(1, (HW[0] * 2, HW[1]))).shape[0] == 1


def test_the_benchmark_compares_like_with_like(capsys):
    model = tiny_detector()
    with torch.no_grad():
        expected = model.predict(pictures())
    torch.testing.assert_close(inference.published_layout(model)(pictures()), expected, atol=5e-3, rtol=1e-5)
    assert any(isinstance(m, inference.SlicedSPD) for m in model.modules())
    argv = ["--models", "yolov5-spd-n", "--formats", "--imgsz", "64", "--rounds", "1", "--calls", "1"]
    assert inference.main(argv) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    ways = {inference.BASELINE, "PyTorch", "PyTorch bf16"}
    assert set(result["ms"]["yolov5-spd-n"]) == set(result["ms"]["yolov5n"]) == ways
    assert result["spd_to_plain"]["yolov5-spd-n"]["PyTorch"] > 0
