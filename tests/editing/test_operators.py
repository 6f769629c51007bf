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


def test_measurements_that_depend_on_each_other_or_contradict_themselves() -> None:
    """Least squares, by the pseudo-inverse: no division by nothing, and never farther than before."""
    torch.manual_seed(0)
    a = torch.randn(40, 64)
    for rows in (torch.cat([a[:20], a[:20]]), torch.cat([a, a, a])):  # of rank 20, and more than there are pixels
        operator = Operator(lambda x, m=rows: x.flatten(1) @ m.T, lambda y, m=rows: (y @ m).view(-1, 1, 8, 8))
        x, y = torch.randn(3, 1, 8, 8), torch.randn(3, len(rows))
        expected = x.flatten(1).double() + (y - x.flatten(1) @ rows.T).double() @ torch.linalg.pinv(rows.double()).T
        assert_close(operator.put_back(x, y).flatten(1), expected.float(), rtol=5e-3, atol=5e-3)
        assert (operator.error(operator.put_back(x, y), y) <= operator.error(x, y)).all()
    half = torch.ones(8, 8)
    half[4:] = 0
    masked = Operator(lambda x: x * half, lambda y: y * half)  # nothing can measure as this where it is 0
    found = masked.put_back(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
    assert_close(found[0, 0], half)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_scale_of_an_operator_says_nothing(scale: float) -> None:
    operator = Operator(
        lambda x: x[..., ::2] * scale, lambda y: y.repeat_interleave(2, -1) * torch.tensor([scale, 0] * 4)
    )
    operator.check((1, 8, 8))
    torch.manual_seed(0)
    x, truth = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    assert_close(operator.put_back(x, operator.apply(truth))[..., ::2], truth[..., ::2])


def test_images_agree_and_are_in_range() -> None:
    """A projection alone leaves the range where much is at its end, as a digit's black ground is."""
    torch.manual_seed(0)
    truth = (3 * torch.randn(4, 1, 16, 16)).clamp(-1, 1)
    operator, x = downscale(4), 2 * torch.rand(4, 1, 16, 16) - 1
    y = operator.apply(truth)
    once = operator.put_back(x, y).clamp(-1, 1)
    found = operator.agreeing(x, y)
    assert found.abs().max() <= 1 and (operator.apply(once) - y).abs().max() > 0.02
    assert (operator.apply(found) - y).abs().max() < 2e-3
    beyond = operator.agreeing(x, y + 5)  # which no image can have
    assert beyond.isfinite().all() and beyond.abs().max() <= 1


def test_functions_get_copies_and_their_own_precision() -> None:
    seen = []

    def halve(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return x.mul_(0.5)

    operator, x = Operator(halve, halve), torch.ones(2, 1, 8, 8)
    with torch.autocast("cpu"):
        operator.check((1, 8, 8))
        assert_close(operator.put_back(x, torch.zeros(2, 1, 8, 8)), torch.zeros(2, 1, 8, 8))
    assert torch.equal(x, torch.ones(2, 1, 8, 8)) and not any(seen)


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
    with pytest.raises(GddlabError, match=r"the adjoint of 'rows' does not take \(2, 1, 8, 16\)"):
        Operator(rows, lambda y: None, "rows").check((1, 16, 16))
    with pytest.raises(GddlabError, match=r"gives torch.complex64 \(2, 1, 8, 16\) of 2 images: give floats"):
        Operator(lambda x: rows(x) * 1j, lambda y: y, "rows").check((1, 16, 16))
    with pytest.raises(GddlabError, match=r"gives torch.float32 \(2,\) of 2 images: give floats"):
        Operator(lambda x: x.mean((1, 2, 3)), lambda y: y, "rows").check((1, 16, 16))
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
