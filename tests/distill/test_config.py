"""Configurations: what cannot work is refused when made; a folder holds one configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.errors import GddlabError
from gddlab.files import read_json
from tests.conftest import tiny_config
from tests.distill.test_trainer import by

ALONE = World(0, 1, torch.device("cpu"))


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
        ({"augment": ("color",)}, "give a part, such as gddlab.Augment"),
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
        ({"instance": by("cd")}, "instance is None there, of kind 'cd' here"),
        (
            {"discriminator": {"kind": "stylegan2"}},
            "discriminator is of kind 'projected' there, of kind 'stylegan2' here",
        ),
        ({"discriminator": {"cout": 8}}, "discriminator.cout is 4 there, 8 here"),
    ):
        assert tiny_config(tmp_path / "run", tiny_teacher, **fields).first_difference(older) == message


def test_another_configuration_is_refused_and_nothing_touched(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher)
    config.write()
    before = (tmp_path / "run" / "config.json").read_bytes()
    other = tiny_config(tmp_path / "run", tiny_teacher, lr_g=1e-3)
    with pytest.raises(GddlabError, match=r"lr_g is 0\.0008 there, 0\.001 here"):
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


def test_a_configuration_is_frozen_and_its_copies_are_checked(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher)
    with pytest.raises(GddlabError, match=r"TrainConfig is frozen: make another with model_copy\(update={'seed'"):
        config.seed = 2  # type: ignore[misc]
    with pytest.raises(GddlabError, match="seed=-1: input should be greater"):
        config.model_copy(update={"seed": -1})
    with pytest.raises(GddlabError, match="unknown configuration field 'sed'"):
        config.model_copy(update={"sed": 1})
    assert config.model_copy(update={"seed": 2}).to_json() == config.to_json() | {"seed": 2}
