"""Refusals in one line: of names, and of arguments against their annotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import pytest
import torch
from pydantic import Field

from gddlab.errors import GddlabError, validated


@validated
def measure(
    x: torch.Tensor, n: Annotated[int, Field(ge=1)] = 4, *, kind: Literal["mean", "median"] | Sequence[float] = "mean"
) -> str:
    """Some function."""
    return f"{len(x)} {n} {kind}"


def test_what_fits_goes_through() -> None:
    assert measure(torch.zeros(3), 2, kind="median") == "3 2 median"
    assert measure(torch.zeros(3), kind=[0.5]) == "3 4 [0.5]"
    assert measure.__doc__ == "Some function."


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.zeros(3), 0), {}, "n=0: input should be greater than or equal to 1"),
        ((torch.zeros(3),), {"n": "many"}, "n='many': input should be a valid integer"),
        ((torch.zeros(3),), {"kind": "meen"}, r"unknown kind 'meen': did you mean 'mean'"),
        ((torch.zeros(3),), {"kin": "mean"}, r"unknown argument of measure 'kin': did you mean 'kind'"),
        ((), {"n": 0, "kin": "mean"}, r"unknown argument of measure 'kin': did you mean 'kind'"),
        (("three",), {}, "x='three': input should be an instance of Tensor"),
    ],
)
def test_what_does_not_is_one_line(args: tuple[object, ...], kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(GddlabError, match=message) as refused:
        measure(*args, **kwargs)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_a_missing_argument_is_pythons_error() -> None:
    with pytest.raises(TypeError, match="lacks the argument 'x'"):
        measure()  # type: ignore[call-arg]
