"""Downloads: data only, on request only, checked, unpacked without leaving the folder. The server is this machine."""

import hashlib
import http.server
import io
import stat
import tarfile
import threading
import zipfile
from dataclasses import replace

import pytest

from utils.core.errors import UserError
from utils.data import download
from utils.data.download import fetch
from utils.data.spec import load_data

CONTENT = {"images/a.jpg": b"picture", "labels/a.txt": b"0 0.5 0.5 0.1 0.1\n"}


class Handler(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes] = {}
    requests: list[str] = []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        data = self.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        self.send_response(200)
        if "nolength" not in self.path:
            self.send_header("Content-Length", str(len(data) + (10 if "short" in self.path else 0)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    Handler.files, Handler.requests = {}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def make_zip(content, patch=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            if patch:
                patch(entry)
            archive.writestr(entry, data)
    return buffer.getvalue()


def make_tar(content, mode="w:gz", patch=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            if patch:
                patch(entry)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def spec_for(folder, server, name, data, sha256="right", extract_to="."):
    Handler.files[f"/{name}"] = data
    total = hashlib.sha256(data).hexdigest() if sha256 == "right" else sha256
    lines = f"download:\n  url: {server}/{name}\n  sha256: '{total}'\n  extract_to: {extract_to}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "d.yaml").write_text(f"path: set\ntrain: images\nnames: [a]\n{lines}")
    return load_data(folder / "d.yaml")


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.zip", make_zip),
        ("a.tar", lambda content: make_tar(content, "w")),
        ("a.tar.gz", make_tar),
        ("a.tgz?x=1", make_tar),
        ("a.tar.bz2", lambda content: make_tar(content, "w:bz2")),
        ("a.tar.xz", lambda content: make_tar(content, "w:xz")),
        ("nolength.zip", make_zip),
    ],
)
def test_archives_are_checked_and_unpacked(tmp_path, server, name, make):
    spec = spec_for(tmp_path, server, name, make(CONTENT))
    with pytest.raises(UserError, match="--download"):
        spec.require("train")
    assert not Handler.requests  # nothing happens unless asked
    assert fetch(spec) == [spec.root]
    assert tree(tmp_path / "set") == CONTENT and spec.require("train")
    assert fetch(spec) == [] and len(Handler.requests) == 1  # nothing is missing any more


def test_single_file_and_other_folder(tmp_path, server):
    fetch(spec_for(tmp_path, server, "instances.json", b"{}", extract_to="annotations/new"))
    assert tree(tmp_path / "set") == {"annotations/new/instances.json": b"{}"}


def test_several_archives_share_folders(tmp_path, server):
    first = spec_for(tmp_path, server, "a.zip", make_zip({"images/a.jpg": b"1"}))
    second = spec_for(tmp_path, server, "b.zip", make_zip({"images/b.jpg": b"2", "labels/b.txt": b""}))
    fetch(replace(first, download=first.download + second.download))
    assert tree(tmp_path / "set") == {"images/a.jpg": b"1", "images/b.jpg": b"2", "labels/b.txt": b""}


def test_redirections_stay_on_the_web(tmp_path, server):
    spec = spec_for(tmp_path, server, "a.zip", make_zip(CONTENT))
    entry = spec.download[0]
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x/y"):
        with pytest.raises(UserError, match="redirects|Redirection"):
            fetch(replace(spec, download=({**entry, "url": f"{server}/to/{target}"},)))
    fetch(replace(spec, download=({**entry, "url": f"{server}/to/{entry['url']}"},)))
    assert tree(tmp_path / "set") == CONTENT


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"url": "file:///etc/passwd"}, "web address"),
        ({"url": "ftp://x/y.zip"}, "web address"),
        ({"url": "http:///x"}, "web address"),
        ({"url": "https://[::1/x.zip"}, "web address"),
        ({"sha256": "12"}, "64 hexadecimal"),
        ({"sha256": ""}, "neither encrypted nor checked"),
        ({"sha256": "0" * 64}, "SHA-256 sum"),
        ({"extract_to": "../elsewhere"}, "leads out"),
        ({"extract_to": "/tmp"}, "leads out"),
        ({"url": "http://127.0.0.1:9/secret.zip"}, "cannot be downloaded"),
        ({"url": "{server}/absent.zip"}, "cannot be downloaded .*404"),
        ({"url": "{server}/short.zip"}, "broke off"),
    ],
)
def test_what_is_refused(tmp_path, server, change, word):
    spec = spec_for(tmp_path, server, "a.zip", make_zip(CONTENT))
    Handler.files["/short.zip"] = Handler.files["/a.zip"]
    entry = {**spec.download[0], **{k: v.replace("{server}", server) for k, v in change.items()}}
    with pytest.raises(UserError, match=word) as error:
        fetch(replace(spec, download=(entry,)))
    assert "\n" not in str(error.value) and tree(tmp_path) == {"d.yaml": (tmp_path / "d.yaml").read_bytes()}


def test_no_entry_and_scripts(tmp_path):
    for lines, word in (("", "no 'download:' entry"), ("download: bash x.sh", "never run")):
        (tmp_path / "d.yaml").write_text(f"train: images\nnames: [a]\n{lines}\n")
        with pytest.raises(UserError, match=word):
            fetch(load_data(tmp_path / "d.yaml"))


def mode(value):
    return lambda entry: setattr(entry, "external_attr", value << 16)


def kind(value, link=""):
    def patch(entry):
        entry.type, entry.linkname, entry.size = value, link, 0

    return patch


@pytest.mark.parametrize(
    "data",
    [
        make_zip({"../out.txt": b"x"}),
        make_zip({"a/../../out.txt": b"x"}),
        make_zip({"/abs.txt": b"x"}),
        make_zip({"..\\out.txt": b"x"}),
        make_zip({"C:/out.txt": b"x"}),
        make_zip({"link": b"/etc/passwd"}, mode(stat.S_IFLNK | 0o777)),
        make_zip({"pipe": b""}, mode(stat.S_IFIFO | 0o777)),
        make_tar({"../out.txt": b"x"}),
        make_tar({"/abs.txt": b"x"}),
        make_tar({"ok": b"", "link": b""}, patch=kind(tarfile.SYMTYPE, "/etc/passwd")),
        make_tar({"hard": b""}, patch=kind(tarfile.LNKTYPE, "../../etc/passwd")),
        make_tar({"pipe": b""}, patch=kind(tarfile.FIFOTYPE)),
        make_tar({"device": b""}, patch=kind(tarfile.CHRTYPE)),
        make_zip({"a": b"x", "a/b": b"y"}),
        make_zip(CONTENT)[:-30],
        make_zip(CONTENT, lambda entry: setattr(entry, "compress_type", 0)).replace(b"picture", b"pictura"),
        make_tar(CONTENT)[:60],
        b"\x1f\x8b not gzip",
    ],
    ids=range(18),
)
def test_dangerous_and_broken_archives_leave_nothing_behind(tmp_path, server, data):
    spec = spec_for(tmp_path / "in", server, "a.bin", data)
    before = {**tree(tmp_path), "in/set/a.bin": b""}
    with pytest.raises(UserError) as error:
        fetch(spec)
        if tree(tmp_path / "in" / "set").keys() == {"a.bin"}:  # taken for a plain file: as good as refused
            raise UserError("plain file")
    assert "\n" not in str(error.value)
    assert tree(tmp_path).keys() <= before.keys()


def test_bombs_are_stopped(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "HONEST_BYTES", 100_000)
    flat = {"zeros": bytes(4_000_000)}
    for i, data in enumerate([make_zip(flat), make_tar(flat), make_tar(flat, "w:xz")]):
        with pytest.raises(UserError, match="bomb"):
            fetch(spec_for(tmp_path / str(i), server, "bomb", data))
        assert tree(tmp_path / str(i)).keys() == {"d.yaml"}
    with pytest.raises(UserError, match="room"):
        fetch(spec_for(tmp_path / "l", server, "a.zip", make_zip(flat)), max_bytes=1000)
    with pytest.raises(UserError, match="room"):
        fetch(spec_for(tmp_path / "n", server, "nolength.zip", make_zip(flat)), max_bytes=1000)


def test_a_tar_header_cannot_fill_the_memory(tmp_path, server):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**32
    with pytest.raises(UserError, match="bomb"):
        fetch(spec_for(tmp_path, server, "a.tar", header.tobuf() + bytes(20_000)))
    header.type, header.size = tarfile.REGTYPE, 10**11
    with pytest.raises(UserError, match="bomb"):
        fetch(spec_for(tmp_path, server, "b.tar", header.tobuf() + bytes(20_000)))


def test_existing_files_are_never_overwritten(tmp_path, server):
    spec = spec_for(tmp_path, server, "a.zip", make_zip({"z/new.txt": b"new", "labels/a.txt": b"theirs"}))
    (tmp_path / "set" / "labels").mkdir(parents=True)
    (tmp_path / "set" / "labels" / "a.txt").write_bytes(b"mine")
    with pytest.raises(UserError, match="labels/a.txt exists already"):
        fetch(spec)
    assert tree(tmp_path / "set") == {"labels/a.txt": b"mine"}
    (tmp_path / "set" / "z").write_bytes(b"a file where a folder is needed")
    (tmp_path / "set" / "labels" / "a.txt").unlink()
    with pytest.raises(UserError, match="set/z exists already"):
        fetch(spec)
