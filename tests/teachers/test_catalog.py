"""Published teachers: names, local copies, and downloads from a server that misbehaves."""

from __future__ import annotations

import hashlib
import http.server
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gddlab.errors import GddlabError, NotFound
from gddlab.nets.architectures import build
from gddlab.teachers import load_teacher
from gddlab.teachers.catalog import PUBLISHED, PublishedTeacher

CONTENT = pickle.dumps({"ema": bytes(range(256)) * 12_000})  # 3 MB, three blocks
NAME = "edm-test"


class Server(http.server.ThreadingHTTPServer):
    """Serves one file; `requests` counts what it was asked."""

    daemon_threads = True
    content = CONTENT
    status = 200
    cut = 0  # breaks the connection after this many bytes
    pause: threading.Event | None = None  # waits before the answer

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        s = self.server
        s.requests += 1
        if s.pause:
            s.pause.wait(20)
        if s.status != 200:
            self.send_error(s.status)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(s.content)))
        self.end_headers()
        self.wfile.write(s.content[: s.cut or None])
        self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    s = Server()
    threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"http://127.0.0.1:{s.server_port}/{NAME}.pkl"
    entry = PublishedTeacher(NAME, url, "ncsnpp-cifar10", 56_397_827, "cifar10", verified=False)
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


def fetch(**fields: Any) -> Path | None:
    return replace(PUBLISHED[NAME].file, **fields).fetch()


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_catalog() -> None:
    assert len(PUBLISHED) == 18 + 51
    edm = PUBLISHED["edm-cifar10-32x32-uncond-ve"]
    assert edm.url == "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-ve.pkl"
    assert (edm.architecture, edm.data, edm.parameters) == ("ncsnpp-cifar10", "cifar10", 56_397_827)
    assert edm.file.about == "about 226 MB, CC BY-NC-SA 4.0, non-commercial"
    base = PUBLISHED["baseline-imagenet-64x64-cond-adm"]
    assert base.url.endswith("/edm/pretrained/baseline/baseline-imagenet-64x64-cond-adm.pkl")
    assert (base.architecture, base.data) == ("iddpm-adm-imagenet-64", "imagenet-64")
    large = PUBLISHED["edm2-img64-xl-0671088-0.040"]
    assert large.url == "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img64-xl-0671088-0.040.pkl"
    assert (large.architecture, large.data, large.kimg) == ("edm2-img64-xl", "imagenet-64", 671088)
    assert PUBLISHED["edm2-img512-xs-2147483-0.135"].file.about.startswith("about 249 MB")  # 16 bits a weight
    for name, entry in PUBLISHED.items():
        cond = "-cond" in name
        assert entry.architecture.endswith("-cond") or "imagenet" in name or not cond
        assert entry.verified == name.startswith(("edm-", "edm2-"))
        assert entry.data.split("-")[0] in name or (entry.kimg and entry.data in ("imagenet-64", "imagenet-512"))
        assert name.startswith(entry.architecture) == name.startswith("edm2-")
    counted = {entry.architecture: entry.parameters for entry in PUBLISHED.values()}
    with torch.device("meta"):
        for architecture, parameters in counted.items():
            assert sum(p.numel() for p in build(architecture).parameters()) == parameters
    assert all(counted[entry.architecture] == entry.parameters for entry in PUBLISHED.values())
    with pytest.raises(GddlabError, match="did you mean 'edm-cifar10-32x32-uncond-v"):
        load_teacher("edm-cifar10-32x32-uncond-vx")


def test_local_copies_come_first(server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("GDDLAB_HOME", str(home))
    file = PUBLISHED[NAME].file
    assert file.locate() is None
    places = [cache / f"{NAME}.pkl", home / "teachers" / f"{NAME}.pkl", home / f"{NAME}.pkl"]
    places += [tmp_path / "work" / f"{NAME}.pkl", tmp_path / "work" / f"{NAME}.safetensors"]
    for path in places:  # each is preferred to those before it
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        assert file.locate() == path
        assert fetch() == path
    assert server.requests == 0


def test_download(server: Server, cache: Path) -> None:
    path = fetch(known_hash=f"sha256:{hashlib.sha256(CONTENT).hexdigest()}")
    assert path is not None and path == cache / f"{NAME}.pkl" and path.read_bytes() == CONTENT
    assert left(cache) == [path.name]
    assert fetch() == path and server.requests == 1


@pytest.mark.parametrize(
    ("attributes", "entry", "reason"),
    [
        ({"status": 404}, {}, "the server answers 404 Not Found"),
        ({"content": b"<html>no such"}, {}, "the server sent a web page"),
        ({"content": b"no such"}, {}, "the server sent plain text"),
        ({"content": b""}, {}, "the server sent empty"),
        ({"cut": 1_500_000}, {}, "ChunkedEncodingError"),
        ({}, {"known_hash": "sha256:" + "0" * 64}, "the server sent another file"),
    ],
)
def test_refusals_leave_nothing(
    server: Server, cache: Path, attributes: dict[str, Any], entry: dict[str, Any], reason: str
) -> None:
    for key, value in attributes.items():
        setattr(server, key, value)
    with pytest.raises(GddlabError, match=reason) as e:
        fetch(**entry)
    message = str(e.value)
    for part in (PUBLISHED[NAME].url, "MB", str(cache / f"{NAME}.pkl"), "GDDLAB_HOME", "CC BY-NC-SA"):
        assert part in message
    assert "\n" not in message
    assert left(cache) == []


def test_no_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Server()
    closed.server_close()
    url = f"http://127.0.0.1:{closed.server_port}/{NAME}.pkl"
    with pytest.raises(GddlabError, match="ConnectionError"):
        fetch(url=url)
    monkeypatch.setenv("GDDLAB_OFFLINE", "1")
    with pytest.raises(GddlabError, match=r"\(GDDLAB_OFFLINE is set\): put http.*about 226 MB.* at"):
        fetch(url=url)


def test_a_silent_server_times_out(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.pause = threading.Event()
    monkeypatch.setattr("gddlab.pretrained.published.TIMEOUT", 0.2)
    with pytest.raises(GddlabError, match="Timeout"):
        fetch()
    server.pause.set()


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(GddlabError, match="Not a directory"):
        fetch()


def test_two_at_once_download_once(server: Server) -> None:
    server.pause = threading.Event()
    paths: list[Any] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch())) for _ in range(3)]
    for t in threads:
        t.start()
    server.pause.set()
    for t in threads:
        t.join(20)
    assert len(paths) == 3 and len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT
    assert server.requests == 1


def test_names_of_the_hub_are_not_fetched() -> None:
    with pytest.raises(NotFound, match="sd-turbo; networks of the Hugging Face hub are not fetched: give a name"):
        load_teacher("stabilityai/sd-turbo")
    with pytest.raises(NotFound, match=r"no such file: nets/teacher.pkl; accepted: a name"):
        load_teacher("nets/teacher.pkl")
