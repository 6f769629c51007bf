"""Downloads of published teachers: resumed, checked, one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gddlab.errors import GddlabError
from gddlab.files import write_text
from gddlab.progress import progress_bar

if TYPE_CHECKING:
    from gddlab.teachers.catalog import Published

__all__ = ["download", "refusal"]

TIMEOUT = (10.0, 60.0)
"""Seconds: to connect, and between two pieces of data."""


def download(teacher: Published, target: Path, *, progress: bool = True) -> None:
    """Brings a teacher to `target`; what an earlier call left unfinished is continued, unless the file has changed.

    A second process that wants the same file waits for the first. Size and sha256 are checked where known.

    Raises:
        GddlabError: No network, a refusal by the server, no space, or another file than the one catalogued.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock")):
            if not target.is_file():  # another process may have brought it meanwhile
                _retrieve(teacher, target, progress)
    except OSError as e:
        raise refusal(teacher, f"{e.strerror or e} at {e.filename or target.parent}", target) from None


def refusal(teacher: Published, why: str, target: Path) -> GddlabError:
    """Says what is missing, where it is, how large, and where to put it by hand."""
    return GddlabError(
        f"cannot download {teacher.name} ({why}): get {teacher.url} ({teacher.megabytes}, {teacher.licence}) and put it at "
        f"{target}, into the working folder or into $GDDLAB_HOME"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for its turn; the lock ends with the process, however that ends."""
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _retrieve(teacher: Published, target: Path, progress: bool) -> None:
    import pooch  # type: ignore[import-untyped]

    pooch.get_logger().setLevel("ERROR")

    def downloader(url: str, output: Any, _: Any) -> None:
        part = _Part(target)
        while not _receive(teacher, part, progress):
            pass  # the connection broke after some data came: go on from there
        part.path.replace(output)
        part.forget()

    try:
        pooch.retrieve(
            teacher.url,
            known_hash=teacher.sha256 and f"sha256:{teacher.sha256}",
            fname=target.name,
            path=target.parent,
            downloader=downloader,
        )
    except GddlabError:
        raise
    except ValueError:  # pooch's word for a wrong hash; the file is gone
        raise refusal(teacher, f"its sha256 is not the catalogued {teacher.sha256}", target) from None


class _Part:
    """What came so far, and the server's mark (ETag or date) of the file that it is a part of."""

    def __init__(self, target: Path):
        self.target = target
        self.path, self._mark = target.with_name(f"{target.name}.part"), target.with_name(f"{target.name}.part.mark")

    @property
    def mark(self) -> str:
        return self._mark.read_text() if self._mark.is_file() else ""

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.mark and self.path.is_file() else 0

    def begin(self, mark: str) -> None:
        self.forget()
        if mark:
            write_text(self._mark, mark)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self._mark.unlink(missing_ok=True)


def _mark(headers: Any) -> str:
    """A strong validator, as If-Range wants it."""
    etag = headers.get("ETag", "")
    return str(etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", ""))


def _receive(teacher: Published, part: _Part, progress: bool) -> bool:
    """One request. True when the file is whole, False when the connection broke after it brought something."""
    import requests

    have = part.size
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": part.mark}
    begun = have
    try:
        with requests.get(teacher.url, headers=headers, stream=True, timeout=TIMEOUT) as r:
            span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", r.headers.get("Content-Range", ""))
            if r.status_code == 416 and span and int(span[2]) == have:
                return True  # it was whole already, only its last rename was missing
            fits = r.status_code == 206 and span and span[1] == str(have) and _mark(r.headers) == part.mark
            if have and r.status_code in (206, 416) and not fits:
                part.forget()  # another file, or another piece than the one asked for
                return False
            if r.status_code != (206 if fits else 200):
                raise refusal(teacher, f"the server answers {r.status_code} {r.reason}", part.target)
            if fits and span:
                total: int | None = int(span[2])
            else:
                have = begun = 0
                total = int(r.headers["Content-Length"]) if r.headers.get("Content-Length", "").isdigit() else None
            _check(teacher, r.headers, total, part.target, have)
            if not have:
                part.begin(_mark(r.headers))
            with part.path.open("ab") as f, _bar(teacher, total, have, progress) as bar:
                for block in r.iter_content(1 << 18):
                    if not have and not block.startswith(b"\x80"):
                        part.forget()
                        raise refusal(teacher, f"the server sends {bytes(block[:12])!r}..., no pickle", part.target)
                    f.write(block)
                    have += len(block)
                    bar.update(len(block))
                os.fsync(f.fileno())
    except requests.RequestException as e:
        if have > begun:
            return False
        kept = f"; {have / 1e6:.1f} MB are kept, the same call goes on from there" if have else ""
        raise refusal(teacher, f"{_reason(e)}{kept}", part.target) from None
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            why = f"no space left in {part.path.parent}; set GDDLAB_CACHE to a larger folder"
            raise refusal(teacher, why, part.target) from None
        raise
    wanted = teacher.size if total is None else total
    if not have or wanted not in (None, have) or not _ends(part.path):
        part.forget()
        why = f"{have} bytes came, {'not all of a pickle' if wanted in (None, have) else f'not {wanted}'}"
        raise refusal(teacher, why, part.target)
    return True


def _ends(path: Path) -> bool:
    """Whether the last byte is a pickle's STOP: a server that gives no length may stop anywhere."""
    with path.open("rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read() == b"."


def _check(teacher: Published, headers: Any, total: int | None, target: Path, have: int) -> None:
    """Refuses before the first byte what cannot be the teacher or has no room."""
    if "html" in headers.get("Content-Type", ""):
        raise refusal(teacher, "the server sends a web page, no file", target)
    if total is not None and teacher.size not in (None, total):
        raise refusal(teacher, f"the server's file has {total} bytes, the catalogued one {teacher.size}", target)
    free = shutil.disk_usage(target.parent).free
    if total is not None and free < total - have:
        why = f"{(total - have) / 1e6:.0f} MB are to come, {free / 1e6:.0f} MB are free in {target.parent}"
        raise refusal(teacher, f"{why}; set GDDLAB_CACHE to a larger folder", target)


def _bar(teacher: Published, total: int | None, have: int, progress: bool) -> Any:
    bar = progress_bar(total=total or 0, desc=teacher.name, unit="B", enabled=progress)
    bar.unit_scale = True
    bar.n = bar.initial = have
    if not bar.disable and not have:
        bar.write(f"{teacher.name}: {teacher.licence}, {teacher.url}", file=sys.stderr)
    return bar


def _reason(e: Exception) -> str:
    """The innermost cause, in few words: requests wraps errors in errors."""
    import requests

    if isinstance(e, requests.Timeout):
        return f"no answer within {TIMEOUT[0]:g} s, or none for {TIMEOUT[1]:g} s"
    text = str(e)
    for sign, words in (
        ("resolve", "the host name is not known: no network?"),
        ("Connection refused", "connection refused"),
        ("unreachable", "network unreachable"),
        ("CERTIFICATE", "the server's certificate is not trusted"),
        ("proxy", "the proxy refuses"),
    ):
        if sign.lower() in text.lower():
            return words
    return type(e).__name__
