"""The Python API: every kind of picture gives the same result, in every form that people ask for."""

import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import hubconf
from models import build_model
from models.weights import pack_model
from tests.media import RedFinder, one_thread, with_squares  # noqa: F401
from utils.core.checkpoint import save_checkpoint
from utils.core.errors import UserError
from utils.engine.inference.results import Results
from utils.ops.detections import Detections

BOX = (40, 60, 80, 180)


@pytest.fixture
def model():
    return hubconf.Model(RedFinder())


def forms(tmp_path):
    """One picture in every form that the API takes."""
    image = with_squares((256, 320), [BOX])
    cv2.imwrite(str(tmp_path / "a.png"), image[:, :, ::-1])
    chw = torch.from_numpy(image).permute(2, 0, 1)
    return {
        "path": tmp_path / "a.png",
        "text": str(tmp_path / "a.png"),
        "array": image,
        "array CHW": image.transpose(2, 0, 1),
        "array with alpha": np.dstack((image, np.full((256, 320), 255, np.uint8))),
        "PIL": Image.fromarray(image),
        "PIL from file": Image.open(tmp_path / "a.png"),
        "tensor": chw,
        "float tensor": chw.float() / 255,
        "batch": chw[None],
        "list": [image],
        "tuple": (image,),
    }


def test_every_form_of_a_picture_gives_the_same_boxes(model, tmp_path):
    for kind, value in forms(tmp_path).items():
        results = model(value, size=320)
        assert len(results) == 1, kind
        assert np.abs(results.xyxy[0][0, :4].numpy() - BOX).max() < 1.5, kind
        assert results.images[0].shape == (256, 320, 3), kind


def test_gray_pictures_and_exif_rotation(model, tmp_path):
    assert model(np.zeros((64, 64), np.uint8), size=64).images[0].shape == (64, 64, 3)
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.fromarray(with_squares((64, 128), [])).save(tmp_path / "r.jpg", exif=exif)
    assert model(tmp_path / "r.jpg", size=64).images[0].shape == (128, 64, 3)
    assert model(Image.open(tmp_path / "r.jpg"), size=64).images[0].shape == (128, 64, 3)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("http://u:secret@host/a.jpg", "nothing is downloaded"),
        ("nowhere.jpg", "nowhere.jpg"),
        (np.zeros((5, 5, 7), np.uint8), "expected uint8"),
        (np.zeros((4, 4, 3), np.float32), "expected uint8"),
        (np.zeros((0, 4, 3), np.uint8), "expected uint8"),
        (torch.full((3, 8, 8), 255.0), "values 255 to 255; expected 0 to 1"),
        (torch.full((3, 8, 8), torch.nan), "expected 0 to 1"),
        (Image.fromarray(np.zeros((8, 8), np.uint16)), "mode I;16"),
        (42, "int"),
        ([None], "NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(model, value, words):
    with pytest.raises(UserError, match=words) as error:
        model(value)
    assert "secret" not in str(error.value)


def test_settings_are_attributes(model):
    picture = with_squares((256, 256), [BOX, (100, 200, 250, 230)])
    assert len(model(picture, size=256)[0]) == 2
    model.classes = [1]
    assert model(picture, size=256)[0].cls.tolist() == [1]
    model.classes = 1
    assert model(picture, size=np.int64(256))[0].cls.tolist() == [1]
    with pytest.raises(UserError, match="size='256'; expected a whole number"):
        model(picture, size="256")
    model.classes = "person"
    with pytest.raises(UserError, match="classes='person'; expected the number of a class"):
        model(picture, size=256)
    model.classes = []
    assert len(model(picture, size=256)[0]) == 0
    model.classes, model.max_det = None, 1
    assert len(model(picture, size=256)[0]) == 1
    model.conf = 0.95
    assert len(model(picture, size=256)[0]) == 0


def test_pictures_of_several_sizes_in_one_call(model):
    pictures = [with_squares((100 + 50 * i, 300), [(20, 10, 40, 80)]) for i in range(5)]
    results = model(pictures, size=320, batch_size=2)
    assert len(results) == 5 and results.files == [f"image{i}" for i in range(5)]
    assert all(np.abs(rows[0, :4].numpy() - (20, 10, 40, 80)).max() < 1.5 for rows in results.xyxy)


def sample() -> Results:
    names = ("person", "car")
    boxes = np.array([[10, 20, 30, 60], [0, 0, 100, 50]], np.float32)
    one = Detections(boxes, np.array([0.9, 0.5]), np.array([1, 0]), names)
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0), names)
    images = [np.zeros((80, 100, 3), np.uint8), np.zeros((40, 40, 3), np.uint8)]
    speed = {"pre-process": 1.0, "inference": 2.0, "NMS": 0.5}
    return Results([one, none], images, ["in/a.jpg", "in/a.png"], speed, names)


def test_the_four_box_forms_agree():
    results = sample()
    assert results.xyxy[0].tolist()[0] == pytest.approx([10, 20, 30, 60, 0.9, 1])
    assert results.xywh[0].tolist()[0] == pytest.approx([20, 40, 20, 40, 0.9, 1])
    assert results.xyxyn[0].tolist()[0] == pytest.approx([0.1, 0.25, 0.3, 0.75, 0.9, 1])
    assert results.xywhn[0].tolist()[0] == pytest.approx([0.2, 0.5, 0.2, 0.5, 0.9, 1])
    assert all(form[1].shape == (0, 6) for form in (results.xyxy, results.xywh, results.xyxyn, results.xywhn))
    assert torch.equal(results.pred[0], results.xyxy[0]) and results.n == 2 and results.t == (1.0, 2.0, 0.5)


def test_tables_have_the_names_that_people_know():
    pytest.importorskip("pandas")
    tables = sample().pandas()
    table = tables.xyxy[0]
    assert list(table.columns) == ["xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"]
    assert table.name.tolist() == ["car", "person"] and table["class"].tolist() == [1, 0]
    assert list(tables.xywhn[0].columns[:4]) == ["xcenter", "ycenter", "width", "height"]
    assert len(tables.xyxy[1]) == 0 and len(tables.xyxyn) == len(tables.xywh) == 2


def test_text_lists_every_picture(capsys):
    results = sample()
    text = str(results)
    assert "image 1/2 in/a.jpg: 80x100 1 person, 1 car" in text and "image 2/2 in/a.png: 40x40 (no detections)" in text
    results.print()
    assert capsys.readouterr().out.strip() == text
    assert [len(part) for part in results.tolist()] == [1, 1] == [len(part) for part in results]


def test_save_and_crop_write_below_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = sample()
    folder = results.save()
    assert sorted(p.name for p in folder.iterdir()) == ["a.jpg", "a_2.png"]
    assert results.save().name == "exp2" and results.save(save_dir="out/here").is_dir()
    crops = results.crop(save_dir="cut")
    assert len(crops) == 2 and crops[0]["label"] == "car 0.90" and crops[0]["im"].ndim == 3
    assert (tmp_path / "cut" / "crops" / "car" / "a.jpg").is_file()
    assert len(results.crop(save=False)) == 2
    assert results.render()[0].any() and not results.images[0].any()


def test_save_never_overwrites_the_sources(model, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), with_squares((64, 64), []))
    with pytest.raises(UserError, match="holds the source"):
        model(tmp_path / "a.png", size=64).save(save_dir=tmp_path, exist_ok=True)


def test_show_uses_the_notebook_where_there_is_one(monkeypatch):
    shown = []
    shell = type("Shell", (), {"config": {"IPKernelApp": {}}})()
    display = type("Display", (), {"display": staticmethod(shown.append)})
    fake = type("IPython", (), {"get_ipython": staticmethod(lambda: shell), "display": display})
    monkeypatch.setitem(sys.modules, "IPython", fake)
    sample().show()
    assert [image.size for image in shown] == [(100, 80), (40, 40)]
    monkeypatch.setitem(sys.modules, "IPython", type("IPython", (), {"get_ipython": staticmethod(lambda: None)}))
    monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self))
    sample().show()
    assert len(shown) == 4


def test_supervision_gets_the_same_boxes(monkeypatch):
    pytest.importorskip("supervision")
    first, second = sample().to_supervision()
    assert first.xyxy.tolist()[0] == [10, 20, 30, 60] and first.class_id.tolist() == [1, 0] and len(second) == 0
    assert first.data["class_name"].tolist() == ["car", "person"]
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        sample().to_supervision()


def test_optional_packages_are_named_when_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        sample().pandas()


def test_names_that_a_file_says_itself_are_not_given(tmp_path):
    save_checkpoint(tmp_path / "m.pt", pack_model(build_model("yolov5n", nc=2), ["a", "b"], 64))
    assert hubconf.load(tmp_path / "m.pt", names=["a", "b"]).names == ["a", "b"]
    with pytest.raises(UserError, match="says its 2 class names itself"):
        hubconf.load(tmp_path / "m.pt", names=["x", "y"])


def test_a_name_that_no_disk_takes_is_one_line(tmp_path):
    results = sample()
    results.files[0] = "x" * 300 + ".jpg"
    with pytest.raises(UserError, match="cannot write the results to .*: File name too long"):
        results.save(save_dir=tmp_path / "out")


def test_networks_by_name_say_that_no_weights_are_shipped(capsys):
    model = hubconf.yolov5_spd_n(classes=3, device="cpu")
    assert "none are shipped" in capsys.readouterr().out
    assert len(model(np.zeros((64, 64, 3), np.uint8), size=64)) == 1 and len(model.names) == 3
    with pytest.raises(UserError, match="no weights are shipped"):
        hubconf.yolov5n(pretrained=True)
    module = hubconf.yolov5n(classes=2, autoshape=False, _verbose=False, device="cpu")
    assert isinstance(module, torch.nn.Module) and module.nc == 2
    assert hubconf.yolov5n6(autoshape=False, device="cpu").strides == [8, 16, 32, 64]


def test_torch_hub_finds_the_entry_points(root):
    for name in ("load", "custom", "yolov5n", "yolov5x", "yolov5x6", "yolov5_spd_x", "yolov5_spdconv_l"):
        assert callable(getattr(hubconf, name))
    assert len(torch.hub.load(str(root), "yolov5n", source="local", classes=2, device="cpu").names) == 2
    with pytest.raises(UserError, match="no such file|not found"):
        torch.hub.load(str(root), "load", "nowhere.pt", source="local")
