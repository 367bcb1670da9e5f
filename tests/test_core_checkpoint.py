"""Checkpoints: plain content, safe reading, and a full disk or a crash that leaves the earlier file whole."""

import pytest
import torch
from safetensors.torch import save_file

from utils.core import checkpoint as ck
from utils.core.errors import UserError

DATA = {"format": "yolov5-spd", "names": ["a", "b"], "n": 3, "state": {"w": torch.arange(6.0).view(2, 3)}}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    ck.save_checkpoint(path, DATA)
    back = ck.load_checkpoint(path)
    assert torch.equal(back.pop("state")["w"], DATA["state"]["w"])
    assert back == {k: v for k, v in DATA.items() if k != "state"}
    assert ck.is_native(path)


def test_only_plain_values_are_written(tmp_path):
    with pytest.raises(AssertionError, match="tensors and plain values"):
        ck.save_checkpoint(tmp_path / "x.pt", {"state": {}, "model": torch.nn.Linear(1, 1)})


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"not a checkpoint", b"\x80\x02cos\nsystem\n."])
def test_damaged_files_are_one_line(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        ck.load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("description", ["{", "[1]", "5", "null", "[" * 100_000])
def test_a_damaged_description_in_safetensors_is_one_line(tmp_path, description):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(2)}, path, {ck.FORMAT: description})
    with pytest.raises(UserError, match="damaged: its model description is") as error:
        ck.load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_one_flipped_bit_is_one_line_or_harmless(tmp_path):
    """Every byte of a file with one bit flipped: read as it was, or refused in one line that names the file."""
    path = tmp_path / "x.pt"
    ck.save_checkpoint(path, DATA)
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        for read in (ck.is_native, ck.load_checkpoint):
            try:
                read(path)
            except UserError as error:
                refused += 1
                assert "x.pt" in str(error) and "\n" not in str(error), at
    assert refused > 100
    at = whole.index(DATA["state"]["w"].numpy().tobytes())
    path.write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
    with pytest.raises(UserError, match="check sums"):
        ck.load_checkpoint(path)


def test_the_mark_is_the_first_entry_and_not_any_text(tmp_path):
    """Files of others that mention this project are not taken as its own, and torch's advice is not passed on."""
    path = tmp_path / "x.pt"
    torch.save({"epoch": 1, "opt": {"project": "runs/yolov5-spd", "format": "yolov5-spd"}}, path)
    assert not ck.is_native(path)
    torch.save({"model": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(UserError, match="written by train.py or convert.py") as error:
        ck.load_checkpoint(path)
    assert "weights_only" not in str(error.value) and "\x1b" not in str(error.value)


def test_a_write_that_fails_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    ck.save_checkpoint(path, DATA)

    def full_disk(obj, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        ck.save_checkpoint(path, {**DATA, "n": 4})
    monkeypatch.undo()
    assert ck.load_checkpoint(path)["n"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
