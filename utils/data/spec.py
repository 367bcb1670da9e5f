"""The data YAML as a checked value: where the images of each split are, how they are labeled, what the classes are.

The entry point of the room: every verb starts from `load_data`. Nothing is scanned here (see `utils.data.index`) and
nothing is fetched (see `utils.data.download`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.core.errors import UserError
from utils.core.files import nearest
from utils.core.log import LOGGER
from utils.core.yamls import load_yaml

HOME = Path(__file__).resolve().parent.parent.parent
SPLITS = ("train", "val", "test")
FORMATS = ("yolo", "coco", "voc", "folder")
KEYS = ("path", *SPLITS, "names", "nc", "annotations", "format", "channels", "download")
DOWNLOAD_KEYS = ("url", "sha256", "extract_to")


@dataclass(frozen=True)
class DataSpec:
    """A data set. `splits` and `annotations` hold absolute paths, which need not exist yet (see `require`)."""

    yaml: Path  # the data YAML, or the folder of a "folder" data set
    root: Path
    names: tuple[str, ...]  # by class number
    splits: dict[str, tuple[Path, ...]]  # split -> image folders and list files
    annotations: dict[str, tuple[Path, ...]] = field(default_factory=dict)  # split -> COCO JSON files or VOC folders
    format: str = "yolo"
    channels: int = 3
    download: tuple[dict[str, str], ...] = ()  # mappings with url, sha256, extract_to; empty: nothing to fetch
    download_note: str = ""  # why a `download:` entry cannot be used

    @property
    def nc(self) -> int:
        """The number of classes."""
        return len(self.names)

    def has(self, split: str) -> bool:
        """Whether the data set declares this split."""
        return bool(self.splits.get(split))

    def require(self, split: str) -> tuple[Path, ...]:
        """The sources of a split, all of which exist; else a UserError that says how to get them."""
        if not self.has(split):
            declared = ", ".join(self.splits) or "none"
            raise UserError(
                f"{self.yaml}: there is no '{split}:'; declared splits: {declared}; add it or pick another split"
            )
        for path in (*self.splits[split], *self.annotations.get(split, ())):
            if not path.exists():
                raise UserError(f"{self.yaml}: '{split}' names {path}, which does not exist; {self._remedy()}")
        return self.splits[split]

    def _remedy(self) -> str:
        if self.download:
            url = self.download[0]["url"]
            return f"its 'download:' entry offers {url}; to fetch it, run check.py --data {self.yaml} --download"
        if self.download_note:
            return self.download_note
        return f"paths are relative to 'path:' ({self.root}); correct the YAML or put the data there"


def find_data(path: str | Path) -> Path:
    """What a user means: a data YAML or folder that exists, else a YAML of the project (`coco.yaml`)."""
    places = () if Path(path).exists() else (HOME / path, HOME / "data" / path)
    return next((place for place in places if place.is_file()), Path(path))


def load_data(path: str | Path) -> DataSpec:
    """Read a data YAML (or a folder of class folders, for classification) into a DataSpec; see `find_data`."""
    path = find_data(path)
    if path.is_dir():
        return _load_folder(path)
    data = load_yaml(path)
    _warn_of_misspelled_keys(path, data)
    root = _resolve_root(path, data.get("path"))
    splits = {s: _paths(path, root, s, data[s]) for s in SPLITS if data.get(s) is not None}
    if not splits:
        raise UserError(f"{path}: no 'train:', 'val:' or 'test:' key; expected a folder of images or a list file")
    if data.get("channels", 3) != 3:
        raise UserError(f"{path}: 'channels: {data['channels']}' is not supported; expected 3 (gray becomes RGB)")
    annotations = _annotations(path, root, data.get("annotations"), splits)
    kind = _format(path, data.get("format"), annotations)
    names = _own_names(kind, splits, annotations) if data.get("names") is None else ()
    names = _names(path, data.get("names"), data.get("nc"), names)
    if not names and kind not in ("coco", "folder"):  # a COCO file or folders that are yet to be fetched will name them
        raise UserError(f"{path}: 'names:' is missing; expected a list of names, or a mapping from number to name")
    download, note = _download(path, data.get("download"))
    return DataSpec(
        yaml=path.absolute(),
        root=root,
        names=names,
        splits=splits,
        annotations=annotations,
        format=kind,
        download=download,
        download_note=note,
    )


def normalize(path: str | Path) -> Path:
    """Absolute, without `.` and `..`, links left alone."""
    return Path(os.path.abspath(path))


def _warn_of_misspelled_keys(path: Path, data: Mapping[Any, Any]) -> None:
    for key in data:
        if str(key) not in KEYS and (hint := nearest(str(key), KEYS)):
            LOGGER.warning("%s: key '%s' is not used%s", path, key, hint)


def _resolve_root(yaml: Path, value: Any) -> Path:
    """`path:` relative to the YAML's folder, else to the working directory; the former when neither exists."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{yaml}: 'path: {value!r}' is a {type(value).__name__}; expected a folder")
    folder = yaml.absolute().parent
    value = os.path.expanduser(value or ".")
    beside, here = normalize(folder / value), normalize(value)
    return here if here.is_dir() and not beside.is_dir() else beside


def _paths(yaml: Path, root: Path, key: str, value: Any) -> tuple[Path, ...]:
    entries = value if isinstance(value, list) else [value]
    for entry in entries or [""]:
        if not isinstance(entry, str) or not entry.strip() or "\0" in entry:
            raise UserError(f"{yaml}: '{key}: {value!r}' is not a path; expected a folder, a file, or a list of those")
    return tuple(normalize(root / os.path.expanduser(entry)) for entry in entries)


def _annotations(yaml: Path, root: Path, value: Any, splits: Mapping[str, Any]) -> dict[str, tuple[Path, ...]]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(
            f"{yaml}: 'annotations:' is a {type(value).__name__}; expected a mapping such as {{train: train.json}}"
        )
    for split in value:
        if split not in splits:
            raise UserError(f"{yaml}: 'annotations:' names split '{split}'; expected one of {', '.join(splits)}")
    missing = [split for split in splits if split not in value]
    if missing:
        raise UserError(f"{yaml}: 'annotations:' has no entry for '{missing[0]}'; add one, or remove the split")
    return {split: _paths(yaml, root, f"annotations.{split}", entry) for split, entry in value.items()}


def _format(yaml: Path, declared: Any, annotations: Mapping[str, tuple[Path, ...]]) -> str:
    if declared is not None and declared not in FORMATS:
        raise UserError(f"{yaml}: 'format: {declared}' is unknown; expected one of {', '.join(FORMATS)}")
    files = [file for split in annotations.values() for file in split]
    found = "yolo" if not files else "coco" if all(f.suffix.lower() == ".json" for f in files) else "voc"
    if found == "voc" and any(f.suffix.lower() == ".json" for f in files):
        raise UserError(f"{yaml}: 'annotations:' mixes JSON files and folders; expected COCO JSON files or VOC folders")
    if declared in ("coco", "voc") and not files:
        raise UserError(f"{yaml}: 'format: {declared}' needs 'annotations:' with an entry for each split")
    return declared or found


def _own_names(kind: str, splits: Mapping[str, Any], annotations: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names that the data itself gives: the categories of COCO files, the folders of an image folder."""
    if kind == "coco":
        from utils.data.coco import category_names

        return category_names(file for split in SPLITS for file in annotations.get(split, ()))
    folders = next(iter(splits.values())) if kind == "folder" else ()
    return tuple(sorted({name for folder in folders for name in _class_folders(folder)}))


def _names(yaml: Path, value: Any, nc: Any, own: tuple[str, ...]) -> tuple[str, ...]:
    if nc is not None and (isinstance(nc, bool) or not isinstance(nc, int) or nc < 1):
        raise UserError(f"{yaml}: 'nc: {nc}' is not a number of classes; expected a whole number of at least 1")
    if value is None:
        value = list(own) or [f"class{i}" for i in range(nc or 0)]
    if value == []:
        return ()
    if isinstance(value, dict):
        wrong = [k for k in value if isinstance(k, bool) or not isinstance(k, int)]
        if wrong:
            raise UserError(
                f"{yaml}: 'names:' has the key {wrong[0]!r}; expected class numbers from 0 to {len(value) - 1}"
            )
        if sorted(value) != list(range(len(value))):
            hole = next(i for i in range(len(value)) if i not in value)
            raise UserError(
                f"{yaml}: 'names:' has {len(value)} entries but no number {hole}; expected 0 to {len(value) - 1}"
            )
        value = [value[i] for i in range(len(value))]
    if not isinstance(value, list):
        raise UserError(f"{yaml}: 'names:' is {value!r}; expected a list of names, or a mapping from number to name")
    for i, name in enumerate(value):
        if isinstance(name, (dict, list, bool)) or name is None:
            raise UserError(f"{yaml}: name number {i} is {name!r}; expected text (quote it if it is a YAML keyword)")
    if nc is not None and nc != len(value):
        raise UserError(f"{yaml}: 'nc: {nc}' but {len(value)} names; make them agree, or remove 'nc:'")
    return tuple(str(name) for name in value)


def _download(yaml: Path, value: Any) -> tuple[tuple[dict[str, str], ...], str]:
    """The `download:` entry as mappings, and a note when it is a script, which is never run."""
    if value is None or value == "":
        return (), ""
    checked: list[dict[str, str]] = []
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, str):
            if not _is_url(entry):
                return (), f"its 'download:' is a script, which is never run; expected {', '.join(DOWNLOAD_KEYS)}"
            entry = {"url": entry.strip()}
        if not isinstance(entry, dict) or not isinstance(entry.get("url"), str):
            raise UserError(f"{yaml}: 'download:' is {entry!r}; expected a mapping with url, sha256, extract_to")
        for key, item in entry.items():
            if key not in DOWNLOAD_KEYS:
                raise UserError(f"{yaml}: 'download:' has the key '{key}'; expected {', '.join(DOWNLOAD_KEYS)}")
            if not isinstance(item, str):
                raise UserError(f"{yaml}: 'download.{key}' is {item!r}; expected text (quote it)")
        checked.append(entry)
    return tuple(checked), ""


def _is_url(text: str) -> bool:
    return text.strip().startswith(("http://", "https://")) and len(text.split()) == 1


def _class_folders(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _load_folder(folder: Path) -> DataSpec:
    """A folder with train/ and val/ (or valid/, test/), each with one folder of images per class."""
    root = normalize(folder)
    found = {s: root / s for s in ("train", "val", "valid", "test") if (root / s).is_dir()}
    train = found.get("train")
    if train is None:
        raise UserError(
            f"{folder} is a folder without train/; expected a data YAML, or a folder per class in train/, val/"
        )
    val = found.get("val") or found.get("valid") or found.get("test")
    names = _class_folders(train)
    if not names:
        raise UserError(f"{train} has no class folders; expected one folder of images per class")
    splits = {"train": (train,)}
    if val:
        splits["val"] = (val,)
    if "test" in found:
        splits["test"] = (found["test"],)
    return DataSpec(yaml=root, root=root, names=names, splits=splits, format="folder")
