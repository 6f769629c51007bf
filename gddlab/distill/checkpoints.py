"""Checkpoints: torch.distributed.checkpoint, written in the background, complete or absent, checked when read."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from gddlab.distill.distributed import World
from gddlab.distill.status import BEST, LATEST, checkpoints, name_of, named, pointer, where_it_continues
from gddlab.distill.step import GanStep
from gddlab.ema import local_shard
from gddlab.errors import GddlabError
from gddlab.files import file_sha256, fsync_dir, read_json, write_json, write_text

FULL = 1 << 20
"""Bytes; a disk with less free space counts as full."""


def training_state(step: GanStep, ema: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Every tensor of a checkpoint, by part and name: networks, average, moments of both optimisers, augmentation."""
    state = {"g": step.g.state_dict(), "ema": ema.state_dict(), "opt_g": _optimizer_tensors(step.opt_g, step.g)}
    if step.opt_d is not None:
        state |= {"d": step.d.state_dict(), "opt_d": _optimizer_tensors(step.opt_d, step.d)}
    if step.augment is not None and (ada := step.augment.state_dict()):
        state["ada"] = ada
    return state


def set_training_state(state: Mapping[str, Any], step: GanStep, ema: nn.Module) -> None:
    """Restores what was read into a `training_state`; the optimisers' tensors were read in place."""
    step.g.load_state_dict(state["g"])
    ema.load_state_dict(state["ema"])
    if step.adversarial:
        step.d.load_state_dict(state["d"])
    if "ada" in state and step.augment is not None:
        step.augment.load_state_dict(state["ada"])


def _optimizer_tensors(opt: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {p: n for n, p in module.named_parameters()}
    return {f"{names[p]}/{k}": v for p, state in opt.state.items() for k, v in state.items()}


class Loaded(NamedTuple):
    """What `Checkpoints.load` read: the counters, the folder's name, and what is wrong with newer ones it skipped."""

    meta: dict[str, Any]
    name: str
    damaged: list[str]


class Checkpoints:
    """The checkpoints of a run, in `checkpoints/KIMG`: torch's files, and meta.json with counters and checksums.

    A checkpoint is written under a temporary name, synced, renamed, and then named by the file `latest`; a kill on the
    way leaves the one before. The last `keep` stay, and the one that `best` names.

    Args:
        run_dir: The run.
        world: Its processes; all of them make every call.
        keep: How many of the newest stay.
    """

    def __init__(self, run_dir: Path, world: World, *, keep: int):
        self.run_dir, self.folder, self.world, self.keep = run_dir, run_dir / "checkpoints", world, keep
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, state: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any], *, best: bool = False) -> None:
        """Copies the state and writes it while the training continues; waits first for an unfinished write before it.

        Args:
            state: From `training_state`.
            meta: Counters, JSON; must hold `nimg`.
            best: Whether this is kept as the best one.

        Raises:
            GddlabError: A parameter is not finite, or the write before failed; earlier checkpoints stand.
        """
        self.wait()
        for part in ("g", "d"):
            floats = {k: local_shard(v) for k, v in state.get(part, {}).items() if v.is_floating_point()}
            bad = [k for k, v in floats.items() if not v.isfinite().all()]
            if self.world.any(bool(bad)):
                first = bad[0] if bad else "one on another rank"
                raise GddlabError(
                    f"{part} holds parameters that are not finite after {meta['nimg']} images, such as {first}: "
                    f"lower lr_g or lr_d in a new run; this one would continue from {where_it_continues(self.run_dir)}"
                )
        staged: Any = self._stager.stage(dict(state))
        self._writing = self._executor.submit(self._write, staged, dict(meta), best)

    def wait(self, timeout: float | None = None) -> None:
        """Returns when nothing is being written, or after `timeout` seconds.

        Raises:
            GddlabError: A write failed; the checkpoints before it stand.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        if futures.wait([writing], timeout).not_done:
            self._writing = writing
            return
        try:
            writing.result()
        except (OSError, CheckpointException) as e:  # any other comes from the ranks' connection, not the disk
            raise GddlabError(
                f"a checkpoint could not be written to {self.folder} ({_cause(e)}): mend that, and the same call "
                f"continues from {where_it_continues(self.run_dir)}"
            ) from e

    def close(self) -> None:
        """Waits as `wait` does, and ends the thread."""
        try:
            self.wait()
        finally:
            self._executor.shutdown(wait=False)
            self._stager.close()

    def abandon(self) -> None:
        """After an error: an unfinished write may still finish, but is not waited for when other ranks are gone."""
        with suppress(Exception):
            self.wait(30)
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _write(self, state: dict[str, Any], meta: dict[str, Any], best: bool) -> None:
        final = self.folder / name_of(meta["nimg"])
        tmp = final.with_name(f".{final.name}.tmp")
        try:
            self._write_to(tmp, final, state, meta, best)
        except BaseException:
            full = self.world.rank == 0 and self.folder.is_dir() and shutil.disk_usage(self.folder).free < FULL
            if self.world.rank == 0:  # on a full disk, makes room for the report of the failure
                shutil.rmtree(tmp, ignore_errors=True)
            if full:  # torch's writer reports it in other words
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp)) from None
            raise

    def _write_to(self, tmp: Path, final: Path, state: dict[str, Any], meta: dict[str, Any], best: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about saving as a single process, which is intended
            dcp.save(state, checkpoint_id=tmp, process_group=self.world.saving)
        if self.world.rank:
            return  # rank 0 returned after the files of all ranks were there and synced
        files = {p.name: [p.stat().st_size, file_sha256(p)] for p in sorted(tmp.iterdir())}
        write_json(tmp / "meta.json", meta | {"files": files})
        fsync_dir(tmp)
        listed = checkpoints(self.run_dir)
        _remove(p for p in named(self.folder) if p == final or p not in listed)  # beyond `latest`, or damaged
        tmp.replace(final)
        fsync_dir(self.folder)
        if best:
            write_text(self.folder / BEST, final.name + "\n")
        write_text(self.folder / LATEST, final.name + "\n")
        kept = pointer(self.folder, BEST)
        for old in checkpoints(self.run_dir)[: -self.keep]:
            if old.name != kept:
                shutil.rmtree(old)

    def load(self, state: dict[str, Any]) -> Loaded | None:
        """Reads the newest complete checkpoint into `state`; None if there is none. Nothing is written.

        Raises:
            GddlabError: There are checkpoints, and none is complete.
        """
        with self.world.together():
            chosen = self._newest() if self.world.rank == 0 else None
        chosen = self.world.gather_objects(chosen)[0]
        if chosen is None:
            return None
        name, damaged = chosen
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=self.folder / name, process_group=self.world.group)
        return Loaded(read_json(self.folder / name / "meta.json"), name, damaged)

    def clean_up(self, loaded: Loaded | None) -> None:
        """Before a training continues: removes what was half written; damaged checkpoints stay until the next save."""
        if self.world.rank:
            return
        _remove([*self.folder.glob(".*.tmp"), *self.folder.glob("*.damaged")])  # earlier versions renamed damaged ones
        if loaded is not None and loaded.damaged:
            write_text(self.folder / LATEST, loaded.name + "\n")

    def _newest(self) -> tuple[str, list[str]] | None:
        """Name of the newest complete checkpoint, and what is wrong with newer ones."""
        damaged: list[str] = []
        for path in reversed(checkpoints(self.run_dir)):
            why = _damage(path)
            if why is None:
                return path.name, damaged
            damaged.append(f"{path.name}: {why}")
        if damaged:
            raise GddlabError(
                f"{self.run_dir}: no checkpoint is complete ({'; '.join(damaged)}): "
                "restore one, or remove the folder checkpoints to start again"
            )
        return None


def _remove(folders: Iterable[Path]) -> None:
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was written. Older versions wrote no checksums."""
    try:
        files = read_json(path / "meta.json").get("files", {})
        for name, (size, digest) in files.items():
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes of {size}"
            if file_sha256(file) != digest:
                return f"{name} is not what was written"
    except (GddlabError, OSError, ValueError, AttributeError) as e:
        return str(e)
    return None


def _cause(error: BaseException) -> str:
    """The system's own message, which an error of many ranks hides."""
    own: Any = error
    failures = getattr(error, "failures", None)
    if failures:
        own = next(iter(failures.values()))[0]
    while own.__cause__ is not None:
        own = own.__cause__
    return own.strerror if isinstance(own, OSError) and own.strerror else f"{type(own).__name__}: {own}".splitlines()[0]
