"""The published EDM teachers: names, addresses, architectures, and where a copy lies on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from gddlab.errors import unknown
from gddlab.files import cache_dir
from gddlab.nets.architectures import ARCHITECTURES, build
from gddlab.teachers.download import download, refusal

__all__ = ["PUBLISHED", "Published", "fetch", "locate", "published"]

ROOT = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained"
LICENCE = "CC BY-NC-SA 4.0, non-commercial"


@dataclass(frozen=True)
class Published:
    """A teacher that its authors publish as a pickle (https://github.com/NVlabs/edm, "Pre-trained models").

    `size` (bytes) and `sha256` are None where no public record of that very file was found; `parameters` then gives the estimate.
    `verified`: its authors published the training options that fix the architecture. For the baselines it is an estimate
    (configuration A); what the file itself says counts.
    """

    name: str
    url: str
    architecture: str
    data: str
    verified: bool = False
    licence: str = LICENCE
    size: int | None = None
    sha256: str | None = None

    @property
    def precond(self) -> str:
        """Class name of the network."""
        return ARCHITECTURES[self.architecture][0]

    @property
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(self.architecture).parameters())

    @property
    def megabytes(self) -> str:
        """Size of the file for people: "226 MB", or "about 226 MB" from four bytes a parameter."""
        if self.size is not None:
            return f"{self.size / 1e6:.0f} MB"
        return f"about {self.parameters * 4 / 1e6:.0f} MB"


def _catalog() -> dict[str, Published]:
    rows = []
    for kind, unet in (("vp", "ddpmpp"), ("ve", "ncsnpp")):
        rows += [
            (f"edm-cifar10-32x32-uncond-{kind}", f"{unet}-cifar10", "cifar10"),
            (f"edm-cifar10-32x32-cond-{kind}", f"{unet}-cifar10-cond", "cifar10"),
            (f"edm-ffhq-64x64-uncond-{kind}", f"{unet}-ffhq-64", "ffhq-64"),
            (f"edm-afhqv2-64x64-uncond-{kind}", f"{unet}-afhqv2-64", "afhqv2-64"),
            (f"baseline-cifar10-32x32-uncond-{kind}", f"{kind}-{unet}-cifar10", "cifar10"),
            (f"baseline-cifar10-32x32-cond-{kind}", f"{kind}-{unet}-cifar10-cond", "cifar10"),
            (f"baseline-ffhq-64x64-uncond-{kind}", f"{kind}-{unet}-64", "ffhq-64"),
            (f"baseline-afhqv2-64x64-uncond-{kind}", f"{kind}-{unet}-64", "afhqv2-64"),
        ]
    rows += [
        ("edm-imagenet-64x64-cond-adm", "adm-imagenet-64", "imagenet-64"),
        ("baseline-imagenet-64x64-cond-adm", "iddpm-adm-imagenet-64", "imagenet-64"),
    ]
    out = {}
    for name, architecture, data in sorted(rows, key=lambda r: (not r[0].startswith("edm"), r[0])):
        edm = name.startswith("edm")
        url = f"{ROOT if edm else f'{ROOT}/baseline'}/{name}.pkl"
        out[name] = Published(name, url, architecture, data, verified=edm)
    return out


PUBLISHED: dict[str, Published] = _catalog()
"""By name; `edm-*` are EDM's own models (configuration F), `baseline-*` those it compares with (configuration A)."""


def published(name: str) -> Published:
    """The entry of `name`.

    Raises:
        GddlabError: Unknown name; near matches are given.
    """
    if name not in PUBLISHED:
        raise unknown("published teacher", name, PUBLISHED)
    return PUBLISHED[name]


def locate(name: str) -> Path | None:
    """A local copy of a published teacher, `NAME.safetensors` or `NAME.pkl`, else None.

    Looked for in the working folder, `$GDDLAB_HOME`, `$GDDLAB_HOME/teachers` and the cache, in this order; a converted
    file before a pickle in the same folder.

    Raises:
        GddlabError: Unknown name.
    """
    published(name)
    home = os.environ.get("GDDLAB_HOME")
    folders = [
        Path.cwd(),
        *([Path(home).expanduser(), Path(home).expanduser() / "teachers"] if home else []),
        cache_dir() / "teachers",
    ]
    for folder in folders:
        for suffix in (".safetensors", ".pkl"):
            if (folder / f"{name}{suffix}").is_file():
                return folder / f"{name}{suffix}"
    return None


def fetch(name: str, *, progress: bool = True) -> Path:
    """Path of a published teacher: a local copy (see `locate`), else a download into the cache.

    An interrupted download continues where it stopped, unless the file has changed on the server. A second process that
    asks for the same teacher waits for the first. `GDDLAB_OFFLINE=1` forbids the network.

    Args:
        name: One of `PUBLISHED`.
        progress: Shows a bar when at a terminal.

    Returns:
        The whole file, its size (and sha256, where the catalog knows it) checked. Nothing in it was run or unpickled.

    Raises:
        GddlabError: Unknown name; no network, a refusal by the server, no space, or another file than the one catalogued.
            The message says the address, the size and where to put the file by hand.
    """
    teacher = published(name)
    found = locate(name)
    if found is not None:
        return found
    target = cache_dir() / "teachers" / f"{name}.pkl"
    if os.environ.get("GDDLAB_OFFLINE", "") not in ("", "0"):
        raise refusal(teacher, "GDDLAB_OFFLINE is set", target)
    download(teacher, target, progress=progress)
    return target
