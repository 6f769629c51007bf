"""`load_teacher`: bundled teachers by name, safetensors files, run directories."""

from __future__ import annotations

from pathlib import Path

from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import data_dir, read_json
from gddlab.nets import Precond, load_network
from gddlab.teachers.card import TeacherCard

__all__ = ["bundled_teachers", "load_teacher"]


def bundled_teachers() -> list[str]:
    """Names of the teachers that ship with gddlab."""
    return sorted(p.parent.name for p in (data_dir() / "teachers").glob("*/teacher.safetensors"))


def load_teacher(source: str | Path) -> Precond:
    """Loads a teacher.

    Args:
        source: Name of a bundled teacher ("digits", "digits-cond"), path of a .safetensors file that gddlab wrote, or a run
            directory of `train_teacher`.

    Returns:
        The network on the CPU, float32, eval mode, gradients off; `teacher.card` says what it is.

    Raises:
        GddlabError: Unknown name (near matches are given), or a file that is no network.
        NotFound: No such path.
    """
    names = bundled_teachers()
    path = Path(source)
    if str(source) in names:
        path = data_dir() / "teachers" / str(source) / "teacher.safetensors"
    elif path.is_dir():
        if not (path / "teacher.safetensors").exists():
            if (path / "student.safetensors").exists():
                raise GddlabError(f"{path} is a run with a student, no teacher: use gddlab.load_run(...).student()")
            raise GddlabError(f"{path} holds no teacher.safetensors: give a finished run directory of train_teacher")
        path = path / "teacher.safetensors"
    elif path.suffix != ".safetensors":
        if path.exists():
            raise GddlabError(
                f"{path} is no .safetensors file: give a name ({', '.join(names)}) or a .safetensors file"
            )
        if len(path.parts) > 1 or path.suffix:
            raise NotFound(f"no such file: {path}; accepted: {', '.join(names)}, a .safetensors file, a run directory")
        raise unknown("teacher", str(source), names)
    net, meta = load_network(path)
    net.requires_grad_(False)
    beside = path.parent / "scores.json"
    scores = read_json(beside) if path.name == "teacher.safetensors" and beside.exists() else []
    name = str(source) if str(source) in names else meta.get("name") or path.stem
    where = f"teachers/{name}, ships with gddlab" if str(source) in names else str(path)
    net.card = TeacherCard.of(net, name=name, source=where, meta=meta, scores=scores)
    return net
