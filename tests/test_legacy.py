"""Foreign checkpoints are read as data: what torch writes comes back, and nothing that a file asks for is ever run."""

import codecs
import functools
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from utils.core.errors import UserError
from utils.core.inert import Damaged, Foreign, Ignored, Machine, TensorRef
from utils.core.legacy import read_legacy

EVENTS: list[str] = []
_WATCH = {"on": False}


def _hook(event: str, args: tuple) -> None:
    if _WATCH["on"] and event in (
        "import", "exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
        "pickle.find_class", "code.__new__", "ctypes.dlopen", "socket.connect", "os.remove", "os.rename", "os.mkdir",
    ):  # fmt: skip
        EVENTS.append(event)


sys.addaudithook(_hook)


class Call:
    """Pickles as a call of `function` on `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> Any:
        return self.parts


def as_zip(pickled: bytes, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return path


def as_bare(pickled: bytes, path: Path) -> Path:
    path.write_bytes(pickled)
    return path


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The standard library imports some of its own parts at first use; that is not what the audit looks for."""
    read_legacy(as_zip(pickle.dumps({"ä": 1}, 2), tmp_path_factory.mktemp("warm") / "x.pt"))


def refused(path: Path) -> str:
    """The message of the refusal; fails if anything happened that Python's audit hooks can see."""
    EVENTS.clear()
    _WATCH["on"] = True
    try:
        with pytest.raises(UserError) as caught:
            read_legacy(path)
    finally:
        _WATCH["on"] = False
    assert not EVENTS, f"while reading {path.name}: {EVENTS}"
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Raw(bytes):
    """A whole pickle, written by hand."""


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _by_getattr(command: str) -> bytes:
    module = b"cimportlib\nimport_module\n" + _text("os") + b"\x85R"
    return b"\x80\x02cbuiltins\ngetattr\n" + module + _text("system") + b"\x86R" + _text(command) + b"\x85R."


# Each entry makes an object whose unpickling writes a file; `names` is what the refusal must name.
ATTACKS: dict[str, tuple[Callable[[str], Any], str]] = {
    "os.system": (lambda command: Call(os.system, command), "system"),
    "eval": (lambda command: Call(eval, f"__import__('os').system({command!r})"), "builtin"),
    "exec": (lambda command: Call(exec, f"import os; os.system({command!r})"), "builtin"),
    "getattr": (lambda command: Raw(_by_getattr(command)), "getattr"),
    "partial": (lambda command: Call(functools.partial(os.system, command)), "functools.partial"),
    "Popen": (lambda command: Call(subprocess.Popen, ["sh", "-c", command]), "Popen"),
    "codecs": (
        lambda command: Call(eval, Call(codecs.decode, f"__import__('os').system({command!r})".encode().hex(), "hex")),
        "builtin",
    ),
    "nested pickle": (
        lambda command: Call(torch.storage._load_from_bytes, _nested(command)),
        "torch.storage._load_from_bytes",
    ),
    "map": (lambda command: Call(list, Call(map, os.system, [command])), "list"),
}  # fmt: skip


def _nested(command: str) -> bytes:
    buffer = io.BytesIO()
    torch.save(Call(os.system, command), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("attack", list(ATTACKS))
@pytest.mark.parametrize("container", [as_zip, as_bare])
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_runs(attack: str, container: Callable, protocol: int, tmp_path: Path) -> None:
    """The file is refused with the offending name and its command did not run; Python's own loader does run it."""
    marker = tmp_path / "ran"
    make, named = ATTACKS[attack]
    value = make(f"echo x > '{marker}'")
    data = value if isinstance(value, Raw) else pickle.dumps({"model": value, "ema": None}, protocol)
    message = refused(container(data, tmp_path / "weights.pt"))
    assert named in message and not marker.exists()
    found = pickle.loads(data)
    if attack == "Popen":
        found["model"].wait()
    assert marker.exists(), "the attack does not work at all, so that its refusal proves nothing"


@pytest.mark.parametrize(
    "name",
    [
        "os system", "posix system", "nt system", "subprocess Popen", "builtins eval", "builtins exec",
        "__builtin__ eval", "builtins getattr", "builtins __import__", "builtins open", "builtins compile",
        "importlib import_module",
        "operator attrgetter", "operator methodcaller", "functools reduce", "runpy _run_code", "types FunctionType",
        "codecs decode", "_codecs decode", "copyreg _reconstructor", "timeit timeit", "cProfile run", "pydoc pipepager",
        "torch load", "torch.hub load", "torch.jit load", "torch.storage _load_from_bytes", "torch.ops load_library",
        "torch._utils _rebuild_from_type_v2", "torch.serialization load", "torch._dynamo optimize", "numpy load",
        "numpy.testing._private.utils runstring", "logging.config dictConfig", "collections defaultdict",
        "pathlib Path",
        "torch.nn.modules.module torch.os.system", "models.common os.system", "models.common __dict__.get x",
        "models.commons Conv", "models Conv", "torch.nn Conv2d", "yolov5.utils.general check_requirements",
    ],
)  # fmt: skip
def test_names_outside_the_list(name: str, tmp_path: Path) -> None:
    module, _, attribute = name.partition(" ")
    pickles = [
        b"\x80\x02}X\x05\x00\x00\x00modelc" + f"{module}\n{attribute}\n".encode() + b"s.",
        b"\x80\x04" + b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, attribute)) + b"\x93.",
        b"c" + f"{module}\n{attribute}\n(S'x'\ntR.".encode(),
    ]
    for data in pickles:
        assert f"{module}.{attribute}" in refused(as_zip(data, tmp_path / "x.pt"))
    assert f"{module}.{attribute}" in refused(as_bare(pickles[2], tmp_path / "x.pt"))


def stand_in(name: str = "models.common Conv") -> bytes:
    module, _, attribute = name.partition(" ")
    return b"\x80\x02c" + f"{module}\n{attribute}\n".encode()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (stand_in() + b"X\x02\x00\x00\x00id\x85R.", "a call of models.common.Conv"),
        (stand_in() + b")R.", "a call of models.common.Conv"),
        (stand_in("torch.nn.modules.conv Conv2d") + b"K\x01K\x01K\x01\x87R.", "a call of torch.nn.modules.conv.Conv2d"),
        (stand_in() + b"K\x01\x85\x81.", "an object of models.common.Conv with arguments"),
        (stand_in("collections OrderedDict") + b")\x81.", "an object of collections.OrderedDict"),
        (stand_in() + b")\x81N}\x86b.", "state of type tuple"),
        (stand_in() + b"}X\x0c\x00\x00\x00__setstate__K\x01sb.", "state of type dict for a Name"),
        (b"\x80\x02]}b.", "state of type dict for a list"),
        (b"\x80\x02(imodels.common\nConv\n.", "INST"),
        (b"\x80\x02(cmodels.common\nConv\no.", "OBJ"),
        (b"\x80\x02" + stand_in()[2:] + b")}\x92.", "NEWOBJ_EX"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"P123\n.", "PERSID"),
        (b"\x80\x02X\x02\x00\x00\x00os)R.", "a call of str"),
        (b"\x80\x02}]K\x01s.", "a list as a dictionary key"),
        (b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.", "os.system"),
        (
            b"\x80\x02(X\x07\x00\x00\x00storagecmodels.common\nConv\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
            "a storage of type models.common.Conv",
        ),
    ],
)
def test_stand_ins_stay_inert(data: bytes, named: str, tmp_path: Path) -> None:
    """Calling a stand-in, giving it arguments or a foreign state, and rare instructions are refused by name."""
    assert named in refused(as_zip(data, tmp_path / "x.pt"))


def test_attributes_named_like_methods_are_only_data(tmp_path: Path) -> None:
    data = stand_in() + b")\x81}(X\x0c\x00\x00\x00__setstate__X\x05\x00\x00\x00modelX\x09\x00\x00\x00__class__K\x01ub."
    value = read_legacy(as_zip(data, tmp_path / "x.pt")).root
    assert type(value) is Foreign and value.state == {"__setstate__": "model", "__class__": 1}


def deep(step: bytes, count: int, start: bytes = b"N") -> bytes:
    return b"\x80\x02" + start + step * count + b"."


BOMBS = {
    "nested tuples": deep(b"\x85", 120_000),
    "nested lists": b"\x80\x02" + b"]" * 120_000 + b"a" * 119_999 + b".",
    "nested dicts": b"\x80\x02" + b"}K\x00" * 80_000 + b"N" + b"s" * 80_000 + b".",
    "nested objects": b"\x80\x02"
    + b"cmodels.yolo\nModel\n)\x81}X\x01\x00\x00\x00m" * 100_000
    + b"N"
    + b"sb" * 100_000
    + b".",
    "long integer": b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
    "long text": b"\x80\x02X\xff\xff\xff\xff" + b"x" * 10 + b".",
    "empty": b"",
    "no stop": b"\x80\x02N",
    "stack underflow": b"\x80\x02R.",
    "unknown slot": b"\x80\x02h\x07.",
    "tuple underflow": b"\x80\x02\x87.",
    "mark underflow": b"\x80\x02t.",
    "noise": bytes(random.Random(1).randrange(256) for _ in range(5000)),
    "nine megabytes": b"\x80\x02X" + struct.pack("<I", 9 << 20) + b"x" * (9 << 20) + b".",
}


@pytest.mark.parametrize("name", list(BOMBS))
@pytest.mark.parametrize("container", [as_zip, as_bare])
def test_bombs_end_quickly(name: str, container: Callable, tmp_path: Path) -> None:
    """Deep or damaged programs are refused, or read as the harmless data they are; nothing crashes or hangs."""
    path = container(BOMBS[name], tmp_path / "x.pt")
    try:
        read_legacy(path)
    except UserError as error:
        assert "\n" not in str(error)


def test_zip_bombs(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.writestr("a/data/0", b"\0" * (64 << 20))
    assert "compressed" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.writestr("b/data.pkl", b"\x80\x02N.")
    assert "exactly one" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.writestr("a/constants.pkl", b"")
    assert "TorchScript" in refused(path)


def tensor_pickle(size: int, shape: str, stride: str, offset: int = 0) -> bytes:
    """A pickle of one float tensor over storage "0" of `size` elements; shape and stride as Python expressions."""
    out = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    out += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ" + struct.pack("<i", size) + b"tQJ" + struct.pack("<i", offset)
    for text in (shape, stride):
        out += b"(" + b"".join(b"J" + struct.pack("<i", int(x)) for x in text.split(",")) + b"t"
    return out + b"\x89}tR."


@pytest.mark.parametrize(
    ("size", "shape", "stride", "offset"),
    [(4, "5", "1", 0), (4, "2,2", "2,3", 0), (4, "4", "1", 1), (4, "-1", "1", 0), (4, "2", "-1", 1), (4, "1", "1", -1)],
)
def test_tensors_outside_their_storage(size: int, shape: str, stride: str, offset: int, tmp_path: Path) -> None:
    assert "tensor" in refused(as_zip(tensor_pickle(size, shape, stride, offset), tmp_path / "x.pt"))


def test_a_tensor_cannot_unfold_to_more_than_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", tensor_pickle(4, "50000,50000", "0,0"))
        archive.writestr("a/data/0", b"\0" * 16)
    file = read_legacy(path)
    assert type(file.root) is TensorRef
    with pytest.raises(UserError, match="damaged"):
        file.tensor(file.root)


@pytest.mark.parametrize("stream", [False, True])
def test_a_storage_of_many_tensors_is_read_once(stream: bool, tmp_path: Path) -> None:
    """Flattened parameters: thousands of views of one block; it is read, summed and copied a single time."""
    base = torch.randn(64)
    torch.save(list(base.split(4)), tmp_path / "x.pt", _use_new_zipfile_serialization=not stream)
    file = read_legacy(tmp_path / "x.pt")
    blocks = [file._blocks(ref.storage.key) for ref in file.root]
    assert len(blocks) == 16 and all(block is blocks[0] for block in blocks)
    assert torch.equal(torch.cat([file.tensor(ref) for ref in file.root]), base)
    file.tensor(file.root[0]).zero_()
    assert torch.equal(file.tensor(file.root[0]), base[:4])


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_every_python_are_ignored(module: str, tmp_path: Path) -> None:
    """Python 3.13 pickles a path under another name; the path itself is thrown away."""
    data = b"\x80\x02c" + f"{module}\nPosixPath\n".encode() + _text("runs") + b"\x85R."
    assert type(read_legacy(as_zip(data, tmp_path / "x.pt")).root) is Ignored


def test_names_in_a_refusal_are_printable(tmp_path: Path) -> None:
    data = b"\x80\x04" + _text("a\x1b[2J\nb") + _text("c" * 5000) + b"\x93."
    message = refused(as_zip(data, tmp_path / "x.pt"))
    assert message.isprintable() and "a\\x1b[2J b.ccc" in message and len(message) < 500


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(11 if depth < 4 else 7)
    leaf = [
        None,
        True,
        False,
        rng.randrange(-(2**40), 2**40),
        rng.uniform(-1e9, 1e9),
        "täxt" * rng.randrange(80),
        b"\0b",
    ]
    if kind < 7:
        return leaf[kind]
    items = [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if kind == 10:
        return OrderedDict((f"k{i}", item) for i, item in enumerate(items))
    return {7: items, 8: tuple(items), 9: {i: item for i, item in enumerate(items)}}[kind]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_equal_those_of_pickle(protocol: int) -> None:
    """Python's own pickle is the oracle for every structure of plain values."""
    for seed in range(100):
        shared = [1, 2]
        value = {"a": random_value(random.Random(seed)), "b": shared, "c": (shared, {1, 2}), "d": 300, "e": 70000}
        data = pickle.dumps(value, protocol)
        found = Machine(data).run()
        if protocol > 2:  # bytes of protocol 2 are a call of _codecs.encode, which is not carried out
            assert found == value and found["b"] is found["c"][0]


def test_tensors_equal_those_of_torch(tmp_path: Path) -> None:
    """Views, dtypes, empty and shared tensors, parameters: equal to what torch.load gives, from both containers."""
    base = torch.randn(6, 8)
    data = {
        "base": base, "view": base[1:4, ::2], "turned": base.t(), "half": base.half(), "int": torch.arange(7),
        "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "bool": base > 0, "bfloat16": base.bfloat16(),
        "double": base.double(), "wide": torch.ones(3, 1).expand(3, 1), "parameter": torch.nn.Parameter(base[:2]),
        "byte": torch.arange(5, dtype=torch.uint8), "nested": [OrderedDict(x=base[0]), (1, "two", None)],
    }  # fmt: skip
    for stream in (False, True):
        path = tmp_path / f"{stream}.pt"
        torch.save(data, path, _use_new_zipfile_serialization=not stream)
        file, expected = read_legacy(path), torch.load(path, weights_only=True)
        for key in data:
            if isinstance(expected[key], torch.Tensor):
                found = file.tensor(file.root[key])
                assert found.dtype == expected[key].dtype and torch.equal(found, expected[key]), key
        assert file.root["nested"][1] == (1, "two", None)
        assert torch.equal(file.tensor(file.root["nested"][0]["x"]), base[0])


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.randn(100)}, path)
    whole = path.read_bytes()
    for cut in (0, 3, 40, 200, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:cut])
        assert "not a readable torch checkpoint" in refused(path)
    with pytest.raises(UserError, match="not found"):
        read_legacy(tmp_path / "absent.pt")


def test_machine_names_the_end() -> None:
    with pytest.raises(Damaged, match="ends early"):
        Machine(b"\x80\x02X").run()
