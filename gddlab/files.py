"""Files: atomic writes, strict JSON, hashes, and what a file is by its first bytes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gddlab.errors import GddlabError, NotFound, Unwritable, shown

if TYPE_CHECKING:
    from torch import Tensor


def data_dir() -> Path:
    """Folder of what ships with gddlab: `data/` in a clone, `gddlab/data/` in an installed wheel (without `runs`)."""
    package = Path(__file__).resolve().parent
    inside = package / "data"
    return inside if inside.is_dir() else package.parent / "data"


def cache_dir() -> Path:
    """Folder of downloads and of results that are expensive to compute: `$GDDLAB_CACHE`, or `~/.cache/gddlab`."""
    return Path(os.environ.get("GDDLAB_CACHE") or "~/.cache/gddlab").expanduser()


def path_of(name: str, value: object) -> Path:
    """`value` as a path; `name` is for the message.

    Raises:
        GddlabError: It is no path, or a URL, or empty, which would mean the working folder; or the system takes no such
            name.
    """
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise GddlabError(f"{name}={shown(value)}: give a path")
    if url := re.match(r"([A-Za-z][\w+.-]+):/+(.*)", str(value)):  # a Path has one slash
        raise GddlabError(f"{name}={f'{url[1]}://{url[2]}'!r} is a URL: give a path on this machine")
    try:
        path = Path(value).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, RuntimeError, ValueError) as e:  # too long, a home of nobody, a null byte
        reason = str(getattr(e, "strerror", None) or e).rstrip(".")
        raise GddlabError(f"{name}={shown(str(value))}: {reason[:1].lower()}{reason[1:]}, give another path") from None
    return path


def folder_of(name: str, value: object, accepted: str = "a folder") -> Path:
    """`value` as the path of a folder, there or to be made; `name` and what is `accepted` are for the message.

    Raises:
        GddlabError: It is no path, or a file, lies below a file, or is called like one.
    """
    path = path_of(name, value)
    there = nearest_existing(path)
    if not there.is_dir():
        raise GddlabError(f"{name}={str(path)!r} is {'' if there == path else 'below '}a file: give {accepted}")
    if {path.suffix.lower(), path.name.lower()} & FILE_SUFFIXES and there != path:  # ".png" alone has no suffix
        raise GddlabError(f"{name}={str(path)!r} is the name of a file: give {accepted}")
    return path


FILE_SUFFIXES = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".svg", ".pdf", ".html", ".mp4"),
        *(".json", ".jsonl", ".csv", ".txt", ".md", ".parquet", ".npy", ".npz", ".zip", ".tar", ".gz", ".tgz"),
        *(".pt", ".pth", ".pkl", ".safetensors", ".onnx", ".pt2"),
    }
)
"""Names that end so are of files."""


def check_free(path: Path, overwrite: bool) -> None:
    """Refuses to replace a result: the one rule for all that is measured, chosen, converted, drawn or scored.

    Raises:
        GddlabError: The path is a file or a folder that is not empty, and `overwrite` is False; or it cannot be there,
            as below a file or where the system does not let it be written.
    """
    if not overwrite and _taken(path):
        raise GddlabError(f"{path} exists: give another name, or replace it (overwrite=True)")
    there = nearest_existing(path if path.is_dir() else path.parent)
    if not there.is_dir():
        raise GddlabError(f"{path} is below a file: give another name")
    if not os.access(there, os.W_OK):
        raise GddlabError(f"{path} cannot be written: give another name")


def check_kind(path: Path, ours: Callable[[Path], bool], what: str) -> None:
    """Refuses to write over another thing than what is written; `what` that is, is for the message.

    Raises:
        GddlabError: A file, or a folder that is not empty, is there, of which `ours` is False.
    """
    if _taken(path) and not ours(path):
        holds = "holds other files and" if path.is_dir() else "is there and"
        raise GddlabError(f"{path} {holds} no {what}: give another name")


def _taken(path: Path) -> bool:
    """Whether a file is there, or a folder with more in it than hidden files, such as a killed process leaves."""
    return any(not p.name.startswith(".") for p in path.iterdir()) if path.is_dir() else path.exists()


def holds_format(path: Path, name: str) -> bool:
    """Whether a file is a JSON object that says `name` in "format", even a damaged one."""
    try:
        return path.is_file() and read_object(path).get("format") == name
    except GddlabError:
        return False


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Refuses in one line, with `path`, what the system does not let be written inside."""
    try:
        yield
    except GddlabError:
        raise
    except OSError as e:
        refusal = Unwritable(f"{path} cannot be written: {e.strerror or e}")
        refusal.strerror = e.strerror
        raise refusal from None


def as_text(source: str | os.PathLike[str]) -> str:
    """A source by name or path as text: a bare word may be a name, "./word", "word/" and a Path never are."""
    text = os.fspath(source)
    return text if isinstance(source, str) or os.sep in text else os.path.join(os.curdir, text)


def located(value: Any, names: Collection[str] = ()) -> Any:
    """A path that exists as an absolute one, for it to be found from any folder; names and all else as they are."""
    if isinstance(value, os.PathLike):
        value = as_text(value)
    if isinstance(value, str) and value not in names and os.path.exists(path := os.path.expanduser(value)):
        return os.path.abspath(path)
    return value


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def fsync_dir(folder: Path) -> None:
    """Makes a rename inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; on success it is fsynced and renamed to `path`, on an error removed."""
    path = path_of("path", path)
    with writing(path):
        if path.is_dir():
            raise GddlabError(f"{path} is a folder: give the name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        tmp.touch(exist_ok=False)
        mode = tmp.stat().st_mode  # the rights that the user's files have, not those of tempfile
    try:
        yield tmp
        tmp.chmod(mode)  # some writers put a file of their own in its place
        with tmp.open("rb") as f:
            os.fsync(f.fileno())
        tmp.replace(path)
        fsync_dir(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    with atomic_path(path) as tmp:
        tmp.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Strict JSON (no NaN), two spaces, final newline."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    path = path_of("path", path)
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"no such file: {path}") from None
    except IsADirectoryError:
        raise GddlabError(f"{path} is a folder: give a file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise GddlabError(f"{path} is not JSON ({e}): give a file that gddlab wrote") from None


def read_object(path: Path) -> dict[str, Any]:
    """A file of one JSON object; {} where there is no file.

    Raises:
        GddlabError: It is damaged.
    """
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise GddlabError(f"{path} holds no JSON object: it is damaged")
    return found


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Every complete line of a .jsonl file; an incomplete last line is skipped.

    Raises:
        GddlabError: A line is no JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").split("\n")
    return [_object(path, line) for line in lines[:-1] if line]


def _object(path: Path, line: str | bytes) -> dict[str, Any]:
    found = None
    with contextlib.suppress(ValueError):
        found = json.loads(line)
    if not isinstance(found, dict):
        start = shown(line[:40])
        raise GddlabError(f"{path} is damaged: the line that begins {start} is no JSON object, remove it")
    return found


def append_jsonl(path: str | Path, line: Mapping[str, Any]) -> None:
    """Adds a line, and returns when it is on the disk, so that it survives a crash of the machine."""
    with Path(path).open("a") as f:
        f.write(json.dumps(line, allow_nan=False) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read_end(path: str | Path, size: int = 1 << 16) -> list[str]:
    """The lines in the last `size` bytes of a file, an incomplete last line included; invalid UTF-8 is replaced."""
    path = Path(path)
    if not path.exists():
        return []
    with path.open("rb") as f:
        start = max(0, path.stat().st_size - size)
        f.seek(start)
        lines = f.read(size).decode(errors="replace").splitlines()
    return lines[1:] if start and len(lines) > 1 else lines  # the first may be incomplete


def last_jsonl(path: str | Path) -> dict[str, Any] | None:
    """The last complete line of a .jsonl file, without reading the others; None where there is none."""
    for line in reversed(read_end(path)):
        with contextlib.suppress(json.JSONDecodeError):  # still being written
            json.loads(line)
            return _object(Path(path), line)
    return None


def thin_jsonl(path: str | Path, most: int = 1000) -> list[dict[str, Any]]:
    """Lines of a .jsonl file for a plot, in order: all of a short file; of a long one about `most`, spread evenly.

    The last line is always among them. The number of bytes read does not grow with the file.
    """
    path = Path(path)
    if not path.exists():
        return []
    size = path.stat().st_size
    if size <= most * 1024:
        return read_jsonl(path)
    found = {}
    with path.open("rb") as f:
        for i in range(most):
            f.seek(i * size // most)
            if i:
                f.readline()  # the rest of an incomplete line
            start, line = f.tell(), f.readline()
            if line.endswith(b"\n"):
                found[start] = line
    lines = [_object(path, line) for _, line in sorted(found.items())]
    last = last_jsonl(path)
    return lines if last is None or lines[-1:] == [last] else [*lines, last]


def by_number(folder: Path, suffix: str) -> list[Path]:
    """What is called by a number, such as thousands of images, and a suffix, in its order; the rest is not ours."""
    named = [(p.name.removesuffix(suffix), p) for p in folder.glob(f"*{suffix}")]
    return [p for _, p in sorted((float(name), p) for name, p in named if re.fullmatch(r"\d+(\.\d+)?", name))]


def file_sha256(path: Path) -> str:
    """sha256 of a file, remembered until the file changes."""
    about = path.stat()
    return _sha256(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _sha256(path: Path, *stamp: Any) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of names."""
    import torch  # here only: the rest serves processes that do not need it

    h = hashlib.sha256()
    for name in sorted(tensors):
        a = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}:{a.dtype}:{tuple(a.shape)}".encode())
        h.update(a.reshape(-1).view(torch.uint8).numpy().data)  # not .tobytes(), a copy
    return h.hexdigest()


def made_in(folder: str | Path) -> Literal["run", "teacher"] | None:
    """What gddlab trained in a folder, finished, damaged or neither: a student's run, a teacher, or None of both."""
    path = Path(folder).expanduser()
    if (path / "teacher.safetensors").exists():
        return "teacher"
    if not (path / "config.json").is_file():
        return None
    fields = None
    with contextlib.suppress(GddlabError):
        fields = read_json(path / "config.json")
    names = fields.keys() if isinstance(fields, dict) else set()
    if "model_channels" in names:
        return "teacher"
    began = any((path / name).exists() for name in ("status.json", "provenance.json", "lock"))
    return "run" if began or {"teacher", "mask"} <= names else None


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds a run of `gddlab.train`, even a damaged one; teachers and others write config.json too."""
    return made_in(folder) == "run"


HUB_NAME = re.compile(r"(?!.*\.(pkl|pth?|bin|safetensors|zip|np[yz]|tar|t?gz|png|jpe?g)$)[\w-][\w.-]*/[\w-][\w.-]*")
"""What may be a name on the Hugging Face hub: owner/name."""

MAGIC = (
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"\xfd7zXZ", "an xz archive: unpack it"),
    (b"(\xb5/\xfd", "a zstd archive: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"Rar!", "a rar archive: unpack it"),
    (b"PK\3\4", "a zip without its end: fetch or make it again"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"GGUF", "a GGUF file"),
    (b"PAR1", "a Parquet table"),
    (b"%PDF", "a PDF"),
    (b"\x7fELF", "a program"),
)


def describe_start(head: bytes) -> str:
    """What a file that is not accepted is, by its first bytes, and what to do about it."""
    if not head:
        return "empty (0 bytes), perhaps an incomplete download: fetch it again"
    if head.startswith(b"version https://git-lfs"):
        found = re.search(rb"\nsize (\d{1,18})", head)
        size = f" for a file of {int(found[1]):,} bytes" if found else ""
        return f"a Git LFS pointer{size}, not the file itself: run `git lfs pull` where it was cloned"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page (HTML), perhaps a sign-in or error page in place of the download: fetch it again"
    if text.startswith(b"<?xml"):
        return "an XML document, perhaps the error message of a server in place of the download: fetch it again"
    for magic, what in MAGIC:
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if re.match(rb"\((dp\d*\n|lp\d*\n|[dlitS(])|c[\w.]+\n[\w.]+\n|[\]}]q.", head, re.DOTALL):
        return f"a pickle of protocol 0 or 1, which is not read (it starts with {head[:12]!r} at byte 0)"
    starts = f"it starts with {head[:24]!r} at byte 0"
    if head.isascii() and not re.search(rb"[^\t\n\r\x20-\x7e]", head):
        return f"JSON text ({starts})" if text[:1] in (b"{", b"[") else f"plain text ({starts})"
    return f"of no known kind ({starts})"
