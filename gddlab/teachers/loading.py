"""`load_teacher`: teachers by name, EDM pickles, safetensors files, run directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import data_dir, read_json
from gddlab.nets import Precond, load_network
from gddlab.teachers.card import TeacherCard
from gddlab.teachers.catalog import PUBLISHED, fetch
from gddlab.teachers.edm import read_edm
from gddlab.teachers.sniff import kind_of

__all__ = ["bundled_teachers", "load_teacher"]


def bundled_teachers() -> list[str]:
    """Names of the teachers that ship with gddlab."""
    return sorted(p.parent.name for p in (data_dir() / "teachers").glob("*/teacher.safetensors"))


def load_teacher(source: str | Path) -> Precond:
    """Loads a teacher, or a student that was published as one.

    A pickle is read as data: nothing that it names is imported or called, its embedded source is never run. It needs no code of
    its authors.

    Args:
        source: Name of a bundled teacher ("digits", "digits-cond") or of a published one ("edm-cifar10-32x32-uncond-ve" and
            the others of `gddlab.teachers.PUBLISHED`; a local copy is used, else it is downloaded); path of an EDM pickle (.pkl
            with `ema`; networks EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond, GDDPrecond, D2OPrecond); path of a .safetensors
            file that gddlab wrote; or a run directory of `train_teacher`.

    Returns:
        The network on the CPU, float32, eval mode, gradients off; `teacher.card` says what it is.

    Raises:
        GddlabError: Unknown name (near matches are given), a file that is no network (what it is, and at which byte it was
            refused), or a download that failed.
        NotFound: No such path.
    """
    name, path = _resolve(source)
    kind = kind_of(path)
    net, meta = load_network(path) if kind == "safetensors" else read_edm(path)
    net.requires_grad_(False)
    beside = path.parent / "scores.json"
    scores: list[dict[str, Any]] = read_json(beside) if path.name == "teacher.safetensors" and beside.exists() else []
    bundled = name in bundled_teachers()
    where = f"teachers/{name}, ships with gddlab" if bundled else str(path)
    if name in PUBLISHED:
        entry = PUBLISHED[name]
        found = type(net).__name__, sum(p.numel() for p in net.parameters())
        if entry.verified and found != (entry.precond, entry.parameters):
            raise GddlabError(
                f"{path} is another network than {name}: {found[0]} with {found[1]:,} parameters, "
                f"not {entry.precond} with {entry.parameters:,}; rename or remove it"
            )
        meta = {"data": entry.data, "licence": entry.licence} | meta
    try:
        net.card = TeacherCard.of(
            net, name=name or meta.get("name") or path.stem, source=where, meta=meta, scores=scores
        )
    except (TypeError, ValueError) as e:
        raise GddlabError(f"{path}: its metadata is damaged ({e}): convert the original again") from None
    return net


def _resolve(source: str | Path) -> tuple[str, Path]:
    """The name, if it is one, and the file."""
    name, path = str(source), Path(source)
    if name in bundled_teachers():
        return name, data_dir() / "teachers" / name / "teacher.safetensors"
    if path.is_dir():
        if (path / "teacher.safetensors").exists():
            return "", path / "teacher.safetensors"
        if (path / "student.safetensors").exists():
            raise GddlabError(f"{path} is a run with a student, no teacher: use gddlab.load_run(...).student()")
        raise GddlabError(f"{path} holds no teacher.safetensors: give a finished run directory of train_teacher")
    if path.exists():
        return "", path
    if name in PUBLISHED:
        return name, fetch(name)
    if len(path.parts) > 1 or path.suffix:
        raise NotFound(f"no such file: {path}; accepted: a name, a .pkl or .safetensors file, a run directory")
    raise unknown("teacher", name, [*bundled_teachers(), *PUBLISHED])
