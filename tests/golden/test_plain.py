"""The plain implementation recomputes the shipped training cases, and the trainer passes the cases that it makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from gddlab.nets import from_edm
from gddlab.nets.architectures import NCSNPP
from tests.golden import plain, test_training
from tests.golden.conftest import Case

SHIPPED = sorted(Path(__file__).parent.glob("training/*.npz"))
COMPUTED = {"shapes", "norms_after", "frozen", "records", "n_params_d", "n_frozen", "n_params_g"}
"""What of a case's meta is a result."""
SMALL: dict[str, Any] = {
    "img_resolution": 16,
    "img_channels": 3,
    "label_dim": 10,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0,
}
ADM: dict[str, Any] = {"model_type": "DhariwalUNet", "model_channels": 32}
MADE = [
    pytest.param(
        {
            "init_kwargs": {**SMALL, **NCSNPP, "model_channels": 16},
            "seed": 31,
            "option": 3,
            "loss_type": "hinge",
            "cout": 8,
        },
        id="option3_hinge_cond_cout8",
    ),
    pytest.param(
        {
            "init_kwargs": {**SMALL, **ADM, "label_dim": 0},
            "seed": 41,
            "option": 2,
            "loss_type": "hinge",
            "cout": 4,
        },
        id="option2_hinge_adm",
        marks=pytest.mark.slow,
    ),
]


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value in nested dicts and lists with the way to it."""
    if isinstance(tree, (dict, list)):
        for k, v in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(v, (*path, str(k)))
    else:
        yield path, tree


@pytest.mark.parametrize(
    "path",  # the conditional GDD-I step holds all that the others do; they take as long
    [pytest.param(p, id=p.stem, marks=() if "cond" in p.stem else pytest.mark.slow) for p in SHIPPED],
)
def test_plain_recomputes_a_shipped_case(path: Path) -> None:
    shipped = Case(path)
    settings = {k: v for k, v in shipped.meta.items() if k not in COMPUTED}
    arrays = {k: v for k, v in shipped.arrays.items() if k != "gen_x"}
    meta, gen_x = plain.compute(settings, arrays)
    found, expected = dict(leaves(meta)), dict(leaves(shipped.meta))
    assert found.keys() == expected.keys() and len(found) > 500
    for way, value in expected.items():
        if isinstance(value, float) and not test_training.before_batchnorm(way[-1]):
            assert_close(found[way], value, rtol=1e-6, atol=1e-12, msg=f"{way}: {found[way]}, not {value}")
        elif not isinstance(value, float):
            assert found[way] == value, way
    assert_close(gen_x, shipped["gen_x"], rtol=1e-6, atol=1e-6 * shipped["gen_x"].abs().max().item())


@pytest.mark.parametrize(("option", "share"), enumerate([0, 84.40, 86.50, 90.46]))
def test_plain_freezes_the_published_share_of_cifar10s_ncsnpp(option: int, share: float) -> None:
    kwargs = {**NCSNPP, "img_resolution": 32, "img_channels": 3, "model_channels": 128, "channel_mult": [2, 2, 2]}
    with torch.device("meta"):
        sizes = {k: p.numel() for k, p in from_edm("EDMPrecond", **kwargs).named_parameters()}
    assert sum(sizes.values()) == 56_395_523
    frozen = sum(sizes[k] for k in plain.frozen_names(sizes, plain.OPTIONS[option]))
    assert round(100 * frozen / 56_395_523, 2) == share


@pytest.mark.parametrize("asked", MADE)
def test_the_trainer_passes_a_made_case(asked: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "made.npz", **plain.make_case(**asked))
    made, shipped = Case(tmp_path / "made.npz"), Case(SHIPPED[0])
    assert made.meta.keys() == shipped.meta.keys()
    kinds, expected = ({k: v.dtype for k, v in c.arrays.items() if "buffer" not in k} for c in (made, shipped))
    assert kinds == expected
    test_training.test_training(made)
