"""Mechanics of training: micro-batches, augmentation, few-step students, bad losses, the best snapshot, alarms."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gddlab.datasets import ImageDataset
from gddlab.distill.build import check
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError, NotFound
from gddlab.evaluation import scorer
from gddlab.files import read_json, read_jsonl, write_json
from gddlab.nets import load_network, save_network
from gddlab.runs import load_run
from gddlab.sampling import sample
from tests.conftest import tiny_config, tiny_net
from tests.distill.test_trainer import assert_continued, tensors

ALONE = World(0, 1, torch.device("cpu"))
DISCRIMINATORS: dict[str, dict[str, Any]] = {
    "projected": {},
    "stylegan2": {"discriminator": {"kind": "stylegan2"}},
    "lpips": {"discriminator": {"kind": "lpips"}},
}


def by(kind: str) -> dict[str, Any]:
    """An instance loss."""
    return {"kind": kind, "distance": "l2", "steps": 4}


def trained(path: Path, teacher: Path, iterations: int, **fields: Any) -> Trainer:
    t = Trainer(tiny_config(path, teacher, **fields), ALONE)
    for _ in range(iterations):
        t.iterate()
    return t


def same(a: Trainer, b: Trainer, *, tolerance: float = 1e-8) -> None:
    x, y = tensors(a), tensors(b)
    for name in x:
        # Adam with beta1 = 0 turns rounding noise into steps where the true gradient is 0: a bias before BatchNorm.
        if ".main.0.bias" not in name and "opt_" not in name:
            assert_close(x[name], y[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def gradients(path: Path, teacher: Path, **fields: Any) -> dict[str, torch.Tensor]:
    """Gradients of the three steps, and the state of BatchNorm and spectral norm; no optimiser steps."""
    t = Trainer(tiny_config(path, teacher, precision="float64", augment={"ops": ("color", "geom")}, **fields), ALONE)
    step, drawer, out = t.step, t.drawer, {}
    images = drawer.place(t.data.images(t.reader.indices()))
    for opt in (step.opt_g, step.opt_d):
        opt.step = lambda: None  # type: ignore[assignment, method-assign, union-attr]

    def keep(name: str, stats: dict[str, torch.Tensor], net: torch.nn.Module) -> None:
        out.update({f"{name}/{k}": v for k, v in stats.items()})
        out.update({f"{name}/{k}": p.grad for k, p in net.named_parameters() if p.grad is not None})

    keep("g", step.g_step(drawer.latents(0, 0), None, drawer.draw(0, 0))[0], step.g)
    keep("d", step.d_step(images, None, z=drawer.latents(0, 1), draw=drawer.draw(0, 1), u=drawer.real(0)), step.d)
    keep("r1", step.r1_step(images, None), step.d)
    return {k: v.clone() for k, v in out.items()} | {f"state/{k}": v for k, v in step.d.state_dict().items()}


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path, tiny_teacher: Path, kind: str) -> None:
    whole = gradients(tmp_path / "a", tiny_teacher, **DISCRIMINATORS[kind])
    parts = gradients(tmp_path / "b", tiny_teacher, batch_per_device=4, **DISCRIMINATORS[kind])
    assert whole.keys() == parts.keys()
    assert any(k.startswith("r1/") and v.ndim == 4 and v.abs().sum() > 0 for k, v in whole.items())
    for name, value in whole.items():
        assert_close(value, parts[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulation_with_reused_fakes_and_the_instance_loss(tmp_path: Path, tiny_teacher: Path) -> None:
    fields = {"precision": "float64", "reuse_fakes": True, "instance": by("ctm")}
    whole = trained(tmp_path / "a", tiny_teacher, 3, **fields)
    same(whole, trained(tmp_path / "b", tiny_teacher, 3, batch_per_device=2, **fields))
    assert whole.meter.sums["loss/instance"] > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"augment": {"ops": ("bgc",), "ada_target": 0.6, "ada_kimg": 0.1}},
        {"mid_sigmas": (0.8,)},
        {"instance": by("pd"), "discriminator": None},
        {"instance": by("cd")},
        {"discriminator": {"kind": "stylegan2"}},
        {"student": "scratch"},
    ],
    ids=["ada", "two steps", "pd alone", "gan and cd", "stylegan2", "scratch"],
)
def test_every_kind_of_run_continues_bit_identically(
    tmp_path: Path, tiny_teacher: Path, fields: dict[str, Any]
) -> None:
    assert_continued(tmp_path, tiny_teacher, **fields)


def test_adas_probability_rises_and_is_written(tmp_path: Path, tiny_teacher: Path) -> None:
    """The target is below any mean sign that a new discriminator gives, so p rises by 32 of 100 images."""
    fields = {"augment": {"ops": ("blit",), "ada_target": 0.001, "ada_kimg": 0.1}}
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, **fields), ALONE)
    assert t.ada is not None
    signs = []
    for _ in range(4):
        t.iterate()
        signs.append(t.meter.sums["signs/real"].item())
    expected = 0.32 if signs[-1] / 4 > 0.001 else 0.0
    assert t.ada.p.item() == pytest.approx(expected)
    assert t.step.augment_p is t.ada.p
    assert "ada/p" in t.meter.sums


def test_augmentation_changes_what_the_discriminator_sees_but_not_r1(tmp_path: Path, tiny_teacher: Path) -> None:
    plain = trained(tmp_path / "a", tiny_teacher, 1)
    augmented = trained(tmp_path / "b", tiny_teacher, 1, augment={"ops": ("cutout",)})
    assert plain.meter.sums["logits/real"] != augmented.meter.sums["logits/real"]
    seen: list[torch.Tensor] = []
    features = augmented.step.d.features
    augmented.step.d.features = lambda x: (seen.append(x.detach().clone()), features(x))[1]
    images = augmented.data.images(slice(0, 8))
    augmented.step.r1_step(images, None)
    assert torch.equal(seen[0], images)


def test_a_two_step_student_trains_both_steps_and_samples_with_them(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher, mid_sigmas=(0.8,), total_kimg=0.064)
    config.write()
    t = Trainer(config, ALONE)
    exits = {t.drawer.draw(i, s).exit for i in range(8) for s in range(2)}
    assert exits == {0, 1}
    t.train()
    student = load_run(tmp_path / "run").student()
    assert student.sigmas == (80.0, 0.8)
    own, one = sample(student, 4, seed=3), sample(student, 4, seed=3, steps=1)
    assert torch.equal(own, sample(student, 4, seed=3, sigmas=(80.0, 0.8)))
    assert not torch.equal(own, one)


def test_a_student_from_scratch_shares_no_weights_with_the_teacher(tmp_path: Path, tiny_teacher: Path) -> None:
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, student="scratch"), ALONE)
    again = Trainer(tiny_config(tmp_path / "run", tiny_teacher, student="scratch"), ALONE)
    theirs = t.teacher.state_dict()
    for name, p in t.step.g.named_parameters():
        assert name.endswith(("bias", "norm0.weight", "norm1.weight", "norm2.weight")) or not torch.equal(
            p, theirs[name]
        ), name
        assert torch.equal(p, again.step.g.get_parameter(name))


@pytest.mark.parametrize("kind", ["pd", "cd", "ctm", "rcd"])
def test_a_baseline_trains_without_a_discriminator(tmp_path: Path, tiny_teacher: Path, kind: str) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher, instance=by(kind), discriminator=None)
    config.write()
    t = Trainer(config, ALONE)
    assert t.train() == "done"
    line = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert line["loss/instance"] > 0
    assert not {"loss/g", "loss/d", "lr/d", "r1"} & set(line)
    student = load_run(tmp_path / "run").student()
    assert student.target_time == (kind != "cd")
    assert torch.isfinite(sample(student, 2)).all()


def test_some_of_the_data_mirrored(tmp_path: Path, tiny_teacher: Path) -> None:
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, classes=(3, 5), max_images=40, xflip=True), ALONE)
    assert len(t.data) == 80
    assert set(t.data.class_ids.tolist()) == {3, 5}
    assert torch.equal(t.data.images([0]).flip(-1), t.data.images([40]))


def poisoned(t: Trainer, iterations: set[int]) -> None:
    """Makes the generator's loss not a number in some iterations."""
    g_step = t.step.g_step

    def step(*args: Any, **kwargs: Any) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        stats, features = g_step(*args, **kwargs)
        if t.iteration in iterations:
            stats["loss/g"] = torch.tensor(float("nan"))
        return stats, features

    t.step.g_step = step  # type: ignore[method-assign]


def test_a_loss_that_is_not_finite_is_counted_and_three_in_a_row_end_the_run(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    t = Trainer(tiny_config(tmp_path / "a", tiny_teacher, tick_kimg=0.048), ALONE)
    poisoned(t, {1, 2, 4})
    assert t.train() == "done"
    line = read_jsonl(tmp_path / "a" / "metrics.jsonl")[-1]
    assert line["nonfinite/loss"] == pytest.approx(0.5)
    assert 0 < line["loss/g"] < 10

    t = Trainer(tiny_config(tmp_path / "b", tiny_teacher, checkpoint_kimg=0.016, tick_kimg=0.048), ALONE)
    poisoned(t, {3, 4, 5})
    with pytest.raises(GddlabError, match="not finite 3 times in a row"):
        t.train()
    again = Trainer(tiny_config(tmp_path / "b", tiny_teacher, checkpoint_kimg=0.016, tick_kimg=0.048), ALONE)
    assert again.restore()
    assert again.nimg == 32
    assert all(torch.isfinite(p).all() for p in again.step.g.parameters())


def test_gradients_that_are_not_finite_are_replaced_and_counted(tmp_path: Path, tiny_teacher: Path) -> None:
    t = Trainer(tiny_config(tmp_path / "a", tiny_teacher), ALONE)
    p = t.step.g_params[0]
    p.register_hook(lambda g: torch.full_like(g, float("inf")))
    before = p.detach().clone()
    t.iterate()
    assert torch.isfinite(p).all()
    assert (p < before).all()  # +inf became 1e5, and Adam's step has its sign
    assert t.meter.sums["nonfinite/g"] == 1
    assert t.meter.sums["sanitised/g"] == 1


def test_a_checkpoint_with_parameters_that_are_not_finite_is_not_written(tmp_path: Path, tiny_teacher: Path) -> None:
    t = trained(tmp_path / "a", tiny_teacher, 1)
    with torch.no_grad():
        t.step.g_params[0].fill_(float("nan"))
    with pytest.raises(GddlabError, match="not finite"):
        t.checkpoint()
    assert not list((tmp_path / "a").rglob("*.distcp"))


def test_the_best_student_is_kept(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher, metric_kimg=0.016, metric_n=16)
    config.write()
    t = Trainer(config, ALONE)
    values = iter([5.0, 3.0, 9.0])
    hashes = {}

    def score(file: Path) -> tuple[str, float, None]:
        net, meta = load_network(file)
        hashes[meta["kimg"]] = net.state_dict()
        return "fd@16", next(values), None

    t.train(score)
    run = load_run(tmp_path / "run")
    assert run.best == {"metric": "fd@16", "value": 3.0, "kimg": 0.032}
    best = run.student("best").state_dict()
    assert all(torch.equal(best[k], v) for k, v in hashes[0.032].items())
    (message,) = run.alarms.loc[run.alarms["kind"] == "jump", "message"]
    assert "fd@16 jumped to 9" in message
    assert not list((tmp_path / "run").glob(".candidate*"))


def test_scores_of_students_are_records(tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "cache"))
    config = tiny_config(tmp_path / "run", tiny_teacher, metric_kimg=0.048, metric_n=8, max_images=16)
    config.write()
    Trainer(config, ALONE).train(scorer(config, ALONE))
    records = read_jsonl(tmp_path / "run" / "evaluation.jsonl")
    assert [(r["metric"], r["kimg"], r["reference_n"]) for r in records] == [("fd-lite2@8", 0.048, 1797)]
    assert load_run(tmp_path / "run").best["value"] == records[0]["value"]


def test_an_alarm_stops_the_run_when_asked(tmp_path: Path, tiny_teacher: Path) -> None:
    fields = {"metric_kimg": 0.016, "stop_on": ("jump",)}
    config = tiny_config(tmp_path / "run", tiny_teacher, **fields)
    config.write()
    values = iter([1.0, 7.0])
    assert Trainer(config, ALONE).train(lambda file: ("fd", next(values), None)) == "stopped"
    status = read_json(tmp_path / "run" / "status.json")
    assert status["state"] == "stopped"
    assert status["nimg"] == 32
    assert "jumped to 7" in status["message"] == status["alarm"]


@pytest.mark.parametrize("fields", [{"precision": "bfloat16", "precision_d": "bfloat16"}, {"channels_last": True}])
def test_fast_options_train_like_the_plain_step(tmp_path: Path, tiny_teacher: Path, fields: dict[str, Any]) -> None:
    """First iteration's losses agree as far as the precision goes."""
    plain = trained(tmp_path / "a", tiny_teacher, 1)
    fast = trained(tmp_path / "b", tiny_teacher, 1, **fields)
    for name in ("loss/g", "loss/d", "logits/real"):
        assert_close(plain.meter.sums[name], fast.meter.sums[name], rtol=0.02, atol=0.02)
    if "precision" in fields:
        assert plain.meter.sums["loss/g"] != fast.meter.sums["loss/g"]
    assert all(p.dtype == torch.float32 for p in fast.step.g.parameters())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_equals_plain_training(
    backend: str, tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated by the compiler always; its C++, which takes minutes to build, in slow tests only."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fields = {"precision": "float64", "total_kimg": 0.024}
    plain = trained(tmp_path / "a", tiny_teacher, 3, **fields)
    same(plain, trained(tmp_path / "b", tiny_teacher, 3, compile=True, **fields))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # of the student, of the features


def test_the_class_embedding_begins_as_its_file_and_is_learned(tmp_path: Path, tiny_teacher: Path) -> None:
    cond, table = tmp_path / "cond.safetensors", torch.randn(12, 320)
    save_network(tiny_net(label_dim=10), cond, name="cond", data="digits")
    torch.save(table, tmp_path / "table.pt")
    t = Trainer(
        tiny_config(tmp_path / "run", cond, discriminator={"embedding_file": str(tmp_path / "table.pt")}), ALONE
    )
    embeds = [p for n, p in t.step.d.named_parameters() if n.endswith("embed.weight")]
    assert len(embeds) == 4
    assert all(torch.equal(p, table[:10]) for p in embeds)
    t.iterate()
    assert not any(torch.equal(p, table[:10]) for p in embeds)
    with pytest.raises(NotFound, match=r"class embedding nowhere.npy: no such file"):
        check(tiny_config(tmp_path / "run", cond, discriminator={"embedding_file": "nowhere.npy"}))
    with pytest.raises(GddlabError, match="unconditional teacher"):
        Trainer(
            tiny_config(tmp_path / "run", tiny_teacher, discriminator={"embedding_file": str(tmp_path / "table.pt")}),
            ALONE,
        )


def test_parts_of_a_batch_hold_whole_groups_of_stylegan2s_deviation(tmp_path: Path, tiny_teacher: Path) -> None:
    fields = {"discriminator": {"kind": "stylegan2", "channel_max": 8}}
    check(tiny_config(tmp_path / "run", tiny_teacher, batch_per_device=4, **fields))
    check(tiny_config(tmp_path / "run", tiny_teacher, batch=6, batch_per_device=3, **fields))
    with pytest.raises(GddlabError, match=r"2 of 8 images at once .* give a multiple of 4"):
        check(tiny_config(tmp_path / "run", tiny_teacher, batch_per_device=2, **fields))
    with pytest.raises(GddlabError, match=r"2 of 8 images at once .* give a multiple of 4"):
        check(tiny_config(tmp_path / "run", tiny_teacher, **fields), world_size=4)


def test_a_stylegan2_discriminator_begins_with_weights(tmp_path: Path, tiny_teacher: Path) -> None:
    first = trained(tmp_path / "a", tiny_teacher, 1, discriminator={"kind": "stylegan2"})
    torch.save(first.step.d.state_dict(), tmp_path / "d.pt")
    fields = {"discriminator": {"kind": "stylegan2", "weights": str(tmp_path / "d.pt")}}
    second = Trainer(tiny_config(tmp_path / "b", tiny_teacher, **fields), ALONE)
    theirs = second.step.d.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in first.step.d.state_dict().items())


def test_hinge_loss_and_a_fixed_probability_of_augmentation(tmp_path: Path, tiny_teacher: Path) -> None:
    """The losses are those of the logits: hinge's generator loss is minus their mean."""
    t = trained(tmp_path / "a", tiny_teacher, 1, loss="hinge", augment={"ops": ("cutout",), "p": 0.5})
    sums = t.meter.sums
    assert_close(sums["loss/g"], -sums["logits/g"])
    assert t.step.augment_p == 0.5
    whole = trained(tmp_path / "b", tiny_teacher, 1, loss="hinge", augment={"ops": ("cutout",)})
    assert whole.meter.sums["logits/real"] != sums["logits/real"]


def test_the_trained_student_can_be_kept_beside_its_average(tmp_path: Path, tiny_teacher: Path) -> None:
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, snapshot_raw=True), ALONE)
    t.train()
    net, _ = load_network(tmp_path / "run" / "snapshots" / "raw" / "000000.048.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), t.step.g.parameters(), strict=True))


def test_a_conditional_teacher_needs_labels(tmp_path: Path) -> None:
    path = tmp_path / "cond.safetensors"
    save_network(tiny_net(label_dim=10), path, name="cond", data="digits")
    folder = tmp_path / "flat"
    folder.mkdir()
    from PIL import Image

    digits = ImageDataset(torch.randint(256, (8, 16, 16, 1), dtype=torch.uint8).numpy(), name="x", source="test").uint8
    for i, x in enumerate(digits):
        Image.fromarray(x[..., 0]).save(folder / f"{i}.png")
    with pytest.raises(GddlabError, match=r"conditional with 10 classes, data .* has no labels"):
        Trainer(tiny_config(tmp_path / "run", path, data=str(folder)), ALONE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mid_sigmas": (0.5, 0.8)}, "descending"),
        ({"mid_sigmas": (90.0,)}, "between 80 and 0.002"),
        ({"mid_sigmas": (0.8,), "instance": {"kind": "cd"}}, "one step"),
        ({"discriminator": None}, "nothing is trained"),
        ({"adversarial_weight": 0}, "greater than 0"),
        ({"discriminator": None, "instance": {"kind": "cd"}, "augment": {}}, "augment with discriminator=None"),
        ({"instance": {"kind": "pd", "steps": 12}}, "power of two"),
        ({"instance": {"kind": "cd", "distance": "l2", "distance_weights": "random"}}, "only lpips takes them"),
        ({"instance": {"kind": "cdd"}}, "unknown kind of instance 'cdd': did you mean 'cd'"),
        ({"instance": "cd"}, r"a dict with its kind \(pd, cd, ctm, rcd\)"),
        ({"discriminator": {"backbones": ()}}, "at least one"),
        ({"discriminator": {"weights": {"vgg16_bn": "random"}}}, "vgg16_bn"),
        ({"discriminator": {"kind": "stylegan2", "cache_real": True}}, "unknown .*'discriminator.cache_real'"),
        ({"discriminator": {"input_sise": 32}}, "did you mean 'discriminator.input_size'"),
        ({"input_size": 32}, "belongs to a part, give discriminator.input_size"),
        ({"augment": {"ops": ("colour",)}}, "did you mean 'color'"),
        ({"augment": {"ops": ("color", "color")}}, "twice"),
        ({"augment": ("color",)}, "give a part such as gddlab.Augment"),
        ({"augment": {"p": 0.5, "ada_target": 0.6}}, "moves the probability"),
        ({"precision": "float64", "precision_d": "bfloat16"}, "float64"),
        ({"batch_per_device": 3}, "divisor"),
        ({"metric_n": 100}, "metric_kimg"),
        ({"stop_on": ("jump",)}, "no metric"),
        (
            {"discriminator": {"kind": "lpips", "net": "alexx"}},
            "unknown discriminator.net 'alexx': did you mean 'alex'",
        ),
    ],
)
def test_combinations_that_cannot_work_are_refused_when_made(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(GddlabError, match=message) as e:
        tiny_config(tmp_path, tmp_path / "teacher.safetensors", **fields)
    assert "\n" not in str(e.value)
    assert "Value error" not in str(e.value) and "run_dir" not in str(e.value)


def test_a_configuration_written_before_a_field_existed_continues(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher)
    config.write()
    values = read_json(tmp_path / "run" / "config.json")
    older = {k: v for k, v in values.items() if k not in ("augment", "instance", "metric_kimg", "mid_sigmas")}
    assert config.first_difference(older) is None
    assert TrainConfig(**(older | {"run_dir": tmp_path / "run", "mask": None})).to_json() == values
    older["discriminator"].pop("sync_batchnorm")
    assert config.first_difference(older) is None
    for fields, message in (
        ({"instance": by("cd")}, "instance is None there, 'cd' here"),
        ({"discriminator": {"kind": "stylegan2"}}, "discriminator is 'projected' there, 'stylegan2' here"),
        ({"discriminator": {"cout": 8}}, "discriminator.cout is 4 there, 8 here"),
    ):
        assert tiny_config(tmp_path / "run", tiny_teacher, **fields).first_difference(older) == message


def test_a_flat_configuration_of_an_older_version_is_refused_in_one_line(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher)
    config.write()
    values = read_json(tmp_path / "run" / "config.json")
    values |= {"discriminator": "projected", "backbones": ["tf_efficientnet_lite0"], "input_size": 32}
    write_json(tmp_path / "run" / "config.json", values)
    for use in (lambda: TrainConfig.load(tmp_path / "run"), config.write):
        with pytest.raises(GddlabError, match="is of an older version, whose fields were not yet in parts") as e:
            use()
        assert "\n" not in str(e.value)
