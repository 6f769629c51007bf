"""Teachers: loss, resumable training, loading, the bundled ones."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gddlab.datasets import BatchReader, data_of, open_dataset
from gddlab.distill import teacher as training_module
from gddlab.distill.teacher import TeacherConfig, train_teacher
from gddlab.errors import GddlabError, NotFound
from gddlab.evaluation.run_scores import score_teacher
from gddlab.files import data_dir, hash_tensors, read_json, read_jsonl
from gddlab.lock import take
from gddlab.nets import OneStepPrecond, load_network, save_network
from gddlab.nets.io import make_student
from gddlab.nets.precond import edm_loss
from gddlab.teachers import bundled_teachers, load_teacher
from gddlab.teachers.catalog import bundled_file
from tests.conftest import tiny_net


def config(run_dir: Path, **fields: Any) -> TeacherConfig:
    settings: dict[str, Any] = {
        "model_channels": 8,
        "num_blocks": 1,
        "batch": 8,
        "total_kimg": 0.064,
        "tick_kimg": 0.016,
    }
    return TeacherConfig(run_dir=run_dir, **(settings | fields))


def test_loss_is_the_formula() -> None:
    net = tiny_net()
    x, n = torch.randn(3, 1, 16, 16), torch.randn(3, 1, 16, 16)
    sigma = torch.tensor([0.1, 1.0, 10.0])
    with torch.no_grad():
        got = edm_loss(net(x + sigma.reshape(-1, 1, 1, 1) * n, sigma), x, sigma)
        for i, s in enumerate(sigma.tolist()):
            d = net(x[i : i + 1] + s * n[i : i + 1], s)
            expected = (s**2 + 0.25) / (s * 0.5) ** 2 * (d - x[i : i + 1]).square().mean()
            assert_close(got[i], expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_that_another_process_trains_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    held = take(tmp_path / "a")
    with pytest.raises(GddlabError, match="is being run by another process"):
        train_teacher(config(tmp_path / "a"))
    os.close(held)
    assert train_teacher(config(tmp_path / "a")).is_file()


@pytest.mark.parametrize(("by", "where"), [("an error", "0.032"), ("Ctrl-C", "0.04")])
def test_continued_training_is_bit_identical(
    by: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Ctrl-C is heeded after the step, which lies between two ticks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    whole = load_network(train_teacher(config(tmp_path / "a")))[0]
    calls = 0
    original = training_module.edm_loss

    def disturbed(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            if by == "an error":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(training_module, "edm_loss", disturbed)
        with pytest.raises(
            KeyboardInterrupt, match="the same call continues from 0.04 kimg$" if by == "Ctrl-C" else None
        ):
            train_teacher(config(tmp_path / "b"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    state = torch.load(tmp_path / "b" / "checkpoint.pt", weights_only=True)
    assert state["step"] * 8 / 1000 == float(where)
    with pytest.raises(GddlabError, match=r"b holds a teacher whose training is not finished: the same train_teacher"):
        load_teacher(tmp_path / "b")
    continued = load_network(train_teacher(config(tmp_path / "b")))[0]
    for (name, p), (_, q) in zip(whole.state_dict().items(), continued.state_dict().items(), strict=True):
        assert torch.equal(p, q), name
    a, b = (read_jsonl(tmp_path / run / "metrics.jsonl") for run in "ab")
    assert [(m["kimg"], m["loss"]) for m in a] == [(m["kimg"], m["loss"]) for m in b]
    assert [m["kimg"] for m in a] == [0.016, 0.032, 0.048, 0.064]
    with pytest.raises(GddlabError, match=r"lr is 0\.002 there, 0\.001 here"):
        train_teacher(config(tmp_path / "b", lr=0.001))


def test_bfloat16_is_near_float32_and_keeps_float32_weights(tmp_path: Path) -> None:
    """Over forty steps that halve the loss: low-precision copies of the first step's weights would not follow them."""
    losses = {}
    quick = {"device": "cpu", "total_kimg": 0.32, "tick_kimg": 0.08, "lr": 3e-3, "lr_rampup_kimg": 0}
    for precision in ("float32", "bfloat16"):
        path = train_teacher(config(tmp_path / precision, precision=precision, **quick))
        losses[precision] = [m["loss"] for m in read_jsonl(path.parent / "metrics.jsonl")]
        assert {p.dtype for p in load_network(path)[0].parameters()} == {torch.float32}
    assert losses["float32"][-1] < 0.85 * losses["float32"][0] and losses["bfloat16"] != losses["float32"]
    assert_close(torch.tensor(losses["bfloat16"]), torch.tensor(losses["float32"]), rtol=0.03, atol=0.0)


def test_a_share_of_the_levels_is_log_uniform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def records(denoised: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(sigma)
        return edm_loss(denoised, x, sigma)

    monkeypatch.setattr(training_module, "edm_loss", records)

    def levels(name: str, **fields: Any) -> torch.Tensor:
        seen.clear()
        train_teacher(config(tmp_path / name, batch=64, total_kimg=0.64, num_blocks=1, model_channels=4, **fields))
        return torch.cat(seen)

    drawn = levels("mixed", uniform_share=0.25, uniform_sigmas=(1000.0, 4000.0))
    high = drawn[drawn > 500]
    assert 0.19 < len(high) / len(drawn) < 0.31  # 640 levels: four standard deviations
    assert high.min() > 1000 and high.max() < 4000
    assert 0.35 < (high < 2000).float().mean() < 0.65  # half of them in each octave
    assert levels("plain").max() < 100
    assert "25 % log-uniform in 1000 to 4000" in str(load_teacher(tmp_path / "mixed").card)
    with pytest.raises(GddlabError, match=r"uniform_sigmas.*lowest and the highest"):
        config(tmp_path / "x", uniform_sigmas=(80.0, 5.0))


def test_images_may_move_and_not_change(tmp_path: Path) -> None:
    """A teacher finds them again by their hash, as a run does."""
    digits = open_dataset("digits").uint8
    for name, pixels in (("mine", digits[:16]), ("other", digits[16:32])):
        np.save(tmp_path / f"{name}.npy", pixels)
    own = {"data": tmp_path / "mine.npy", "total_kimg": 0.016}
    path = train_teacher(config(tmp_path / "t", **own))
    moved = (tmp_path / "mine.npy").rename(tmp_path / "moved.npy")
    with pytest.warns(UserWarning, match=r"data has moved from .*mine.npy to .*moved.npy; its hash is the same"):
        assert train_teacher(config(tmp_path / "t", **own | {"data": moved})) == path
    with pytest.raises(GddlabError, match=r"holds another run: data is .*other.npy' here"):
        train_teacher(config(tmp_path / "t", **own | {"data": tmp_path / "other.npy"}))
    with pytest.raises(NotFound, match="is no longer there: give data="):
        score_teacher(tmp_path / "t")
    records = score_teacher(tmp_path / "t", data=moved, progress=False)
    assert {r.reference_n for r in records} == {8, 16}


def test_trained_teacher_loads_from_its_run_directory(tmp_path: Path) -> None:
    train_teacher(config(tmp_path / "run", conditional=True, total_kimg=0.016))
    teacher = load_teacher(tmp_path / "run")
    assert teacher.card.classes == 10
    assert teacher.card.data == "digits:train"
    assert teacher.card.name == "run"
    assert (tmp_path / "run" / "samples.png").exists()


def dit_config(run_dir: Path, **fields: Any) -> TeacherConfig:
    settings = {"network": "dit", "model_channels": 12, "num_blocks": 1, "batch": 8, "total_kimg": 0.064}
    return config(run_dir, **(settings | {"tick_kimg": 0.032} | fields))


@pytest.mark.parametrize("prediction", ["flow", "epsilon"])
def test_the_loss_of_a_transformer_is_the_error_of_its_prediction(prediction: str, tmp_path: Path) -> None:
    c = dit_config(tmp_path, prediction=prediction, batch=64, label_dropout=0.0)
    data = open_dataset("digits")
    net = training_module._network(c, data)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    seen: dict[str, torch.Tensor] = {}

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen.update(x=args[0], t=args[1], ids=args[2], out=out)

    net.model.register_forward_hook(keep)
    with torch.no_grad():
        loss = training_module._loss(c, net, BatchReader(data, batch=64, seed=0), 0)
    x, labels = BatchReader(data, batch=64, seed=0).next()
    assert torch.equal(seen["ids"], labels.argmax(1))
    sigma = torch.tensor([net.path.sigma(t) for t in seen["t"].tolist()]).reshape(-1, 1, 1, 1)
    if prediction == "flow":
        t = seen["t"].reshape(-1, 1, 1, 1) / 1000
        noise = (seen["x"] - (1 - t) * x) / t
        wanted = noise - x
    else:
        noise = wanted = (seen["x"] * (1 + sigma**2).sqrt() - x) / sigma
    assert 0.9 < noise.std() < 1.1
    assert_close(loss, (seen["out"] - wanted).square().mean(), rtol=1e-3, atol=1e-3)
    levels = sigma.log()
    assert -1.9 < levels.median() < -0.5 and (sigma > 5).sum() > 1  # log-normal, and a tenth above 5


def test_a_transformer_is_trained_like_a_u_net(tmp_path: Path) -> None:
    """Reproducibly, with a card; it learns what a class is, and to do without."""
    paths = [train_teacher(dit_config(tmp_path / name)) for name in "ab"]
    a, b = (load_network(path)[0].state_dict() for path in paths)
    assert all(torch.equal(a[k], b[k]) for k in a)
    card = load_teacher(tmp_path / "a").card
    assert (card.classes, card.sigma_min, card.sigma_max, card.data) == (10, 0.002, 80.0, "digits:train")
    assert card.init_kwargs["label_dropout"] == 0.1 and card.init_kwargs["kind"] == "flow"
    assert "time 0 (image) to 1000 (noise); predicts noise - image" in str(card)
    assert "10 % log-uniform in 5 to 80" in str(card)
    noise = train_teacher(dit_config(tmp_path / "noise", prediction="epsilon", conditional=False, label_dropout=0))
    card = load_teacher(noise.parent).card
    assert (card.classes, card.sigma_max) == (0, 80.0) and card.sigma_min == pytest.approx(0.01, rel=1e-3)


def test_a_transformer_learns(tmp_path: Path) -> None:
    fast = {"lr": 5e-3, "lr_rampup_kimg": 0, "batch": 32, "total_kimg": 3.2, "tick_kimg": 0.8}
    path = train_teacher(dit_config(tmp_path / "run", model_channels=24, **fast))
    losses = [m["loss"] for m in read_jsonl(path.parent / "metrics.jsonl")]
    assert losses[-1] < 0.6 * losses[0]


def test_fields_of_the_other_network_are_refused(tmp_path: Path) -> None:
    made = TeacherConfig(run_dir=tmp_path, network="dit")
    assert (made.model_channels, made.num_blocks, made.num_heads, made.conditional) == (96, 6, 3, True)
    assert (made.total_kimg, made.label_dropout, made.uniform_share) == (160, 0.1, 0.1)
    assert TeacherConfig(run_dir=tmp_path, network="dit", total_kimg=5).total_kimg == 5
    assert TeacherConfig(run_dir=tmp_path, **made.to_json()) == made
    for fields, message in (
        ({"patch_size": 4}, r"patch_size=4 is of network='dit': omit it"),
        ({"prediction": "epsilon"}, r"prediction='epsilon' is of network='dit'"),
        ({"network": "dit", "channel_mult": (1,)}, r"channel_mult=\(1,\) is of network='unet'"),
        ({"network": "dit", "dropout": 0.1}, r"dropout=0\.1 is of network='unet'"),
        ({"label_dropout": 0.1}, r"label_dropout=0\.1 without labels: give conditional=True"),
        ({"network": "dits"}, "unknown network 'dits': did you mean 'dit'"),
    ):
        with pytest.raises(GddlabError, match=message) as e:
            TeacherConfig(run_dir=tmp_path, **fields)
        assert "\n" not in str(e.value)


def test_a_u_net_may_drop_labels_too(tmp_path: Path) -> None:
    path = train_teacher(config(tmp_path / "run", conditional=True, label_dropout=0.2, total_kimg=0.016))
    assert load_network(path)[0].model.label_dropout == 0.2


@pytest.mark.parametrize(
    "name",
    ["digits", "digits-high", "digits-cond", "digits-dit", "digits-all", "emoji", "emoji-cond"],
)
def test_bundled_teachers(name: str) -> None:
    assert name in bundled_teachers()
    teacher = load_teacher(name)
    card = teacher.card
    assert card.sha256 == hash_tensors(teacher.state_dict())
    assert card.parameters == sum(p.numel() for p in teacher.parameters())
    assert (card.sigma_min, card.sigma_max) == (0.002, 80.0)
    assert not any(p.requires_grad for p in teacher.parameters())
    folder, trained = data_dir() / "teachers" / name, bundled_file(name).parent
    assert bool(teacher.label_dim) == (name in ("digits-cond", "digits-dit", "emoji-cond"))
    assert read_json(trained / "config.json")["conditional"] == (name not in ("digits", "digits-high", "digits-all"))
    assert len(read_jsonl(trained / "metrics.jsonl")) > 50
    assert (trained / "samples.png").exists()
    high = ("digits-high", "digits-dit")
    assert ("10 % log-uniform in 5 to 80" in str(card)) == (name in high)
    if name.endswith("-all"):
        return  # rounded to half precision after they were scored
    assert all((folder / f"samples-{steps}.png").exists() for steps in (1, 5, 18))
    scores = {s["sampler"]: s for s in card.scores if s["metric"].startswith("fd-lite2@")}
    assert set(scores) == {"heun-1", "heun-5", "heun-18", "data"}
    assert all(s["model_sha256"] == card.sha256 for k, s in scores.items() if k != "data")
    assert scores["heun-18"]["value"] < scores["heun-5"]["value"] < scores["heun-1"]["value"]
    assert f"fd-lite2@{len(data_of(card) or ())}" in str(card)


def test_emoji_are_those_of_the_conditional_teacher_without_its_labels() -> None:
    teacher, conditional = load_teacher("emoji"), load_teacher("emoji-cond")
    assert teacher.card.name == "emoji" and teacher.card.source == "teachers/emoji-cond, ships with gddlab"
    assert "32 x [1, 2, 3], 1 block per level" in str(teacher.card)
    assert read_json(bundled_file("emoji").parent / "config.json")["label_dropout"] == 0.5
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(teacher(x, 1.0), conditional(x, 1.0), rtol=1e-4, atol=1e-4)


def test_bundled_teacher_denoises() -> None:
    """Better than the trivial denoiser at every noise level where there is something to do."""
    from gddlab.datasets import digits

    teacher = load_teacher("digits")
    x = digits().images(slice(0, 32))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for sigma in (0.1, 0.5, 2.0):
            error = (teacher(x + sigma * noise, sigma) - x).square().mean()
            wiener = (x.var() * sigma**2) / (x.var() + sigma**2)
            assert error < 0.5 * wiener, sigma


def test_a_run_directory_gives_its_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "digits"  # the name of a bundled teacher
    run.mkdir()
    (run / "config.json").write_text('{"teacher": "digits", "mask": null}')
    with pytest.raises(NotFound, match="has no student"):
        load_teacher(run)
    student = make_student(tiny_net())
    (run / "snapshots").mkdir()
    save_network(make_student(tiny_net()), run / "snapshots" / "5.safetensors")
    save_network(student, run / "student.safetensors")
    net = load_teacher(run)
    assert isinstance(net, OneStepPrecond) and net.card.name == "student of digits"
    assert hash_tensors(net.state_dict()) == hash_tensors(student.state_dict())
    assert not any(p.requires_grad for p in net.parameters())
    monkeypatch.chdir(tmp_path)
    assert not isinstance(load_teacher("digits"), OneStepPrecond)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(GddlabError, match="did you mean 'digits'"):
        load_teacher("digit")
    with pytest.raises(NotFound, match="no such file"):
        load_teacher(tmp_path / "x.safetensors")
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(GddlabError, match=r"x\.bin is .*; a teacher is an EDM pickle"):
        load_teacher(tmp_path / "x.bin")
    with pytest.raises(GddlabError, match=r"holds no teacher\.safetensors"):
        load_teacher(tmp_path)
