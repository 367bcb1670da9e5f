"""val.py as its users call it, on pictures that a predictor without a network can read."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import val
from tests.squares import NAMES, SquareFinder, dataset
from utils.core.errors import UserError
from utils.data.spec import DataSpec, load_data
from utils.engine.evaluation.coco_eval import TWELVE
from utils.ops.nms import non_max_suppression

QUIET = {"workers": 0, "noplots": True}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("squares"))


@pytest.fixture
def finder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--weights fixed` is a predictor of one size, anything else one of any size."""

    def load(path, **_):
        if str(path).startswith("fixed"):
            return SquareFinder((96, 160) if "wide" in str(path) else (160, 160), fixed=True)
        return SquareFinder(blind=10.0 if "blind" in str(path) else 0.0)

    monkeypatch.setattr(val, "load_predictor", load)


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


@pytest.mark.usefixtures("finder")
def test_a_run_leaves_numbers_and_pictures(squares: Path, tmp_path: Path, capsys):
    report = val.run(weights="any.pt", data=squares, project=tmp_path, workers=0, batch_size=4)
    assert report.save_dir == tmp_path / "exp"
    metrics = read(report.save_dir, "metrics.json")
    assert set(TWELVE) <= set(metrics) and {"per_class", "speed_ms", "settings", "P", "R", "F1"} <= set(metrics)
    assert metrics["AP"] > 0.9 and metrics["P"] == metrics["R"] == 1.0 and metrics["AP_L"] is None
    assert metrics["settings"]["imgsz"] == [160, 160] and metrics["settings"]["conf_thres"] == 0.001
    rows = list(csv.DictReader((report.save_dir / "per_class.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == list(NAMES) and float(rows[0]["AP50"]) == 1.0
    names = {p.name for p in report.save_dir.iterdir()}
    curves = {f"{letter}_curve.png" for letter in ("PR", "F1", "P", "R")}
    assert curves | {"confusion_matrix.png", "confusion_matrix_normalized.png", "confusion_matrix.csv"} <= names
    assert {"val_batch0_labels.jpg", "val_batch0_pred.jpg", "val_batch1_pred.jpg"} <= names
    out = capsys.readouterr().out
    assert "AP_S" in out and "Speed: " in out and "Results saved to" in out


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize("weights", ["any.pt", "fixed.onnx", "fixed-wide.onnx"])
@pytest.mark.parametrize("rect", [True, False])
def test_any_shape_of_input_gives_boxes_in_source_pixels(squares: Path, tmp_path: Path, weights: str, rect: bool):
    report = val.run(weights=weights, data=squares, project=tmp_path, rect=rect, batch_size=4, **QUIET)
    assert report.metrics["AP50"] == 1.0
    numbers_only = {"metrics.json", "per_class.csv", "confusion_matrix.csv"}
    assert {path.name for path in report.save_dir.iterdir()} == numbers_only


@pytest.mark.usefixtures("finder")
def test_saved_predictions_measure_the_same(squares: Path, tmp_path: Path):
    first = val.run(
        weights="blind.pt", data=squares, project=tmp_path, save_json=True, save_txt=True, save_conf=True, **QUIET
    )
    files = {key: first.save_dir / f"{key}.json" for key in ("predictions", "annotations")}
    second = val.run(project=tmp_path, noplots=True, **files)
    assert 0 < first.metrics["AP"] < 0.95
    for key in (*TWELVE, "P", "R", "F1"):
        assert second.metrics[key] == pytest.approx(first.metrics[key], abs=2e-3, nan_ok=True), key
    line = (first.save_dir / "labels" / "picture0.txt").read_text().splitlines()[0].split()
    assert len(line) == 6 and line[0] in "012" and all(0 <= float(v) <= 1 for v in line[1:])
    assert not (first.save_dir / "labels" / "picture5.txt").exists()


@pytest.mark.usefixtures("finder")
def test_slices_find_what_the_whole_image_is_too_coarse_for(tmp_path: Path):
    data = dataset(tmp_path / "large", images=3, hw=(320, 480), count=10)
    whole = val.run(weights="blind.pt", data=data, project=tmp_path, imgsz=[160], **QUIET)
    sliced = val.run(weights="blind.pt", data=data, project=tmp_path, imgsz=[160], slice=160, overlap=0.3, **QUIET)
    assert sliced.metrics["AR_S"] > whole.metrics["AR_S"] + 0.3
    every = val.run(weights="any.pt", data=data, project=tmp_path, slice=160, overlap=0.3, workers=0)
    assert every.metrics["R"] == every.metrics["P"] == 1.0
    assert (every.save_dir / "val_batch0_pred.jpg").exists()


@pytest.mark.usefixtures("finder")
def test_ensemble_augmentation_and_single_class(squares: Path, tmp_path: Path):
    both = val.run(weights=["any.pt", "blind.pt"], data=squares, project=tmp_path, **QUIET)
    assert both.metrics["AP50"] == 1.0
    one = val.run(weights="any.pt", data=squares, project=tmp_path, single_cls=True, **QUIET)
    assert one.metrics["AP50"] == 1.0 and len(one.metrics["per_class"]) == 1


@pytest.mark.usefixtures("finder")
def test_free_thresholds_bins_and_limits_reach_the_metrics(squares: Path, tmp_path: Path, capsys):
    flags = ["--iou-thrs", "0.33", "--area-bins", "4", "16", "64", "--max-dets", "1", "2"]
    flags += ["--area-pixels", "network", "--area-from", "box"]
    argv = ["--weights", "any.pt", "--data", str(squares), "--project", str(tmp_path), "--workers", "0", "--noplots"]
    assert val.main(argv + flags) == 0
    metrics = read(tmp_path / "exp", "metrics.json")
    assert {"AP33", "AP_4-16", "AP_64+", "AR2"} <= set(metrics) and metrics["settings"]["iou_thrs"] == [0.33]
    assert metrics["settings"]["area_from"] == "box" and metrics["settings"]["pr_iou"] == 0.33
    assert "--max-dets" in capsys.readouterr().out


@pytest.mark.usefixtures("finder")
def test_speed_gives_percentiles_of_each_stage(squares: Path, tmp_path: Path, capsys):
    report = val.run(weights="any.pt", data=squares, project=tmp_path, task="speed", runs=5)
    speed = read(report.save_dir, "speed.json")
    for stage in ("pre-process", "inference", "NMS", "total"):
        assert 0 < speed[stage]["min"] <= speed[stage]["p50"] <= speed[stage]["p99"]
    assert speed["shape"] == [1, 3, 160, 160] and "p95" in capsys.readouterr().out
    as_detect = {"conf_thres": 0.25, "iou_thres": 0.45, "max_det": 1000}
    assert speed["settings"].items() >= as_detect.items()
    given = {"conf_thres": 0.1, "iou_thres": 0.5, "agnostic_nms": True}
    report = val.run(weights="any.pt", data=squares, project=tmp_path, task="speed", runs=1, **given)
    assert read(report.save_dir, "speed.json")["settings"].items() >= {
        "conf_thres": 0.1, "iou_thres": 0.5, "agnostic": True
    }.items()  # fmt: skip


@pytest.mark.usefixtures("finder")
def test_study_measures_every_size_of_every_model(squares: Path, tmp_path: Path):
    report = val.run(
        weights=["any.pt", "blind.pt"], data=squares, project=tmp_path, task="study", sizes=[64, 150], workers=0
    )
    rows = list(csv.DictReader((report.save_dir / "study.csv").read_text().splitlines()))
    assert [(r["model"], r["imgsz"]) for r in rows] == [
        ("any", "64"),
        ("any", "160"),
        ("blind", "64"),
        ("blind", "160"),
    ]
    assert (report.save_dir / "study.png").exists() and float(rows[1]["AP_S"]) > float(rows[2]["AP_S"])


@pytest.mark.usefixtures("finder")
def test_images_without_labels_can_only_be_predicted(tmp_path: Path):
    data = dataset(tmp_path / "bare", images=2, labels=False)
    with pytest.raises(UserError, match="--save-json"):
        val.run(weights="any.pt", data=data, project=tmp_path, **QUIET)
    report = val.run(weights="any.pt", data=data, project=tmp_path, save_json=True, **QUIET)
    assert report.metrics == {} and read(report.save_dir, "predictions.json")


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize(
    "ids,own", [([7, 500], True), (["img-9", "img-10"], False), (["42", "43"], False), ([1, 1], False)]
)
def test_saved_predictions_belong_to_an_annotation_file(tmp_path: Path, capsys, ids: list, own: bool):
    dataset(tmp_path, images=2, labels=False)
    records = [{"id": ids[i], "file_name": f"picture{i}.png", "width": 160, "height": 120} for i in range(2)]
    categories = [{"id": 10 * (c + 1), "name": name} for c, name in enumerate(NAMES)]
    parts = [records] if len(set(ids)) == 2 else [[record] for record in records]  # ids that files share
    for i, part in enumerate(parts):
        text = json.dumps({"images": part, "annotations": [], "categories": categories})
        (tmp_path / f"part{i}.json").write_text(text)
    files = ", ".join(f"part{i}.json" for i in range(len(parts)))
    (tmp_path / "d.yaml").write_text(f"val: images\nannotations: {{val: [{files}]}}\n")
    folder = val.run(weights="x.pt", data=tmp_path / "d.yaml", project=tmp_path, save_json=True, **QUIET).save_dir
    assert (folder / "annotations.json").exists() == (not own)
    assert ("annotations.json beside it: the data set's annotation files" in capsys.readouterr().out) == (not own)
    truth = {"images": records} if own else read(folder, "annotations.json")
    id_of = {record["file_name"]: record["id"] for record in truth["images"]}
    assert {p["image_id"] for p in read(folder, "predictions.json")} == {id_of["picture0.png"]}


def test_class_numbers_under_cocos_names_are_announced():
    names = tuple(load_data(val.__file__.replace("val.py", "data/coco128.yaml")).names)
    plain = DataSpec(Path("d.yaml"), Path("."), names, {})
    assert "category_id is the class number" in val.own_numbers(plain) and "annotations:" in val.own_numbers(plain)
    assert "category_id" not in val.own_numbers(DataSpec(Path("d.yaml"), Path("."), NAMES, {}))


class NmsInside(SquareFinder):
    """The finder as a file with NMS inside, which leaves nothing below 0.62."""

    end2end = True

    def __init__(self) -> None:
        super().__init__()
        nms = {"conf_thres": 0.62, "iou_thres": 0.5, "max_det": 7, "agnostic": True, "count": "fixed"}
        self.metadata = SimpleNamespace(**{**vars(self.metadata), "nms": nms})

    def __call__(self, images):
        return non_max_suppression(super().__call__(images), conf_thres=0.62, iou_thres=0.5, agnostic=True, max_det=7)


def test_the_nms_of_a_file_is_what_counts(squares: Path, tmp_path: Path, monkeypatch, capsys):
    """It is recorded, said where it costs AP, and not taken for what the flags say."""
    monkeypatch.setattr(val, "load_predictor", lambda *_, **__: NmsInside())
    report = val.run(weights="nms.onnx", data=squares, project=tmp_path, workers=0, noplots=True)
    used = read(report.save_dir, "metrics.json")["settings"]
    given = {"conf_thres": 0.62, "iou_thres": 0.5, "max_det": 7, "agnostic": True, "multi_label": False}
    assert given.items() <= used.items() and "export it with --conf-thres 0.001" in "".join(capsys.readouterr())
    for flag in ({"iou_thres": 0.1}, {"agnostic_nms": True}):
        with pytest.raises(UserError, match="does nothing with a file that has its NMS inside"):
            val.run(weights="nms.onnx", data=squares, project=tmp_path, **flag)


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize("task", ["study", "speed"])
def test_a_folder_that_cannot_be_is_told_before_the_work(task: str, squares: Path, tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises((UserError, OSError), match="file"):
        val.run(weights="any.pt", data=squares, project=tmp_path / "file", task=task, workers=0)
    assert "AP" not in capsys.readouterr().out


@pytest.mark.usefixtures("finder")
def test_a_study_needs_labels(tmp_path: Path):
    data = dataset(tmp_path / "bare", labels=False)
    with pytest.raises(UserError, match="have no labels"):
        val.run(weights="any.pt", data=data, project=tmp_path, task="study", sizes=[64])


@pytest.mark.parametrize(
    "options,limit,warned",
    [({}, 300, False), ({"max_dets": [1, 10, 1000]}, 1000, False), ({"max_det": 500}, 500, False),
     ({"max_dets": [1, 1000], "max_det": 400}, 400, True)],
)  # fmt: skip
def test_the_limit_of_nms_lets_through_what_is_counted(options: dict, limit: int, warned: bool, capsys):
    assert val.val_settings(val.ValConfig(**options), SquareFinder()).max_det == limit
    out = capsys.readouterr().out
    assert ("--max-det 400" in out and "--max-dets 1000" in out) == warned and out.count("\n") == warned


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize(
    "flags,words",
    [
        ({"weights": []}, "no --weights"),
        ({"task": "test"}, "test"),
        ({"imgsz": [1, 2, 3]}, "imgsz"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"conf_thres": 5}, "--conf-thres 5"),
        ({"iou_thres": -1}, "--iou-thres -1"),
        ({"max_det": 0}, "--max-det 0"),
        ({"task": "speed", "runs": 0}, "--runs 0"),
        ({"task": "study", "save_json": True}, "--save-json does nothing with --task study"),
        ({"task": "speed", "save_txt": True}, "--save-txt does nothing with --task speed"),
        ({"weights": "x", "predictions": "a", "annotations": "b"}, "--weights does nothing with --predictions"),
        ({"half": True, "predictions": "a", "annotations": "b"}, "--half does nothing with --predictions"),
        ({"weights": [], "predictions": "a", "annotations": "b", "save_json": True}, "--save-json"),
        ({"weights": [], "predictions": "a", "annotations": "b", "save_txt": True}, "--save-txt"),
        ({"weights": [], "predictions": "a", "annotations": "b", "slice": 640}, "--slice does nothing"),
        ({"weights": [], "predictions": "a", "annotations": "b", "single_cls": True}, "--single-cls does nothing"),
        ({"weights": [], "predictions": "a", "annotations": "b", "task": "speed"}, "--task does nothing"),
        ({"task": "study", "imgsz": [64]}, "--imgsz does nothing with --task study"),
        ({"sizes": [64]}, "--sizes does nothing with --task val"),
        ({"overlap": 0.5}, "--overlap is about the slices of --slice"),
        ({"task": "speed", "area_bins": [8.0]}, "--area-bins does nothing with --task speed"),
        ({"device": "cpu", "predictions": "a", "annotations": "b"}, "--device does nothing with --predictions"),
        ({"save_conf": True}, "--save-conf adds the confidence to the files of --save-txt"),
        ({"task": "study", "sizes": [64, -5]}, "--sizes 64 -5"),
        ({"annotations": "a.json"}, "--predictions"),
        ({"predictions": "a.json"}, "--annotations"),
        ({"weights": [], "predictions": "a.json", "annotations": "b.json"}, "b.json"),
    ],
)
def test_mistakes_are_one_line(squares: Path, tmp_path: Path, flags: dict, words: str):
    of_models = {"weights": "any.pt", "data": squares, **QUIET}
    options = {"project": tmp_path, **({} if {"predictions", "annotations"} <= set(flags) else of_models), **flags}
    with pytest.raises(UserError) as e:
        val.run(**options)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_model_of_other_classes_is_refused(squares: Path, tmp_path: Path, monkeypatch, capsys):
    finder = SquareFinder()
    finder.names = ["one", "two"]
    monkeypatch.setattr(val, "load_predictor", lambda *_, **__: finder)
    with pytest.raises(UserError, match="2 classes .* 3"):
        val.run(weights="x.pt", data=squares, project=tmp_path, **QUIET)
    finder.names = ["red", "green", "azure"]
    val.run(weights="x.pt", data=squares, project=tmp_path, **QUIET)
    assert "azure / blue" in capsys.readouterr().out


def test_a_classifier_is_measured_too(tmp_path: Path, monkeypatch):
    for name, color in (("green", (0, 200, 0)), ("red", (200, 0, 0))):
        for split in ("train", "val"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 40), color).save(folder / f"{i}.png")

    class Colors(SquareFinder):
        task = "classify"

        def __call__(self, images):
            return torch.stack([images[:, 1].mean((1, 2)), images[:, 0].mean((1, 2))], 1)

    finder = Colors(imgsz=(32, 32))
    finder.names, finder.max_stride = ["green", "red"], 16
    monkeypatch.setattr(val, "load_predictor", lambda *_, **__: finder)
    report = val.run(weights="x.pt", data=tmp_path / "data", project=tmp_path, **QUIET)
    assert report.metrics["top1"] == 1.0 and (report.save_dir / "metrics.json").exists()
    for size, told in (([33], "a multiple of 16"), ([0], "expected one side"), ([64, 96], "expected one side")):
        with pytest.raises(UserError, match=told):
            val.run(weights="x.pt", data=tmp_path / "data", imgsz=size, project=tmp_path, **QUIET)
    with pytest.raises(UserError, match="classifier"):
        val.run(weights="x.pt", data=tmp_path / "data", task="speed", project=tmp_path, **QUIET)
    with pytest.raises(UserError, match="--save-json does nothing with a classifier, which 'x.pt' is"):
        val.run(weights="x.pt", data=tmp_path / "data", save_json=True, project=tmp_path, **QUIET)
    monkeypatch.setattr(val, "load_predictor", lambda path, **_: finder if path == "x.pt" else SquareFinder())
    with pytest.raises(UserError, match="'x.pt' is a classifier"):
        val.run(weights=["detector.pt", "x.pt"], data=tmp_path / "data", project=tmp_path, **QUIET)


def test_acceptance_of_existing_predictions(shared_data: Path, tmp_path: Path):
    folder = shared_data / "cocoapi-val2014-100"
    argv = ["--predictions", str(folder / "instances_val2014_fakebbox100_results.json")]
    argv += ["--annotations", str(folder / "instances_val2014_100.json"), "--project", str(tmp_path), "--noplots"]
    assert val.main(argv) == 0
    metrics = read(tmp_path / "exp", "metrics.json")
    expected = read(folder, "expected.json")["bbox"]
    assert [metrics[key] for key in TWELVE] == pytest.approx(expected, abs=1e-9)


def test_old_flags_name_their_replacement():
    with pytest.raises(UserError, match="--save-txt"):
        val.main(["--save-hybrid"])
