"""Metadata travel as JSON and are checked; formats are found by name; what is missing is said in one line."""

import importlib
import json
from dataclasses import fields

import pytest

from models.backends import FORMATS, exportable, format_of, load_predictor
from models.backends.base import FIELDS, NMS_KEYS, Metadata, given_metadata, need, pair
from models.backends.graph import NmsSettings, nms_dict
from models.weights import load_model
from utils.core.errors import UserError

NMS = nms_dict(NmsSettings(max_det=5))
GOOD = Metadata(names=("a", "b"), imgsz=(64, 96), strides=(8, 16), dynamic="all", nms=NMS, version="1")


def test_metadata_survive_json_with_any_names():
    for names in (("a",), ("\"'<>&\n{}", "größe", "人")):
        made = Metadata(names=names, imgsz=(64, 96))
        assert Metadata.from_json(made.to_json(), "x") == made
    classifier = Metadata(names=("a",), imgsz=(64, 64), strides=(), task="classify")
    for made in (GOOD, classifier):
        assert Metadata.from_json(made.to_json(), "x") == made


@pytest.mark.parametrize(
    "change",
    [
        {"names": "__import__('os').system('true')"},
        {"names": [1]},
        {"names": []},
        {"imgsz": [64]},
        {"imgsz": [True, False]},
        {"strides": None},
        {"strides": []},
        {"strides": [8, 0]},
        {"task": "segment"},
        {"dynamic": "some"},
        {"batch": "1"},
        {"nms": []},
        {"nms": {"max_det": 5}},
        {"precision": "fp8"},
        {"max_stride": 0},
        {"schema": None},
        {"schema": 99},
        {"preprocessing": "mean"},
    ],
)
def test_damaged_metadata_are_refused(change):
    damaged = "metadata schema" if change == {"schema": 99} else next(iter(change)) if "schema" not in change else "not"
    with pytest.raises(UserError, match=rf"file\.onnx: .*{damaged}"):
        Metadata.from_json(json.dumps({**json.loads(GOOD.to_json()), **change}), "file.onnx")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{'names': ['a']}", "__import__('os')"])
def test_text_that_is_no_metadata_is_refused(text):
    with pytest.raises(UserError):
        Metadata.from_json(text, "file")


def test_every_field_is_checked():
    assert set(FIELDS) == {field.name for field in fields(Metadata)}
    assert {field.name for field in fields(NmsSettings)} == NMS_KEYS


def test_unknown_keys_of_a_later_minor_version_are_ignored():
    assert Metadata.from_json(json.dumps({**json.loads(GOOD.to_json()), "new": 1}), "x") == GOOD


def test_a_file_without_metadata_needs_names_and_size():
    with pytest.raises(UserError, match="--data DATA.yaml and --imgsz"):
        given_metadata("x.onnx", ["a"], None)
    assert given_metadata("x.onnx", ["a"], 64).imgsz == (64, 64)


def test_every_format_has_exporter_and_runtime():
    suffixes = [f.suffix for f in FORMATS.values()]
    assert len(set(suffixes)) == len(suffixes)
    for fmt in FORMATS.values():
        module = importlib.import_module(f"models.backends.{fmt.module}")
        assert callable(module.load)
        assert callable(getattr(module, "export", None)) == fmt.exports
        assert format_of(f"some/dir/best{fmt.suffix}") is fmt
    assert set(exportable()) == {n for n, f in FORMATS.items() if f.exports}


def test_exported_files_are_no_checkpoints():
    for fmt in (FORMATS[name] for name in exportable()):
        with pytest.raises(UserError, match="is an exported file; expected the checkpoint"):
            load_model(f"best{fmt.suffix}")


def test_unknown_and_absent_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean '.onnx'"):
        load_predictor(tmp_path / "best.onx")
    with pytest.raises(UserError, match="no such file"):
        load_predictor(tmp_path / "best.onnx")


def test_missing_packages_are_named_and_not_installed():
    with pytest.raises(UserError, match="pip install no_such_package_here"):
        need("json", "no_such_package_here", what="this")


def test_pair():
    assert pair(64) == pair([64]) == (64, 64) and pair((64, 96)) == (64, 96)
    with pytest.raises(UserError):
        pair([1, 2, 3])
