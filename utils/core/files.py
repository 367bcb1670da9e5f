"""Files: atomic writes, run folders, the user's cache folder, the project's own files, and near misses of names."""

import atexit
import contextlib
import difflib
import functools
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from utils.core.errors import UserError
from utils.core.log import LOGGER

ODD_NAMES = "backslashreplace"  # how file names that are not UTF-8 stand in text files; JSON reads them back


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary neighbor of `path`; on success flush it to the disk and rename it over `path`.

    Whatever goes wrong (a full disk, a crash, an exception in the body), the earlier content of `path` stays whole.
    What the disk refuses is a UserError.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        encoding, newline, errors = (None, None, None) if "b" in mode else ("utf-8", "", ODD_NAMES)
        with open(temporary, mode, encoding=encoding, newline=newline, errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            f"cannot write '{path}' ({error.strerror or error}); what was there before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # renamed by now, or the error that led here is the one to tell
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush the rename itself where the platform allows opening a folder."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def increment_path(project: str | Path, name: str, exist_ok: bool = False) -> Path:
    """Create and return project/name, or project/name2, name3, ... when it exists and `exist_ok` is false."""
    base = Path(project) / name
    if not name.strip() or not base.name or base.name == "..":
        raise UserError(f"'{base}' is no name for a run folder; give another --name")
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        if exist_ok:
            base.mkdir(exist_ok=True)
            return base
        number = 1
        while True:
            path = base if number == 1 else base.with_name(f"{base.name}{number}")
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
    except OSError as e:
        raise UserError(f"the run folder '{base}' cannot be made ({e.strerror}); choose another --project") from e


def cache_dir(*parts: str) -> Path:
    """A folder for caches, created: $YOLOV5_SPD_CACHE, else $XDG_CACHE_HOME/yolov5-spd, else ~/.cache/yolov5-spd.

    Where none of them can be written to, a temporary one that lasts as long as this process.
    """
    path = _cache_root(os.environ.get("YOLOV5_SPD_CACHE"), os.environ.get("XDG_CACHE_HOME")).joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


@functools.cache
def _cache_root(own: str | None, xdg: str | None) -> Path:
    try:
        root = Path(own) if own else (Path(xdg) if xdg else Path.home() / ".cache") / "yolov5-spd"
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
        return root
    except (OSError, RuntimeError) as error:  # Path.home() raises a RuntimeError for users without a home
        folder = tempfile.mkdtemp(prefix="yolov5-spd-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        LOGGER.warning(f"no cache folder ({error}): a temporary one serves; YOLOV5_SPD_CACHE names one that lasts")
        return Path(folder)


def existing_file(path: str | Path, what: str) -> Path:
    """`path` as a Path if it is a file, else a UserError that names what was looked for."""
    found = Path(path)
    if not found.is_file():
        raise UserError(f"{what} '{path}' not found; expected a file (working directory: {Path.cwd()})")
    return found


def project_file(name: str | Path, what: str, folder: str, pattern: str) -> Path:
    """A file by its path, by its path in the project, or by its name in a folder of the project.

    Where there is none, the folder's files that fit the pattern are what a user is told of.
    """
    home = Path(__file__).resolve().parents[2]
    for place in (Path(name), home / name, home / folder / name):
        if place.is_file():
            return place
    known = sorted(path.name for path in (home / folder).glob(pattern))
    hint = nearest(Path(name).name, known) or f"; there are {', '.join(known)}"
    raise UserError(f"{what} '{name}' not found (working directory: {Path.cwd()}){hint}")


def short_names(files: Sequence[str | Path]) -> list[str]:
    """What to call models by: the stems of their files, else the folders in which their paths begin to differ from
    behind (`exp` and `exp2` of `exp/weights/best.pt` and `exp2/weights/best.pt`), else the paths."""
    stems = [Path(file).stem for file in files]
    parts = [Path(file).parts for file in files]
    while min(map(len, parts)) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    for names in (stems, [own[-1] for own in parts]):
        if len(set(names)) == len(names):
            return names
    return [str(file) for file in files]


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a choice is close to `name`, else an empty string."""
    match = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""
