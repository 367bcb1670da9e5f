"""Atomic writes, run folders, strict YAML, near misses."""

import json
import os
import subprocess
import sys

import pytest

from utils.core.errors import UserError
from utils.core.files import atomic_write, cache_dir, increment_path, nearest, short_names
from utils.core.yamls import dump_yaml, load_yaml, parse_yaml


def test_atomic_write_keeps_the_old_file_when_the_body_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_what_the_disk_refuses_is_one_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UserError, match="No space left on device.*what was there before is untouched"):  # noqa: SIM117
        with atomic_write(path):
            raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    with pytest.raises(UserError, match="cannot write"), atomic_write(path / "below" / "b.txt"):
        pass


def test_without_a_cache_folder_a_temporary_one_serves(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("YOLOV5_SPD_CACHE", str(tmp_path / "file"))
    place = cache_dir("index")
    assert place.is_dir() and tmp_path not in place.parents and cache_dir("index") == place
    assert capsys.readouterr().out.count("a temporary one serves") == 1


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_what_is_no_name_of_a_run_folder(name):
    with pytest.raises(UserError, match="is no name for a run folder"):
        increment_path(".", name)


def test_run_folders_are_numbered_from_two(tmp_path):
    names = [increment_path(tmp_path / "runs", "exp").name for _ in range(3)]
    assert names == ["exp", "exp2", "exp3"]
    assert increment_path(tmp_path / "runs", "exp", exist_ok=True).name == "exp"


@pytest.mark.parametrize("exist_ok", [False, True])
def test_a_run_folder_below_a_file_is_refused_in_one_line(tmp_path, exist_ok):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="choose another --project"):
        increment_path(tmp_path / "runs", "exp", exist_ok)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: 1\na: 2\n", "given twice"),
        ("- 1\n", "found a list"),
        ("a: !!python/object/apply:os.system [x]\n", "not valid YAML"),
        ("a: [1\n", "not valid YAML"),
        ("? [1]\n: 2\n", "plain value"),
    ],
)
def test_yaml_is_strict_and_says_why_in_one_line(text, part):
    with pytest.raises(UserError, match=part) as error:
        parse_yaml(text, "x.yaml")
    assert "\n" not in str(error.value)


def test_yaml_round_trip(tmp_path):
    data = {"names": ["ä", "b"], "n": 1.5, "deep": {"x": [1, 2]}}
    dump_yaml(tmp_path / "a.yaml", data)
    assert load_yaml(tmp_path / "a.yaml") == data


def test_nearest():
    assert "batch-size" in nearest("bach-size", ["batch-size", "epochs"])
    assert nearest("zzz", ["batch-size"]) == ""


def test_names_that_are_not_utf8_can_be_written_down(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    with atomic_write(tmp_path / "a.json", "w") as file:
        json.dump({"file": name}, file, ensure_ascii=False)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["file"] == name


def test_a_console_without_the_letters_still_gets_the_message(root):
    code = "from utils.core.log import LOGGER; LOGGER.info('\u732b 0.9')"
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "\\u732b 0.9\n" and not done.stderr


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.pt", "runs/b.onnx"], ["a", "b"]),
        (["runs/exp/weights/best.pt", "runs/exp2/weights/best.pt"], ["exp", "exp2"]),
        (["plain/train/weights/best.pt", "spd/train/weights/best.pt"], ["plain", "spd"]),
        (["a/best.pt", "a/best.onnx"], ["best.pt", "best.onnx"]),
        (["x/a.pt", "x/a.pt"], ["x/a.pt", "x/a.pt"]),
        (["a.pt", "x/a.pt"], ["a.pt", "x/a.pt"]),
        (["x/a.pt", "y/a.pt", "y/b.pt"], ["x/a.pt", "y/a.pt", "y/b.pt"]),
    ],
)
def test_models_are_called_by_what_tells_them_apart(files: list[str], names: list[str]) -> None:
    assert short_names(files) == names
