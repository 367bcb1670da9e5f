"""The program part of foreign checkpoints, carried out on inert values only.

A pickle is a program: whoever runs it runs whatever its author wrote. This is not a pickle interpreter with some names
forbidden. It knows the few instructions that torch's archives consist of, imports nothing, and never calls
anything that a file names: classes become inert `Foreign` records, tensors become `TensorRef` records. Whatever is
outside the short lists below is refused, with its name.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

MAX_PICKLE_BYTES = 8 << 20  # of the program part (0.08 MB in yolov5n): limits what a crafted file can unfold to
_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# Modules whose classes may be named; their objects stay records, so that what matters is the layer names of the YAML.
_CLASS_MODULES = (
    "models.common",
    "models.yolo",
    "models.experimental",
    *(
        f"torch.nn.modules.{part}"
        for part in (
            *("activation", "batchnorm", "container", "conv", "dropout", "flatten", "instancenorm", "linear", "loss"),
            *("module", "normalization", "padding", "pixelshuffle", "pooling", "upsampling"),
        )
    ),
)
_CLASSES = ("argparse.Namespace",)
# Values that checkpoints carry besides the model (a fitness as a NumPy number, a path): records, never computed.
_IGNORED_CALLS = (
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "_codecs.encode",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",  # Python 3.13
    "pathlib._local.WindowsPath",
    "torch.device",
)
_IGNORED_NAMES = ("numpy.ndarray", "torch.float16", "torch.float32", "torch.float64", "torch.bfloat16", "torch.int64")


@dataclass(frozen=True)
class Name:
    """A global that a file names. It is never looked up."""

    dotted: str


@dataclass
class Foreign:
    """An object of a foreign class: the class name and the attributes that the file gives it."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass
class Ignored:
    """The result of a harmless constructor that is not needed here; what it was given is thrown away."""

    kind: str


@dataclass(frozen=True)
class Storage:
    """One raw block of the archive: `size` elements of `dtype` under `key`."""

    key: str
    dtype: torch.dtype
    size: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor as a view of a storage; `utils.core.legacy` reads it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Refused(Exception):
    """Something outside the lists; the message names it."""


class Damaged(Exception):
    """The bytes are not a well-formed torch archive."""


def need(condition: bool, what: str) -> None:
    if not condition:
        raise Damaged(what)


def _sizes(value: Any) -> tuple[int, ...]:
    need(type(value) is tuple and all(type(v) is int and v >= 0 for v in value), "a tensor has odd sizes")
    return value


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    need(type(storage) is Storage and type(offset) is int and offset >= 0, "a tensor without a storage")
    shape, stride = _sizes(shape), _sizes(stride)
    need(len(shape) == len(stride) <= 8, "a tensor whose sizes and strides differ in number")
    empty = 0 in shape
    last = offset + (0 if empty else sum((n - 1) * step for n, step in zip(shape, stride, strict=True)))
    need(empty or last < storage.size, "a tensor larger than its storage")
    return TensorRef(storage, offset, shape, stride)


def _rebuild_parameter(data: Any, *_: Any) -> TensorRef:
    need(type(data) is TensorRef, "a parameter without a tensor")
    return data


def _mapping(pairs: Any = ()) -> dict[Any, Any]:
    need(type(pairs) in (list, tuple), "an OrderedDict of something else than pairs")
    return {_key(k): v for k, v in pairs}


def _collection(items: Any = ()) -> frozenset[Any]:
    need(type(items) in (list, tuple), "a set of something else than a list")
    return frozenset(_key(item) for item in items)


def _torch_size(items: Any = ()) -> tuple[int, ...]:
    return _sizes(items)


# The only constructors that are carried out, each by the function of this file beside it.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "__builtin__.set": _collection,
    "builtins.set": _collection,
    "torch.Size": _torch_size,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
_KNOWN = {*_CALLS, *_DTYPES, *_IGNORED_CALLS, *_IGNORED_NAMES, *_CLASSES}


def _key(value: Any) -> Any:
    """Keys and set members are scalars: hashing anything nested could be made to recurse without end."""
    if type(value) not in (str, int, float, bool, bytes, type(None)):
        raise Refused(f"a {type(value).__name__} as a dictionary key")
    return value


def _is_class(dotted: str) -> bool:
    module, _, name = dotted.rpartition(".")
    return dotted in _CLASSES or (module.removeprefix("yolov5.") in _CLASS_MODULES and name.isidentifier())


class Machine:
    """Carries out the instructions of one pickle on inert values only."""

    def __init__(self, data: bytes, start: int = 0) -> None:
        self.data, self.at = data, start
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.end = min(len(data), start + MAX_PICKLE_BYTES)

    def run(self) -> Any:
        """The value of the pickle; `self.at` is then just behind it."""
        while True:
            code = self.take(1)
            if code == b".":
                return self.stack.pop()
            if code in _UNUSED:
                raise Refused(f"the pickle instruction {_UNUSED[code]}")
            need(code in _STEPS, f"unknown instruction {code!r}")
            _STEPS[code](self)

    def take(self, count: int) -> bytes:
        need(0 <= count <= self.end - self.at, "the pickle ends early or is larger than 8 MB")
        self.at += count
        return self.data[self.at - count : self.at]

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.end)
        need(end >= 0, "the pickle ends early")
        text = self.take(end - self.at).decode("utf-8")
        self.at += 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def integer(self, size: int) -> None:
        need(size <= 16, "an integer of more than 128 bits")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def text(self, size: int) -> None:
        self.push(self.take(size).decode("utf-8", "surrogatepass"))

    def pop_tuple(self, count: int) -> None:
        items = tuple(self.stack[len(self.stack) - count :])
        need(len(items) == count, "the stack runs dry")
        del self.stack[len(self.stack) - count :]
        self.push(items)

    def store(self, slot: int) -> None:
        self.memo[slot] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        need(type(self.stack[-1]) is list, "items for something else than a list")
        self.stack[-1].extend(items)

    def include(self, items: list[Any]) -> None:
        need(type(self.stack[-1]) is set, "members for something else than a set")
        self.stack[-1].update(map(_key, items))

    def assign(self, items: list[Any]) -> None:
        need(type(self.stack[-1]) is dict and len(items) % 2 == 0, "entries for something else than a dictionary")
        self.stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def name(self, module: Any, name: Any) -> None:
        """A global: allowed names are pushed as text, everything else ends the reading."""
        dotted = f"{module}.{name}"
        if type(module) is not str or type(name) is not str or not (dotted in _KNOWN or _is_class(dotted)):
            raise Refused(dotted)
        self.push(Name(dotted))

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        dotted = function.dotted if type(function) is Name else type(function).__name__
        need(type(arguments) is tuple, "a call without arguments")
        if dotted in _CALLS and type(function) is Name:
            self.push(_CALLS[dotted](*arguments))
        elif dotted in _IGNORED_CALLS and type(function) is Name:
            self.push(Ignored(dotted))
        else:
            raise Refused(f"a call of {dotted}")

    def new(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if type(kind) is not Name or not _is_class(kind.dotted) or arguments != ():
            raise Refused(f"an object of {kind.dotted if type(kind) is Name else type(kind).__name__} with arguments")
        self.push(Foreign(kind.dotted))

    def build(self) -> None:
        """Attributes of the object on top: a dictionary is stored; there is no `__setstate__` here."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Foreign and type(state) is dict:
            target.state.update(state)
        elif type(target) not in (Ignored, dict):
            raise Refused(f"state of type {type(state).__name__} for a {type(target).__name__}")

    def persistent(self) -> None:
        record = self.stack.pop()
        need(type(record) is tuple, "an unknown reference")
        need(len(record) >= 2, "an unknown reference")
        if record[0] == "module" and type(record[1]) is Name:
            self.push(record[1])
            return
        need(record[0] == "storage" and len(record) >= 5 and type(record[1]) is Name, "an unknown reference")
        kind, key, size = record[1].dotted, record[2], record[4]
        if kind not in _DTYPES:
            raise Refused(f"a storage of type {kind}")
        need(type(key) is str and type(size) is int and size >= 0, "a storage without a size")
        need(len(record) < 6 or record[5] is None, "a storage that is a view of another")
        self.storages[key] = Storage(key, _DTYPES[kind], size)
        self.push(self.storages[key])


# Instructions of pickle that create objects or references in ways torch's archives never do.
_UNUSED = {b"i": "INST", b"o": "OBJ", b"P": "PERSID", b"\x92": "NEWOBJ_EX"}
_UNUSED |= {b"\x82": "EXT1", b"\x83": "EXT2", b"\x84": "EXT4", b"\x97": "NEXT_BUFFER", b"\x98": "READONLY_BUFFER"}
_STEPS: dict[bytes, Callable[[Machine], object]] = {
    b"\x80": lambda m: need(2 <= m.unsigned(1) <= 5, "a pickle protocol older than 2"),
    b"\x95": lambda m: need(m.unsigned(8) <= len(m.data), "a frame longer than the file"),
    b"(": Machine.mark,
    b"0": lambda m: m.stack.pop(),
    b"1": lambda m: m.pop_mark(),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.unsigned(1)),
    b"M": lambda m: m.push(m.unsigned(2)),
    b"J": lambda m: m.push(m.number("<i")),
    b"\x8a": lambda m: m.integer(m.unsigned(1)),
    b"G": lambda m: m.push(m.number(">d")),
    b"X": lambda m: m.text(m.unsigned(4)),
    b"\x8c": lambda m: m.text(m.unsigned(1)),
    b"B": lambda m: m.push(m.take(m.unsigned(4))),
    b"C": lambda m: m.push(m.take(m.unsigned(1))),
    b")": lambda m: m.push(()),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b"\x8f": lambda m: m.push(set()),
    b"\x90": lambda m: m.include(m.pop_mark()),
    b"\x91": lambda m: m.push(_collection(m.pop_mark())),
    b"\x85": lambda m: m.pop_tuple(1),
    b"\x86": lambda m: m.pop_tuple(2),
    b"\x87": lambda m: m.pop_tuple(3),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.pop_mark()),
    b"s": lambda m: m.assign([m.stack.pop(-2), m.stack.pop()]),
    b"u": lambda m: m.assign(m.pop_mark()),
    b"q": lambda m: m.store(m.unsigned(1)),
    b"r": lambda m: m.store(m.unsigned(4)),
    b"\x94": lambda m: m.store(len(m.memo)),
    b"h": lambda m: m.push(m.memo[m.unsigned(1)]),
    b"j": lambda m: m.push(m.memo[m.unsigned(4)]),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": Machine.stack_name,
    b"R": Machine.call,
    b"\x81": Machine.new,
    b"b": Machine.build,
    b"Q": Machine.persistent,
}
