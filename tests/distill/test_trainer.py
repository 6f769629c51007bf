"""The trainer: continuing is bit-identical, a run directory is whole, bad losses, the best snapshot, alarms, probes."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gddlab.datasets import ImageDataset
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError, NotFound
from gddlab.evaluation import scorer
from gddlab.files import read_json, read_jsonl
from gddlab.freezing import select_freeze
from gddlab.nets import load_network, save_network
from gddlab.probing import probe
from gddlab.runs import load_run
from gddlab.sampling import sample
from gddlab.teachers import load_teacher
from tests.conftest import tiny_config, tiny_net

ALONE = World(0, 1, torch.device("cpu"))


def by(kind: str) -> dict[str, Any]:
    """An instance loss."""
    return {"kind": kind, "distance": "l2", "steps": 4}


def trained(path: Path, teacher: Path, iterations: int, **fields: Any) -> Trainer:
    t = Trainer(tiny_config(path, teacher, **fields), ALONE)
    for _ in range(iterations):
        t.iterate()
    return t


def tensors(t: Trainer) -> dict[str, torch.Tensor]:
    out = {f"g/{k}": v for k, v in t.step.g.state_dict().items()}
    out |= {f"ema/{k}": v for k, v in t.ema.state_dict().items()}
    if t.step.adversarial:
        out |= {f"d/{k}": v for k, v in t.step.d.state_dict().items()}
    if t.step.augment is not None:
        out |= {f"ada/{k}": v for k, v in t.step.augment.state_dict().items()}
    for name, opt in (("opt_g", t.step.opt_g), ("opt_d", t.step.opt_d)):
        if opt is None:
            continue
        for i, state in enumerate(opt.state.values()):
            out |= {f"{name}/{i}/{k}": v for k, v in state.items()}
    return out


def assert_continued(tmp_path: Path, teacher: Path, world: World = ALONE, **fields: Any) -> None:
    """A run of six iterations equals, bit for bit, one that was stopped after three and continued."""
    whole = Trainer(tiny_config(tmp_path / "a", teacher, **fields), world)
    assert whole.train() == "done"

    config = tiny_config(tmp_path / "b", teacher, **fields)
    first = Trainer(config, world)
    iterate = first.iterate

    def iterate_and_stop() -> None:
        iterate()
        first.stop_asked = first.iteration == 3  # in the middle of a tick, after an R1 step

    first.iterate = iterate_and_stop  # type: ignore[method-assign]
    assert first.train() == "stopped"
    assert read_json(config.run_dir / "status.json")["state"] == "stopped"
    second = Trainer(config, world)
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


def test_conditional_student_trains(tmp_path: Path) -> None:

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


def test_the_student_is_probed_while_it_trains(tmp_path: Path, tiny_teacher: Path) -> None:
    teacher = load_teacher(tiny_teacher)
    mask = select_freeze(teacher, strategy="gdd-i")
    config = tiny_config(tmp_path / "run", tiny_teacher, mask=mask, probe_kimg=0.016)
    config.write()
    trainer = Trainer(config, ALONE)
    trainer.train()
    run = load_run(tmp_path / "run")
    frame = run.probes
    assert run.draw_probes("weight_change").get_title(loc="left") == "weight_change"
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


def test_a_two_step_student_trains_both_steps_and_samples_with_them(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher, mid_sigmas=(0.8,), total_kimg=0.064)
    config.write()
    t = Trainer(config, ALONE)
    exits = {t.drawer.draw(i, s).exit for i in range(8) for s in range(2)}
    assert exits == {0, 1}
    t.train()
    run = load_run(tmp_path / "run")
    student = run.student()
    assert student.sigmas == (80.0, 0.8)
    for kimg in (0.064, "0.064", "000000.064"):
        assert run.student(kimg).card.kimg == 0.064
    with pytest.raises(NotFound, match=r"has no student 0.5: snapshots are .*000000.064"):
        run.student(0.5)
    own, one = sample(student, 4, seed=3), sample(student, 4, seed=3, steps=1)
    assert torch.equal(own, sample(student, 4, seed=3, sigmas=(80.0, 0.8)))
    assert not torch.equal(own, one)


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


def test_a_run_that_was_killed_while_it_kept_the_best(tmp_path: Path, tiny_teacher: Path) -> None:
    """Its alarms and its best student are those of an undisturbed run: no alarm twice, the best checkpoint again."""
    config = tiny_config(
        tmp_path / "run", tiny_teacher, metric_kimg=0.016, metric_n=16, keep_checkpoints=3, checkpoint_kimg=0.016
    )
    config.write()
    values = {0.016: 5.0, 0.032: 3.0, 0.048: 9.0}

    def score(file: Path) -> tuple[str, float, None]:
        return "fd@16", values[load_network(file)[1]["kimg"]], None

    first = Trainer(config, ALONE)
    first.train(score)
    best = config.run_dir / "checkpoints" / "best"
    assert best.read_text().strip() == "000000.032"
    alarms = read_jsonl(config.run_dir / "alarms.jsonl")
    assert [a["kind"] for a in alarms] == ["jump"]
    best.write_text("000000.016")  # killed after best.json was written, and before the last two checkpoints
    for name in ("000000.032", "000000.048"):
        shutil.rmtree(config.run_dir / "checkpoints" / name)
    Trainer(config, ALONE).train(score)
    assert best.read_text().strip() == "000000.032"
    assert read_jsonl(config.run_dir / "alarms.jsonl") == alarms
    events = EventAccumulator(str(config.run_dir / "events")).Reload()
    assert [e.step for e in events.Scalars("loss/g")] == [16, 32, 48]  # each once, that of the checkpoint too


def test_the_time_of_a_line_is_that_since_the_line_before(tmp_path: Path, tiny_teacher: Path) -> None:
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher), ALONE)
    for seconds, expected in ((3.0, 3000 / 16), (4.0, 1000 / 16)):
        t.reader.position += 16
        t.seconds = seconds
        line = t.tick()
        assert line["sec_per_kimg"] == pytest.approx(expected) and line["seconds"] == seconds


@pytest.mark.parametrize(("kimg", "batch", "iterations"), [(16.056, 8, 2007), (12, 16, 750), (0.05, 8, 7)])
def test_iterations_are_not_changed_by_rounding(
    tmp_path: Path, tiny_teacher: Path, kimg: float, batch: int, iterations: int
) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher, total_kimg=kimg, batch=batch)
    assert config.iterations == iterations and config.end_kimg == pytest.approx(iterations * batch / 1000)


def test_a_grid_shows_the_classes_that_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cond.safetensors"
    save_network(tiny_net(label_dim=10), path, name="cond", data="digits")
    config = tiny_config(tmp_path / "run", path, classes=(3, 5), total_kimg=0.016)
    asked: list[Any] = []

    def seen(net: Any, n: int, **how: Any) -> torch.Tensor:
        asked.append(how["class_labels"])
        return sample(net, n, **how)

    monkeypatch.setattr("gddlab.distill.recorder.sample", seen)
    config.write()
    Trainer(config, ALONE).train()
    assert asked and all(labels[:4] == [3, 5, 3, 5] and len(labels) == 64 for labels in asked)


@pytest.mark.parametrize(
    ("kimg", "found"),
    [(0.012, [16, 24, 40, 48]), (0.024, [24, 48]), (0.001, [*range(8, 49, 8)]), (1.0, [48]), (None, [])],
)
def test_an_interval_ends_at_its_multiples_without_drifting(kimg: float | None, found: list[int]) -> None:
    def at(iteration: int) -> Any:
        return SimpleNamespace(nimg=8 * iteration, config=SimpleNamespace(batch=8), iteration=iteration, total=6)

    assert [8 * i for i in range(1, 7) if Trainer.every(at(i), kimg)] == found


def test_scores_of_students_are_records(tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "cache"))
    fields = {"metric_kimg": 0.048, "metric_n": 8, "classes": (3,), "max_images": 16}
    config = tiny_config(tmp_path / "run", tiny_teacher, **fields)
    config.write()
    Trainer(config, ALONE).train(scorer(config, ALONE))
    records = read_jsonl(tmp_path / "run" / "evaluation.jsonl")
    assert [(r["metric"], r["kimg"], r["reference_n"]) for r in records] == [("fd-lite2@8", 0.048, 122)]
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


def test_a_short_run_is_not_called_collapsed(tmp_path: Path, tiny_teacher: Path) -> None:
    """Its student has had no time to leave the one grey image; a single training image is named."""
    for images, said in ((None, []), (1, ["the training images are all alike, 1 in all"])):
        config = tiny_config(tmp_path / f"{images}", tiny_teacher, max_images=images)
        config.write()
        t = Trainer(config, ALONE)
        t.train()
        assert images or (widest := t.health.past.widest) is None or widest[0] < t.health.thresholds.collapse
        messages = load_run(config.run_dir).alarms["message"]
        assert [message.partition(":")[0] for message in messages] == said


def test_the_trained_student_can_be_kept_beside_its_average(tmp_path: Path, tiny_teacher: Path) -> None:
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, snapshot_raw=True), ALONE)
    t.train()
    net, _ = load_network(tmp_path / "run" / "snapshots" / "raw" / "000000.048.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), t.step.g.parameters(), strict=True))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "with 8 images at once: give batch_per_device=4 or less in a new run"),
        ({"batch_per_device": 1}, "with 1 images at once: take a larger device"),
    ],
)
def test_out_of_memory_says_which_field_to_change(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], said: str
) -> None:
    t = Trainer(tiny_config(tmp_path / "run", tiny_teacher, **fields), ALONE)

    def refuse(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(t.step, "g_step", refuse)
    with pytest.raises(GddlabError, match=said) as e:
        t.train()
    assert "\n" not in str(e.value)
