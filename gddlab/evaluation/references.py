"""What images are scored against: a data set, or a file of its statistics, in EDM's format or ours."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gddlab.datasets import PARTS, ImageDataset, Manifest, Source, name_and_part, open_dataset, parts_of
from gddlab.errors import GddlabError, NotFound, validated
from gddlab.evaluation.extractors import Extractor, find_extractor
from gddlab.evaluation.features import real_features, real_rows
from gddlab.evaluation.metrics import Statistics, statistics
from gddlab.files import atomic_path, check_free, file_sha256, path_of
from gddlab.provenance import versions
from gddlab.runtime import beside_runs

FORMAT = "gddlab-reference-1"
SAME = ("name", "layer", "dims", "input_size", "preprocessing", "sha256")
"""What must agree with an extractor; other versions of its code give the same features up to rounding."""


@dataclass(frozen=True)
class Reference:
    """Real images, or what a file says about them.

    Attributes:
        name, sha256: Of the data set and its manifest, also if its statistics come from a file of ours; else of the
            file.
        n: Number of images; None if unknown.
        channels, resolution, classes, class_ids: Of the images, if known.
        data: The images.
        known: Mean and covariance, from a file.
        features: (N, D), from a file.
        manifest: Of the images, if known.
    """

    name: str
    sha256: str
    n: int | None
    channels: int | None = None
    resolution: int | None = None
    classes: int = 0
    class_ids: np.ndarray | None = None
    data: ImageDataset | None = None
    known: Statistics | None = None
    features: Tensor | None = None
    manifest: Manifest | None = None

    @classmethod
    def of(cls, data: ImageDataset) -> Reference:
        m = data.manifest
        about = (m.channels, m.resolution, m.classes, data.class_ids, data)
        return cls(m.what, m.sha256, len(data), *about, manifest=m)

    def fitted(self, extractor: Extractor) -> Extractor:
        """The extractor for images of this shape; raises as `Extractor.fitted`."""
        if self.channels is None or self.resolution is None:
            return extractor  # statistics alone
        return extractor.fitted(self.channels, self.resolution)

    @cached_property
    def parts(self) -> tuple[ImageDataset, ImageDataset]:
        """What was trained on and what was held out, where these images are either of the two.

        Raises:
            GddlabError: They are not, or the other part is not found.
        """
        if self.data is None or name_and_part(self.data.name)[1] is None:
            name = name_and_part(self.name)[0]
            raise GddlabError(
                f"metric 'copying' against {self.name!r}: it needs images that were trained on and images held out, "
                f"give data='{name}:{PARTS[0]}', of a model that was trained on that part"
            )
        return parts_of(self.data)

    def check(self, kinds: tuple[str, ...]) -> None:
        """Raises: GddlabError: A metric needs more than is known of the images: features, or the images themselves."""
        for kind in kinds:
            if kind == "copying":
                _ = self.parts
            elif kind == "classes" and self.data is None:
                raise GddlabError(
                    f"metric 'classes' needs the images, {self.name} holds their features: give the dataset"
                )
            if kind not in ("fid", "is") and self.data is None and self.features is None:
                raise GddlabError(
                    f"metric {kind!r} needs the features of each real image, {self.name} holds their mean and "
                    "covariance: give the dataset, or a file of gddlab reference --features"
                )

    def against(self, extractor: Extractor, **where: Any) -> Tensor | Statistics:
        """The real side of a metric: features, (N, D), or mean and covariance alone; `where` as for `real_rows`."""
        if self.features is not None:
            return self.features
        if self.data is not None:
            return real_rows(self.data, extractor, **where).rows[:, : extractor.dims]
        assert self.known is not None
        return self.known

    def inputs(self, kind: str, extractor: Extractor, **where: Any) -> tuple[Tensor | Statistics, ...]:
        """What a metric compares with, `where` as for `real_rows`: nothing, logits, features, or those of parts."""
        if kind == "is":
            return ()
        if kind == "copying":
            return tuple(real_rows(part, extractor, **where).rows[:, : extractor.dims] for part in self.parts)
        if kind == "classes":
            assert self.data is not None
            return (real_rows(self.data, extractor, **where).rows[:, extractor.dims :],)
        return (self.against(extractor, **where),)


def open_reference(data: Source, extractor: Extractor, *, progress: bool = True) -> Reference:
    """Real images to score against, given as for `open_dataset`, or a .npz of statistics of this extractor.

    That file is EDM's (arrays `mu`, `sigma` of Inception's features), or one that `reference` wrote. Of ADM's, which
    hold images too, Inception takes the statistics, any other extractor the images.

    Raises:
        GddlabError: No such data; a file that is no reference, or of another extractor.
    """
    if isinstance(data, str | Path) and (path := Path(data).expanduser()).suffix == ".npz":
        held = _load(path, ()).keys()
        if held & {"mu", "sigma"} and ("arr_0" not in held or extractor.label == "inception"):
            return _read(path, extractor)
    return Reference.of(open_dataset(data, progress=progress))


@beside_runs()
@validated
def reference(
    data: Source,
    out: str | Path,
    *,
    extractor: str | Path = "lite2",
    features: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes statistics of real images to a file, so that a score needs neither the images nor their features again.

    The file holds `mu` and `sigma` in float64 as EDM's do, the number of images and their classes, and as JSON in
    `about` the manifest of the data set and the extractor. Scores against it equal those against the data set.

    Args:
        data: The images, as for `open_dataset`.
        out: File that ends in .npz.
        extractor: As for `evaluate`.
        features: Also writes the features of each image, which kernel distance, precision, recall and MIND need.
        overwrite: Replaces a file that is there.
        progress: Shows a bar at a terminal.

    Returns:
        Path of the file.

    Raises:
        GddlabError: Unknown names, missing weights, fewer than 2 images, another suffix, or a file that is there.
    """
    out, spec = path_of("out", out), find_extractor(extractor)
    if out.suffix != ".npz":
        raise GddlabError(f"out={out}: give a file that ends in .npz")
    check_free(out, overwrite)
    spec.check()
    real = open_dataset(data, progress=progress)
    spec = spec.fitted(real.channels, real.resolution)
    if len(real) < 2:
        raise GddlabError(f"{real.name!r} has {len(real)} image: give at least 2")
    rows = real_features(real, spec, progress=progress)
    known = statistics(rows)
    arrays: dict[str, Any] = {"mu": known.mu.numpy(), "sigma": known.sigma.numpy()}
    if real.class_ids is not None:
        arrays["class_ids"] = real.class_ids
    if features:
        arrays["features"] = rows.numpy()
    about = {
        "format": FORMAT,
        "manifest": real.manifest.to_dict(),
        "n": len(real),
        "extractor": {key: getattr(spec, key) for key in SAME},
        "versions": versions(),
    }
    with atomic_path(out) as tmp, tmp.open("wb") as f:
        np.savez(f, about=np.array(json.dumps(about, allow_nan=False)), **arrays)
    return out


def _load(path: Path, wanted: Collection[str]) -> dict[str, np.ndarray | None]:
    """The arrays of a .npz by name; those not wanted are None, and not read."""
    if not path.is_file():
        raise NotFound(f"no such file: {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] if k in wanted else None for k in file.files}
    except (ValueError, OSError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as e:
        raise GddlabError(f"{path} cannot be read ({e}): give a .npz of images, or of arrays mu and sigma") from None


def _read(path: Path, spec: Extractor) -> Reference:
    found = _load(path, ("mu", "sigma", "about", "features", "class_ids"))
    arrays = {k: a for k, a in found.items() if a is not None}
    if missing := {"mu", "sigma"} - set(arrays):
        raise GddlabError(f"{path} lacks {' and '.join(sorted(missing))}: give a .npz of arrays mu and sigma")
    mu, sigma = arrays["mu"], arrays["sigma"]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not {mu.dtype.kind, sigma.dtype.kind} <= {"f"}:
        raise GddlabError(
            f"{path}: mu is {mu.dtype} {mu.shape}, sigma {sigma.dtype} {sigma.shape}: give float (D,) and (D, D)"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise GddlabError(f"{path} holds numbers that are not finite: fetch it again")
    known = Statistics(torch.from_numpy(mu).double(), torch.from_numpy(sigma).double())
    if "about" in arrays:
        return _own(path, arrays, known, spec)
    if spec.label != "inception" or len(mu) != spec.dims:
        raise GddlabError(
            f"{path} holds {len(mu)} features per image and does not name their network: it is read as Inception's "
            f"2048, but asked is extractor={spec.label!r}"
        )
    return Reference(path.name, file_sha256(path), None, known=known)


def _own(path: Path, arrays: dict[str, np.ndarray], known: Statistics, spec: Extractor) -> Reference:
    try:
        about = json.loads(str(arrays["about"]))
        if about["format"] != FORMAT:
            raise KeyError("format")
        theirs, manifest, n = about["extractor"], about["manifest"], int(about["n"])
        about_data = {k: manifest[k] for k in ("name", "sha256", "channels", "resolution", "classes")}
        about_data["manifest"] = Manifest(**manifest)
    except (ValueError, KeyError, TypeError):
        raise GddlabError(f"{path} is no reference that gddlab wrote: make it again, gddlab reference") from None
    spec = spec.fitted(about_data["channels"], about_data["resolution"])
    for key in SAME:
        if theirs.get(key) != (ours := getattr(spec, key)):
            raise GddlabError(
                f"{path} was made with another extractor, {key} {theirs.get(key)!r}; asked is {spec.label!r}, {ours!r}"
            )
    features, class_ids = arrays.get("features"), arrays.get("class_ids")
    fits = known.mu.shape == (spec.dims,)
    fits &= features is None or (features.shape == (n, spec.dims) and bool(np.isfinite(features).all()))
    fits &= class_ids is None or class_ids.shape == (n,)
    if not fits:
        raise GddlabError(f"{path} is damaged, its arrays do not fit each other: make it again, gddlab reference")
    rows = None if features is None else torch.from_numpy(features)
    return Reference(**about_data, n=n, class_ids=class_ids, known=known, features=rows)
