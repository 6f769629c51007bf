"""Operators and adjoints: the dot-product test, the nearest image that agrees, masks."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gddlab.editing.operators import Operator, Pixels, blur, check_keep, downscale, greyscale
from gddlab.errors import GddlabError

OPERATORS = [(downscale(4), (1, 16, 16)), (downscale(2), (3, 8, 8)), (blur(1.0), (3, 16, 16)), (greyscale(), (3, 8, 8))]


@pytest.mark.parametrize(("operator", "shape"), OPERATORS, ids=lambda x: getattr(x, "name", ""))
def test_adjoints_are_adjoint_and_images_are_made_to_agree(operator: Operator, shape: tuple[int, ...]) -> None:
    operator.check(shape)
    torch.manual_seed(0)
    x, truth = torch.rand(2, *shape) * 2 - 1, torch.rand(2, *shape) * 2 - 1
    y = operator.apply(truth)
    found = operator.put_back(x, y)
    left = 0.15 if "blur" in operator.name else 2e-3  # what a blur takes away is out of reach of float32
    assert (operator.apply(found) - y).abs().max() < left * (operator.apply(x) - y).abs().max()


def test_an_operator_by_a_dense_matrix() -> None:
    torch.manual_seed(1)
    a = torch.randn(10, 64)
    operator = Operator(lambda x: x.flatten(1) @ a.T, lambda y: (y @ a).view(-1, 1, 8, 8), "matrix")
    operator.check((1, 8, 8))
    x, y = torch.randn(3, 1, 8, 8), torch.randn(3, 10)
    expected = x.flatten(1) + (y - x.flatten(1) @ a.T) @ torch.linalg.pinv(a).T
    assert_close(operator.put_back(x, y).flatten(1), expected, rtol=1e-3, atol=1e-4)


def test_a_wrong_adjoint_is_refused() -> None:
    def rows(x: torch.Tensor) -> torch.Tensor:
        return x[..., ::2, :]

    right = Operator(rows, lambda y: torch.zeros(*y.shape[:2], 16, 16).index_copy(2, torch.arange(0, 16, 2), y), "rows")
    right.check((1, 16, 16))
    with pytest.raises(GddlabError, match=r"the adjoint of 'rows' is none: <A x, y> = .*; give A\^T"):
        Operator(rows, lambda y: y.repeat_interleave(2, 2), "rows").check((1, 16, 16))
    with pytest.raises(GddlabError, match=r"the adjoint of 'rows' gives \(2, 1, 8, 16\): give \(2, 1, 16, 16\)"):
        Operator(rows, lambda y: y, "rows").check((1, 16, 16))
    with pytest.raises(GddlabError, match="'operator' measures nothing"):
        Operator(lambda x: 0 * x, lambda y: 0 * y).check((1, 16, 16))
    with pytest.raises(GddlabError, match=r"does not take images \(2, 1, 16, 16\)"):
        Operator(lambda x: x[:, :, 20], lambda y: y).check((1, 16, 16))


def test_known_pixels_are_equal_to_the_bit() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    keep = check_keep(torch.rand(2, 1, 8, 8) < 0.5, 2, (3, 8, 8))
    operator = Pixels(keep)
    operator.check((3, 8, 8))
    found = operator.put_back(x, operator.apply(y))
    whole = keep.expand_as(x)
    assert torch.equal(found[whole], y[whole]) and torch.equal(found[~whole], x[~whole])
    assert torch.equal(operator.at(torch.tensor([1, 1])).keep, keep[[1, 1]])


def test_masks_are_refused_in_one_line() -> None:
    shape = (1, 8, 8)
    half = torch.ones(8, 8)
    half[4:] = 0
    assert check_keep(half, 3, shape).shape == (1, 1, 8, 8)
    assert torch.equal(check_keep("top", 3, (1, 8, 8))[0, 0], half.bool())
    assert check_keep("border", 1, (3, 8, 8)).sum() == 64 - 16
    for bad, text in (
        ("topp", "unknown keep 'topp': did you mean 'top'"),
        (torch.ones(3, 8, 8), r"keep is \(3, 8, 8\): give"),  # of three images, or of three channels?
        (torch.ones(4, 4), r"keep is \(4, 4\): give \(8, 8\), \(3, 1, 8, 8\)"),
        (half * 0.5, "other values than 0 and 1"),
        (torch.ones(8, 8), "nothing is missing of image 0"),
        (torch.stack([half, half, 0 * half])[:, None], "nothing is known of image 2"),
        ([1, 0], "keep is a list: give a tensor"),
    ):
        with pytest.raises(GddlabError, match=text):
            check_keep(bad, 3, shape)
