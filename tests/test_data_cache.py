"""Caches change the time, never the picture; they are shared, checked for room, keyed by content, and given back."""

import multiprocessing as mp
import os
import pickle

import cv2
import numpy as np
import pytest

from tests.samples import make_index, picture
from utils.core.errors import UserError
from utils.core.hyp import Hyp
from utils.data import cache
from utils.data.cache import DiskStore, Recent, SharedMemory, levels_for, read_reduced, reduced_hw, remove_unused_blocks
from utils.data.dataset import DetectionDataset


@pytest.fixture
def shared_folder(tmp_path, monkeypatch):
    """Blocks of these tests lie in a folder of their own."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(cache, "SHARED_FOLDER", folder)
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("cache") / "set", 7)


SHAPES = [(5, 7), (3, 2), (11, 4)]


def decode(number):
    return np.full((*SHAPES[number], 3), number + 1, np.uint8)


# ---------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("hw", [(64, 96), (61, 95), (7, 200)])
@pytest.mark.parametrize("level", [1, 2, 4, 8])
def test_reduced_reading_is_block_averaging(tmp_path, suffix, hw, level):
    path, image = tmp_path / f"p{suffix}", picture(np.random.default_rng(0), hw)
    image = cv2.GaussianBlur(image, (0, 0), 2)
    cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])
    got = read_reduced(path, hw, level)
    h, w = reduced_hw(hw, level)
    assert got.shape == (h, w, 3)
    padded = np.pad(image, ((0, h * level - hw[0]), (0, w * level - hw[1]), (0, 0)), "edge")
    means = padded.reshape(h, level, w, level, 3).mean((1, 3))
    assert np.abs(got - means).mean() < (1 if suffix == ".png" else 4)


def test_reduced_reading_follows_exif_rotation(tmp_path):
    """Odd sizes, turned by 180 degrees: the partial blocks lie at the right and bottom nevertheless."""
    from PIL import Image

    image = cv2.GaussianBlur(picture(np.random.default_rng(1), (61, 95)), (0, 0), 3)
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    upright = image[::-1, ::-1]
    padded = np.pad(upright, ((0, 3), (0, 1), (0, 0)), "edge")
    means = padded.reshape(16, 4, 24, 4, 3).mean((1, 3))
    assert np.abs(read_reduced(tmp_path / "a.jpg", (61, 95), 4) - means).mean() < 2


def test_a_file_that_changed_since_it_was_indexed_is_named(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 30, 3), np.uint8))
    with pytest.raises(UserError, match=r"a\.png: is 30 x 20 pixels now, was 40 x 20"):
        read_reduced(tmp_path / "a.png", (20, 40), 1)


def test_levels_leave_the_size_that_is_asked_for():
    long = np.array([100, 640, 1279, 1280, 2559, 2560, 5120, 50_000])
    assert levels_for(long, 640).tolist() == [1, 1, 2, 2, 4, 4, 8, 8]
    assert all(-(-side // level) >= 640 or level == 1 for side, level in zip(long, levels_for(long, 640), strict=True))


def test_recent_arrays_stay_within_their_bytes():
    recent, made = Recent(limit=300), []

    def make(key, size=100):
        got = recent.get(key, lambda: made.append(key) or np.full(size, key, np.uint8))
        assert (got == key).all() and len(got) == size

    for key in (1, 2, 3, 1, 4, 2, 3, 1):
        make(key)
    assert made == [1, 2, 3, 4, 1]  # the one decoded first went first
    make(9, 1000)
    make(9, 1000)
    assert made[-2:] == [9, 9]  # too large to keep


def test_recent_arrays_are_never_mixed_up():
    """Arrays of all sizes, asked for at random, against their definition."""
    rng, recent = np.random.default_rng(0), Recent(limit=1000)
    sizes, hits = rng.integers(1, 400, 40), 0
    for key in rng.integers(0, 12, 500).tolist() + rng.integers(0, 40, 500).tolist():
        made = []
        got = recent.get(key, lambda key=key, made=made: made.append(1) or np.full(sizes[key], key, np.uint8))
        assert got.shape == (sizes[key],) and (got == key).all()
        hits += not made
        held = recent._arrays.items()
        assert sum(len(a) for _, a in held) <= 1000 and all((a == k).all() for k, a in held)
    assert hits > 100


# ---------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("size", [64, 128])
def test_a_cache_changes_no_sample(index, kind, size, shared_folder):
    plain = DetectionDataset(index, size, Hyp(), augment=True)
    cached = DetectionDataset(index, size, Hyp(), augment=True, cache=kind)
    for p in range(7):
        a, b = plain.sample(0, p, p), cached.sample(0, p, p)
        assert (a.image == b.image).all() and (a.cxcywh == b.cxcywh).all()
    cached.close()
    evaluation = [DetectionDataset(index, size, Hyp(), augment=False, cache=c) for c in (None, kind)]
    assert (evaluation[0].sample(0, 0, 3).image == evaluation[1].sample(0, 0, 3).image).all()
    evaluation[1].close()
    assert not list(shared_folder.iterdir())


def test_the_shared_block_is_filled_once_and_goes_with_its_last_user(shared_folder):
    made = []

    def counted(number):
        made.append(number)
        return decode(number)

    first = SharedMemory("key", SHAPES, counted)
    second = SharedMemory("key", SHAPES, counted)
    copy = pickle.loads(pickle.dumps(second))  # as a spawned worker gets it
    assert sorted(made) == [0, 1, 2]
    for store in (first, second, copy):
        assert all((store.get(n) == decode(n)).all() for n in range(3))
        assert not store.get(0).flags.writeable
    first.close()
    remove_unused_blocks()
    assert list(shared_folder.iterdir()), "still in use"
    second.close()
    copy.close()
    assert not list(shared_folder.iterdir())


def _attach_together(folder, start, ready, number):
    cache.SHARED_FOLDER = folder
    start.wait(60)
    store = SharedMemory("key", SHAPES, decode)
    ready.wait(60)  # as the ranks of a run wait for each other
    assert (store.get(number % 3) == decode(number % 3)).all()
    store.close()


def test_processes_that_come_at_once_share_one_block(shared_folder):
    context = mp.get_context("fork")
    for _ in range(3):
        start, ready = context.Barrier(4), context.Barrier(4)
        group = [context.Process(target=_attach_together, args=(shared_folder, start, ready, n)) for n in range(4)]
        for process in group:
            process.start()
        for process in group:
            process.join(60)
        assert [process.exitcode for process in group] == [0] * 4 and not list(shared_folder.iterdir())


def _hold_and_die(folder, ready):
    cache.SHARED_FOLDER = folder
    SharedMemory("held", SHAPES, decode)
    ready.set()
    os.kill(os.getpid(), 9)


def test_what_a_killed_process_leaves_is_removed_by_the_next(shared_folder):
    context = mp.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold_and_die, args=(shared_folder, ready))
    process.start()
    process.join()
    assert ready.is_set() and len(list(shared_folder.iterdir())) == 1
    SharedMemory("other", SHAPES, decode).close()
    assert not list(shared_folder.iterdir())


def test_a_failure_while_filling_leaves_nothing(shared_folder):
    def fails(number):
        raise UserError("2.jpg: is broken")

    with pytest.raises(UserError, match="is broken"):
        SharedMemory("key", SHAPES, fails)
    assert not list(shared_folder.iterdir())
    assert (SharedMemory("key", SHAPES, decode).get(2) == 3).all()


def test_the_room_is_checked_first(shared_folder, monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda: 200)
    with pytest.raises(UserError, match="--cache ram: the images need .* use --cache disk"):
        SharedMemory("key", SHAPES, decode)
    assert not list(shared_folder.iterdir())
    monkeypatch.setattr(cache, "SHARED_FOLDER", shared_folder / "absent")
    with pytest.raises(UserError, match="needs .* use --cache disk"):
        SharedMemory("key", SHAPES, decode)
    assert cache.free_memory() == 200


def test_free_memory_is_a_sensible_number():
    assert 2**20 < cache.free_memory() < 2**50


def test_the_disk_cache_is_keyed_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("YOLOV5_SPD_CACHE", str(tmp_path / "cache"))
    files, made = [tmp_path / f"{n}.bin" for n in range(3)], []
    for n, file in enumerate(files):
        file.write_bytes(bytes([n % 2]) * 9)  # 0 and 2 have the same content

    def store(key):
        shapes = [SHAPES[0]] * 3
        return DiskStore(key, files, shapes, [1] * 3, lambda n: made.append(n) or np.full((*SHAPES[0], 3), n, np.uint8))

    first = store("a")
    assert len(set(map(str, (first._path(n) for n in range(3))))) == 2
    count = len(made)
    store("a")
    store("b")  # another index of the same files
    assert len(made) == count
    files[1].write_bytes(b"other")
    assert (store("c").get(1) == 1).all() and len(made) == count + 1
    assert not list(tmp_path.glob("*.npy")), "nothing is written beside the data"
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    files[0].write_bytes(b"new")
    with pytest.raises(UserError, match="--cache disk: the images need"):
        store("d")


def test_an_unknown_cache_is_refused(index):
    with pytest.raises(UserError, match="--cache tape; expected ram or disk"):
        DetectionDataset(index, 64, Hyp(), augment=True, cache="tape")
