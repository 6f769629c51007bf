"""What rank 0 writes of a run while it trains: metrics, TensorBoard, status, alarms, grids, students."""

from __future__ import annotations

import json
import math
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gddlab.distill.health import Alarm
from gddlab.errors import GddlabError
from gddlab.files import append_jsonl, read_json, read_jsonl, write_json, write_text
from gddlab.nets import OneStepPrecond, save_network
from gddlab.sampling import sample, save_grid

__all__ = ["Recorder", "name_of", "write_status"]

GRID = 64
BEAT = 2.0
"""Seconds between two heartbeats."""


def name_of(nimg: int) -> str:
    """Name of what belongs to a moment of a run: thousands of images, in a form that sorts."""
    return f"{nimg / 1000:010.3f}"


def write_status(run_dir: Path, state: str, **extra: Any) -> None:
    """status.json: state ("starting", "running", "done", "failed", "stopped"), heartbeat (Unix seconds), and more."""
    write_json(run_dir / "status.json", {"state": state, "heartbeat": time.time(), **extra})


class Recorder:
    """Writes a run directory; lines written after the moment where a run continues are taken back.

    Args:
        run_dir: The folder.
        nimg: Images seen where the run begins or continues.
        total_nimg: Images of the whole run.
        world_size: For the status.
    """

    def __init__(self, run_dir: Path, *, nimg: int, total_nimg: int, world_size: int):
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir, self.total_nimg, self.world_size = run_dir, total_nimg, world_size
        for name in ("metrics.jsonl", "alarms.jsonl"):
            lines = [m for m in read_jsonl(run_dir / name) if m["kimg"] * 1000 <= nimg + 0.5]
            if lines or name == "metrics.jsonl":
                write_text(run_dir / name, "".join(json.dumps(m, allow_nan=False) + "\n" for m in lines))
        self.writer: Any = SummaryWriter(str(run_dir / "events"), purge_step=nimg if nimg else None)
        self.alarms = [str(a["message"]) for a in read_jsonl(run_dir / "alarms.jsonl")]
        self._beat = 0.0

    def status(self, state: str, nimg: int, **extra: Any) -> None:
        if self.alarms:
            extra["alarm"] = self.alarms[-1]
        about = {
            "nimg": nimg,
            "total_nimg": self.total_nimg,
            "world_size": self.world_size,
            "host": socket.gethostname(),
        }
        write_status(self.run_dir, state, **about, **extra)

    def beat(self, nimg: int) -> None:
        """A sign of life, now and then.

        Raises:
            GddlabError: The run directory is gone; writing on would make one that lacks most of it.
        """
        if time.time() - self._beat > BEAT:
            if not (self.run_dir / "provenance.json").exists():
                raise GddlabError(
                    f"{self.run_dir} is gone, or lost its provenance.json: somebody removed it while the run went on"
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

    def snapshot(self, ema: OneStepPrecond, nimg: int, meta: dict[str, Any]) -> torch.Tensor:
        """Grid of fixed noise and the averaged student of this moment; returns the grid's images, (64, C, H, W) in [-1, 1]."""
        images = sample(ema, GRID, seed=0)
        save_grid(images, self.run_dir / "samples" / f"{name_of(nimg)}.png", columns=8)
        save_network(ema, self.run_dir / "snapshots" / f"{name_of(nimg)}.safetensors", **meta)
        return images

    def raw(self, g: OneStepPrecond, nimg: int, meta: dict[str, Any]) -> None:
        """The student that is trained, not averaged."""
        save_network(g, self.run_dir / "snapshots" / "raw" / f"{name_of(nimg)}.safetensors", **meta)

    def best(self, candidate: Path, name: str, value: float, kimg: float) -> bool:
        """Keeps a candidate, whose file lies in the run directory, if no better one is kept; returns whether it does."""
        path = self.run_dir / "best.json"
        if not math.isfinite(value) or (path.exists() and read_json(path)["value"] <= value):
            candidate.unlink()
            return False
        candidate.replace(self.run_dir / "best.safetensors")
        write_json(path, {"metric": name, "value": value, "kimg": kimg})
        return True

    def close(self) -> None:
        self.writer.close()
