"""The trainer: one loop for GDD, GDD-I and the instance-based baselines, for one process and for many."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gddlab.datasets import BatchReader, ImageDataset, order
from gddlab.distill.build import build_step, check
from gddlab.distill.checkpoints import Checkpoints, Loaded, set_training_state, training_state
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.graph import Graphed
from gddlab.distill.health import Alarm, Health, Thresholds
from gddlab.distill.randomness import Ahead, Batch, Draw, Drawer
from gddlab.distill.recorder import GRID, Meter, Recorder
from gddlab.distill.status import OUT_OF_TIME, name_of, where_it_continues
from gddlab.distill.step import Stats
from gddlab.ema import Average, ema_beta, local_shard
from gddlab.errors import GddlabError
from gddlab.files import hash_tensors
from gddlab.nets import OneStepPrecond, Precond, save_network
from gddlab.nets.io import make_student
from gddlab.probing import probe, weight_change
from gddlab.runtime import peak_memory_mib, tf32

Score = Callable[[Path], tuple[str, float, float | None]]
"""Scores the student in a file: name of the metric, value (lower is better, nan if diverged), spread if known."""

PROBED = 64
"""Images of a probe."""
BAD_LOSSES = 3
"""How many losses in a row that are not finite end a run."""
SETTLED, LEARNED = 64, 300
"""Iterations after which a student's images have no more noise than real ones, and after which it is diverse; one that
is not by then, and by half of the run, has collapsed. The digits' take 32 and 8."""


class Trainer:
    """A run in this process, one of `world.size`.

    Everything random (order, noise, times, augmentation) is a function of seed and iteration, so the position is the
    whole state of the random numbers: a continued run is bit-identical, and the global batch does not depend on the
    number of processes.

    Args:
        config: What to run.
        world: The processes of the run.
        given: A teacher and data in place of those that the configuration names.
    """

    def __init__(self, config: TrainConfig, world: World, *, given: tuple[Precond, ImageDataset] | None = None):
        self.config, self.world = config, world
        self.teacher, self.data = check(config, world_size=world.size) if given is None else given
        self.step, self.ema = build_step(config, self.teacher, world)
        g = self.step.g
        self.average = Average(self.ema, g)
        self.frozen = {n: local_shard(p) for n, p in g.named_parameters() if not p.requires_grad}
        self.frozen |= dict(g.named_buffers())
        self.frozen_hash = hash_tensors(self.frozen)
        self.reader = BatchReader(
            self.data, batch=config.batch, seed=config.seed, rank=world.rank, world_size=world.size
        )
        width = 0 if self.step.augment is None else self.step.augment.width
        self.drawer = Drawer(config, g, world, width=width)
        self.ahead = Ahead(self.draw, config.batch, world.device)
        self.run: Callable[[Batch], Stats] = self.step.iteration
        self.run_r1: Callable[[tuple[Tensor, Tensor | None]], Stats] = lambda given: self.step.r1_step(*given)
        if config.cuda_graph:
            self.run, self.run_r1 = Graphed(self.run, world.device), Graphed(self.run_r1, world.device)
        self.meter = Meter(world.device)
        real = self.data.images(order(len(self.data), 0, 0, min(GRID, len(self.data))))
        settled, learned = SETTLED * config.batch / 1000, LEARNED * config.batch / 1000
        grace = min(Thresholds().grace_kimg, max(config.total_kimg / 2, learned))
        self.health = Health(real, Thresholds(grace_kimg=grace, settled_kimg=settled), images=len(self.data))
        self.checkpoints = Checkpoints(config.run_dir, world, keep=config.keep_checkpoints)
        self.iteration = 0
        self.seconds = 0.0
        self.ticked = 0.0, 0
        """Seconds and images at the last line of metrics.jsonl."""
        self.real: list[Tensor] | None = None
        self.recorder: Recorder | None = None
        self.stop_asked = self.out_of_time = False
        self.why_stopped: str | None = None

    @property
    def nimg(self) -> int:
        """Images seen: the position of the reader."""
        return self.reader.position

    @property
    def total(self) -> int:
        """Iterations of the whole run."""
        return self.config.iterations

    def cache_real(self) -> None:
        """Computes the features of the whole real set once, if the configuration asks for it and they do not change."""
        discriminator = self.config.discriminator
        if discriminator is None or not discriminator.caches() or self.config.augment is not None:
            return
        parts: list[list[Tensor]] = []
        with tf32(self.config.tf32):
            for i in range(0, len(self.data), 128):
                parts.append(self.step.real_features(self.drawer.place(self.data.images(slice(i, i + 128)))))
        self.real = [torch.cat(level) for level in zip(*parts, strict=True)]

    @property
    def takes_images(self) -> bool:
        """Whether each iteration takes real images, and not their features."""
        return self.step.instance is not None or (self.step.adversarial and self.real is None)

    def draw(self, iteration: int, position: int) -> Batch:
        """What an iteration takes, on the CPU: a function of iteration and position in the data."""
        step, drawer, index = self.step, self.drawer, self.reader.indices(position)
        fresh = step.adversarial and not self.config.reuse_fakes
        batch = Batch(
            z=drawer.latents(iteration, 0),
            draw=drawer.draw(iteration, 0),
            z_d=drawer.latents(iteration, 1) if fresh else None,
            draw_d=drawer.draw(iteration, 1) if fresh else Draw(),
            labels=self.data.labels(index) if step.g.label_dim else None,
            images=self.data.images(index) if self.takes_images or step.due_r1(iteration) else None,
            u=drawer.real(iteration),
            instance=None if step.instance is None else drawer.instance(iteration, step.instance),
        )
        return drawer.pinned(batch)

    def iterate(self) -> None:
        """One iteration: G, D, and R1 where due."""
        c, step = self.config, self.step
        batch = self.drawer.place(self.ahead(self.iteration, self.nimg))
        images = batch.images
        if not self.takes_images:
            batch = batch._replace(images=None)
        if self.real is not None:
            index = self.drawer.pinned(self.reader.indices()).to(self.world.device, non_blocking=True)
            batch = batch._replace(features=[f[index] for f in self.real])
        with tf32(c.tf32):
            stats = self.run(batch)
            if step.due_r1(self.iteration):
                assert images is not None
                bad = stats.pop("nonfinite/d")
                stats |= self.run_r1((images, batch.labels))
                stats["nonfinite/d"] = stats["nonfinite/d"] + bad
        self.iteration += 1
        self.reader.position += c.batch
        self.average.update(ema_beta(c.batch, c.ema_halflife_kimg, c.ema_rampup, self.nimg))
        self.meter.add(stats)

    def every(self, kimg: float | None) -> bool:
        """Whether the last step reached a multiple of `kimg`, or the end of the run; never for None."""
        if kimg is None:
            return False
        interval = max(1, round(kimg * 1000))
        reached = self.nimg // interval > (self.nimg - self.config.batch) // interval
        return reached or self.iteration == self.total

    def tick(self) -> dict[str, float]:
        """One line of metrics.jsonl: means over the iterations since the last one, over ranks."""
        c = self.config
        means = self.meter.means(self.world)
        line = {"nimg": self.nimg, "kimg": self.nimg / 1000, **means, "lr/g": c.lr_g}
        if self.step.opt_d is not None:
            line["lr/d"] = self.step.opt_d.param_groups[0]["lr"]
        line |= {
            "ema": ema_beta(c.batch, c.ema_halflife_kimg, c.ema_rampup, self.nimg),
            "sec_per_kimg": (self.seconds - self.ticked[0]) / (self.nimg - self.ticked[1]) * 1000,
            "seconds": self.seconds,
            "peak_mem_mib": peak_memory_mib(self.world.device),
        }
        self.ticked = self.seconds, self.nimg
        self.meter.reset()
        return line

    def check_losses(self) -> None:
        """Ends a run whose loss was not finite several times in a row.

        Raises:
            GddlabError: On every rank alike.
        """
        if self.world.any(bool(self.meter.longest >= BAD_LOSSES)):
            where = where_it_continues(self.config.run_dir)
            raise GddlabError(
                f"the loss was not finite {BAD_LOSSES} times in a row by {self.nimg} images: lower lr_g or lr_d in a "
                f"new run; this one would continue from {where}"
            )

    def verify_frozen(self) -> None:
        if hash_tensors(self.frozen) != self.frozen_hash:
            raise GddlabError(
                f"frozen parameters changed by {self.nimg} images on rank {self.world.rank}: please report this bug"
            )

    def checkpoint(self, *, best: bool = False) -> None:
        """Starts to write a checkpoint in the background; `self.checkpoints.wait()` returns when it is complete."""
        self.check_losses()
        self.verify_frozen()
        meta = {
            "nimg": self.nimg,
            "iteration": self.iteration,
            "data": self.reader.state_dict(),
            "seconds": self.seconds,
            "ticked": list(self.ticked),
            "world_size": self.world.size,
            "meter": self.meter.state_dict(self.world),
            "health": self.health.state_dict(),
        }
        self.checkpoints.save(training_state(self.step, self.ema), meta, best=best)

    def restore(self) -> Loaded | None:
        """Continues from the newest checkpoint that is complete; None if there is none."""
        state: dict[str, Any] = dict(training_state(self.step, self.ema))
        loaded = self.checkpoints.load(state)
        if loaded is None:
            return None
        set_training_state(state, self.step, self.ema)
        meta = loaded.meta
        self.iteration, self.seconds = meta["iteration"], meta["seconds"]
        self.ticked = tuple(meta.get("ticked", (0.0, 0)))  # of an older version: the mean since the start, once
        self.reader.load_state_dict(meta["data"])
        self.meter.load_state_dict(meta["meter"])
        self.health.load_state_dict(meta["health"])
        self.verify_frozen()
        return loaded

    def student_meta(self) -> dict[str, Any]:
        return {
            "data": self.config.data,
            "manifest": self.data.manifest.to_dict(),
            "teacher": self.config.teacher,
            "kimg": self.nimg / 1000,
            "mask": None if self.config.mask is None else self.config.mask.hash,
            "seed": self.config.seed,
        }

    def whole(self, net: OneStepPrecond) -> OneStepPrecond:
        """The student or its average as a network that can be saved and sampled; all ranks call it to gather shards."""
        if not (self.config.shard and self.world.size > 1):
            return net
        out = make_student(self.teacher, mid_sigmas=self.config.mid_sigmas).eval().requires_grad_(False)
        out.to(self.world.device, self.drawer.dtype)
        with torch.no_grad():
            shards = net.state_dict()
            for name, whole in out.state_dict().items():  # one tensor at a time: whole networks may not fit twice
                shard = shards[name]
                whole.copy_(shard.full_tensor() if isinstance(shard, DTensor) else shard)
        return out

    def snapshot(self) -> None:
        """Sample grid of fixed noise and the EMA student of this moment."""
        ema = self.whole(self.ema)
        raw = self.whole(self.step.g) if self.config.snapshot_raw else None
        if self.recorder:
            images = self.recorder.snapshot(ema, self.nimg, self.student_meta(), raw=raw)
            self._alarm(self.health.observe_images(images, self.nimg / 1000))

    def score(self, score: Score) -> bool:
        """Scores the averaged student, all ranks together; returns whether it is the best so far, which is kept."""
        candidate = self.config.run_dir / f".candidate-{name_of(self.nimg)}.safetensors"
        ema = self.whole(self.ema)
        if self.recorder:
            save_network(ema, candidate, **self.student_meta())
        self.world.barrier()
        name, value, std = score(candidate)
        self.world.barrier()  # all have read it
        best = False
        if self.recorder:
            best = self.recorder.score(candidate, name, value, self.nimg)
            self._alarm(self.health.observe_metric(name, value, self.nimg / 1000, std=std))
        return self.world.any(best)

    def _alarm(self, alarms: list[Alarm]) -> None:
        assert self.recorder is not None
        self.recorder.alarm(alarms)
        for a in alarms:
            if a.kind in self.config.stop_on:
                self.stop_asked, self.why_stopped = True, a.message

    def probe(self) -> None:
        """Activations of the averaged student, and how far each layer is from the teacher; all ranks call it."""
        ema = self.whole(self.ema)
        found = probe(ema, states="student", layers="all", n=PROBED, progress=False)
        if self.world.rank == 0:
            moved = weight_change(ema, self.teacher, "all")
            found.join(moved).save(self.config.run_dir / "probes" / name_of(self.nimg))

    def train(self, score: Score | None = None) -> str:
        """Runs to the end, or until asked to stop; returns "done" or "stopped".

        Args:
            score: Scores students, called on all ranks; needed with `metric_kimg`.
        """
        c, world = self.config, self.world
        assert score is not None or c.metric_kimg is None
        with suppress(ValueError):  # outside the main thread, the caller stops the training in another way
            for s in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(s, self._asked_to_stop)
            # signals sent while the process started were blocked until now
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
        loaded = self.restore()
        self.checkpoints.clean_up(loaded)
        self.cache_real()
        if world.rank == 0:
            self.recorder = Recorder(c, self.teacher, self.data, world_size=world.size, loaded=loaded)
        if loaded is None:
            self.snapshot()
            if c.probe_kimg:
                self.probe()
        try:
            state = self._loop(score)
            self.checkpoints.close()
        except BaseException:
            self.checkpoints.abandon()
            raise
        ema = self.whole(self.ema) if state == "done" else None
        if self.recorder:
            self.recorder.writer.close()
            if ema is not None:
                save_network(ema, c.run_dir / "student.safetensors", **self.student_meta())
            why = {} if self.why_stopped is None else {"message": self.why_stopped}
            if state == "stopped" and self.out_of_time:
                why["cause"] = OUT_OF_TIME
            self.recorder.status(state, self.nimg, **why)
        world.barrier()
        return state

    def _asked_to_stop(self, number: int, _: object) -> None:
        self.stop_asked, self.out_of_time = True, number == signal.SIGUSR1 and "TORCHELASTIC_RUN_ID" in os.environ

    def _too_large(self) -> GddlabError:
        """Says which field to change where a device's memory does not suffice."""
        part = self.config.batch // self.world.size
        held = self.config.batch_per_device or part
        smaller = max((n for n in range(1, held) if part % n == 0), default=None)
        advice = "take a larger device, or shard=True on several"
        if smaller is not None:
            advice = f"give batch_per_device={smaller} or less in a new run, which hardly changes its result"
        return GddlabError(f"{self.world.device} is out of memory with {held} images at once: {advice}")

    def _loop(self, score: Score | None) -> str:
        """The remaining iterations, and what is due after each."""
        c, world, recorder = self.config, self.world, self.recorder
        while self.iteration < self.total:
            began = time.perf_counter()
            if recorder:
                recorder.beat(self.nimg)
            try:
                self.iterate()
            except torch.OutOfMemoryError as e:
                raise self._too_large() from e
            if world.device.type == "cuda" and self.every(c.tick_kimg):
                torch.cuda.synchronize(world.device)  # kernels that are only launched are not done
            self.seconds += time.perf_counter() - began
            if self.every(c.tick_kimg):
                self.check_losses()
                line = self.tick()
                if recorder:
                    recorder.tick(line)
                    self._alarm(self.health.observe_tick(line))
            if self.every(c.snapshot_kimg):
                self.snapshot()
            if self.every(c.probe_kimg):
                self.probe()
            best = score is not None and self.every(c.metric_kimg) and self.score(score)
            stop = self.world.any(self.stop_asked)
            if stop or best or self.every(c.checkpoint_kimg):
                self.checkpoint(best=best)
            if stop and self.iteration < self.total:
                return "stopped"
        return "done"
