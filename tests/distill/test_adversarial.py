"""The generator's loss of a run, outside of training: the same student, discriminator and gradient."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from gddlab.distill.adversarial import adversarial_problem
from gddlab.distill.distributed import World
from gddlab.distill.losses import g_loss
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError, NotFound
from gddlab.files import hash_tensors
from gddlab.freezing import select_freeze
from gddlab.nets import save_network
from gddlab.probing.gradients import grad_probe
from gddlab.sampling import latents
from gddlab.teachers import load_teacher
from tests.conftest import tiny_config, tiny_net

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Trainer:
    """Four iterations of a frozen student, in float64."""
    folder = tmp_path_factory.mktemp("run")
    mask = select_freeze(load_teacher(tiny_teacher), strategy="gdd-i")
    config = tiny_config(folder, tiny_teacher, mask=mask, precision="float64", total_kimg=0.032)
    config.write()
    trainer = Trainer(config, ALONE)
    assert trainer.train() == "done"
    return trainer


def test_gradients_are_those_of_the_next_generator_step(run: Trainer) -> None:
    problem = adversarial_problem(run.config.run_dir, n=16, seed=3)
    assert hash_tensors(problem.student.state_dict()) == hash_tensors(run.step.g.state_dict())
    assert hash_tensors(problem.student.state_dict()) != hash_tensors(run.ema.state_dict())
    batch = next(iter(problem.batches))
    z, labels = batch.inputs
    assert (batch.sigma, batch.n, labels) == (80.0, 8, None)
    assert_close(z, latents(range(3, 11), (1, 16, 16)).double())

    step = copy.deepcopy(run.step)
    expected, _ = step.g_step(z, None)
    loss = problem.loss(problem.student, batch.inputs)
    assert_close(loss.detach(), expected["loss/g"])
    trained = [n for n, p in step.g.named_parameters() if p.grad is not None]
    assert trained
    assert len(trained) < len(list(step.g.parameters()))
    found = torch.autograd.grad(loss, [problem.student.get_parameter(n) for n in trained])
    for name, g in zip(trained, found, strict=True):
        grad = step.g.get_parameter(name).grad
        assert grad is not None
        assert_close(g * run.config.adversarial_weight, grad, rtol=1e-9, atol=1e-12)


def test_every_batch_meets_the_same_discriminator(run: Trainer) -> None:
    problem = adversarial_problem(run.config.run_dir, n=16)
    first, second = (b.inputs for b in problem.batches)
    d = copy.deepcopy(run.step.d)
    with torch.no_grad():
        values = [problem.loss(problem.student, x) for x in (first, second, first)]
        expected = g_loss(d(problem.student.generate(first[0])), "ns")
    assert_close(values[0], expected)
    assert torch.equal(values[0], values[2])
    assert not torch.equal(values[0], values[1])


def test_the_probe_says_what_must_change_in_frozen_layers_too(run: Trainer) -> None:
    mask = run.config.mask
    assert mask is not None
    before = {p: p.stat().st_mtime_ns for p in run.config.run_dir.rglob("*")}
    problem = adversarial_problem(run.config.run_dir, n=16)
    flags = [p.requires_grad for p in problem.student.parameters()]
    result = grad_probe(*problem)
    assert flags == [p.requires_grad for p in problem.student.parameters()]
    assert result.sigmas == [80.0]
    assert result.meta["settings"]["batches"] == [2]
    assert set(result.frame["n_images"]) == {16}
    frozen = {name.removesuffix(".weight") for name in mask.frozen if name.endswith(".weight")}
    assert frozen & set(result.layers)
    assert (result.pivot("grad_norm_ratio") > 0).all(None)
    assert grad_probe(*problem).hash == result.hash  # the same noise again
    assert before == {p: p.stat().st_mtime_ns for p in run.config.run_dir.rglob("*")}


def test_global_random_numbers_go_on(run: Trainer) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    adversarial_problem(run.config.run_dir, n=8)
    assert torch.equal(torch.rand(3), expected)


def test_a_conditional_student_gets_classes_of_the_data(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.safetensors"
    save_network(tiny_net(label_dim=10), teacher, name="conditional", data="digits")
    config = tiny_config(tmp_path / "run", teacher, total_kimg=0.008)
    config.write()
    trainer = Trainer(config, ALONE)
    trainer.iterate()
    trainer.checkpoint()
    trainer.checkpoints.wait()
    problem = adversarial_problem(tmp_path / "run", n=8, batch_size=4)
    labels = torch.cat([b.inputs[1] for b in problem.batches])
    assert labels.shape == (8, 10)
    assert torch.equal(labels.sum(1), torch.ones(8))
    result = grad_probe(*problem, layers=["model.map_label", "model.enc.16x16_conv"])
    assert (result.pivot("fisher") > 0).all(None)


def test_what_cannot_be_rebuilt_is_refused(tmp_path: Path, tiny_teacher: Path, run: Trainer) -> None:
    with pytest.raises(NotFound, match="no such file"):
        adversarial_problem(tmp_path)
    tiny_config(tmp_path / "new", tiny_teacher).write()
    with pytest.raises(NotFound, match="new has no checkpoint: wait for its first one"):
        adversarial_problem(tmp_path / "new")
    for name, fields in {"augment": {"augment": {"ops": ("color",)}}, "mid_sigmas": {"mid_sigmas": (0.8,)}}.items():
        tiny_config(tmp_path / name, tiny_teacher, **fields).write()
        with pytest.raises(GddlabError, match=f"trains with {name}, which this loss does not have"):
            adversarial_problem(tmp_path / name, n=8)
    with pytest.raises(GddlabError, match="n=12 images in batches of 8: give a multiple"):
        adversarial_problem(run.config.run_dir, n=12)
    with pytest.raises(GddlabError, match="batch_size=0"):
        adversarial_problem(run.config.run_dir, batch_size=0)
