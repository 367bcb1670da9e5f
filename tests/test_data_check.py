"""The data check: numbers against counting by hand, the digest, duplicates, and the verb's three outputs."""

import json

import hostile
import numpy as np
import pytest
from PIL import Image

import check as verb
from utils.core.errors import UserError
from utils.data.check import EDGES, check, digest, object_sizes, render
from utils.data.index import build_index
from utils.data.problems import KEPT
from utils.data.spec import load_data


@pytest.fixture
def yaml(tmp_path):
    rng = np.random.default_rng(0)
    for split, sizes in (("train", [(200, 100), (100, 50), (40, 80)]), ("val", [(64, 64), (32, 32)])):
        for folder in ("images", "labels"):
            (tmp_path / folder / split).mkdir(parents=True)
        for i, size in enumerate(sizes):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / split / f"{i}.png")
    (tmp_path / "labels/train/0.txt").write_text(
        "0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.5 0.02\n"
    )  # 20x10 and 100x2 of 200x100
    (tmp_path / "labels/train/1.txt").write_text("0 0.5 0.5 0.06 0.2\n")  # 6x10 of 100x50
    (tmp_path / "labels/train/9.txt").write_text("0 0.5 0.5 0.1 0.1\n")  # of no image
    (tmp_path / "labels/val/0.txt").write_text("0 0.5 0.5 1 1\n")
    (tmp_path / "images/val/copy.png").write_bytes((tmp_path / "images/train/2.png").read_bytes())
    (tmp_path / "d.yaml").write_text("train: images/train\nval: images/val\nnames: [a, b, c]\n")
    return tmp_path / "d.yaml"


def test_sizes_at_the_network_scale(yaml):
    original, network = object_sizes(build_index(load_data(yaml), "train"), 100)
    np.testing.assert_allclose(original, [[20, 10], [100, 2], [6, 10]], rtol=1e-5)
    np.testing.assert_allclose(network, [[10, 5], [50, 1], [6, 10]], rtol=1e-5)


def test_digest(yaml):
    assert digest(build_index(load_data(yaml), "train"), 100) == [
        "3 images (1 without a box), 3 boxes of 3 classes",
        "classes: a 2 (66.7%), b 1 (33.3%); 1 without any box",
        "shorter side at 100 px: 1 (33.3%) under 2 px, 1 (33.3%) under 4 px, 3 (100.0%) under 8 px; median 10 x 5 px",
    ]


def test_numbers(yaml):
    result, _ = check(load_data(yaml), 100)
    train, val = result["splits"]["train"], result["splits"]["val"]
    assert train["classes"] == {"a": 2, "b": 1, "c": 0} and train["under_px"] == {"2": 1, "4": 1, "8": 3}
    assert train["image_sizes_hw"] == {"smallest": [80, 40], "median": [50, 100], "largest": [100, 200]}
    assert train["boxes_per_image"] == {"mean": 1.0, "max": 2} and train["counts"] == {"label-orphan": 1}
    by_hand = [
        sum(a <= size < b for size in (200**0.5, 200**0.5, 60**0.5)) for a, b in zip(EDGES, EDGES[1:], strict=False)
    ]
    assert train["box_sizes"]["original"] == by_hand and sum(train["box_sizes"]["network"]) == 3
    assert result["duplicates"]["train/val"] == [
        [str(yaml.parent / "images/train/2.png"), str(yaml.parent / "images/val/copy.png")]
    ]
    assert result["duplicates"]["train"] == [] and val["used"] == 3 and val["without_box"] == 2
    text = "\n".join(render(result))
    assert "1 images of equal content in train and val" in text and "labels/train/9.txt belongs to no image" in text


def test_classes_of_one_name_are_counted_apart(yaml):
    yaml.write_text(yaml.read_text().replace("[a, b, c]", "[a, a, c]"))
    result, _ = check(load_data(yaml), 100)
    assert result["splits"]["train"]["classes"] == {"a (0)": 2, "a (1)": 1, "c": 0}


def test_verb_writes_table_json_and_picture(yaml, tmp_path, capsys):
    args = ["--data", str(yaml), "--imgsz", "100", "--project", str(tmp_path / "runs")]
    assert verb.main(args) == 0
    out = capsys.readouterr().out
    assert "boxes under 4 px" in out and "1 (33.3%)" in out
    content = json.loads((tmp_path / "runs/exp/check.json").read_text())
    assert content["splits"]["train"]["boxes"] == 3
    with Image.open(tmp_path / "runs/exp/check.png") as picture:
        assert picture.size == (1400, 1000) and len(np.unique(picture.convert("L"))) > 20
    assert verb.main([*args, "--quick", "--noplots", "--max-problems", "0"]) == 1
    assert verb.main([*args, "--quick", "--noplots", "--max-problems", "1"]) == 0


def test_hostile_folder(tmp_path, capsys):
    folder = hostile.build(tmp_path / "h")
    result = verb.run(data=folder.yaml, project=str(tmp_path / "runs"), workers=0, noplots=True)
    out = capsys.readouterr().out
    train = result["splits"]["train"]
    named = {(p["kind"], p["file"]) for p in train["problems"]}
    extra = named - folder.problems
    assert folder.problems <= named and all(kind == "label-orphan" for kind, _ in extra)
    assert train["used"] == len(folder.used) and train["boxes"] == folder.boxes
    assert "Traceback" not in out and len(result["duplicates"]["train"]) > 5
    json.dumps(result)


def test_what_stops_training_is_not_called_dropped(yaml):
    (yaml.parent / "labels/val/1.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    result, _ = check(load_data(yaml), 100)
    assert result["splits"]["val"]["actions"] == {"train.py and val.py stop at it": 1}
    with pytest.raises(UserError, match="expected 0 to 2"):
        build_index(load_data(yaml), "val")


def test_empty_splits_have_numbers_too(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "images" / "a.png")
    (tmp_path / "d.yaml").write_text("train: images\nnames: [a]\n")
    result = verb.run(data=tmp_path / "d.yaml", project=str(tmp_path / "runs"), noplots=True)
    assert result["splits"]["train"]["boxes"] == 0
    assert digest(build_index(load_data(tmp_path / "d.yaml"), "train"), 64)[1] == "classes: ; 1 without any box"


def test_help_promises_no_more_than_the_json_holds(capsys):
    with pytest.raises(SystemExit):
        verb.main(["--help"])
    assert f"at most {KEPT:,}" in " ".join(capsys.readouterr().out.split())
