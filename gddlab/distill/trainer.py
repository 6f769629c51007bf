"""The GDD / GDD-I trainer: one loop for one process and for many."""

from __future__ import annotations

import copy
import json
import math
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gddlab.datasets import BatchReader, ImageDataset, open_dataset
from gddlab.distill.checkpoints import load_checkpoint, save_checkpoint
from gddlab.distill.config import TrainConfig
from gddlab.distill.discriminators import ProjectedDiscriminator
from gddlab.distill.distributed import World
from gddlab.distill.step import GanStep
from gddlab.distill.student import make_student
from gddlab.ema import ema_beta, ema_update
from gddlab.errors import GddlabError
from gddlab.files import hash_tensors, read_jsonl, write_json, write_text
from gddlab.nets import Precond, save_network
from gddlab.probing import DEFAULT, probe, weight_change
from gddlab.provenance import commit, hardware, versions
from gddlab.rng import generator
from gddlab.sampling import sample, save_grid
from gddlab.teachers import load_teacher

__all__ = ["Trainer", "check", "write_status"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
GRID = 64
PROBED = 64
STUDENT_STATS = tuple(s for s in DEFAULT if s != "cosine")
"""A student has one noise level, nothing to compare it with."""


def check(config: TrainConfig, *, world_size: int = 1) -> tuple[Precond, ImageDataset]:
    """Refuses what cannot work before anything is written: teacher, data, mask and batch must fit each other.

    Returns:
        Teacher and data.
    """
    teacher, data = load_teacher(config.teacher), open_dataset(config.data)
    for what, a, b in (
        ("resolution", teacher.img_resolution, data.resolution),
        ("channels", teacher.img_channels, data.channels),
    ):
        if a != b:
            raise GddlabError(
                f"teacher {config.teacher!r} has {what} {a}, data {config.data!r} has {b}: give a pair that fits"
            )
    if teacher.label_dim not in (0, data.classes):
        raise GddlabError(
            f"teacher {config.teacher!r} has {teacher.label_dim} classes, data {config.data!r} has {data.classes}: give a pair that fits"
        )
    if config.batch % world_size:
        raise GddlabError(f"batch={config.batch} on {world_size} processes: give a multiple of {world_size}")
    if config.mask is not None:
        config.mask.apply(make_student(teacher))
    return teacher, data


def write_status(run_dir: Path, state: str, **extra: Any) -> None:
    """status.json: state ("starting", "running", "done", "failed", "stopped"), heartbeat (Unix seconds), and more."""
    write_json(run_dir / "status.json", {"state": state, "heartbeat": time.time(), **extra})


class Trainer:
    """A run in this process, one of `world.size`.

    Everything random is a function of seed and iteration (order, noise), so the position is the whole state of the random
    numbers: a continued run is bit-identical, and the global batch does not depend on the number of processes.
    """

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.world = config, world
        self.teacher, self.data = check(config, world_size=world.size)
        dtype = DTYPES[config.precision]
        torch.manual_seed(config.seed)
        d = ProjectedDiscriminator(
            config.backbones,
            input_size=config.input_size,
            cout=config.cout,
            classes=self.teacher.label_dim,
            max_width=config.head_width,
            sync_batchnorm=config.sync_batchnorm,
            fold=config.precision != "float64",
        )
        g = make_student(self.teacher).eval()
        if config.mask is None:
            g.requires_grad_(True)
        else:
            config.mask.apply(g)
        g.to(world.device, dtype)
        d.to(world.device, dtype).train()
        trained = [(n, p) for n, p in g.named_parameters() if p.requires_grad]
        if not trained:
            raise GddlabError("the mask freezes every parameter: nothing is left to train")
        self.frozen = {n: p for n, p in g.named_parameters() if not p.requires_grad} | dict(g.named_buffers())
        self.frozen_hash = hash_tensors(self.frozen)
        self.step = GanStep(
            g,
            d,
            trainable=[p for _, p in trained],
            lr_g=config.lr_g,
            lr_d=config.lr_d,
            adversarial_weight=config.adversarial_weight,
            r1_gamma=config.r1_gamma,
            r1_interval=config.r1_interval,
            world=world,
            loss=config.loss,
            autocast=torch.bfloat16 if config.precision == "bfloat16" else None,
        )
        self.ema = copy.deepcopy(g).eval()
        self.reader = BatchReader(
            self.data, batch=config.batch, seed=config.seed, rank=world.rank, world_size=world.size
        )
        self.iteration = 0
        self.seconds = 0.0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.real: list[Tensor] | None = None
        self.stop_asked = False

    @property
    def nimg(self) -> int:
        """Images seen: the position of the reader."""
        return self.reader.position

    @property
    def total(self) -> int:
        """Iterations of the whole run."""
        return math.ceil(self.config.total_kimg * 1000 / self.config.batch)

    def noise(self, stream: int) -> Tensor:
        """This rank's part of the global batch's noise for a step of the current iteration."""
        c, net = self.config, self.step.g
        shape = (c.batch, net.img_channels, net.img_resolution, net.img_resolution)
        z = torch.randn(shape, generator=generator(c.seed, 2 * self.iteration + stream))
        return self.world.shard(z).to(self.world.device, DTYPES[c.precision])

    def cache_real(self) -> None:
        """Projected features of the whole real set, once."""
        parts: list[list[Tensor]] = []
        with torch.no_grad():
            for i in range(0, len(self.data), 128):
                x = self.data.images(slice(i, i + 128)).to(self.world.device, DTYPES[self.config.precision])
                parts.append(self.step.d.features(x))
        self.real = [torch.cat(level) for level in zip(*parts, strict=True)]

    def iterate(self) -> None:
        """One iteration: G, D, and R1 where due."""
        c, device, dtype = self.config, self.world.device, DTYPES[self.config.precision]
        index = self.reader.indices()
        due = self.step.due_r1(self.iteration)
        images = self.data.images(index).to(device, dtype) if due or self.real is None else torch.empty(0)
        labels = self.data.labels(index).to(device, dtype) if self.step.g.label_dim else None
        real = None if self.real is None else [f[index.to(device)] for f in self.real]
        stats = self.step.g_step(self.noise(0), labels)
        features = [stats.pop(k) for k in list(stats) if k.startswith("fake_features/")]
        if c.reuse_fakes:
            stats |= self.step.d_step(images, labels, fake_features=features, real_features=real)
        else:
            stats |= self.step.d_step(images, labels, z=self.noise(1), real_features=real)
        if due:
            bad = stats.pop("nonfinite/d")
            stats |= self.step.r1_step(images, labels)
            stats["nonfinite/d"] = stats["nonfinite/d"] + bad
        self.iteration += 1
        self.reader.position += c.batch
        ema_update(self.ema, self.step.g, ema_beta(c.batch, c.ema_halflife_kimg, c.ema_rampup, self.nimg))
        for k, v in stats.items():
            v = v.double() if device.type == "cpu" else v.float()
            self.sums[k] = self.sums[k] + v if k in self.sums else v
            self.counts[k] = self.counts.get(k, 0) + 1

    def every(self, kimg: float) -> bool:
        """Whether the step just made is the last of a stretch of `kimg`, or of the run."""
        steps = max(1, round(kimg * 1000 / self.config.batch))
        return self.iteration % steps == 0 or self.iteration == self.total

    # What is written.

    def tick(self) -> dict[str, float]:
        """One line of metrics.jsonl: means over the iterations since the last one, over ranks."""
        c = self.config
        names = sorted(self.sums)
        flat = self.world.mean(torch.stack([self.sums[k] / self.counts[k] for k in names]))
        means = dict(zip(names, flat.tolist(), strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if self.world.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        line = {"nimg": self.nimg, "kimg": self.nimg / 1000, **means}
        line |= {"lr/g": c.lr_g, "lr/d": self.step.opt_d.param_groups[0]["lr"]}
        line |= {
            "ema": ema_beta(c.batch, c.ema_halflife_kimg, c.ema_rampup, self.nimg),
            "sec_per_kimg": self.seconds / (self.nimg / 1000),
            "seconds": self.seconds,
            "peak_mem_mib": peak,
        }
        self.sums.clear()
        self.counts.clear()
        for k, v in means.items():
            if not math.isfinite(v):
                raise GddlabError(
                    f"{k} is {v} at {self.nimg} images: the last checkpoint stands; lower lr_g or lr_d in a new run"
                )
        return line

    def verify_frozen(self) -> None:
        if hash_tensors(self.frozen) != self.frozen_hash:
            raise GddlabError(
                f"frozen parameters changed by {self.nimg} images on rank {self.world.rank}: this is a bug, please report it"
            )

    def checkpoint(self) -> None:
        self.verify_frozen()
        meta = {
            "nimg": self.nimg,
            "iteration": self.iteration,
            "data": self.reader.state_dict(),
            "seconds": self.seconds,
            "world_size": self.world.size,
            "sums": {k: self.world.mean(v).item() for k, v in sorted(self.sums.items())},
            "counts": self.counts,
        }
        save_checkpoint(self.config.run_dir, self.step, self.ema, meta, self.world, keep=self.config.keep_checkpoints)

    def restore(self) -> bool:
        meta = load_checkpoint(self.config.run_dir, self.step, self.ema, self.world)
        if meta is None:
            return False
        self.iteration, self.seconds = meta["iteration"], meta["seconds"]
        self.reader.load_state_dict(meta["data"])
        kind = torch.float64 if self.world.device.type == "cpu" else torch.float32
        self.sums = {k: torch.tensor(v, dtype=kind, device=self.world.device) for k, v in meta["sums"].items()}
        self.counts = dict(meta["counts"])
        self.verify_frozen()
        return True

    def student_meta(self) -> dict[str, Any]:
        return {
            "data": self.data.name,
            "manifest": self.data.manifest.to_dict(),
            "teacher": self.config.teacher,
            "kimg": self.nimg / 1000,
            "mask": None if self.config.mask is None else self.config.mask.hash,
            "seed": self.config.seed,
        }

    def snapshot(self) -> None:
        """Sample grid of fixed noise and the EMA student of this moment."""
        kimg = f"{self.nimg / 1000:010.3f}"
        run = self.config.run_dir
        save_grid(sample(self.ema, GRID, seed=0), run / "samples" / f"{kimg}.png", columns=8)
        save_network(self.ema, run / "snapshots" / f"{kimg}.safetensors", **self.student_meta())

    def probe(self) -> None:
        """Activations of the averaged student at its sigma, and how far each layer is from the teacher; every rank takes its part of the images."""
        found = probe(self.ema, states="student", layers="all", stats=STUDENT_STATS, n=PROBED, progress=False)
        if self.world.rank == 0:
            moved = weight_change(self.ema, self.teacher, "all")
            found.join(moved).save(self.config.run_dir / "probes" / f"{self.nimg / 1000:010.3f}")

    def provenance(self) -> dict[str, Any]:
        return {
            "versions": versions(),
            "commit": commit(),
            "teacher_sha256": hash_tensors(self.teacher.state_dict()),
            "mask": None if self.config.mask is None else self.config.mask.hash,
            "dataset_sha256": self.data.manifest.sha256,
            "world_size": self.world.size,
            "hardware": hardware(),
        }

    def train(self) -> str:
        """Runs to the end, or until asked to stop; returns "done" or "stopped"."""
        c, world, main = self.config, self.world, self.world.rank == 0
        run = c.run_dir
        with suppress(ValueError):  # not in the main thread: whoever runs us there stops us otherwise
            for s in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(s, lambda *_: setattr(self, "stop_asked", True))
        resumed = self.restore()
        if c.cache_real:
            self.cache_real()
        lines = [m for m in read_jsonl(run / "metrics.jsonl") if m["nimg"] <= self.nimg]
        writer: Any = None
        if main:
            from torch.utils.tensorboard import SummaryWriter

            write_text(run / "metrics.jsonl", "".join(json.dumps(m, allow_nan=False) + "\n" for m in lines))
            writer = SummaryWriter(str(run / "events"), purge_step=self.nimg if resumed else None)
            if not (run / "provenance.json").exists():
                write_json(run / "provenance.json", self.provenance())
                card = getattr(self.teacher, "card", None)
                write_json(run / "teacher.json", card.to_dict() if card is not None else {"teacher": c.teacher})
            if not resumed:
                self.snapshot()
        if c.probe_kimg and not resumed:
            self.probe()
        beat = 0.0
        state = "done"
        while self.iteration < self.total:
            began = time.perf_counter()
            if main and time.time() - beat > 2:
                write_status(run, "running", nimg=self.nimg, total_nimg=self.total * c.batch, world_size=world.size)
                beat = time.time()
            self.iterate()
            self.seconds += time.perf_counter() - began
            if self.every(c.tick_kimg):
                line = self.tick()
                if main:
                    lines.append(line)
                    with (run / "metrics.jsonl").open("a") as f:
                        f.write(json.dumps(line, allow_nan=False) + "\n")
                    for k, v in line.items():
                        writer.add_scalar(k, v, self.nimg)
                    sys.stdout.write(
                        f"{line['kimg']:9.2f} kimg  loss G {line['loss/g']:.3f}  D {line['loss/d']:.3f}  "
                        f"{line['sec_per_kimg']:.2f} s/kimg\n"
                    )
                    sys.stdout.flush()
            if main and self.every(c.snapshot_kimg):
                self.snapshot()
            if c.probe_kimg and self.every(c.probe_kimg):
                self.probe()
            stop = world.any(self.stop_asked)
            if stop or self.every(c.checkpoint_kimg):
                self.checkpoint()
            if stop and self.iteration < self.total:
                state = "stopped"
                break
        if main:
            writer.close()
            if state == "done":
                save_network(self.ema, run / "student.safetensors", **self.student_meta())
            write_status(run, state, nimg=self.nimg, total_nimg=self.total * c.batch, world_size=world.size)
        world.barrier()
        return state
