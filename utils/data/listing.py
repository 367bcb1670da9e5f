"""Which images a split has, and where the label of each lies: folders are walked, list files are read.

Paths are plain strings here, for speed with hundreds of thousands of files, and may hold names that are not UTF-8.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from utils.core.errors import UserError
from utils.data.images import IMAGE_SUFFIXES, open_regular, read_regular, sniff
from utils.data.problems import LEFT_OUT, REMOVED, Problem

# Files that commonly lie among images and are not looked into.
_OTHER_SUFFIXES = frozenset(
    (".txt", ".xml", ".json", ".yaml", ".yml", ".csv", ".tsv", ".md", ".html", ".cache", ".npy", ".npz", ".zip", ".tar")
    + (".gz", ".tgz", ".py", ".ini", ".db", ".log", ".mp4", ".avi", ".mov", ".mat", ".pkl", ".pt", ".pdf", ".lnk", "")
)
MAX_LIST_BYTES = 2**30


def label_path(image: str) -> str:
    """The label file of an image: its last `/images/` folder becomes `/labels/`, its suffix `.txt`."""
    stem = os.path.splitext(image)[0]
    head, found, tail = stem.rpartition(f"{os.sep}images{os.sep}")
    return f"{head}{os.sep}labels{os.sep}{tail}.txt" if found else f"{stem}.txt"


def list_images(sources: tuple[Path, ...], ids_in: Path | None = None) -> tuple[list[str], list[Problem]]:
    """The absolute image paths of folders and list files, in order (sorted inside a folder), each once.

    `ids_in`: a Pascal VOC folder of images; a list line without a suffix is the name of an image there.
    """
    problems: list[Problem] = []
    found: dict[str, None] = {}
    for source in sources:
        listed = os.path.isfile(source)
        paths = _listed(source, ids_in) if listed else sorted(walk(str(source), problems))
        repeats = 0
        first = ""
        for path in paths:
            if path in found:
                repeats += 1
                first = first or path
            found[path] = None
        if repeats:
            detail = f"lists {first} again"
            problems.append(Problem("image-repeated", str(source), REMOVED, detail, count=repeats))
    return list(found), problems


def walk(folder: str, problems: list[Problem]) -> Iterator[str]:
    """The image files under a folder; hidden names are passed over.

    Links to folders are followed last, and no folder is read twice, so that links can neither loop nor multiply.
    """
    stack, links = [folder], list[str]()
    seen: set[tuple[int, int]] = set()
    while stack or links:
        current = stack.pop() if stack else links.pop(0)
        try:
            status = os.stat(current)
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            detail = f"cannot be read ({error.strerror or error})"
            problems.append(Problem("folder-unreadable", current, LEFT_OUT, detail))
            continue
        if (status.st_dev, status.st_ino) in seen:
            problems.append(Problem("folder-repeated", current, REMOVED, "is a link to a folder that is read already"))
            continue
        seen.add((status.st_dev, status.st_ino))
        below = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                (links if entry.is_symlink() else below).append(entry.path)
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                yield entry.path
            elif suffix not in _OTHER_SUFFIXES:
                _note_odd_suffix(entry.path, problems)
        stack.extend(reversed(below))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _note_odd_suffix(path: str, problems: list[Problem]) -> None:
    """An image under another suffix is probably meant to be used, and is not."""
    try:
        with open_regular(path) as file:
            kind = sniff(file.read(32))
    except OSError:
        return
    if kind:
        detail = f"is {kind.upper()} under a suffix that is no image's; rename it to use it"
        problems.append(Problem("image-suffix", path, LEFT_OUT, detail))


def _listed(source: Path, ids_in: Path | None) -> Iterator[str]:
    """The paths in a list file: one a line; `./x` is relative to the file, others to it, else to the working folder."""
    try:
        text = read_regular(source, MAX_LIST_BYTES).decode("utf-8-sig")
    except OSError as error:
        detail = f"cannot be read ({error.strerror or error})"
        raise UserError(f"list file {source} {detail}; expected the path of an image on each line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"list file {source} is not UTF-8 text; expected the path of an image on each line") from error
    if "\0" in text:
        raise UserError(f"list file {source} is not a list; expected the path of an image on each line")
    folder = os.path.dirname(os.path.abspath(source))
    for line in text.splitlines():
        line = line.strip()
        if not line:
            continue
        if ids_in is not None and os.path.splitext(line.split()[0])[1].lower() not in IMAGE_SUFFIXES:
            yield _by_id(ids_in, line.split()[0])
        elif line.startswith("./") or os.path.isabs(line):
            yield os.path.normpath(os.path.join(folder, line))
        else:
            here, beside = os.path.abspath(line), os.path.normpath(os.path.join(folder, line))
            yield beside if os.path.exists(beside) or not os.path.exists(here) else here


def _by_id(folder: Path, name: str) -> str:
    for suffix in (".jpg", ".jpeg", ".png"):
        path = os.path.join(folder, name + suffix)
        if os.path.exists(path):
            return path
    return os.path.join(folder, name + ".jpg")


def list_voc(sources: tuple[Path, ...], annotations: tuple[Path, ...]) -> tuple[list[tuple[str, str]], list[Problem]]:
    """(image, XML) pairs of Pascal VOC sources; `annotations` are one folder for all, or one for each source."""
    if len(annotations) not in (1, len(sources)):
        raise UserError(
            f"{len(sources)} image sources but {len(annotations)} annotation folders; expected one, or one each"
        )
    pairs: dict[str, str] = {}
    problems: list[Problem] = []
    for i, source in enumerate(sources):
        folder = annotations[i if len(annotations) > 1 else 0]
        images, more = list_images((source,), ids_in=folder.parent / "JPEGImages")
        problems += more
        for image in images:
            stem = os.path.splitext(image)[0]
            inside = stem.startswith(os.path.join(source, ""))
            name = os.path.relpath(stem, source) if inside else os.path.basename(stem)
            label = os.path.join(folder, name + ".xml")
            if inside and os.sep in name and not os.path.exists(label):
                label = os.path.join(folder, os.path.basename(stem) + ".xml")
            pairs.setdefault(image, label)
    return list(pairs.items()), problems
