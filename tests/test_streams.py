"""Live streams: newest frame, reconnection, isolation of dead streams, and passwords that stay hidden."""

import http.server
import re
import sys
import threading
import time
import types
from itertools import pairwise

import cv2
import numpy as np
import pytest

from utils.core.errors import UserError
from utils.data import streams
from utils.data.screen import ScreenSource
from utils.data.streams import StreamSource


class Camera:
    """A motion-JPEG camera on the loopback device that can be switched off and on at its port."""

    def __init__(self, gray: int, port: int = 0) -> None:
        self.gray, self.port = gray, port
        self._on = threading.Event()
        self.switch_on()

    def switch_on(self) -> None:
        camera = self
        self._on.set()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                picture = cv2.imencode(".jpg", np.full((48, 64, 3), camera.gray, np.uint8))[1].tobytes()
                part = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%b\r\n"
                while camera._on.is_set():
                    try:
                        self.wfile.write(part % (len(picture), picture))
                    except OSError:
                        return
                    time.sleep(0.01)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def switch_off(self) -> None:
        self._on.clear()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://user:topsecret@127.0.0.1:{self.port}/video.mjpg?token=topsecret"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses between attempts."""
    monkeypatch.setattr(streams, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(streams, "LONGEST_PAUSE", 0.2)


def test_a_stream_that_dies_and_returns_goes_on_while_the_other_never_stops(capfd):
    steady, flaky = Camera(60), Camera(200)
    source = StreamSource([steady.url, flaky.url], give_up=30)
    seen = {1: 0, 2: 0}
    phase, at_switch, deadline = "both up", 0, time.monotonic() + 60
    try:
        for frames in source.batches():
            for frame in frames:
                seen[frame.item] += 1
                assert abs(float(frame.image.mean()) - {1: 60, 2: 200}[frame.item]) < 4
                assert frame.kind == "stream" and frame.items == 2 and abs(frame.timestamp - time.time()) < 5
            if phase == "both up" and min(seen.values()) >= 3:
                flaky.switch_off()
                phase, at_switch = "one down", seen[1]
            elif phase == "one down" and seen[1] > at_switch + 20:
                flaky.switch_on()
                phase, at_switch = "back", seen[2]
            elif phase == "back" and seen[2] > at_switch + 3:
                phase = "done"
                break
            assert time.monotonic() < deadline, phase
    finally:
        source.close()
        steady.switch_off()
        if flaky._on.is_set():
            flaky.switch_off()
    assert phase == "done"
    out, err = capfd.readouterr()
    assert "stream 2/2" in out and "connection lost, trying again" in out and "connected again" in out
    assert "topsecret" not in out + err
    assert not any(thread.name.startswith("reader of") for thread in threading.enumerate())


def test_one_dead_stream_does_not_end_the_others_and_is_given_up(capfd):
    camera = Camera(90)
    source = StreamSource(["http://user:topsecret@127.0.0.1:9/none", camera.url], give_up=0.3)
    deadline, count, output = time.monotonic() + 60, 0, ""
    try:
        for frames in source.batches():
            assert {frame.item for frame in frames} == {2}
            count += len(frames)
            output += capfd.readouterr().out
            if "given up" in output and count > 20:
                break
            assert time.monotonic() < deadline
    finally:
        source.close()
        camera.switch_off()
    assert "stream 1/2 http://127.0.0.1:9/none: cannot connect" in output and "topsecret" not in output


def test_streams_that_never_give_a_frame_are_an_error_without_password(capfd):
    source = StreamSource(["rtsp://user:topsecret@127.0.0.1:9/x"], give_up=0.2)
    with pytest.raises(UserError, match="no frame came from rtsp://127.0.0.1:9/x") as error:
        list(source.batches())
    out, err = capfd.readouterr()
    assert "topsecret" not in str(error.value) + out + err


class FakeCapture:
    """A camera at 200 frames a second for `length` frames whose value is their number."""

    def __init__(self, length: int) -> None:
        self.length, self.position = length, 0

    def grab(self):
        if self.position >= self.length:
            return False
        self.position += 1
        time.sleep(0.005)
        return True

    def retrieve(self):
        return True, np.full((4, 4, 3), self.position % 256, np.uint8)

    def get(self, prop):
        return float("nan")

    def release(self):
        self.length = 0


def test_a_slow_consumer_gets_the_newest_frame():
    camera = FakeCapture(10_000)
    source = StreamSource(["0"], opener=lambda address: camera)
    numbers = []
    for frames in source.batches():
        numbers.append(frames[0].index)
        assert frames[0].image[0, 0, 0] == frames[0].index % 256 and frames[0].fps == 0
        if len(numbers) == 5:
            break
        while camera.position < numbers[-1] + 10:
            time.sleep(0.005)
    source.close()
    assert all(later - earlier >= 9 for earlier, later in pairwise(numbers))


def test_stride_and_count_go_on_over_reconnections():
    source = StreamSource(["0"], stride=4, opener=lambda address: FakeCapture(10), give_up=5)
    numbers = []
    for frames in source.batches():
        numbers.append(frames[0].index)
        if frames[0].index > 25:
            break
    source.close()
    assert all(number % 4 == 1 for number in numbers) and numbers == sorted(set(numbers))


def test_streams_end_when_all_are_given_up():
    openings = []

    def opener(address):
        openings.append(address)
        return FakeCapture(3) if len(openings) == 1 else None

    source = StreamSource(["0"], opener=opener, give_up=1.0)
    count = sum(len(frames) for frames in source.batches())
    assert 1 <= count <= 3 and len(openings) > 2 and source.tally.failed == ["webcam 0"]


def test_pauses_grow_and_stay_bounded(capfd):
    source = StreamSource(["0"], opener=lambda address: None, give_up=2.0)
    with pytest.raises(UserError):
        list(source.batches())
    pauses = [float(pause) for pause in re.findall(r"trying again in (\S+) s", "".join(capfd.readouterr()))]
    assert pauses[:3] == [0.05, 0.1, 0.2] and max(pauses) == 0.2


def test_frames_that_cannot_be_decoded_do_not_keep_a_stream_alive():
    class Undecodable(FakeCapture):
        def retrieve(self):
            return False, np.zeros(0)

    source = StreamSource(["0"], opener=lambda address: Undecodable(100), give_up=0.3)
    with pytest.raises(UserError, match="no frame came"):
        list(source.batches())


class FakeScreen(types.ModuleType):
    """Stands in for `mss`: one monitor whose blue-green-red-alpha pixels are known."""

    class exception:  # noqa: N801 (the module's own name)
        class ScreenShotError(Exception):
            pass

    class mss:  # noqa: N801
        monitors = [{"left": 0, "top": 0, "width": 64, "height": 48}, {"left": 5, "top": 7, "width": 32, "height": 24}]

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

        def grab(self, box):
            pixels = np.zeros((box["height"], box["width"], 4), np.uint8)
            pixels[:] = (3, 2, 1, 255)
            pixels[0, 0, 2] = box["left"]
            return pixels


def test_screen_regions_are_rgb_and_relative_to_their_monitor(monkeypatch):
    monkeypatch.setitem(sys.modules, "mss", FakeScreen("mss"))
    source = ScreenSource("screen 1 10 2 20 8")
    for number, frames in enumerate(source.batches(), 1):
        assert frames[0].image.shape == (8, 20, 3) and frames[0].image[1, 1].tolist() == [1, 2, 3]
        assert frames[0].image[0, 0, 0] == 15 and frames[0].index == number
        if number == 3:
            source.close()
    assert source.tally.frames == 3
    with pytest.raises(UserError, match="monitors are 1 to 1"):
        list(ScreenSource("screen 2").batches())
