"""Validation with stand-in predictors: perfect ones reach 1.0, shards equal the whole, broken numbers do no harm."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from utils.core.dist import Dist
from utils.core.errors import UserError
from utils.engine.evaluation import validate as module
from utils.engine.evaluation.coco_eval import MetricSettings
from utils.engine.evaluation.validate import ModelPredictor, ValSettings, evaluate_rows, validate
from utils.engine.inference.predict import PredictSettings
from utils.ops.boxes import xyxy_to_cxcywh
from utils.ops.letterbox import letterbox_geometry

NAMES = ["a", "b", "c"]


class Index:
    """Three images of different shapes with known boxes, as a label index."""

    def __init__(self, images: int = 6, seed: int = 0, per_image: int = 4):
        rng = np.random.default_rng(seed)
        self.shapes = np.array([[300, 500], [640, 640], [200, 100]] * (images // 3 + 1), np.int32)[:images]
        counts = rng.integers(0, per_image + 1, images)
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        m = int(self.offsets[-1])
        hw = np.repeat(self.shapes, counts, 0)
        xy = rng.uniform(0, 0.7, (m, 2)) * hw[:, ::-1]
        self.boxes = np.concatenate([xy, xy + rng.uniform(0.05, 0.29, (m, 2)) * hw[:, ::-1]], 1).astype(np.float32)
        self.cls = rng.integers(0, 3, m).astype(np.int32)
        self.areas = np.prod(self.boxes[:, 2:] - self.boxes[:, :2], 1).astype(np.float64)
        self.crowd = np.zeros(m, bool)
        self.image_ids = np.arange(images) * 10
        self.category_ids = np.array([1, 5, 9])

    def __len__(self) -> int:
        return len(self.shapes)


def batches(index: Index, size: int = 2, hw: int = 320) -> list[SimpleNamespace]:
    """The index as batches; the image number stands in the first pixel, so that the oracle knows where it is."""
    out = []
    for start in range(0, len(index), size):
        numbers = np.arange(start, min(start + size, len(index)))
        geometries = [letterbox_geometry(tuple(index.shapes[i]), hw) for i in numbers]
        images = torch.full((len(numbers), 3, hw, hw), 114, dtype=torch.uint8)
        targets = []
        for b, i in enumerate(numbers):
            images[b, 0, 0, 0] = int(i)
            span = slice(index.offsets[i], index.offsets[i + 1])
            boxes = xyxy_to_cxcywh(geometries[b].to_network(index.boxes[span])) / hw
            targets += [[b, c, *box] for c, box in zip(index.cls[span], boxes, strict=True)]
        targets = torch.tensor(np.array(targets, np.float32).reshape(-1, 6))
        out.append(SimpleNamespace(images=images, targets=targets, indices=numbers, geometries=geometries))
    return out


class Oracle:
    """Says what the labels say, in the form of decoded predictions, and adds `noise` px to the corners."""

    end2end, half, imgsz, batch = False, False, None, None
    device = torch.device("cpu")

    def __init__(self, index: Index, noise: float = 0.0):
        self.index, self.noise, self.names = index, noise, NAMES

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images]

    def decode(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return self(maps[0])

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(images), 20, 5 + 3)
        for b, image in enumerate(images):
            i = int(round(float(image[0, 0, 0]) * 255))
            span = slice(self.index.offsets[i], self.index.offsets[i + 1])
            geometry = letterbox_geometry(tuple(self.index.shapes[i]), tuple(images.shape[-2:]))
            boxes = torch.from_numpy(geometry.to_network(self.index.boxes[span]))
            generator = torch.Generator().manual_seed(i)
            boxes = boxes + self.noise * torch.randn(boxes.shape, generator=generator)
            n = len(boxes)
            out[b, :n, :4] = xyxy_to_cxcywh(boxes)
            out[b, :n, 4] = torch.rand(n, generator=generator) * 0.5 + 0.5
            out[b, torch.arange(n), 5 + torch.from_numpy(self.index.cls[span]).long()] = 1.0
        return out


def test_a_perfect_predictor_reaches_one_in_source_pixels():
    index = Index()
    result = validate(Oracle(index), batches(index), index, NAMES)
    assert result.metrics["AP"] == pytest.approx(1.0)
    assert [result.metrics[k] for k in ("P", "R", "F1")] == pytest.approx([1, 1, 1])
    assert result.fitness == pytest.approx(1.0)
    assert np.abs(np.sort(result.detections[:, 1:5], 0) - np.sort(index.boxes, 0)).max() < 1e-3
    assert result.confusion.trace() == len(index.cls) == result.confusion.sum()
    assert set(result.speed_ms) == {"pre-process", "inference", "NMS"} and result.shape == (2, 3, 320, 320)


def test_end_to_end_rows_are_taken_as_they_are():
    index = Index()
    oracle = Oracle(index)

    class EndToEnd(Oracle):
        end2end = True

        def __call__(self, images):
            return module.suppress_batch(oracle, oracle(images), ValSettings())[0]

    a = validate(oracle, batches(index), index, NAMES)
    b = validate(EndToEnd(index), batches(index), index, NAMES)
    assert (a.detections == b.detections).all()


class FakeRank:
    """One of several ranks run one after the other; the main one comes last and finds what the others left."""

    def __init__(self, rank: int, world: int, box: list):
        self.rank, self.world_size, self.box, self.device = rank, world, box, torch.device("cpu")
        self.is_main = rank == 0

    def gather(self, value):
        self.box.append((self.rank, value))
        return [v for _, v in sorted(self.box, key=lambda item: item[0])] if self.is_main else None

    def broadcast(self, value):
        return value if self.is_main else ({}, {}, {}, ())


@pytest.mark.parametrize("world", [2, 3])
def test_shards_equal_the_whole_to_the_last_digit(world: int):
    index = Index(10, seed=1)
    oracle = Oracle(index, noise=2.0)

    def loss(maps, targets):
        return {"box": maps[0].mean() * 3.3 + len(targets), "obj": maps[0].std()}

    whole = validate(oracle, batches(index), index, NAMES, loss=loss)
    box: list = []
    for rank in reversed(range(world)):
        part = batches(index)[rank::world]
        result = validate(oracle, part, index, NAMES, dist=FakeRank(rank, world, box), loss=loss)
    assert repr(result.metrics) == repr(whole.metrics) and result.loss == whole.loss
    assert (result.detections == whole.detections).all()
    assert 0.2 < whole.metrics["AP"] < 1


def test_batch_numbers_of_shards_are_those_of_the_whole():
    index = Index(10, seed=1)
    seen: list = []
    for rank in (1, 0):
        part = batches(index)[rank::2]
        dist = FakeRank(rank, 2, [])
        validate(Oracle(index), part, index, NAMES, dist=dist, on_batch=lambda n, b, d: seen.append((n, b.indices[0])))
    assert sorted(seen) == [(n, 2 * n) for n in range(5)]


def test_loss_is_the_mean_over_images():
    index = Index(5)

    def loss(maps, targets):
        return {"box": torch.tensor(float(len(maps[0])))}

    result = validate(Oracle(index), batches(index), index, NAMES, loss=loss)
    assert result.loss == {"box": (2 * 2 + 2 * 2 + 1 * 1) / 5}


def test_nan_predictions_are_dropped_and_said(capsys):
    index = Index()

    class Broken(Oracle):
        def __call__(self, images):
            out = super().__call__(images)
            out[:, -1] = float("nan")
            out[:, -2, :5] = float("inf")
            return out

    result = validate(Broken(index), batches(index), index, NAMES)
    assert result.metrics["AP"] == pytest.approx(1.0)
    assert np.isfinite(result.detections).all()
    assert "NaN or infinite" in capsys.readouterr().out

    class AllBroken(Oracle):
        def __call__(self, images):
            return torch.full((len(images), 9, 8), float("nan"))

    assert validate(AllBroken(index), batches(index), index, NAMES).fitness == 0.0


def test_unlabeled_images_are_detected_but_not_measured():
    index = Index()
    result = validate(Oracle(index), batches(index), index, NAMES, labeled=False)
    assert result.metrics == {} and len(result.detections) and result.fitness == 0.0


def test_no_images_is_an_error():
    with pytest.raises(UserError, match="no images"):
        validate(Oracle(Index()), [], Index(0), NAMES)


def test_network_pixels_follow_the_letterbox():
    index = Index(1)
    index.shapes[:] = (1280, 1280)
    rows = validate(Oracle(index), batches(index, hw=320), index, NAMES).detections
    network = ValSettings(metrics=MetricSettings(area_pixels="network"))
    result = validate(Oracle(index), batches(index, hw=320), index, NAMES, network)
    scaled = evaluate_rows(rows, index, NAMES, network, scale=np.full(1, 1 / 16))
    assert result.truth.area_scale.tolist() == [1 / 16]
    assert repr(result.metrics) == repr(scaled.metrics)


def test_model_predictor_takes_a_network_apart():
    class Net(torch.nn.Module):
        strides, max_stride = [8], 8

        def __init__(self):
            super().__init__()
            self.bn = torch.nn.BatchNorm2d(3)

        def forward(self, x):
            return [self.bn(x)]

        def decode(self, maps):
            return maps[0].flatten(1)

    net = Net().train()
    predictor = ModelPredictor(net, NAMES, device="cpu", amp=torch.bfloat16)
    images = torch.rand(2, 3, 8, 8)
    assert predictor.maps(images)[0].dtype == torch.float32
    assert predictor(images).shape == (2, 192) and not net.training and not predictor(images).requires_grad
    assert (net.bn.running_mean == 0).all()


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    """One process of a real group."""
    import json
    import os

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist = Dist.start("cpu")
    index = Index(10, seed=1)
    result = validate(Oracle(index, noise=2.0), batches(index)[rank::world], index, NAMES, dist=dist)
    with open(f"{folder}/{world}_{rank}.json", "w") as file:
        json.dump(result.metrics, file)
    dist.stop()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_real_processes_agree_to_the_last_digit(tmp_path, world: int):
    import json
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (world, port, str(tmp_path)), nprocs=world)
    index = Index(10, seed=1)
    whole = validate(Oracle(index, noise=2.0), batches(index), index, NAMES).metrics
    for rank in range(world):
        assert json.loads((tmp_path / f"{world}_{rank}.json").read_text()) == json.loads(json.dumps(whole))


@pytest.mark.parametrize("bad", [{"conf_thres": 5}, {"iou_thres": -1}, {"conf_thres": float("nan")}, {"max_det": 0}])
@pytest.mark.parametrize("settings", [ValSettings, PredictSettings])
def test_thresholds_out_of_bounds_name_their_flag(settings: type, bad: dict):
    with pytest.raises(UserError, match=f"--{next(iter(bad)).replace('_', '-')} .*expected"):
        settings(**bad)
