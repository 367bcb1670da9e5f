"""Data YAML files as users write them, good and bad."""

import json
import os

import pytest

from utils.core.errors import UserError
from utils.data.spec import load_data


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[a, b]", ("a", "b")),
        ("{0: a, 1: b}", ("a", "b")),
        ("{1: b, 0: a}", ("a", "b")),
        ("[1, 2.5]", ("1", "2.5")),
        ("[Ä, 火]", ("Ä", "火")),
    ],
)
def test_names(tmp_path, names, expected):
    spec = load_data(write(tmp_path / "d.yaml", f"train: images\nnames: {names}\n"))
    assert spec.names == expected and spec.nc == len(expected) and spec.format == "yolo" and spec.channels == 3


def test_nc_without_names_numbers_them(tmp_path):
    assert load_data(write(tmp_path / "d.yaml", "train: x\nnc: 3")).names == ("class0", "class1", "class2")


def test_paths_are_relative_to_the_yaml_then_to_the_working_folder(tmp_path, monkeypatch):
    yaml = write(tmp_path / "conf" / "d.yaml", "path: set\ntrain: [a, b/list.txt]\nval: /abs\nnames: [x]\n")
    (tmp_path / "work" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    spec = load_data(os.path.relpath(yaml))
    assert spec.root == tmp_path / "work" / "set" and spec.splits["val"][0].as_posix() == "/abs"
    assert spec.splits["train"] == (spec.root / "a", spec.root / "b" / "list.txt")
    (tmp_path / "conf" / "set").mkdir()
    assert load_data(yaml).root == tmp_path / "conf" / "set"
    assert load_data(write(tmp_path / "e.yaml", "train: t\nnames: [x]")).splits["train"] == (tmp_path / "t",)


def test_unknown_keys_are_tolerated(tmp_path, capsys):
    text = "train: t\nnames: [x]\nroboflow: {url: x}\nanotations: 3\n"
    load_data(write(tmp_path / "d.yaml", text))
    assert "did you mean 'annotations'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("names: [a]", "train"),
        ("train: t", "names"),
        ("train: []\nnames: [a]", "'train: \\[\\]' is not a path"),
        ("train: t\nnames: 3", "names"),
        ("train: t\nnames: []", "names"),
        ("train: t\nnames: [a, [b]]", "number 1"),
        ("train: t\nnames: [a, no]", "quote"),
        ("train: t\nnames: {0: a, 2: b}", "no number 1"),
        ("train: t\nnames: {a: 0}", "'a'"),
        ("train: t\nnames: [a]\nnc: 2", "nc"),
        ("train: t\nnames: [a]\nnc: two", "nc"),
        ("train: t\nnames: [a]\nnc: -1", "nc"),
        ("train: 5\nnames: [a]", "train"),
        ("train: ['']\nnames: [a]", "train"),
        ("train: t\nnames: [a]\npath: [p]", "path"),
        ("train: t\nnames: [a]\nchannels: 4", "channels"),
        ("train: t\nnames: [a]\nformat: labelme", "labelme"),
        ("train: t\nnames: [a]\nformat: coco", "annotations"),
        ("train: t\nnames: [a]\nannotations: t.json", "mapping"),
        ("train: t\nnames: [a]\nannotations: {val: t.json}", "val"),
        ("train: t\nval: v\nnames: [a]\nannotations: {train: t.json}", "val"),
        ("train: t\nnames: [a]\nannotations: {train: [a.json, folder]}", "mixes"),
        ("train: t\nnames: [a]\ndownload: {file: x}", "download"),
        ("train: t\nnames: [a]\ndownload: {url: 'http://x', run: 'rm'}", "run"),
        ("train: t\nnames: [a]\ndownload: {url: 'http://x', sha256: 12}", "sha256"),
        ("train: t\ntrain: u\nnames: [a]", "twice"),
        ("- a", "top level"),
        ("a: [", "YAML"),
        ("!!python/object/apply:os.system [ls]", "YAML"),
    ],
)
def test_errors_say_where_and_what(tmp_path, text, word):
    path = write(tmp_path / "d.yaml", text)
    with pytest.raises(UserError, match=word) as error:
        load_data(path)
    assert "d.yaml" in str(error.value) and "\n" not in str(error.value)


def test_missing_images_name_the_download(tmp_path):
    text = "train: images/train\nnames: [a]\ndownload: {url: 'https://example.org/x.zip', sha256: 'ab'}\n"
    spec = load_data(write(tmp_path / "d.yaml", text))
    with pytest.raises(
        UserError, match=r"images/train.*does not exist.*example.org/x.zip.*check.py --data .*--download"
    ):
        spec.require("train")
    with pytest.raises(UserError, match="no 'val:'; declared splits: train"):
        spec.require("val")


def test_a_download_script_is_never_run_and_says_so(tmp_path):
    for script in ("bash get.sh", "import os; os.system('touch owned')", "|\n  from utils import x\n  x()"):
        spec = load_data(write(tmp_path / "d.yaml", f"train: t\nnames: [a]\ndownload: {script}\n"))
        assert spec.download == ()
        with pytest.raises(UserError, match="never run"):
            spec.require("train")
    spec = load_data(write(tmp_path / "d.yaml", "train: t\nnames: [a]\ndownload: https://example.org/x.zip"))
    assert spec.download == ({"url": "https://example.org/x.zip"},)


def test_coco_names_come_from_the_categories(tmp_path):
    categories = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]
    file = write(tmp_path / "t.json", json.dumps({"images": [], "categories": categories}))
    yaml = write(tmp_path / "d.yaml", "train: t\nannotations: {train: t.json}")
    assert load_data(yaml).names == ("three", "seven") and load_data(yaml).format == "coco"
    file.write_text(json.dumps({"images": [], "categories": categories[:1]}))
    assert load_data(yaml).names == ("seven",)
    file.unlink()
    with pytest.raises(UserError, match="does not exist"):
        load_data(yaml).require("train")


def test_image_folder(tmp_path):
    for part in ("train/cat", "train/ant", "test/cat", ".git"):
        (tmp_path / part).mkdir(parents=True)
    spec = load_data(tmp_path)
    assert spec.format == "folder" and spec.names == ("ant", "cat")
    assert spec.splits == {s: (tmp_path / p,) for s, p in (("train", "train"), ("val", "test"), ("test", "test"))}
    with pytest.raises(UserError, match="class folders"):
        (tmp_path / "empty" / "train").mkdir(parents=True)
        load_data(tmp_path / "empty")
    with pytest.raises(UserError, match="without train/"):
        load_data(tmp_path / "train")


def test_shared_yamls_load(shared_data):
    for name, classes in (("coco128", 80), ("deeppcb", 6), ("coco-val200", 80)):
        spec = load_data(shared_data / name / f"{name}.yaml")
        assert spec.nc == classes and spec.require("train") and spec.require("val")
    assert load_data(shared_data / "tiny-imagenet-20").nc == 20


def test_names_in_data_are_found_from_anywhere(tmp_path, root, monkeypatch):
    """A name or a path of the project's data/, unless the file exists here; a name of neither is told."""
    monkeypatch.chdir(tmp_path)
    for name in ("coco.yaml", "data/coco.yaml"):
        assert load_data(name).yaml == root / "data" / "coco.yaml"
    (tmp_path / "coco.yaml").write_text("train: images\nnames: [own]\n")
    assert load_data("coco.yaml").names == ("own",)
    with pytest.raises(UserError, match="'cocoa.yaml' not found"):
        load_data("cocoa.yaml")
