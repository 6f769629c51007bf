"""Parts of a configuration: given whole, as a dict, or left out; what a preset's own part keeps; one-line refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gddlab
from gddlab.distill.config import TrainConfig
from gddlab.distill.parts import parts_of

digits = gddlab.presets.digits


def test_a_part_replaces_the_presets() -> None:
    stylegan2 = gddlab.StyleGAN2(channel_max=64)
    assert digits(run_dir="a", discriminator=stylegan2).discriminator == stylegan2
    assert digits(run_dir="a", discriminator={"kind": "stylegan2", "channel_max": 64}).discriminator == stylegan2
    alone = digits(run_dir="a", discriminator=None, instance=gddlab.Consistency(steps=16, distance="lite0"))
    assert alone.discriminator is None and not alone.has_r1
    assert alone.instance == gddlab.Consistency(steps=16, distance="lite0")
    assert digits(run_dir="a", augment={}).augment == gddlab.Augment(ops=("bgc",))


@pytest.mark.parametrize("kind", [{}, {"kind": "projected"}])
def test_a_dict_changes_fields_of_the_presets_own_part(kind: dict[str, str]) -> None:
    own = digits(run_dir="a").discriminator
    changed = digits(run_dir="a", discriminator=kind | {"input_size": 32}).discriminator
    assert own is not None and changed == own.model_copy(update={"input_size": 32})


def test_every_kind_comes_back_from_json(tmp_path: Path) -> None:
    fields: list[dict[str, Any]] = [
        {name: part()} for name in ("discriminator", "instance", "augment") for part in parts_named(name).values()
    ]
    assert len(fields) == 8
    for i, given in enumerate(fields):
        config = digits(run_dir=tmp_path / str(i), **given)
        config.write()
        assert TrainConfig.load(config.run_dir) == config


def parts_named(name: str) -> dict[str, Any]:
    field = TrainConfig.model_fields[name]
    return parts_of(field.annotation)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: gddlab.StyleGAN2(channel_maxx=3),
            "unknown field of StyleGAN2 'channel_maxx': did you mean 'channel_max'",
        ),
        (lambda: gddlab.LPIPS(net="vgg16"), "unknown net 'vgg16': did you mean 'vgg'"),
        (lambda: gddlab.Progressive(steps=12), "power of two"),
        (lambda: TrainConfig(), "run_dir is missing"),
        (lambda: digits(run_dir="a", discriminator=gddlab.Augment()), "discriminator=Augment.*: give a part"),
        (lambda: digits(run_dir="a", discriminator=print), "an object of this process"),
    ],
)  # fmt: skip
def test_a_part_is_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(gddlab.GddlabError, match=message) as e:
        make()
    assert "\n" not in str(e.value)
