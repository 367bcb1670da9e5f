"""YOLO label files: what is a box, what is a polygon, and what the policy does to the rest."""

import numpy as np
import pytest

from utils.data.labels import judge, parse_yolo, read_yolo, settle

HW = 100, 200


def kinds(issues):
    return [(issue.kind, issue.line) for issue in issues]


def test_boxes_become_pixels_of_the_image():
    labels, issues = parse_yolo("1 0.5 0.5 0.2 0.4\n0 .25 .25 5e-1 0.50\n", HW, 2)
    assert not issues and labels.cls.tolist() == [1, 0] and labels.lines.tolist() == [1, 2]
    np.testing.assert_allclose(labels.xyxy, [[80, 30, 120, 70], [0, 0, 100, 50]])


@pytest.mark.parametrize(
    "text",
    [
        "1 0.5 0.5 0.2 0.4",
        "1 0.5 0.5 0.2 0.4\r\n",
        "\n\n 1\t0.5  0.5 0.2 0.4   \n\n",
        "1.0 0.5 0.5 0.2 0.4\n",
        "1 0.5 0.5 0.2 0.4\r",
    ],
)
def test_white_space_does_not_matter(text):
    labels, issues = parse_yolo(text, HW, 2)
    assert not issues and labels.cls.tolist() == [1]
    np.testing.assert_allclose(labels.xyxy, [[80, 30, 120, 70]])


def test_polygons_and_boxes_in_one_file():
    text = "0 0.5 0.5 0.2 0.4\n1 0.1 0.2 0.4 0.2 0.1 0.6\n0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n"
    labels, issues = parse_yolo(text, HW, 2)
    assert not issues and labels.polygons is not None
    np.testing.assert_allclose(labels.xyxy, [[80, 30, 120, 70], [20, 20, 80, 60], [20, 10, 40, 20]], atol=1e-9)
    assert [len(p) for p in labels.polygons] == [0, 3, 4]
    np.testing.assert_allclose(labels.polygons[1], [[20, 20], [80, 20], [20, 60]], atol=1e-4)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0 0.5 0.5 0.2", "label-format"),
        ("0", "label-format"),
        ("0 0.5 0.5 0.2 0.2 0.9", "label-format"),
        ("0 0.1 0.1 0.2 0.1 0.2 0.2 0.1", "label-format"),
        ("cat 0.5 0.5 0.2 0.2", "label-format"),
        ("0,0.5,0.5,0.2,0.2", "label-format"),
        ("0 0,5 0,5 0,2 0,2", "label-format"),
        ("0 0.5 0.5 nan 0.2", "label-format"),
        ("0 0.5 inf 0.2 0.2", "label-format"),
        ("0 0.5 1e999 0.2 0.2", "label-format"),
        ("0 0.1 0.1 nan 0.1 0.2 0.2", "label-format"),
        ("0.5 0.5 0.5 0.2 0.2", "label-format"),
        ("nan 0.5 0.5 0.2 0.2", "label-format"),
        ("0 0_5 0.5 0.2 0.2", "label-format"),
        ("2 0.5 0.5 0.2 0.2", "label-class"),
        ("-1 0.5 0.5 0.2 0.2", "label-class"),
        ("99999999999999999999 0.5 0.5 0.2 0.2", "label-class"),
        ("# comment", "label-format"),
        ("\0\0\0", "label-format"),
    ],
)
def test_a_bad_line_costs_itself_only(line, kind):
    labels, issues = parse_yolo(f"0 0.3 0.3 0.2 0.2\n{line}\n1 0.6 0.6 0.2 0.2\n", HW, 2)
    assert kinds(issues) == [(kind, 2)] and labels.cls.tolist() == [0, 1] and labels.lines.tolist() == [1, 3]


def test_any_class_is_accepted_for_a_single_class():
    labels, issues = parse_yolo("79 0.3 0.3 0.2 0.2", HW, 0)
    assert not issues and len(labels) == 1


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ("0.5 0.5 1 1", (None, (0, 0, 200, 100))),
        ("0.5 0.5 1.0004 1", (None, (0, 0, 200, 100))),  # 0.04 px: rounding
        ("0.5 0.5 1.009 1", ("box-overhang", (0, 0, 200, 100))),  # 0.9 px
        ("0.5 0.5 1.019 1", ("box-overhang", (0, 0, 200, 100))),  # 1.9 of 2 px allowed (1 % of 200)
        ("0.5 0.5 1 1.018", ("box-overhang", (0, 0, 200, 100))),  # 0.9 of 1 px allowed
        ("0.5 0.5 1 1.022", ("box-outside", None)),  # 1.1 of 1 px
        ("0.5 0.5 1.021 1", ("box-outside", None)),  # 2.1 of 2 px
        ("1.5 0.5 0.1 0.1", ("box-outside", None)),
        ("320 240 20 20", ("box-outside", None)),  # pixels instead of shares
        ("0.5 0.5 0 0.1", ("box-empty", None)),
        ("0.5 0.5 -0.1 0.1", ("box-empty", None)),
        ("1.004 0.5 0.002 0.1", ("box-empty", None)),  # within the tolerance, nothing of it inside
        ("1e300 1e300 1e300 1e300", ("box-outside", None)),
    ],
)
def test_clip_policy(box, expected):
    labels, _ = parse_yolo(f"0 {box}", HW, 1)
    labels, issues = settle(labels, HW, "clip")
    assert ([i.kind for i in issues] or [None])[-1] == expected[0]
    assert labels.xyxy.tolist() == ([list(expected[1])] if expected[1] else [])


@pytest.mark.parametrize(
    ("policy", "kept", "action"),
    [("clip", 2, "box clipped"), ("drop-box", 1, "box dropped"), ("drop-image", 1, "image left out")],
)
def test_the_other_policies(policy, kept, action):
    labels, issues = parse_yolo("0 0.5 0.5 1.009 1\n0 0.5 0.5 0.2 0.2", HW, 1)
    labels, issues = settle(labels, HW, policy)
    problems, out = judge("x.txt", issues, policy)
    assert len(labels) == kept and out == (policy == "drop-image")
    assert [(p.kind, p.file, p.lines, p.action) for p in problems] == [("box-overhang", "x.txt", (1,), action)]


def test_repeated_rows_are_counted_once_under_every_policy():
    text = "0 0.5 0.5 0.2 0.2\n0 0.50 0.50 0.20 0.20\n1 0.5 0.5 0.2 0.2\n0 0.5 0.5 0.2 0.2\n"
    for policy in ("clip", "drop-box", "drop-image"):
        labels, issues = settle(parse_yolo(text, HW, 2)[0], HW, policy)
        assert labels.lines.tolist() == [1, 3] and kinds(issues) == [("box-repeated", 2), ("box-repeated", 4)]
        problems, out = judge("x.txt", issues, policy)
        assert not out and problems[0].count == 2 and problems[0].action == "counted once"
        assert problems[0].lines == (2, 4) and "x.txt:2 repeats the box at 1 (and 1 more in this file, line 4)" in str(
            problems[0]
        )


def test_same_extents_but_another_polygon_is_no_repetition():
    text = "0 0.1 0.1 0.3 0.1 0.3 0.3\n0 0.1 0.1 0.3 0.1 0.1 0.3\n0 0.1 0.1 0.3 0.1 0.1 0.3\n"
    labels, issues = settle(parse_yolo(text, HW, 1)[0], HW, "clip")
    assert labels.lines.tolist() == [1, 2] and kinds(issues) == [("box-repeated", 3)]


def test_polygons_are_clipped_with_their_box():
    labels, _ = parse_yolo("0 -0.004 0.1 0.5 0.1 0.5 1.005", HW, 1)
    labels, issues = settle(labels, HW, "clip")
    assert [i.kind for i in issues] == ["box-overhang"] and labels.polygons is not None
    np.testing.assert_allclose(labels.xyxy, [[0, 10, 100, 100]])
    assert np.ptp(labels.polygons[0], 0).tolist() == [100, 90]


def test_two_thousand_boxes():
    rng = np.random.default_rng(0)
    rows = np.column_stack([rng.integers(0, 5, 2000), rng.random((2000, 2)) * 0.8 + 0.1, np.full((2000, 2), 0.05)])
    text = "\n".join(" ".join(f"{v:.6g}" for v in row) for row in rows)
    labels, issues = settle(parse_yolo(text, HW, 5)[0], HW, "clip")
    assert len(labels) == 2000 and not issues


@pytest.mark.parametrize(
    ("data", "count", "issue"),
    [
        (None, 0, None),
        (b"", 0, None),
        (b"\n  \n", 0, None),
        (b"\xef\xbb\xbf0 0.5 0.5 0.1 0.1", 1, None),
        ("0 0.5 0.5 0.1 0.1".encode("utf-16"), 1, None),
        (b"\xff\xd8\xff\xe0\x10JFIF", 0, "label-unreadable"),
        (b"\x80\x81\x82", 0, "label-unreadable"),
    ],
)
def test_files(tmp_path, data, count, issue):
    path = tmp_path / "x.txt"
    if data is not None:
        path.write_bytes(data)
    labels, issues, there = read_yolo(path, HW, 1)
    assert len(labels) == count and there == (data is not None)
    assert [i.kind for i in issues] == ([issue] if issue else [])
    (tmp_path / "folder").mkdir()
    assert kinds(read_yolo(tmp_path / "folder", HW, 1)[1]) == [("label-unreadable", 0)]
