"""What rank 0 writes of a run while it trains: metrics, TensorBoard, status, alarms, grids, students."""

from __future__ import annotations

import json
import math
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gddlab.datasets import ImageDataset
from gddlab.distill.build import given_student
from gddlab.distill.checkpoints import Loaded
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.health import Alarm
from gddlab.distill.status import name_of, write_status
from gddlab.errors import GddlabError
from gddlab.files import append_jsonl, hash_tensors, read_json, read_jsonl, write_json, write_text
from gddlab.nets import OneStepPrecond, Precond, save_network
from gddlab.nets.io import INITS
from gddlab.pretrained.backbones import backbone_sha256
from gddlab.provenance import commit, hardware, versions
from gddlab.sampling import sample, save_grid

GRID = 64
BEAT = 2.0
"""Seconds between two heartbeats."""


class Recorder:
    """Writes a run directory, on rank 0; lines from after the moment where a run continues are removed.

    A new run records what it is made from, a continued one what has changed since.

    Args:
        config, teacher, data: Of the run.
        world_size: Processes of this start.
        loaded: The checkpoint that the run continues from; None for a new run.
    """

    def __init__(
        self, config: TrainConfig, teacher: Precond, data: ImageDataset, *, world_size: int, loaded: Loaded | None
    ):
        from torch.utils.tensorboard import SummaryWriter

        run = self.run_dir = config.run_dir
        nimg: int = 0 if loaded is None else loaded.meta["nimg"]
        self.total_nimg, self.world_size = round(config.end_kimg * 1000), world_size
        for name in ("metrics.jsonl", "alarms.jsonl"):
            lines = [m for m in read_jsonl(run / name) if m["kimg"] * 1000 <= nimg + 0.5]
            if (run / name).exists() or name == "metrics.jsonl":
                write_text(run / name, "".join(json.dumps(m, allow_nan=False) + "\n" for m in lines))
        self.writer: Any = SummaryWriter(str(run / "events"), purge_step=nimg + 1)
        self.alarms = [str(a["message"]) for a in read_jsonl(run / "alarms.jsonl")]
        self._beat = 0.0
        self.classes = config.classes
        if not (run / "provenance.json").exists():
            card = getattr(teacher, "card", None)
            write_json(run / "teacher.json", card.to_dict() if card is not None else {"teacher": config.teacher})
            write_json(run / "provenance.json", provenance(config, teacher, data, world_size))
        known = read_json(run / "provenance.json")
        start = {"nimg": nimg, "world_size": world_size, "commit": commit(), "hardware": hardware()}
        write_json(run / "provenance.json", known | {"starts": [*known.get("starts", []), start]})
        if loaded is not None:
            self._continue(config, loaded)

    def _continue(self, config: TrainConfig, loaded: Loaded) -> None:
        kimg, before = loaded.meta["nimg"] / 1000, loaded.meta["world_size"]
        for damage in loaded.damaged:
            text = f"checkpoint {damage}; the one of {kimg:g} kimg is used instead"
            self.alarm([Alarm("checkpoint", kimg, text, 1.0, 0.0)])
        self.say(f"{kimg:9.2f} kimg  continued from its checkpoint")
        if before != self.world_size:
            more = "" if config.discriminator is None else config.discriminator.world_size_matters()
            self.say(
                f"on {self.world_size} processes, before {before}: the same images and noise, but sums are rounded in "
                f"another order, so that numbers are not identical to the bit{f'; and {more}' if more else ''}"
            )

    def status(self, state: str, nimg: int, **extra: Any) -> None:
        if self.alarms:
            extra["alarm"] = self.alarms[-1]
        about = {"total_nimg": self.total_nimg, "world_size": self.world_size, "host": socket.gethostname()}
        write_status(self.run_dir, state, nimg=nimg, **about, **extra)

    def beat(self, nimg: int) -> None:
        """A heartbeat every `BEAT` seconds.

        Raises:
            GddlabError: The run directory is gone; more writing would make one that lacks most of it.
        """
        if time.time() - self._beat > BEAT:
            if not (self.run_dir / "provenance.json").exists():
                raise GddlabError(
                    f"{self.run_dir} is gone, or lost its provenance.json: it was removed during the training"
                )
            self.status("running", nimg)
            self._beat = time.time()

    def tick(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl, TensorBoard's scalars, and a line of the log."""
        append_jsonl(self.run_dir / "metrics.jsonl", line)
        for name, value in line.items():
            self.writer.add_scalar(name, value, line["nimg"])
        losses = "  ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in line.items() if k.startswith("loss/"))
        self.say(f"{line['kimg']:9.2f} kimg  loss {losses}  {line['sec_per_kimg']:.2f} s/kimg")

    def say(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def alarm(self, alarms: Iterable[Alarm]) -> None:
        """A line of alarms.jsonl and of the log each; the last one is shown in the status."""
        for a in alarms:
            append_jsonl(self.run_dir / "alarms.jsonl", a.to_dict())
            self.alarms.append(a.message)
            self.say(f"alarm: {a.message}")

    def snapshot(
        self, ema: OneStepPrecond, nimg: int, meta: dict[str, Any], *, raw: OneStepPrecond | None = None
    ) -> Tensor:
        """Writes a grid of fixed noise and the averaged student, and the one that is trained where `raw` is given.

        Returns:
            The grid, (64, C, H, W) in [-1, 1].
        """
        kept = [self.classes[i % len(self.classes)] for i in range(GRID)] if self.classes and ema.label_dim else None
        images, folder = sample(ema, GRID, seed=0, class_labels=kept), self.run_dir / "snapshots"
        save_grid(images, self.run_dir / "samples" / f"{name_of(nimg)}.png", columns=8)
        save_network(ema, folder / f"{name_of(nimg)}.safetensors", **meta)
        if raw is not None:
            save_network(raw, folder / "raw" / f"{name_of(nimg)}.safetensors", **meta)
        return images

    def score(self, candidate: Path, name: str, value: float, nimg: int) -> bool:
        """Writes a score; returns whether it is the best so far, and keeps its student, a file in the run directory."""
        path, kimg = self.run_dir / "best.json", nimg / 1000
        before = read_json(path) if path.exists() else {"value": math.inf, "kimg": kimg}
        # the same one again: a run that was killed before its checkpoint was marked as the best
        best = math.isfinite(value) and (value < before["value"] or kimg == before["kimg"])
        if best:
            candidate.replace(self.run_dir / "best.safetensors")
            write_json(path, {"metric": name, "value": value, "kimg": kimg})
        else:
            candidate.unlink()
        self.writer.add_scalar(f"metric/{name}", value, nimg)
        self.say(f"{kimg:9.2f} kimg  {name} {value:.4g}{'  best so far' if best else ''}")
        return best


TRAINER = 2
"""Raised when a change of the code changes the numbers of a run: runs that differ in it are not comparable."""


def provenance(config: TrainConfig, teacher: Precond, data: ImageDataset, world_size: int) -> dict[str, Any]:
    """What ran: versions, trainer, commit, hashes of what it is made from, processes, hardware."""
    start = {} if config.student in INITS else {"student_sha256": given_student(config.student).card.sha256}
    backbones = {} if config.discriminator is None else config.discriminator.networks()
    return {
        "versions": versions(),
        "trainer": TRAINER,
        "commit": commit(),
        "teacher_sha256": hash_tensors(teacher.state_dict()),
        **start,
        "mask": None if config.mask is None else config.mask.hash,
        "dataset_sha256": data.manifest.sha256,
        "backbones": {name: backbone_sha256(name, weights) or "random" for name, weights in backbones.items()},
        "world_size": world_size,
        "hardware": hardware(),
    }


class Meter:
    """Sums and counts of scalars by name, without waiting for the device until `means`.

    `streak` counts iterations in a row, up to the last one, whose loss is not finite; `longest` is its maximum since
    the last `reset`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.kind = torch.float64 if device.type == "cpu" else torch.float32
        self.absent = torch.full((), torch.nan, device=device, dtype=self.kind)
        self.names: list[str] = []
        self.totals = torch.zeros(2, 0, device=device, dtype=self.kind)
        """Sums and counts, in the order of `names`: one operation for all, since each costs a launch."""
        self.streak = torch.zeros((), device=device)
        self.longest = torch.zeros((), device=device)

    @property
    def sums(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.totals[0].unbind(), strict=True))

    def add(self, stats: Mapping[str, Tensor]) -> None:
        """Adds an iteration's scalars, whether gradients were sanitised, and whether a loss was not finite."""
        finite = torch.stack([v.detach() for k, v in stats.items() if k.startswith("loss/")]).isfinite().all()
        self.streak = torch.where(finite, 0.0, self.streak + 1)
        self.longest = torch.maximum(self.longest, self.streak)
        shares = {f"sanitised/{k[-1]}": v > 0 for k, v in stats.items() if k.startswith("nonfinite/")}
        given = {**stats, **shares, "nonfinite/loss": ~finite}
        new = [name for name in given if name not in self.names]
        if new:
            self.names += new
            self.totals = F.pad(self.totals, (0, len(new)))
        values = torch.stack([given[n].detach().to(self.kind) if n in given else self.absent for n in self.names])
        known = values.isfinite()
        self.totals += torch.stack([torch.where(known, values, 0.0), known.to(self.kind)])

    def _reduced(self, world: World) -> tuple[dict[str, float], dict[str, float]]:
        """Sums and counts by name, means over ranks."""
        if not self.names:
            return {}, {}
        order = [self.names.index(name) for name in sorted(self.names)]  # ranks may have met them in another order
        sums, counts = world.mean(self.totals[:, order]).tolist()
        names = sorted(self.names)
        return dict(zip(names, sums, strict=True)), dict(zip(names, counts, strict=True))

    def means(self, world: World) -> dict[str, float]:
        """Means over iterations and ranks since the last `reset`; a name without any finite value is left out."""
        sums, counts = self._reduced(world)
        return {k: total / counts[k] for k, total in sums.items() if counts[k]}

    def reset(self) -> None:
        self.names.clear()
        self.totals = self.totals[:, :0]
        self.longest = self.streak.clone()

    def state_dict(self, world: World) -> dict[str, Any]:
        """Sums and counts, means over ranks, as JSON."""
        sums, counts = self._reduced(world)
        return {"sums": sums, "counts": counts, "streak": self.streak.item(), "longest": self.longest.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.names = list(state["sums"])
        totals = [[state[part][name] for name in self.names] for part in ("sums", "counts")]
        self.totals = torch.tensor(totals, dtype=self.kind, device=self.device).reshape(2, -1)
        self.streak = torch.tensor(state["streak"], device=self.device)
        self.longest = torch.tensor(state["longest"], device=self.device)
