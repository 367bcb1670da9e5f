"""torch.export (.pt2): the network as one graph of ATen operations, run by PyTorch and compilable by AOTInductor.

PyTorch's reader of this format can unpickle objects, execute guard strings and import modules, so an archive is
checked before it is read: only tensors, arithmetic on sizes and ATen operations pass. What PyTorch reads is a new
archive of the entries that were checked, never the file itself, which another reader may understand in another way.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from models.backends.base import Metadata, ModulePredictor, foreign_metadata
from models.backends.graph import ExportJob
from utils.core.errors import UserError
from utils.core.files import atomic_write

METADATA_FILE = "yolov5_spd.json"
CHECK_BYTES = 64 << 20  # of JSON in an archive; a YOLOv5x graph has 3 MB

ENTRY = re.compile(
    r"(data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json)"
    r"|sample_inputs/model\.pt)|models/model\.json|extra/[\w.]+|archive_format|archive_version|byteorder"
    r"|\.data/\w+|version)"
)
TARGET = re.compile(
    r"torch\.ops\.(aten|torchvision)\.\w+(\.\w+)?|_operator\.\w+|torch\.sym_\w+|math\.(ceil|floor|trunc)"
)
FUNCTIONS = "Mul Add Max Min Pow Mod PythonMod FloorDiv CleanDiv CeilDiv ModularIndexing Not And Or Where"
RELATIONS = "LessThan GreaterThan StrictLessThan StrictGreaterThan Equality Unequality Eq Ne Le Lt Ge Gt not and or"
VALUES = (
    "Symbol Integer Rational integer positive nonnegative nonzero negative evaluate True False true false oo int_oo"
)
GUARDS = "L images size torch sym_max sym_min sym_not sym_ite sym_sum"
WORDS = frozenset(" ".join((FUNCTIONS, RELATIONS, VALUES, GUARDS)).split())
CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", None}
SIZE_WORD = re.compile(r"[suz]\d+|\d+")


def export(job: ExportJob) -> Path:
    """Writes the exported program, with as many dynamic axes as asked for. The network's own device is kept."""
    with torch.no_grad():
        program = torch.export.export(
            job.module(channels_last=True), (job.example(),), dynamic_shapes=job.dynamic_shapes(), strict=False
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names folders of this machine
    with atomic_write(job.path) as file:
        torch.export.save(program, file, extra_files={METADATA_FILE: job.metadata.to_json()})
    return job.path


def load(
    path: Path,
    *,
    device: torch.device,
    names: Sequence[str] | None = None,
    imgsz: int | Sequence[int] | None = None,
    **_: Any,
) -> ModulePredictor:
    archive = checked_archive(path)
    import torchvision  # noqa: F401 - brings the NMS operation that a program may hold
    from torch.export.passes import move_to_device_pass

    extra = {METADATA_FILE: ""}
    try:
        program = move_to_device_pass(torch.export.load(archive, extra_files=extra), device)
    except Exception as e:  # whatever a program of another version of PyTorch leads to
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise UserError(f"{path}: PyTorch {torch.__version__} cannot read this program ({reason})") from e
    text = extra[METADATA_FILE]
    metadata = Metadata.from_json(text, str(path)) if text else _foreign(program, path, names, imgsz)
    return ModulePredictor(program.module(), metadata, device)


def _foreign(
    program: torch.export.ExportedProgram,
    path: Path,
    names: Sequence[str] | None,
    imgsz: int | Sequence[int] | None,
) -> Metadata:
    """Metadata for a file of another tool, from what the user gives and what the program says about its shapes."""
    nodes = {node.name: node for node in program.graph.nodes}

    def sizes(name: str) -> list[int | None]:
        return [size if type(size) is int else None for size in nodes[name].meta["val"].shape]

    signature = program.graph_signature
    outputs = {name: sizes(name) for name in map(str, signature.user_outputs)}
    return foreign_metadata(str(path), names, imgsz, sizes(str(next(iter(signature.user_inputs)))), outputs)


# What a file that is no archive of torch.export's makes its readers raise.
DAMAGE = (zipfile.BadZipFile, ValueError, LookupError, TypeError, AttributeError, RuntimeError)


def checked_archive(path: Path) -> io.BytesIO:
    """A copy of an archive that holds only tensors, plain operations and arithmetic on sizes; others are refused."""
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(archive, str(path))
            with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as checked:
                for info in archive.infolist():
                    checked.writestr(zipfile.ZipInfo(info.filename), archive.read(info))
    except UserError:
        raise
    except DAMAGE as e:
        raise UserError(f"{path}: not a readable torch.export archive ({e}); export the file again") from e
    copy.seek(0)
    return copy


def _check_entries(archive: zipfile.ZipFile, source: str) -> None:
    names = archive.namelist()
    entries = {name.partition("/")[2]: name for name in names}
    if len(entries) != len(names) or any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise UserError(f"{source}: holds entries twice or compressed, as no file of export.py does; refused")
    for entry in entries:
        if not ENTRY.fullmatch(entry):
            raise UserError(
                f"{source}: holds {entry!r}, which no file of export.py has; refused, since it may run code"
            )
    for entry in ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"):
        if any(item.get("use_pickle") for item in _json(archive, entries[entry], source)["config"].values()):
            raise UserError(f"{source}: holds pickled objects, which can run code; refused")
    with archive.open(entries["data/sample_inputs/model.pt"]) as file:
        try:
            torch.load(file, weights_only=True)
        except Exception as e:  # the safe reader has many ways to say no, all of them final
            raise UserError(
                f"{source}: its sample inputs are no plain tensors; refused, since they may run code"
            ) from e
    model = _json(archive, entries["models/model.json"], source)
    for expression in _expressions(model):
        words = re.findall(r"\w+", expression)
        calls = re.findall(r"\.(?!size\(|sym_(?:max|min|not|ite|sum)\()", expression)
        if calls or not re.fullmatch(r"[\w\s'()\[\],+\-*/%<>=!.]*", expression) or not all(map(_safe_word, words)):
            raise UserError(f"{source}: holds the expression {expression[:80]!r}; refused, since it may run code")
    for spec in (*_values(model, "in_spec"), *_values(model, "out_spec")):
        kinds = set(_values(json.loads(spec), "type")) if isinstance(spec, str) else set()
        if not kinds <= CONTAINERS:
            raise UserError(
                f"{source}: nests {sorted(map(str, kinds - CONTAINERS))}; refused, since that can import code"
            )
    for target in _values(model, "target"):
        if isinstance(target, str) and "." in target and not TARGET.fullmatch(target):
            raise UserError(f"{source}: calls {target[:80]!r}; refused, since only ATen operations are expected")


def _safe_word(word: str) -> bool:
    return word in WORDS or SIZE_WORD.fullmatch(word) is not None


def _json(archive: zipfile.ZipFile, name: str, source: str) -> Any:
    if archive.getinfo(name).file_size > CHECK_BYTES:
        raise UserError(
            f"{source}: {name} has {archive.getinfo(name).file_size >> 20} MB; expected less than {CHECK_BYTES >> 20}"
        )
    return json.loads(archive.read(name))


def _expressions(model: dict[str, Any]) -> Iterator[str]:
    """Every string that PyTorch parses or executes when it reads a program."""
    yield from map(str, model.get("guards_code", []))
    yield from map(str, model.get("range_constraints", {}))
    yield from map(str, _values(model, "expr_str"))


def _values(tree: Any, key: str) -> Iterator[Any]:
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if key in node:
                yield node[key]
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)
