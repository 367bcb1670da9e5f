"""One declaration per option: flags, prefixes, aliases, keywords, retired flags, hyper-parameters."""

from pathlib import Path

import pytest

from utils.core.config import config_from_kwargs, given_options, parse_config
from utils.core.errors import UserError
from utils.core.hyp import Hyp, load_hyp
from utils.engine.training.settings import RETIRED, TrainConfig


def parse(*argv):
    return parse_config(TrainConfig, ["--cfg", "x.yaml", *argv], "train.py", "", RETIRED)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--img", "256"], "imgsz", 256),
        (["--img-size", "256"], "imgsz", 256),
        (["--imgsz", "256"], "imgsz", 256),
        (["--batch", "8"], "batch_size", 8),
        (["--batch-size", "8"], "batch_size", 8),
        (["--batch_size", "8"], "batch_size", 8),
        (["--epo", "3"], "epochs", 3),
        (["--cache"], "cache", "ram"),
        (["--cache", "disk"], "cache", "disk"),
        (["--resume"], "resume", "newest"),
        (["--freeze", "0", "1"], "freeze", [0, 1]),
        (["--hyp", "a.yaml", "lr0=0.1"], "hyp_overrides", ["lr0=0.1"]),
        (["--save-every", "500"], "save_every", "500"),
    ],
)
def test_flags_that_people_type(argv, field, value):
    assert getattr(parse(*argv), field) == value


@pytest.mark.parametrize("flag", sorted(RETIRED))
def test_retired_flags_name_their_replacement_in_one_line(flag):
    with pytest.raises(UserError, match="does not exist here") as error:
        parse(flag)
    assert RETIRED[flag] in str(error.value)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--epochz", "3"], "did you mean '--epochs'"),
        (["--epochs", "x"], "invalid int"),
        (["--epochs", "0"], "expected 1 or more"),
        (["--optimizer", "sgdd"], "invalid choice"),
        (["--cos-lr", "--linear-lr"], "exclude"),
        (["--batch-size", "0"], "expected 1 or more"),
        (["--save-every", "soon"], "expected 10m"),
        (["--save-every", "5ms"], "expected 10m"),
        (["--save-every=-5"], "expected 10m"),
        (["--save-every=-1m"], "expected 10m"),
        (["--save-every", "0.5"], "whole number of steps"),
        (["--freeze", "-1"], "expected numbers of 0 or more"),
    ],
)
def test_bad_flags_are_one_line(argv, part):
    with pytest.raises(UserError, match=part) as error:
        parse(*argv)
    assert "\n" not in str(error.value)


def test_keywords_mirror_flags_and_aliases():
    config = config_from_kwargs(TrainConfig, cfg="x.yaml", img=128, batch=4)
    assert (config.imgsz, config.batch_size) == (128, 4)
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        config_from_kwargs(TrainConfig, cfg="x.yaml", epoch=3)


def test_paths_in_keywords_become_text():
    config = config_from_kwargs(TrainConfig, cfg=Path("x.yaml"), hyp=[Path("a.yaml"), "lr0=0.1"])
    assert (config.cfg, config.hyp) == ("x.yaml", ["a.yaml", "lr0=0.1"])


def test_options_without_a_value_are_true_in_keywords():
    """`resume=True` and `cache=False`, as YOLOv5 takes them, are the flag without a value and no flag."""
    config = config_from_kwargs(TrainConfig, resume=True, cache=True)
    assert (config.resume, config.cache) == ("newest", "ram")
    config = config_from_kwargs(TrainConfig, cfg="x.yaml", resume=False, cache=False)
    assert (config.resume, config.cache) == (None, None)


def test_given_options_are_fields_whatever_their_spelling():
    expected = {"imgsz", "batch_size", "rect"}
    assert given_options(TrainConfig, {"img": 8, "batch": 4, "rect": True}) == expected
    assert given_options(TrainConfig, ["--img-size", "8", "--batch", "4", "--rect"]) == expected


def test_save_interval_units():
    assert [parse("--save-every", t).save_interval() for t in ("10m", "1.5S", "500", "0")] == [
        (600.0, 0), (1.5, 0), (0.0, 500), (0.0, 0),
    ]  # fmt: skip


def test_hyp_files_overrides_and_typos(tmp_path):
    path = tmp_path / "h.yaml"
    path.write_text("lr0: 0.02\nmosaic: 0.5\n")
    hyp = load_hyp(path, ["mosaic=0.25"])
    assert (hyp.lr0, hyp.mosaic, hyp.momentum) == (0.02, 0.25, Hyp().momentum)
    for overrides, part in (
        (["momentun=1"], "did you mean 'momentum'"),
        (["lr0=x"], "key=number"),
        (["fliplr=2"], "0 to 1"),
    ):
        with pytest.raises(UserError, match=part):
            load_hyp(path, overrides)
