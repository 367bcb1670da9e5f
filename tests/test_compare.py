"""compare.py and the bootstrap behind it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import compare
from tests.squares import NAMES, SquareFinder, dataset
from tests.test_engine_coco_eval import random_case
from utils.core.errors import UserError
from utils.engine.evaluation.bootstrap import image_weights, paired_bootstrap
from utils.engine.evaluation.coco_eval import Truth, coco_metrics
from utils.engine.evaluation.comparison import judge, most_different, region
from utils.ops.metrics import Found, Objects


def repeated(truth: Truth, found: Found, counts: np.ndarray) -> tuple[Truth, Found]:
    """The data set in which image i stands counts[i] times, made the slow way."""
    picks = np.repeat(np.arange(len(truth)), counts)
    parts = [(np.flatnonzero(truth.objects.image == i), np.flatnonzero(found.image == i)) for i in picks]
    o = np.concatenate([a for a, _ in parts])
    f = np.concatenate([b for _, b in parts])
    image = np.repeat(np.arange(len(picks)), [len(a) for a, _ in parts])
    t = truth.objects
    objects = Objects(image, t.cls[o], t.xywh[o], t.area[o], t.crowd[o])
    dets = found.take(f)
    dets = Found(
        np.repeat(np.arange(len(picks)), [len(b) for _, b in parts]), dets.cls, dets.xywh, dets.score, dets.area
    )
    n = len(picks)
    return Truth(objects, truth.shapes[:n], truth.names, tuple(range(n)), truth.category_ids, np.ones(n)), dets


def test_replicates_equal_evaluating_the_repeated_data_set():
    truth, a = random_case(0)
    _, b = random_case(0)
    b = b.take(np.arange(len(b)) % 3 > 0)
    draws = image_weights(len(truth), 4, seed=1)
    intervals = paired_bootstrap(truth, a, b, metrics=["AP", "AP_M"], replicates=4, seed=1, level=0.999999)
    for key, interval in intervals.items():
        differences = []
        for row in draws.astype(int):
            values = [coco_metrics(*repeated(truth, found, row))[0][key] for found in (a, b)]
            differences.append(values[1] - values[0])
        moved = np.array(differences) - np.mean(differences) + interval.difference
        assert (interval.low, interval.high) == pytest.approx((moved.min(), moved.max()), abs=1e-5)


def test_a_model_does_not_differ_from_itself_and_swapping_mirrors():
    truth, a = random_case(1)
    b = a.take(np.arange(len(a)) % 2 > 0)
    same = paired_bootstrap(truth, a, a, replicates=50)["AP"]
    assert same.low == same.high == same.difference == 0 and not same.clear
    one, other = (paired_bootstrap(truth, *pair, replicates=50)["AP"] for pair in ((a, b), (b, a)))
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low)) and one.difference < 0
    assert one.share_above == pytest.approx(1 - other.share_above)


def test_draws_are_the_same_for_a_seed_and_keep_the_number_of_images():
    draws = image_weights(7, 20, seed=3)
    assert (draws.sum(1) == 7).all() and (draws == image_weights(7, 20, seed=3)).all()


def test_bootstrap_without_small_objects_is_undefined():
    truth, a = random_case(2)
    large = Truth(**{**vars(truth), "objects": Objects(**{**vars(truth.objects), "area": truth.objects.area + 1e5})})
    interval = paired_bootstrap(large, a, a, metrics=["AP_S"], replicates=5)["AP_S"]
    assert np.isnan([interval.a, interval.low, interval.high]).all() and interval.replicates == 0
    with pytest.raises(UserError, match="AP_M"):
        paired_bootstrap(truth, a, a, metrics=["AP75"])


def test_images_are_picked_for_both_sides():
    truth, a = random_case(3)
    even = (a.image % 2 == 0) & (a.score > 0.3)
    first = judge("even", truth, a.take(even), 0.3, 0.5, 100)
    second = judge("odd", truth, a.take((a.image % 2 == 1) & (a.score > 0.3)), 0.3, 0.5, 100)
    gain = first.errors(truth) - second.errors(truth)
    picked = most_different(truth, first, second, 6)
    assert len(picked) == min(6, int((gain != 0).sum()))
    assert all(gain[i] == g and g != 0 for i, g in picked)
    assert {g > 0 for _, g in picked} == {True, False}
    for i, _ in picked:
        x1, y1, x2, y2 = region(truth, first, second, i, (640, 640))
        assert 0 <= x1 < x2 <= 640 and 0 <= y1 < y2 <= 640


def test_verdicts_add_up():
    truth, a = random_case(4)
    verdict = judge("a", truth, a, 0.2, 0.5, 100)
    objects = int((~truth.objects.crowd).sum())
    assert verdict.right.sum() + verdict.missed.sum() == objects
    assert verdict.errors(truth).sum() == verdict.missed.sum() + (verdict.counted & ~verdict.right).sum()


@pytest.fixture
def finders(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path, **_):
        return SquareFinder(blind=12.0 if "blind" in str(path) else 0.0)

    monkeypatch.setattr(compare, "load_predictor", load)


@pytest.mark.usefixtures("finders")
def test_two_models_side_by_side(tmp_path: Path, capsys):
    data = dataset(tmp_path / "squares", images=5)
    argv = ["--weights", "blind.pt", "sharp.pt", "--data", str(data), "--workers", "0", "--replicates", "50"]
    assert compare.main([*argv, "--project", str(tmp_path)]) == 0
    folder = tmp_path / "exp"
    content = json.loads((folder / "compare.json").read_text())
    assert content["A"]["AP_S"] < content["B"]["AP_S"]
    assert content["difference"]["AP_S"]["clear"] and content["difference"]["AP_S"]["low"] > 0
    assert (folder / "ap_by_size.png").exists()
    pictures = sorted((folder / "pairs").iterdir())
    assert [p.name for p in pictures] == content["pictures"] and "B_better_by" in pictures[0].name
    image = Image.open(pictures[0])
    assert image.width > 2 * image.height
    out = capsys.readouterr().out
    assert "beyond chance" in out and "sharp" in out


@pytest.mark.parametrize(
    "flags,words",
    [
        ({"weights": ["a.pt"]}, "expected two"),
        ({"predictions": ["a", "b"]}, "--annotations"),
        ({"weights": ["a", "b"], "labels": ["x"]}, "--labels"),
        ({"weights": ["a", "b"], "annotations": "t.json"}, "--annotations does nothing without --predictions"),
        ({"weights": ["a", "b"], "images": "images"}, "--images does nothing without --predictions"),
        ({"predictions": ["a", "b"], "annotations": "t.json", "slice": 640}, "--slice does nothing with --predictions"),
        ({"weights": ["a", "b"], "imgsz": [64, 64, 64]}, "--imgsz 64 64 64"),
        ({"weights": ["a", "b"], "conf": 7.0}, "--conf 7"),
        ({"weights": ["a", "b"], "pictures": -1}, "--pictures -1"),
        ({"weights": ["a", "b"], "level": 2.0}, "level 2"),
        ({"weights": ["a", "b"], "seed": -1}, "--seed -1"),
        ({"weights": ["a", "b"], "overlap": 0.5}, "--overlap is about the slices"),
        ({"predictions": ["a", "b"], "annotations": "t.json", "device": "cpu"}, "--device does nothing with --predict"),
        (
            {"predictions": ["a", "b"], "annotations": "t.json", "conf": 0.4},
            "--conf does nothing with --predictions and",
        ),
    ],
)
def test_mistakes_are_one_line(flags: dict, words: str):
    with pytest.raises(UserError) as e:
        compare.run(**flags)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_model_files_are_read_once_with_all_that_the_options_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data, seen = dataset(tmp_path / "squares", images=2), []

    def load(path, **options):
        seen.append((path, options["names"], options["imgsz"], options["half"]))
        return SquareFinder()

    monkeypatch.setattr(compare, "load_predictor", load)
    options = {"weights": ["a.onnx", "b.onnx"], "data": data, "project": tmp_path, "workers": 0, "replicates": 0}
    compare.run(**options, imgsz=160, half=True, pictures=0)
    assert [(path, list(names), *rest) for path, names, *rest in seen] == [
        (path, list(NAMES), [160], True) for path in ("a.onnx", "b.onnx")
    ]


@pytest.mark.usefixtures("finders")
def test_flags_reach_the_comparison(tmp_path: Path):
    data = dataset(tmp_path / "squares", images=3)
    argv = ["--weights", "a.pt", "b.pt", "--data", str(data), "--workers", "0", "--replicates", "0"]
    argv += ["--area-bins", "8", "32", "96", "--area-pixels", "network", "--max-dets", "1", "400"]
    assert compare.main([*argv, "--project", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "exp" / "compare.json").read_text())
    assert "AP_8-32" in content["A"] and content["settings"]["max_det"] == 400
    assert content["settings"]["area_pixels"] == "network" and content["settings"]["imgsz"] == [[160, 160]] * 2


def test_records_without_sizes_have_their_pictures(tmp_path: Path):
    data = dataset(tmp_path / "squares", images=1)
    box = {"image_id": 7, "category_id": 1, "bbox": [5, 5, 50, 50]}
    truth = {"images": [{"id": 7, "file_name": "picture0.png"}], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "t.json").write_text(json.dumps({**truth, "annotations": [box]}))
    (tmp_path / "a.json").write_text(json.dumps([{**box, "score": 0.9}]))
    (tmp_path / "b.json").write_text("[]")
    report = compare.run(
        predictions=[str(tmp_path / f"{x}.json") for x in "ab"], annotations=tmp_path / "t.json",
        images=data.parent / "images", project=tmp_path, replicates=0, conf=0.5,
    )  # fmt: skip
    assert [path.name for path in report.pictures] == ["01_A_better_by_1_picture0.jpg"]


def test_pictures_that_cannot_be_shown_cost_nothing_else(tmp_path: Path, capsys):
    data = dataset(tmp_path / "squares", images=3)
    records = [{"id": i, "file_name": f"picture{i}.png", "height": 120, "width": 160} for i in range(3)]
    boxes = [{"image_id": i, "category_id": 1, "bbox": [5, 5, 50, 50]} for i in range(3)]
    truth = {"images": records, "categories": [{"id": 1, "name": "a"}], "annotations": boxes}
    (tmp_path / "t.json").write_text(json.dumps(truth))
    (tmp_path / "a.json").write_text(json.dumps([{**box, "score": 0.9} for box in boxes]))
    (tmp_path / "b.json").write_text("[]")
    folder = data.parent / "images"
    (folder / "picture0.png").unlink()
    Image.new("RGB", (40, 30)).save(folder / "picture1.png")
    files = {"predictions": [str(tmp_path / f"{x}.json") for x in "ab"], "annotations": tmp_path / "t.json"}
    report = compare.run(**files, images=folder, project=tmp_path, replicates=0, conf=0.5)
    content = json.loads((report.save_dir / "compare.json").read_text())
    assert content["pictures"] == [p.name for p in report.pictures] == ["03_A_better_by_1_picture2.jpg"]
    line = next(line for line in capsys.readouterr().out.splitlines() if "left out" in line)
    assert "2 of 3" in line and "picture0.png" in line and "picture1 has 40 x 30 px" in line
    with pytest.raises(UserError, match="--images"):
        compare.run(**files, images=tmp_path / "absent", project=tmp_path)
    with pytest.raises(UserError, match="--area-pixels network needs a model"):
        compare.run(**files, area_pixels="network", project=tmp_path)


def test_network_pixels_need_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = dataset(tmp_path / "squares", images=2)
    monkeypatch.setattr(compare, "load_predictor", lambda path, **_: SquareFinder((int(path), int(path))))
    options = {"weights": ["160", "320"], "data": data, "project": tmp_path, "workers": 0, "replicates": 0}
    with pytest.raises(UserError, match="--area-pixels network.*one --imgsz"):
        compare.run(**options, area_pixels="network")
    assert not list(tmp_path.glob("exp*"))
    assert compare.run(**options, pictures=0).metrics[1]["AP50"] == 1.0


def test_both_models_are_given_the_same_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file of a fixed size gets no margin around the image, so the other model does not either."""
    shapes: dict[str, set[tuple[int, ...]]] = {"free": set(), "fixed": set(), "other": set()}

    class Seen(SquareFinder):
        def __init__(self, name: str) -> None:
            super().__init__((160, 160), fixed=name == "fixed")
            self.name = name

        def __call__(self, images):
            shapes[self.name].add(tuple(images.shape[2:]))
            return super().__call__(images)

    data = dataset(tmp_path / "squares", images=2)
    monkeypatch.setattr(compare, "load_predictor", lambda path, **_: Seen(path))
    options = {"data": data, "project": tmp_path, "workers": 0, "replicates": 0, "pictures": 0, "batch_size": 1}

    def rect(*models: str) -> bool:
        report = compare.run(weights=list(models), **options)
        return json.loads((report.save_dir / "compare.json").read_text())["settings"]["rect"]

    assert rect("free", "fixed") is False and shapes["free"] == shapes["fixed"] == {(160, 160)}
    assert rect("free", "other") is True
    assert shapes["other"] and shapes["other"] != {(160, 160)}, "both take any size: the shapes of val.py"
