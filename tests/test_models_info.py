"""What a network costs: figures that can be counted by hand, and the verb that prints them."""

import pytest
import torch

import info
from models import build_model
from models.summary import summarize
from models.weights import pack_model
from utils.core.checkpoint import save_checkpoint
from utils.core.errors import UserError


def test_one_convolution_by_hand() -> None:
    cfg = {
        "nc": 1,
        "anchors": [[8, 8]],
        "backbone": [[-1, 1, "Conv", [8, 3, 2]]],
        "head": [[[0], 1, "Detect", ["nc", "anchors"]]],
    }
    summary = summarize(build_model(cfg), 64)
    conv, detect = summary.rows
    assert conv.flops == 2 * 3 * 9 * 8 * 32 * 32 and detect.flops == 2 * 8 * 6 * 32 * 32
    assert conv.parameters == 8 * 27 + 16 and detect.parameters == 6 * 8 + 6
    # image, and the inputs of normalization and activation, in float32; Detect keeps its input, the activation's output
    maps = 8 * 32 * 32 * 4
    assert conv.saved == pytest.approx(3 * 64 * 64 * 4 + 2 * maps, rel=0.01)
    assert detect.saved == pytest.approx(maps, rel=0.01)
    assert (conv.shape, detect.shape) == ("8x32x32", "1x32x32x6")
    assert summary.flops == conv.flops + detect.flops and summary.saved == conv.saved + detect.saved


def test_model_is_left_as_it_was() -> None:
    model = build_model("yolov5-spd-n", nc=2).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    summary = summarize(model, (64, 128))
    assert summary.imgsz == (64, 128) and not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_verb_prints_rows_and_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["yolov5-spd-n", "--imgsz", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 SPD [2]" in lines[3] and "2,256,157 parameters" in lines[-1]


def test_verb_takes_classifiers_and_checkpoints(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert info.run(cfg="resnet18-spd", nc=200, brief=True).parameters == pytest.approx(14.4e6, rel=0.01)
    model = build_model("yolov5-spd-n", nc=2)
    path = f"{tmp_path}/model.pt"
    save_checkpoint(path, pack_model(model, ["a", "b"], 96))
    assert info.run(cfg=path, brief=True).imgsz == (96, 96)
    assert "at 96x96" in capsys.readouterr().out


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="multiple of the model's largest stride 32; nearest usable sizes are 224"):
        info.main(["yolov5-spd-n", "--imgsz", "250"])
