"""Weights of feature extractors that others publish: found on this machine or fetched, and checked before they are used."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from gddlab.errors import GddlabError, NotFound
from gddlab.files import cache_dir, file_sha256
from gddlab.pretrained.files import find_weights

__all__ = ["Published"]

_HASHED = re.compile(r"-([0-9a-f]{8,64})\.\w+$")


@dataclass(frozen=True)
class Published:
    """A file of weights, and where it is looked for.

    It is the path in the environment variable, or else a file of its name in the working folder, `$GDDLAB_HOME`, `$GDDLAB_HOME/backbones`, the cache's
    `backbones`, or torch.hub's own cache; else it is downloaded to the cache, unless GDDLAB_OFFLINE is set.

    Attributes:
        title: Of the network, for messages.
        variable: Environment variable with a path.
        url: Where it is published.
        sha256: Of the published file, where it is known in full.
        aliases: Other names it is kept under, without suffix.
    """

    title: str
    variable: str
    url: str
    sha256: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def target(self) -> Path:
        """Where a download goes."""
        return cache_dir() / "backbones" / self.file

    def locate(self) -> Path | None:
        """The file on this machine, or None; nothing is downloaded.

        Raises:
            GddlabError: The environment variable names no file.
        """
        if given := os.environ.get(self.variable):
            if not Path(given).expanduser().is_file():
                raise NotFound(f"no weights of {self.title} at {given}, which {self.variable} names: {self._remedy}")
            return Path(given).expanduser()
        stems = (Path(self.file).stem, *self.aliases)
        if found := find_weights(*stems):
            return found
        hub = Path(torch.hub.get_dir()) / "checkpoints"
        return next((p for s in stems if (p := hub / f"{s}{Path(self.file).suffix}").is_file()), None)

    def fetch(self) -> Path:
        """The file, downloaded if it is not on this machine.

        Raises:
            GddlabError: It is not here and downloads are forbidden or fail; the message says where it is had and where it goes.
        """
        found = self.locate()
        if found is None:
            if os.environ.get("GDDLAB_OFFLINE", "") not in ("", "0"):
                raise self.missing("GDDLAB_OFFLINE is set")
            found = self._download()
        check_name(found)
        return found

    def missing(self, why: str) -> GddlabError:
        return GddlabError(f"no weights of {self.title} ({why}): {self._remedy}")

    @property
    def _remedy(self) -> str:
        return f"put {self.url} at {self.target}, in the working folder or in $GDDLAB_HOME, or set {self.variable}=PATH"

    def _download(self) -> Path:
        import pooch  # type: ignore[import-untyped]
        import requests

        from gddlab.progress import interactive

        pooch.get_logger().setLevel("ERROR")
        try:
            pooch.retrieve(
                self.url,
                known_hash=self.sha256 and f"sha256:{self.sha256}",
                fname=self.file,
                path=self.target.parent,
                downloader=pooch.HTTPDownloader(progressbar=interactive(), timeout=60),
            )
            check_name(self.target)
        except GddlabError as e:
            self.target.unlink(missing_ok=True)
            raise self.missing(str(e)) from None
        except ValueError:  # pooch's word for a wrong hash; the file is gone
            raise self.missing("what came is another file") from None
        except (OSError, requests.RequestException) as e:
            raise self.missing(type(e).__name__) from None
        return self.target


def check_name(path: Path) -> None:
    """Checks a file against the start of its sha256, where the name carries one, as torch.hub's do.

    Raises:
        GddlabError: It is another file, or a part of it.
    """
    wanted = _HASHED.search(path.name)
    if wanted and not file_sha256(path).startswith(wanted[1]):
        raise GddlabError(f"{path} is damaged: its sha256 is {file_sha256(path)[:8]}..., its name says {wanted[1][:8]}")
