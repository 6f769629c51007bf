"""Checkpoints: torch.distributed.checkpoint, written beside and renamed, independent of the number of processes."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from gddlab.distill.ada import AdaController
from gddlab.distill.distributed import World
from gddlab.distill.step import GanStep
from gddlab.errors import GddlabError
from gddlab.files import fsync_dir, read_json, write_json

__all__ = ["checkpoint_tensors", "checkpoints", "load_checkpoint", "save_checkpoint"]


def _optimizer_tensors(opt: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {p: n for n, p in module.named_parameters()}
    return {f"{names[p]}/{k}": v for p, state in opt.state.items() for k, v in state.items()}


def _state(step: GanStep, ema: nn.Module, ada: AdaController | None) -> dict[str, Any]:
    state = {
        "g": step.g.state_dict(),
        "ema": ema.state_dict(),
        "opt_g": _optimizer_tensors(step.opt_g, step.g),
    }
    if step.opt_d is not None:
        state |= {"d": step.d.state_dict(), "opt_d": _optimizer_tensors(step.opt_d, step.d)}
    if ada is not None:
        state["ada"] = ada.state_dict()
    return state


def checkpoint_tensors(step: GanStep, ema: nn.Module, ada: AdaController | None = None) -> list[Tensor]:
    """Every tensor of a checkpoint, for its size."""
    return [t for part in _state(step, ema, ada).values() for t in part.values()]


def checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in (run_dir / "checkpoints").glob("*") if re.fullmatch(r"\d+\.\d{3}", p.name)]
    return sorted((p for p in found if (p / "meta.json").exists()), key=lambda p: float(p.name))


def save_checkpoint(
    run_dir: Path,
    step: GanStep,
    ema: nn.Module,
    meta: dict[str, Any],
    world: World,
    *,
    keep: int,
    ada: AdaController | None = None,
) -> None:
    """Writes checkpoints/KIMG from all ranks; older ones beyond `keep` are removed after it stands.

    Args:
        meta: Counters, JSON; must hold `nimg`.

    Raises:
        GddlabError: A parameter is not finite; what was written before stands.
    """
    state = _state(step, ema, ada)
    for part in ("g", "d"):
        bad = [k for k, v in state.get(part, {}).items() if v.is_floating_point() and not v.isfinite().all()]
        if bad:
            raise GddlabError(
                f"{part} holds parameters that are not finite after {meta['nimg']} images, such as {bad[0]}: "
                "the last checkpoint stands; lower lr_g or lr_d in a new run"
            )
    final = run_dir / "checkpoints" / f"{meta['nimg'] / 1000:010.3f}"
    tmp = final.with_name(f".{final.name}.tmp")
    if world.rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
    world.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "saving as a single process" is meant
        dcp.save(state, checkpoint_id=tmp, process_group=world.control)
    world.barrier()
    if world.rank == 0:
        write_json(tmp / "meta.json", meta)
        for file in tmp.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        fsync_dir(tmp)
        shutil.rmtree(final, ignore_errors=True)
        tmp.replace(final)
        fsync_dir(final.parent)
        for old in checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    world.barrier()


def load_checkpoint(
    run_dir: Path, step: GanStep, ema: nn.Module, world: World, *, ada: AdaController | None = None
) -> dict[str, Any] | None:
    """Reads the newest checkpoint into the networks and optimisers; returns its counters, None where there is none."""
    found = checkpoints(run_dir)
    if not found:
        return None
    state = _state(step, ema, ada)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=found[-1], process_group=world.control)
    step.g.load_state_dict(state["g"])
    ema.load_state_dict(state["ema"])
    if step.adversarial:
        step.d.load_state_dict(state["d"])
    if ada is not None:
        ada.load_state_dict(state["ada"])
    meta: dict[str, Any] = read_json(found[-1] / "meta.json")
    return meta
