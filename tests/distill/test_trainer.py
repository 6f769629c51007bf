"""The trainer: continuing is bit-identical, frozen is frozen, fast paths equal plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from gddlab.datasets import ImageDataset
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError
from gddlab.files import read_json, read_jsonl
from gddlab.freezing import select_freeze
from gddlab.nets import load_network
from gddlab.probing import probe
from gddlab.runs import load_run
from gddlab.teachers import load_teacher
from tests.conftest import tiny_config, tiny_net

ALONE = World(0, 1, torch.device("cpu"))


def tensors(t: Trainer) -> dict[str, torch.Tensor]:
    out = {f"g/{k}": v for k, v in t.step.g.state_dict().items()}
    out |= {f"ema/{k}": v for k, v in t.ema.state_dict().items()}
    if t.step.adversarial:
        out |= {f"d/{k}": v for k, v in t.step.d.state_dict().items()}
    if t.ada is not None:
        out |= {f"ada/{k}": v for k, v in t.ada.state_dict().items()}
    for name, opt in (("opt_g", t.step.opt_g), ("opt_d", t.step.opt_d)):
        if opt is None:
            continue
        for i, state in enumerate(opt.state.values()):
            out |= {f"{name}/{i}/{k}": v for k, v in state.items()}
    return out


def assert_continued(tmp_path: Path, teacher: Path, **fields: Any) -> None:
    """A run of six iterations equals, bit for bit, one that was stopped after three and continued."""
    whole = Trainer(tiny_config(tmp_path / "a", teacher, **fields), ALONE)
    assert whole.train() == "done"

    config = tiny_config(tmp_path / "b", teacher, **fields)
    first = Trainer(config, ALONE)
    iterate = first.iterate

    def iterate_and_stop() -> None:
        iterate()
        first.stop_asked = first.iteration == 3  # in the middle of a tick, after an R1 step

    first.iterate = iterate_and_stop  # type: ignore[method-assign]
    assert first.train() == "stopped"
    assert read_json(config.run_dir / "status.json")["state"] == "stopped"
    second = Trainer(config, ALONE)
    assert second.train() == "done"

    a, b = tensors(whole), tensors(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    timing = ("seconds", "sec_per_kimg", "peak_mem_mib")
    lines = [
        [{k: v for k, v in m.items() if k not in timing} for m in read_jsonl(tmp_path / x / "metrics.jsonl")]
        for x in "ab"
    ]
    assert lines[0] == lines[1]
    assert [m["nimg"] for m in lines[0]] == [16, 32, 48]


def test_continued_run_is_bit_identical(tmp_path: Path, tiny_teacher: Path) -> None:
    assert_continued(tmp_path, tiny_teacher, mask=select_freeze(load_teacher(tiny_teacher), strategy="gdd-i"))


def test_a_run_does_not_continue_on_other_data(tmp_path: Path, tiny_teacher: Path) -> None:
    first = Trainer(tiny_config(tmp_path / "run", tiny_teacher), ALONE)
    first.iterate()
    first.checkpoint()
    first.checkpoints.wait()
    second = Trainer(tiny_config(tmp_path / "run", tiny_teacher), ALONE)
    second.reader.dataset = ImageDataset(second.data.uint8[::-1], name="digits", source="test")
    with pytest.raises(GddlabError, match="the data position is of dataset_sha256"):
        second.restore()


def test_frozen_parameters_are_the_teachers_and_in_no_optimiser(tmp_path: Path, tiny_teacher: Path) -> None:
    teacher = load_teacher(tiny_teacher)
    mask = select_freeze(teacher, strategy="gdd-i")
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, mask=mask), ALONE)
    t.train()
    for net in (t.step.g, t.ema, load_network(tmp_path / "run" / "student.safetensors")[0]):
        mask.verify(net, teacher)
    by_tensor = {p: n for n, p in t.step.g.named_parameters()}
    optimised = {by_tensor[p] for group in t.step.opt_g.param_groups for p in group["params"]}
    assert optimised == {n for n, _ in t.step.g.named_parameters()} - set(mask.frozen)
    start = teacher.state_dict()
    moved = [n for n in optimised if not torch.equal(start[n], t.step.g.state_dict()[n])]
    assert len(moved) == len(optimised)


def test_without_mask_everything_moves(tmp_path: Path, tiny_teacher: Path) -> None:
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher), ALONE)
    start = {n: p.detach().clone() for n, p in t.step.g.named_parameters()}
    t.iterate()
    assert all(not torch.equal(start[n], p) for n, p in t.step.g.named_parameters())


def test_cached_real_features_change_nothing(tmp_path: Path, tiny_teacher: Path) -> None:
    states = []
    for cached in (False, True):
        config = tiny_config(
            tmp_path / str(cached), tiny_teacher, discriminator={"cache_real": cached}, precision="float64"
        )
        t = Trainer(config, ALONE)
        few = t.data.uint8[:24]
        t.data = t.reader.dataset = ImageDataset(few, name="few", source="test")
        if cached:
            t.cache_real()
        for _ in range(3):
            t.iterate()
        states.append(tensors(t))
    for name in states[0]:
        # Adam with beta1 = 0 turns rounding noise into steps where the true gradient is 0: a bias before BatchNorm.
        if ".main.0.bias" not in name and "opt_" not in name:
            assert_close(states[0][name], states[1][name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_reused_fakes_are_those_of_the_generator_step(tmp_path: Path, tiny_teacher: Path) -> None:
    """The first D step on reused fakes equals one on fresh fakes of the same noise and the previous generator."""
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, precision="float64"), ALONE)
    z, images = t.drawer.latents(0, 0), t.data.images(slice(0, 8)).double()
    with torch.no_grad():
        expected = t.step.d.features(t.step.g.generate(z))
    _, features = t.step.g_step(z, None)
    assert_close(features, expected)
    a = t.step.d_step(images, None, fake_features=features)
    assert torch.isfinite(a["loss/d"])


def test_bfloat16_student_trains(tmp_path: Path, tiny_teacher: Path) -> None:
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, precision="bfloat16"), ALONE)
    t.iterate()
    assert all(torch.isfinite(v).all() for v in t.meter.sums.values())
    assert all(p.dtype == torch.float32 for p in t.step.g.parameters())


def test_conditional_student_trains(tmp_path: Path) -> None:
    from gddlab.nets import save_network

    path = tmp_path / "cond.safetensors"
    save_network(tiny_net(label_dim=10), path, name="cond", data="digits")
    t = Trainer(tiny_config(tmp_path / "run", path, total_kimg=0.016), ALONE)
    assert t.train() == "done"
    assert any("embed_proj" in n for n, _ in t.step.d.named_parameters())


def test_run_directory_is_whole(tmp_path: Path, tiny_teacher: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(run, tiny_teacher)
    config.write()
    Trainer(config, ALONE).train()
    for name in (
        "config.json",
        "provenance.json",
        "teacher.json",
        "metrics.jsonl",
        "student.safetensors",
        "status.json",
    ):
        assert (run / name).is_file(), name
    for folder in ("events", "samples", "snapshots", "checkpoints"):
        assert any((run / folder).iterdir()), folder
    assert not list(run.rglob("*.tmp"))
    line = read_jsonl(run / "metrics.jsonl")[-1]
    assert {
        "nimg",
        "loss/g",
        "loss/d",
        "logits/fake",
        "logits/real",
        "r1",
        "lr/g",
        "ema",
        "sec_per_kimg",
        "peak_mem_mib",
    } <= set(line)
    assert TrainConfig.load(run).to_json() == config.to_json()


def test_another_configuration_is_refused_and_nothing_touched(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher)
    config.write()
    before = (tmp_path / "run" / "config.json").read_bytes()
    other = tiny_config(tmp_path / "run", tiny_teacher, lr_g=1e-3)
    with pytest.raises(GddlabError, match=r"lr_g is 0\.0004 there, 0\.001 here"):
        other.write()
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"loss": "wgan"}, "unknown loss 'wgan': accepted: ns, hinge"),
        ({"total_kmg": 3}, "did you mean 'total_kimg'"),
        ({"discriminator": {"input_size": 8}}, "discriminator.input_size=8"),
    ],
)
def test_bad_configurations_are_refused(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(GddlabError, match=message):
        tiny_config(tmp_path, tmp_path / "teacher.safetensors", **fields)


def test_mask_of_another_network_is_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    from gddlab.launch import train
    from gddlab.nets import from_edm
    from tests.conftest import TINY

    mask = select_freeze(from_edm("EDMPrecond", **(TINY | {"num_blocks": 2})), strategy="gdd-i")
    with pytest.raises(GddlabError, match="another network"):
        train(tiny_config(tmp_path / "run", tiny_teacher, mask=mask))
    assert not (tmp_path / "run").exists()


def test_the_student_is_probed_while_it_trains(tmp_path: Path, tiny_teacher: Path) -> None:
    teacher = load_teacher(tiny_teacher)
    mask = select_freeze(teacher, strategy="gdd-i")
    config = tiny_config(tmp_path / "run", tiny_teacher, mask=mask, probe_kimg=0.016)
    config.write()
    trainer = Trainer(config, ALONE)
    trainer.train()
    frame = load_run(tmp_path / "run").probes
    assert sorted(set(frame["kimg"])) == [0.0, 0.016, 0.032, 0.048]
    moved = frame[frame["stat"] == "weight_change"].pivot(index="layer", columns="kimg", values="value")
    frozen = {n.rpartition(".")[0] for n in mask.frozen}
    assert (moved.loc[sorted(frozen & set(moved.index))] == 0).all(axis=None)
    assert (moved[0.0] == 0).all()
    assert (moved.loc["model.enc.16x16_conv", [0.016, 0.032, 0.048]].diff().iloc[1:] > 0).all()
    last = frame[(frame["kimg"] == 0.048) & (frame["stat"] == "rms")].set_index("layer")["value"]
    again = probe(trainer.ema, states="student", layers="all", stats="rms", n=64).pivot("rms")[80.0]
    assert last["model.enc.16x16_conv"] == pytest.approx(again["model.enc.16x16_conv"], rel=1e-5)
    config = tiny_config(tmp_path / "plain", tiny_teacher, mask=mask)
    config.write()
    plain = Trainer(config, ALONE)
    plain.train()
    assert all(torch.equal(a, b) for a, b in zip(plain.ema.parameters(), trainer.ema.parameters(), strict=True))
    assert len(load_run(tmp_path / "plain").probes) == 0
