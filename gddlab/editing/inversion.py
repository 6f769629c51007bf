"""`invert`: the noise whose image is nearest to a given one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from pydantic import Field, PositiveInt
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gddlab.editing.search import LR, Generator, Search, check_images, class_ids_of, running, searching
from gddlab.errors import GddlabError, NotFound, validated
from gddlab.files import atomic_path, check_kind, folder_of, hash_json, hash_tensors, path_of, read_json, write_json
from gddlab.nets import architecture
from gddlab.probing.inputs import Labels, Precision
from gddlab.progress import progress_bar
from gddlab.runtime import Seed, beside_runs
from gddlab.sampling.samplers import seed_list, weights_hash

if TYPE_CHECKING:
    import pandas as pd

MOST_CLASSES = 32
"""Classes among which the best is searched where none is given."""
FIRST = 4
"""Where the class is searched, the first 1 / FIRST of the steps are taken in each class."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """Noise whose images are near given ones, one row per image.

    Attributes:
        z: Noise on the Gaussian's shell, (B, C, H, W).
        images: What the student makes of it, in [-1, 1], (B, C, H, W).
        distance: To the given image, root mean square of pixels on the scale of [-1, 1], (B,).
        perceptual: `Lite0Distance` to it, (B,); NaN where it was not asked for.
        class_ids: Given or found, (B,); -1 for an unconditional student.
        seeds: Whose noise the search began at, and which later steps of a student of several take, (B,).
        calls: Calls of the network per image; each but the last is followed by a backward pass.
        seconds: Wall time per image.
    """

    z: Tensor
    images: Tensor
    distance: Tensor
    perceptual: Tensor
    class_ids: Tensor
    seeds: Tensor
    calls: int
    seconds: float

    def __len__(self) -> int:
        return len(self.z)

    def __repr__(self) -> str:
        return (
            f"Inversion of {len(self)} images: distance {self.distance.median():.3f} (median), "
            f"{self.calls:,} calls and {self.seconds:.2g} s an image"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per image: distance, perceptual, class_ids, seeds, calls, seconds."""
        import pandas as pd

        columns = {name: getattr(self, name).numpy() for name in ("distance", "perceptual", "class_ids", "seeds")}
        return pd.DataFrame(columns | {"calls": self.calls, "seconds": self.seconds})

    def save(self, path: str | Path) -> None:
        """Writes a .safetensors file, atomically; a file there is replaced if it is an inversion.

        Raises:
            GddlabError: Another file is there.
        """
        check_kind(path := path_of("path", path), _is_inversion, "inversion")
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self) if f.type == "Tensor"}
        with atomic_path(path) as tmp:
            save_file(tensors, tmp, metadata={"calls": str(self.calls), "seconds": str(self.seconds)})

    @classmethod
    def load(cls, path: str | Path) -> Inversion:
        """Reads what `save` wrote.

        Raises:
            NotFound: No such file. GddlabError: Another kind of file.
        """
        path = path_of("path", path)
        if not path.is_file():
            raise NotFound(f"no such file: {path}")
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(**tensors, calls=int(about["calls"]), seconds=float(about["seconds"]))
        except Exception as e:  # safetensors' own errors have no common base
            raise GddlabError(f"{path} holds no inversion: {e}") from None


def _is_inversion(path: Path) -> bool:
    try:
        return bool(Inversion.load(path))
    except GddlabError:
        return False


@beside_runs()
@validated
@searching
def invert(
    student: Any,
    images: Any,
    *,
    class_labels: Labels = None,
    steps: PositiveInt = 100,
    restarts: PositiveInt = 2,
    perceptual: Annotated[float, Field(ge=0, le=1e6)] = 0.0,
    lr: Annotated[float, Field(gt=0, le=100)] = LR,
    seed: Seed = 0,
    batch_size: PositiveInt = 128,
    dtype: Precision = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Inversion:
    """Finds noise from which a student makes given images.

    Each image is searched for from several starts, by Adam on the noise, which stays on the Gaussian's shell |z| =
    sqrt(d); the nearest counts. The squared error of pixels is lowered, plus `perceptual` times a distance of
    EfficientNet-lite0 features. Weights are not touched. A result depends on the image's place and the seed, not on its
    batch, but for rounding, which a search of many steps can carry to another minimum, as near.

    Args:
        student: A one-step student, or one of several steps, of which the noise of the first is searched for, that of
            the later ones drawn by the seed.
        images: float [-1, 1], (B, C, H, W).
        class_labels: For a conditional student: class ids, or one for all; None finds the class, of at most 32.
        steps: Of the search.
        restarts: Starts per image.
        perceptual: Weight of `Lite0Distance`, beside the mean squared error of pixels; 0 omits it.
        lr: Adam's learning rate; noise has unit variance.
        seed: Of the starts: image i, start r has the noise of seed + i * restarts + r.
        batch_size: How many searches run at once: images x starts (x classes); at least those of one image.
        dtype: Runs the student under autocast, as for `sample`.
        out: A folder where finished batches are kept; the same call continues there.
        progress: Shows a bar at a terminal.

    Raises:
        GddlabError: No student; images of another shape or out of range; labels that do not fit, or too many classes to
            search; a folder that holds another inversion.
    """
    make = Generator(student)
    goal = check_images("images", images, make.shape)
    ids = class_ids_of(student, class_labels, len(goal))
    classes = make.label_dim if ids is None else 0
    if classes > MOST_CLASSES:
        raise GddlabError(f"the student has {classes} classes, too many to search: give class_labels=")
    how: dict[str, Any] = {"steps": steps, "restarts": restarts, "perceptual": perceptual, "lr": lr, "seed": seed}
    seed_list(len(goal) * restarts, seed, None)  # refuses a last one out of range
    size = max(1, batch_size // (restarts * max(classes, 1)))
    folder = None if out is None else _prepared(out, make, goal, ids, how | {"size": size, "dtype": str(dtype)})
    parts: list[Inversion] = []
    with progress_bar(total=len(goal), desc="inverting", unit="img", enabled=progress) as bar:
        for i in range(0, len(goal), size):
            file = None if folder is None else folder / f"{i:06}.safetensors"
            if file is not None and file.exists():
                parts.append(Inversion.load(file))
            else:
                rows = slice(i, i + size)
                with running(student, dtype):
                    parts.append(_inverted(make, goal[rows], None if ids is None else ids[rows], first=i, **how))
                if file is not None:
                    parts[-1].save(file)
            bar.update(len(parts[-1]))
    return _together(parts)


def _prepared(out: str | Path, make: Generator, goal: Tensor, ids: Tensor | None, how: dict[str, Any]) -> Path:
    """The folder, which holds this inversion alone."""
    folder = folder_of("out", out)
    about = how | {"student": weights_hash(make.module), "images": hash_tensors({"images": goal})}
    about |= architecture(make.module)  # the levels of its steps are no weights
    about["class_ids"] = None if ids is None else ids.tolist()
    path, sign = folder / "inversion.json", {"sha256": hash_json(about)}
    if path.exists():
        given = read_json(path)
        if not isinstance(given, dict) or given.get("sha256") != sign["sha256"]:
            raise GddlabError(f"{folder} holds another inversion (student, images or settings): give another out=")
    elif next(folder.glob("*.safetensors"), None) is not None:
        raise GddlabError(f"{folder} holds batches, but no inversion.json that says of what: give another out=")
    else:
        write_json(path, {"steps": how["steps"], "restarts": how["restarts"], "images": len(goal)} | sign)
    return folder


class _Rows(NamedTuple):
    """Starts of the search, on the network's device but for the last two; row i * tries + k is of image i.

    Attributes:
        wanted: The image that a row is for, (rows, C, H, W).
        z, later: Starting noise, and that of later steps.
        labels: One-hot; None for an unconditional student.
        ids: Class of each row, -1 without; on the CPU.
        seeds: Of the noise; on the CPU.
    """

    wanted: Tensor
    z: Tensor
    later: list[Tensor]
    labels: Tensor | None
    ids: Tensor
    seeds: Tensor

    @classmethod
    def of(cls, make: Generator, goal: Tensor, ids: Tensor | None, first: int, restarts: int) -> _Rows:
        """`restarts` starts per image in its class, or in each class where none is given; the seed of the first."""
        n = len(goal)
        searched = torch.arange(make.label_dim) if ids is None and make.label_dim else None
        if searched is not None:
            each = searched.repeat(n, 1)  # (n, classes)
        else:
            each = torch.full((n, 1), -1) if ids is None else ids[:, None]
        starts = first + torch.arange(n)[:, None, None] * restarts + torch.arange(restarts)  # (n, 1, restarts)
        seeds = starts.expand(n, each.shape[1], restarts).flatten()
        classes = each[:, :, None].expand(n, each.shape[1], restarts).flatten()
        z, later = make.noise(seeds.tolist())
        wanted = goal.to(make.device).repeat_interleave(len(seeds) // n, 0)
        return cls(wanted, z, later, make.one_hot(classes) if make.label_dim else None, classes, seeds)

    def take(self, rows: Tensor) -> _Rows:
        here, there = rows.to(self.z.device), rows.cpu()
        labels = None if self.labels is None else self.labels[here]
        later = [x[here] for x in self.later]
        return _Rows(self.wanted[here], self.z[here], later, labels, self.ids[there], self.seeds[there])


class _Distance:
    """How far rows' images are from those wanted: the mean square of pixels, and a perceptual distance or NaN."""

    def __init__(self, make: Generator, perceptual: float):
        from gddlab.distill.distances import Lite0Distance

        self.make, self.weight = make, perceptual
        self.feel = Lite0Distance().to(make.device) if perceptual else None

    def parts(self, rows: _Rows, x: Tensor) -> tuple[Tensor, Tensor]:
        pixels = (x - rows.wanted).square().mean((1, 2, 3))
        felt = torch.full_like(pixels, torch.nan) if self.feel is None else self.feel(x.clamp(-1, 1), rows.wanted)
        return pixels, felt

    def total(self, pixels: Tensor, felt: Tensor) -> Tensor:
        return pixels + self.weight * felt if self.weight else pixels

    def of(self, rows: _Rows) -> Callable[[Tensor], Tensor]:
        """What a search lowers."""
        return lambda z: self.total(*self.parts(rows, self.make(z, rows.labels, rows.later)))


def _nearest(distance: Tensor, n: int, k: int) -> Tensor:
    """The k nearest rows of each of n images, which have as many rows each; (n * k,)."""
    by_image = distance.view(n, -1)
    first = torch.arange(n, device=distance.device)[:, None] * by_image.shape[1]
    return (by_image.argsort(1)[:, :k] + first).flatten()


def _inverted(
    make: Generator,
    goal: Tensor,
    ids: Tensor | None,
    *,
    first: int,
    steps: int,
    restarts: int,
    perceptual: float,
    lr: float,
    seed: int,
) -> Inversion:
    """The images of one batch, `first` the place of the first."""
    began, n = time.perf_counter(), len(goal)
    rows = _Rows.of(make, goal, ids, seed + first * restarts, restarts)
    distance, search, calls = _Distance(make, perceptual), Search(rows.z, steps=steps, lr=lr), 0
    taken = 0
    if len(rows.z) > n * restarts:  # in every class: the best go on
        taken = max(1, steps // FIRST)
        search.run(distance.of(rows), taken)
        calls += len(rows.z) * (taken + 1)
        with torch.no_grad():
            best = _nearest(distance.of(rows)(search.z), n, restarts)
        search.keep(best)
        rows = rows.take(best)
    search.run(distance.of(rows), steps - taken)
    calls += len(rows.z) * (steps - taken + 1)
    with torch.no_grad():
        x = make(search.z, rows.labels, rows.later).clamp(-1, 1)
        pixels, felt = distance.parts(rows, x)
    best = _nearest(distance.total(pixels, felt), n, 1)
    kept = {"z": search.z, "images": x, "distance": pixels.sqrt(), "perceptual": felt}
    return Inversion(
        **{name: value[best].cpu() for name, value in kept.items()},
        class_ids=rows.ids[best.cpu()],
        seeds=rows.seeds[best.cpu()],
        calls=calls // n * make.calls,
        seconds=(time.perf_counter() - began) / n,
    )


def _together(parts: list[Inversion]) -> Inversion:
    """Batches as one; calls are the same in each, seconds the mean."""
    tensors = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Inversion) if f.type == "Tensor"}
    seconds = sum(p.seconds * len(p) for p in parts) / sum(map(len, parts))
    return Inversion(**tensors, calls=parts[0].calls, seconds=seconds)
