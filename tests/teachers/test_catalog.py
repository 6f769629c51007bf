"""Published teachers: names, local copies, and downloads from a server that misbehaves."""

from __future__ import annotations

import hashlib
import http.server
import pickle
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gddlab.errors import GddlabError
from gddlab.teachers import download
from gddlab.teachers.catalog import PUBLISHED, Published, fetch, locate, published

CONTENT = pickle.dumps({"ema": bytes(range(256)) * 12_000})  # 3 MB, three blocks
NAME = "edm-test"


class Server(http.server.ThreadingHTTPServer):
    """Serves one file; `served` counts its bytes, `requests` keeps the headers."""

    daemon_threads = True
    content = CONTENT
    etag = '"one"'
    ranges = True  # understands Range
    length = True  # says Content-Length
    kind = "application/octet-stream"
    status = 200
    cut = 0  # breaks each connection after so many bytes
    cuts = 10**9  # how many connections it breaks
    pause: threading.Event | None = None  # waits before the answer

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.served = 0
        self.requests: list[dict[str, str]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        s = self.server
        s.requests.append(dict(self.headers))
        if s.pause:
            s.pause.wait(20)
        if s.status != 200:
            self.send_error(s.status)
            return
        start, total = 0, len(s.content)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and s.ranges and self.headers.get("If-Range", s.etag) == s.etag:
            start = int(asked[1])
            self.send_response(206 if start < total else 416)
            self.send_header(
                "Content-Range", f"bytes {start}-{total - 1}/{total}" if start < total else f"bytes */{total}"
            )
        else:
            self.send_response(200)
        if s.etag:
            self.send_header("ETag", s.etag)
        self.send_header("Content-Type", s.kind)
        if s.length:
            self.send_header("Content-Length", str(total - start))
        self.end_headers()
        body = s.content[start:]
        if s.cut and s.cuts and s.cut < len(body):
            s.cuts -= 1
            body = body[: s.cut]
        self.wfile.write(body)
        s.served += len(body)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    s = Server()
    threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    entry = Published(NAME, f"http://127.0.0.1:{s.server_port}/{NAME}.pkl", "ncsnpp-cifar10", "cifar10")
    monkeypatch.setitem(PUBLISHED, NAME, entry)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield s
    s.shutdown()
    s.server_close()


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working folder, home and cache."""
    for name in ("GDDLAB_HOME", "GDDLAB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache" / "teachers"


def catalogued(**fields: Any) -> None:
    PUBLISHED[NAME] = replace(PUBLISHED[NAME], **fields)


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_catalog() -> None:
    assert len(PUBLISHED) == 18
    edm = published("edm-cifar10-32x32-uncond-ve")
    assert edm.url == "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-ve.pkl"
    assert (edm.precond, edm.data, edm.parameters, edm.megabytes) == (
        "EDMPrecond",
        "cifar10",
        56_397_827,
        "about 226 MB",
    )
    base = published("baseline-imagenet-64x64-cond-adm")
    assert base.url.endswith("/edm/pretrained/baseline/baseline-imagenet-64x64-cond-adm.pkl")
    assert base.precond == "iDDPMPrecond"
    for name, entry in PUBLISHED.items():
        cond = "-cond" in name
        assert entry.architecture.endswith("-cond") or "imagenet" in name or not cond
        assert entry.verified == name.startswith("edm-")
        assert "BY-NC-SA" in entry.licence and entry.data.split("-")[0] in name
    assert replace(edm, size=223_165_173).megabytes == "223 MB"
    with pytest.raises(GddlabError, match="did you mean 'edm-cifar10-32x32-uncond-v"):
        fetch("edm-cifar10-32x32-uncond-vx")


def test_local_copies_come_first(server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("GDDLAB_HOME", str(home))
    assert locate(NAME) is None
    places = [cache / f"{NAME}.pkl", home / "teachers" / f"{NAME}.pkl", home / f"{NAME}.pkl"]
    places += [tmp_path / "work" / f"{NAME}.pkl", tmp_path / "work" / f"{NAME}.safetensors"]
    for path in places:  # each is preferred to those before it
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        assert locate(NAME) == path
        assert fetch(NAME) == path
    assert server.requests == []


def test_download(server: Server, cache: Path) -> None:
    catalogued(size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
    path = fetch(NAME)
    assert path == cache / f"{NAME}.pkl" and path.read_bytes() == CONTENT
    assert left(cache) == [path.name]
    assert fetch(NAME) == path and len(server.requests) == 1


def test_broken_connections_are_continued(server: Server, cache: Path) -> None:
    server.cut = 1_500_000
    assert fetch(NAME).read_bytes() == CONTENT
    assert len(server.requests) > 1
    assert server.served < len(CONTENT) + 600_000  # at most what one cut leaves in flight
    assert left(cache) == [f"{NAME}.pkl"]


def interrupted(server: Server) -> int:
    """A first call that fails after a part came; how many bytes it kept."""
    server.cut, server.cuts, keep = 2_000_000, 1, server.get_request

    def refuse_after_first() -> Any:
        if server.requests:
            server.status = 503
        return keep()

    server.get_request = refuse_after_first  # type: ignore[method-assign]
    with pytest.raises(GddlabError, match="503"):
        fetch(NAME)
    server.get_request = keep  # type: ignore[method-assign]
    server.status, server.cut = 200, 0
    part = next(Path().resolve().parent.glob("cache/teachers/*.part"))
    server.requests.clear()
    server.served = 0
    return part.stat().st_size


def test_a_later_call_continues(server: Server) -> None:
    kept = interrupted(server)
    assert 1_000_000 <= kept <= 2_000_000
    assert fetch(NAME).read_bytes() == CONTENT
    assert server.served == len(CONTENT) - kept
    assert server.requests[0]["Range"] == f"bytes={kept}-" and server.requests[0]["If-Range"] == '"one"'


def test_a_changed_file_starts_again(server: Server) -> None:
    interrupted(server)
    server.content, server.etag = CONTENT[:1000] + b"new" + CONTENT[1000:], '"two"'
    assert fetch(NAME).read_bytes() == server.content
    assert server.served == len(server.content)


def test_a_server_that_ignores_if_range_is_noticed(server: Server) -> None:
    interrupted(server)
    server.content, server.etag = CONTENT[:1000] + b"new" + CONTENT[1000:], '"two"'
    original = Handler.do_GET

    def without_condition(self: Handler) -> None:
        del self.headers["If-Range"]
        original(self)

    Handler.do_GET = without_condition  # type: ignore[method-assign]
    try:
        assert fetch(NAME).read_bytes() == server.content
    finally:
        Handler.do_GET = original  # type: ignore[method-assign]


def test_a_server_without_ranges_starts_again(server: Server) -> None:
    interrupted(server)
    server.ranges = False
    assert fetch(NAME).read_bytes() == CONTENT
    assert server.served == len(CONTENT)


def test_without_a_mark_nothing_is_continued(server: Server) -> None:
    server.etag = ""
    interrupted(server)
    assert fetch(NAME).read_bytes() == CONTENT
    assert "Range" not in server.requests[0]


def test_a_whole_part_needs_no_more_bytes(server: Server, cache: Path) -> None:
    interrupted(server)
    (cache / f"{NAME}.pkl.part").write_bytes(CONTENT)
    assert fetch(NAME).read_bytes() == CONTENT
    assert server.served == 0


def test_a_part_longer_than_the_file_is_dropped(server: Server, cache: Path) -> None:
    interrupted(server)
    (cache / f"{NAME}.pkl.part").write_bytes(CONTENT + b"more")
    assert fetch(NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("attributes", "entry", "reason"),
    [
        ({"status": 404}, {}, "404 Not Found"),
        ({"kind": "text/html; charset=utf-8"}, {}, "a web page, no file"),
        ({"content": b"<html>no such"}, {}, r"the server sends b'<html>no suc'..., no pickle"),
        ({"content": b""}, {}, "0 bytes came"),
        ({"content": CONTENT[:-1], "length": False}, {}, "not all of a pickle"),
        ({"length": False}, {"size": 5}, f"{len(CONTENT)} bytes came, not 5"),
        ({}, {"size": 5}, f"the server's file has {len(CONTENT)} bytes, the catalogued one 5"),
        ({}, {"sha256": "0" * 64}, f"sha256 is not the catalogued {'0' * 64}"),
    ],
)
def test_refusals_leave_nothing(
    server: Server, cache: Path, attributes: dict[str, Any], entry: dict[str, Any], reason: str
) -> None:
    for key, value in attributes.items():
        setattr(server, key, value)
    catalogued(**entry)
    with pytest.raises(GddlabError, match=reason) as e:
        fetch(NAME)
    message = str(e.value)
    for part in (PUBLISHED[NAME].url, "MB", str(cache / f"{NAME}.pkl"), "GDDLAB_HOME", "CC BY-NC-SA"):
        assert part in message
    assert "\n" not in message
    assert left(cache) == []


def test_a_web_page_does_not_cost_the_part(server: Server, cache: Path) -> None:
    kept = interrupted(server)
    server.etag, server.kind = "", "text/html"  # a login page of the network
    with pytest.raises(GddlabError, match="web page"):
        fetch(NAME)
    assert (cache / f"{NAME}.pkl.part").stat().st_size == kept


def test_no_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(server)
    closed = Server()
    closed.server_close()
    catalogued(url=f"http://127.0.0.1:{closed.server_port}/{NAME}.pkl")
    with pytest.raises(GddlabError, match=r"connection refused; \d\.\d MB are kept"):
        fetch(NAME)
    monkeypatch.setenv("GDDLAB_OFFLINE", "1")
    with pytest.raises(GddlabError, match=r"\(GDDLAB_OFFLINE is set\): get http.*about 226 MB.* and put it at"):
        fetch(NAME)


def test_a_silent_server_times_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.pause = threading.Event()
    monkeypatch.setattr(download, "TIMEOUT", (0.2, 0.2))
    with pytest.raises(GddlabError, match="no answer within"):
        fetch(NAME)
    server.pause.set()


def test_a_full_disk(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(GddlabError, match=r"3 MB are to come, 1 MB are free in .*GDDLAB_CACHE"):
        fetch(NAME)
    monkeypatch.undo()


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(GddlabError, match="Not a directory"):
        fetch(NAME)


def test_two_at_once_download_once(server: Server) -> None:
    server.pause = threading.Event()
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(NAME))) for _ in range(3)]
    for t in threads:
        t.start()
    server.pause.set()
    for t in threads:
        t.join(20)
    assert len(paths) == 3 and len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT
    assert len(server.requests) == 1
