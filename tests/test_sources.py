"""Sources: what --source may be, what is passed over, and names that give nothing away."""

import sys

import numpy as np
import pytest

from tests.media import write_picture, write_video
from utils.core.errors import UserError
from utils.data.frames import distinct, redact, safe_name, unique_names
from utils.data.screen import parse_screen
from utils.data.sources import FileSource, has_sequence, open_source
from utils.data.streams import StreamSource


def frames_of(spec, size=1, **options):
    source = open_source(spec, **options)
    return [frame for batch in source.batches(size) for frame in batch], source


@pytest.fixture
def folder(tmp_path):
    """b.png, a.jpg, c.avi and a text file that is no source."""
    write_picture(tmp_path / "b.png")
    write_picture(tmp_path / "a.jpg")
    write_video(tmp_path / "c.avi", frames=3)
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a.jpg", ["a.jpg"]),
        ("", ["a.jpg", "b.png", "c.avi", "c.avi", "c.avi"]),
        ("*.png", ["b.png"]),
        ("**/*.jpg", ["a.jpg"]),
        ("[ab].*", ["a.jpg", "b.png"]),
    ],
)
def test_files_folders_and_globs_come_in_order(folder, spec, expected):
    frames, source = frames_of(f"{folder}/{spec}")
    assert [frame.path.name for frame in frames] == expected
    assert source.tally.frames == len(expected) and not source.tally.failed


def test_list_files_know_their_own_folder_and_comments(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    (folder / "list.txt").write_text(f"# pictures\n./a.jpg\n\n{folder / 'b.png'}\nc.avi\n")
    frames, _ = frames_of(folder / "list.txt")
    assert [frame.path.name for frame in frames] == ["a.jpg", "b.png", "c.avi", "c.avi", "c.avi"]


def test_several_words_are_several_sources(folder):
    frames, source = frames_of([folder / "b.png", folder / "a.jpg"])
    assert [(frame.item, frame.items) for frame in frames] == [(1, 2), (2, 2)] and source.items == 2


def test_pictures_are_rgb(tmp_path):
    frames, _ = frames_of(write_picture(tmp_path / "a.png", color=(200, 20, 90)))
    assert frames[0].image[0, 0].tolist() == [200, 20, 90]


def test_a_picture_may_be_called_screen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path / "screen shot.png")
    assert [path.name for path in open_source("screen shot.png").files] == ["screen shot.png"]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_batches_hold_every_frame_once(folder, size):
    source = open_source(str(folder))
    sizes = [len(batch) for batch in source.batches(size)]
    assert sum(sizes) == 5 and max(sizes) <= size


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.jpg", "not found"),
        ("x" * 300, "at most 255 bytes"),
        ("no/such/*.jpg", "matches no picture"),
        ("ftp://host/x.mp4", "scheme 'ftp'"),
        ("https://www.youtube.com/watch?v=1", "not a stream"),
        ("https://host/cat.jpg?key=1", "single picture"),
        ("", "no --source"),
        (["0", "a.png"], "mixes"),
        (
            ["rtsp://cam/x", "https://user:SECRET@host/cars.mp4"],
            "mixes live sources (rtsp://cam/x) and files (https://host/cars.mp4)",
        ),
    ],
)
def test_wrong_sources_are_refused_in_one_line(spec, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path / "a.png")
    with pytest.raises(UserError) as error:
        open_source(spec)
    assert "\n" not in str(error.value) and words in str(error.value)


def test_empty_folder_and_empty_list_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no picture"):
        open_source(tmp_path)
    (tmp_path / "list.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="is empty"):
        open_source(tmp_path / "list.txt")


def test_a_text_under_an_unknown_suffix_is_refused_but_a_picture_is_taken(tmp_path):
    (tmp_path / "x.doc").write_text("hello")
    with pytest.raises(UserError, match="neither a picture nor a video"):
        open_source(tmp_path / "x.doc")
    write_picture(tmp_path / "y.png").rename(tmp_path / "y.scan")
    assert len(frames_of(tmp_path / "y.scan")[0]) == 1


def test_unreadable_pictures_are_passed_over_in_one_line_each(tmp_path, capsys):
    write_picture(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"this is no picture")
    (tmp_path / "c.jpg").write_bytes(b"")
    (tmp_path / "d.mp4").write_bytes(b"neither is this")
    frames, source = frames_of(tmp_path)
    assert [frame.path.name for frame in frames] == ["a.jpg"]
    assert [name.rsplit("/")[-1] for name in source.tally.failed] == ["b.jpg", "c.jpg", "d.mp4"]
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3 and all("skipped" in line for line in lines)


def test_video_frames_carry_number_time_and_rate(tmp_path):
    frames, _ = frames_of(write_video(tmp_path / "v.avi", frames=10, fps=12.5))
    assert [frame.index for frame in frames] == list(range(1, 11))
    assert all(frame.frames == 10 and frame.fps == 12.5 and frame.kind == "video" for frame in frames)
    assert np.allclose([frame.timestamp for frame in frames], np.arange(10) / 12.5, atol=1e-3)
    gray = [float(frame.image.mean()) for frame in frames]
    assert np.allclose(gray, 10 * np.arange(1, 11), atol=3)


def test_vid_stride_takes_every_nth_frame_and_keeps_the_pace(tmp_path):
    frames, _ = frames_of(write_video(tmp_path / "v.avi", frames=10, fps=12.0), vid_stride=3)
    assert [frame.index for frame in frames] == [1, 4, 7, 10]
    assert frames[0].fps == 4.0
    assert np.allclose([float(f.image.mean()) for f in frames], [10, 40, 70, 100], atol=3)
    with pytest.raises(UserError, match="vid-stride"):
        open_source(tmp_path / "v.avi", vid_stride=0)


def test_a_video_with_a_broken_tail_gives_what_it_has_and_says_so(tmp_path, capsys):
    whole = write_video(tmp_path / "v.avi", frames=24, hw=(96, 128)).read_bytes()
    (tmp_path / "v.avi").write_bytes(whole[: len(whole) * 6 // 10])
    write_picture(tmp_path / "w.jpg")
    frames, source = frames_of(tmp_path)
    videos = [frame for frame in frames if frame.kind == "video"]
    assert 5 < len(videos) < 24 and frames[-1].path.name == "w.jpg" and not source.tally.failed
    assert f"{len(videos)} of {videos[0].frames} announced frames read" in capsys.readouterr().out


def test_a_real_video_cut_short(shared_data, tmp_path, capsys):
    data = (shared_data / "videos" / "car-detection.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 4])
    count = sum(len(batch) for batch in FileSource([tmp_path / "cut.mp4"], stride=5).batches(1))
    assert 5 < count < 60
    assert "of 377 announced frames read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://user:secret@cam.local:554/live/1", "rtsp://cam.local:554/live/1"),
        ("rtsp://user:se@cret@cam/live", "rtsp://cam/live"),
        ("rtsp://user:se/cret@cam/live", "rtsp://cam/live"),
        ("rtsp://user:se?cret#@cam/live", "rtsp://cam/live"),
        ("http://cam/video?user=me&password=secret", "http://cam/video"),
        ("https://cam/video#token=secret", "https://cam/video"),
        ("rtmp://host/app/secretkey", "rtmp://host/app/..."),
        ("rtsp://cam:554/user=me&password=secret&channel=1/live", "rtsp://cam:554/.../live"),
        ("HTTP://u:secret@host/x", "http://host/x"),
        ("street.jpg", "street.jpg"),
        ("a@b.jpg", "a@b.jpg"),
        ("0", "0"),
    ],
)
def test_redaction(url, shown):
    assert redact(url) == shown


@pytest.mark.parametrize(
    "spec",
    [
        "ftp://me:secret@host/x",
        "https://me:secret@host/a.jpg?key=secret",
        ["rtsp://me:secret@host/x", "a.png"],
        "rtsp:/me:secret@host/x",
        "rtsp:/me:secret?@host/x",
    ],
)
def test_error_messages_do_not_show_passwords(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path / "a.png")
    with pytest.raises(UserError) as error:
        open_source(spec)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_a_timeout_is_a_number_of_seconds(seconds):
    with pytest.raises(UserError, match="--stream-timeout"):
        open_source("rtsp://127.0.0.1:9/a", stream_timeout=seconds)


def test_live_addresses_open_lazily_and_keep_secrets():
    source = open_source(["rtsp://me:secret@127.0.0.1:9/a", "7"])
    assert isinstance(source, StreamSource) and source.live and source.items == 2
    assert "secret" not in repr(vars(source)["_names"])
    source.close()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("person", "person"),
        ("traffic light", "traffic light"),
        ("../../etc/passwd", "etc_passwd"),
        ("a/b\\c:d", "a_b_c_d"),
        ("..", "unnamed"),
        ("", "unnamed"),
        (".hidden", "hidden"),
        ("CON", "_CON"),
        ("nul.txt", "_nul.txt"),
        ("Straße 車", "Straße 車"),
        ("x\x00\ny", "x_y"),
    ],
)
def test_safe_names(text, name):
    assert safe_name(text) == name


def test_distinct_names_stay_what_they_are():
    assert distinct(["photo (1)", "_a", "50%", "b", "B", "b_2", "b"]) == [
        "photo (1)",
        "_a",
        "50%",
        "b",
        "B_3",
        "b_2",
        "b_4",
    ]


def test_safe_names_are_short_and_unique():
    assert len(safe_name("x" * 500)) == 100
    names = ["a/b", "a_b", "A_B", "", "..", "a_b_1", "car"]
    safe = unique_names(names)
    assert len({name.lower() for name in safe}) == len(names) and safe[-1] == "car"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("screen", (0, None)),
        ("screen 2", (2, None)),
        ("screen 10 20 300 200", (0, (10, 20, 300, 200))),
        ("screen 1 10 20 300 200", (1, (10, 20, 300, 200))),
    ],
)
def test_screen_specs(spec, expected):
    assert parse_screen(spec) == expected


@pytest.mark.parametrize("spec", ["screen x", "screen 1 2 3", "screen 1 2 0 0"])
def test_wrong_screen_specs(spec):
    with pytest.raises(UserError, match="screen"):
        parse_screen(spec)


def test_screen_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mss", None)
    with pytest.raises(UserError, match="pip install mss"):
        open_source("screen")


@pytest.mark.parametrize(
    "name,sequence", [("a.png", False), ("a.mp4", True), ("http://example.org/a.mp4", True), ("a.gif", True)]
)
def test_pictures_are_no_sequence(name: str, sequence: bool):
    assert has_sequence(FileSource([name])) == has_sequence(FileSource(["b.jpg", name])) == sequence
