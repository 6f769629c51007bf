"""Gradients of two processes: in buckets what one message gives, to the bit; sent during the last backward pass."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from gddlab.distill import distributed
from gddlab.distill.distributed import Gradients, World
from gddlab.distill.trainer import Trainer
from gddlab.freezing import select_freeze
from gddlab.teachers import load_teacher
from tests.conftest import tiny_config
from tests.distill.test_trainer import by, tensors

CPU = torch.device("cpu")
BUCKET = 4096
"""Bytes: the tiny networks' gradients then take many buckets."""
ITERATIONS = 3
"""The last one with R1."""

STYLEGAN2: dict[str, Any] = {"discriminator": {"kind": "stylegan2"}, "batch": 16, "batch_per_device": 4}
RUNS: dict[str, dict[str, Any]] = {
    "GDD-I": {},
    "accumulation": {"batch_per_device": 2},
    "synchronised BatchNorm": {"discriminator": {"sync_batchnorm": True}},  # its collectives are between the buckets'
    "stylegan2": STYLEGAN2,
    "instance loss": {"instance": by("ctm"), **STYLEGAN2},
    "instance loss alone": {"instance": by("ctm"), "discriminator": None},
    "two steps, augmentation": {"mid_sigmas": (0.8,), "augment": {"ops": ("color",), "ada_target": 0.1}, **STYLEGAN2},
    "channels_last": {"channels_last": True},
    "sharded": {"shard": True, **STYLEGAN2},
}


class OneMessage(Gradients):
    """The plain form: one message after the backward pass."""

    def __init__(self, params: Sequence[nn.Parameter], world: World):
        self.params, self.world = params, world

    def expect(self, passes: float) -> None:
        pass

    def average(self) -> None:
        grads = [p.grad for p in self.params if p.grad is not None and not isinstance(p, DTensor)]
        if grads:
            flat = torch.cat([g.reshape(-1) for g in grads])
            dist.all_reduce(flat)
            flat /= self.world.size
            for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(mean.view_as(g))


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


class Events(list[str]):
    """In their order: a backward pass comes to the "first" layer, a bucket is "sent"."""

    def during(self, run: Callable[[], object], first: nn.Parameter) -> None:
        handle = first.register_hook(lambda _: self.append("first"))  # before the gradient is added
        reduce = dist.all_reduce

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("async_op"):
                self.append("sent")
            return reduce(*args, **kwargs)

        with mock.patch.object(dist, "all_reduce", recorded):
            run()
        handle.remove()


def order(folder: Path, teacher: str, world: World) -> dict[str, tuple[int, list[str]]]:
    """Number of buckets and events of each step of an iteration in two micro-batches."""
    t = Trainer(tiny_config(folder, Path(teacher), instance=by("ctm"), **STYLEGAN2), world)
    step, drawer, out = t.step, t.drawer, {}
    images = drawer.place(t.data.images(t.reader.indices()))
    z, noise = (drawer.place(x) for x in (drawer.latents(0, 0), drawer.instance(0, step.instance)))
    fakes, reals = step.fake_features(z, None), step.real_features(images)
    runs = {
        "g": lambda: step.g_step(z, None, instance=(images, noise)),
        "d": lambda: step.d_step(fakes, reals, None),
        "r1": lambda: step.r1_step(images, None),
    }
    for name, run in runs.items():
        gradients = step.gradients_g if name == "g" else step.gradients_d
        events = Events()
        events.during(run, gradients.params[0])
        out[name] = (len(gradients.buckets), list(events))
    return out


def branches(world: World) -> dict[str, list[Tensor | None]]:
    """Means of gradients whose order differs between ranks, and of a parameter that has none; a bucket each."""
    params = [nn.Parameter(torch.full((1500,), float(i))) for i in range(4)]
    gradients = Gradients(params, world)
    assert len(gradients.buckets) == 4
    out: dict[str, list[Tensor | None]] = {}
    for name, passes in (("announced", 1), ("not announced", None)):
        for p in params:
            p.grad = None
        if passes:
            gradients.expect(passes)
        used = params[1:] if world.rank == 0 else params[:0:-1]
        terms = [(world.rank + 1) * p.square().sum() for p in used]
        functools.reduce(torch.add, terms).backward()
        gradients.average()
        out[name] = [None if p.grad is None else p.grad.clone() for p in params]
    gradients.expect(1)
    params[3].sum().backward()
    with pytest.raises(AssertionError, match="more backward passes"):
        params[3].sum().backward()
    return out


def process(rank: int, folder: str, teacher: str) -> None:
    """What one of two processes finds, in a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    world = World(rank, 2, CPU, group=dist.group.WORLD)
    mask = select_freeze(load_teacher(teacher), strategy="gdd-i")
    out: dict[str, Any] = {}
    with mock.patch.object(distributed, "BUCKET", BUCKET):
        for name, fields in RUNS.items():
            for form, kind in (("buckets", Gradients), ("one message", OneMessage)):
                with mock.patch("gddlab.distill.step.Gradients", kind):
                    path = Path(folder) / f"{name} {form} {rank}"
                    t = Trainer(tiny_config(path, Path(teacher), mask=mask, **fields), world)
                for _ in range(ITERATIONS):
                    t.iterate()
                params = t.step.g_params + t.step.d_params
                out[f"{name}/{form}"] = {k: whole(v) for k, v in tensors(t).items()}
                out[f"{name}/{form}/gradients"] = [None if p.grad is None else whole(p.grad) for p in params]
                named = {"g": t.step.g} | ({"d": t.step.d} if t.step.adversarial else {})
                every = [(f"{n}/{k}", p) for n, net in named.items() for k, p in net.named_parameters()]
                out[f"{name}/{form}/hooks"] = [k for k, p in every if p._post_accumulate_grad_hooks]
                out[f"{name}/{form}/trained"] = [k for k, p in every if p.requires_grad]
        out["order"] = order(Path(folder) / f"order {rank}", teacher, world)
        out["branches"] = branches(world)
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> list[dict[str, Any]]:
    """What each of two processes finds."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(process, (str(folder), str(tiny_teacher)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_buckets_give_what_one_message_gives(name: str, found: list[dict[str, Any]]) -> None:
    """Networks, average, optimisers' state and last gradients after three iterations, the last with R1, to the bit."""
    for rank in found:
        buckets, message = rank[f"{name}/buckets"], rank[f"{name}/one message"]
        assert buckets.keys() == message.keys() and len(buckets) > 100
        for k, v in message.items():
            assert torch.equal(buckets[k], v), k
        for a, b in zip(rank[f"{name}/buckets/gradients"], rank[f"{name}/one message/gradients"], strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    first, second = (rank[f"{name}/buckets"] for rank in found)
    shared = [k for k in first if not k.startswith("d/") or k.endswith(("weight", "bias"))]  # BatchNorm's means differ
    assert all(torch.equal(first[k], second[k]) for k in shared)


def test_r1_leaves_parameters_without_a_gradient(found: list[dict[str, Any]]) -> None:
    """The last bias, whose bucket so never fills."""
    names, gradients = (found[0][f"stylegan2/buckets/{what}"] for what in ("trained", "gradients"))
    assert [k for k, g in zip(names, gradients, strict=True) if g is None] == ["d/b4.out.bias"]


def test_hooks_are_where_gradients_are_sent(found: list[dict[str, Any]]) -> None:
    """On what is trained; on nothing that is frozen or sharded, and on nothing in a single process."""
    hooks, trained = (found[0][f"stylegan2/buckets/{what}"] for what in ("hooks", "trained"))
    assert hooks == trained and {k[0] for k in hooks} == {"g", "d"}
    assert not found[0]["stylegan2/one message/hooks"]
    own, foreign = (found[0][f"sharded/{form}/hooks"] for form in ("buckets", "one message"))
    assert [k for k in own if k not in foreign] == [k for k in trained if k.startswith("d/")]
    p = nn.Parameter(torch.ones(3))
    gradients = Gradients([p], World(0, 1, CPU))
    gradients.expect(1)
    p.sum().backward()
    kept = p.grad
    gradients.average()
    assert not p._post_accumulate_grad_hooks and not gradients.buckets
    assert p.grad is kept


@pytest.mark.parametrize(("step", "passes"), [("g", 4), ("d", 4), ("r1", 2)])
def test_buckets_are_sent_during_the_last_backward_pass(step: str, passes: int, found: list[dict[str, Any]]) -> None:
    """Of all passes of a step none but the last sends, and that one before it comes to the first layer."""
    for rank in found:
        buckets, events = rank["order"][step]
        assert buckets > 2
        assert events.count("first") == passes and events.count("sent") == buckets
        assert events[: passes - 1] == ["first"] * (passes - 1)
        if step != "r1":  # whose first bucket never fills: the last bias has no gradient
            assert events[passes - 1] == "sent"


def test_the_order_of_gradients_does_not_matter(found: list[dict[str, Any]]) -> None:
    """Ranks whose gradients come in opposite orders send the same; one that no rank has stays None."""
    for rank in found:
        for gradients in rank["branches"].values():
            assert gradients[0] is None
            for i, g in enumerate(gradients[1:], 1):
                assert_close(g, torch.full((1500,), 3.0 * i), rtol=0, atol=0)  # the mean of 2 i and 4 i
