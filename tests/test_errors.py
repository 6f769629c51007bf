"""Refusals in one line: of names, and of arguments against their annotations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field
from torch import nn

import gddlab
from gddlab.errors import GddlabError, NotFound, validated


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


def test_a_long_value_does_not_fill_the_screen() -> None:
    long = [list(range(1000))] * 1000
    for call in (
        lambda: measure(torch.zeros(3), kind=long),  # type: ignore[arg-type]
        lambda: gddlab.select_freeze(gddlab.load_teacher("digits"), strategy=str(long)),
        lambda: gddlab.load_run(long),  # type: ignore[arg-type]
        lambda: gddlab.probe(gddlab.load_teacher("digits"), 2, n=2, data=long),
    ):
        with pytest.raises(GddlabError) as refused:
            call()
        assert len(str(refused.value)) < 1000
    with pytest.raises(GddlabError, match=r"unknown kind 'mmm.*m'\.\.\. \(1,000 characters\): accepted: mean, median"):
        measure(torch.zeros(3), kind="m" * 1000)  # type: ignore[arg-type]
    text = f"values are {long}\n{long}: give fewer"
    for error in (GddlabError(text), NotFound(text)):
        assert str(error).startswith("values are [[0, 1, 2")
        assert str(error).endswith(": give fewer")
        assert len(str(error)) < 1000 and "\n" not in str(error)


def test_a_missing_argument_is_pythons_error() -> None:
    with pytest.raises(TypeError, match="lacks the argument 'x'"):
        measure()  # type: ignore[call-arg]


def test_making_an_object_is_checked_too() -> None:
    with pytest.raises(GddlabError, match="frozen=5: input should be a valid tuple"):
        gddlab.FreezeMask(5, ())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"FreezeMask\(\) lacks the argument 'parameters'"):
        gddlab.FreezeMask(())  # type: ignore[call-arg]


NO_PATHS: dict[str, Callable[[Any], object]] = {
    "load_teacher": gddlab.load_teacher,
    "attach": gddlab.attach,
    "load_run": gddlab.load_run,
    "load_runs": gddlab.load_runs,
    "load_study": gddlab.load_study,
    "report": gddlab.report,
    "report, out": lambda path: gddlab.report("data/runs", out=path),
    "preset": lambda path: gddlab.presets.digits(run_dir=path),
    "TrainConfig": lambda path: gddlab.TrainConfig(run_dir=path),
    "TrainConfig.load": gddlab.TrainConfig.load,
    "TeacherConfig": lambda path: gddlab.TeacherConfig(run_dir=path),
    "FreezeMask.load": gddlab.FreezeMask.load,
    "FreezeMask.save": lambda path: gddlab.FreezeMask((), (("w", (1,)),)).save(path),
    "ProbeResult.load": gddlab.ProbeResult.load,
    "convert": lambda path: gddlab.convert("digits", path),
    "export": lambda path: gddlab.export(nn.Identity(), path),
    "reference": lambda path: gddlab.reference("digits", path),
    "reproduce": lambda path: gddlab.reproduce("digits", out=path),
    "sample_files": lambda path: gddlab.sample_files("digits", path, n=1),
    "adversarial_problem": gddlab.adversarial_problem,
}


@pytest.mark.parametrize("value", [5, ""])
@pytest.mark.parametrize("call", NO_PATHS.values(), ids=NO_PATHS.keys())
def test_what_is_no_path_is_refused(call: Callable[[Any], object], value: object) -> None:
    with pytest.raises(GddlabError, match=rf"^\w+={value!r}: (give a path|input should be a valid string)$|^give a "):
        call(value)


def test_what_is_no_network_is_refused() -> None:
    teacher = gddlab.load_teacher("digits")
    mask = gddlab.select_freeze(teacher, strategy="gdd-i")
    for call in (
        lambda: gddlab.patch(teacher, 5),
        lambda: gddlab.weight_change(5, teacher),
        lambda: gddlab.grad_probe(5),
        lambda: mask.verify(teacher, 5),  # type: ignore[arg-type]
        lambda: gddlab.wrap(5, denoise=print),
    ):
        with pytest.raises(GddlabError, match="the network is of type int: give"):
            call()


def test_what_is_no_configuration_is_refused() -> None:
    for call in (gddlab.scaling, gddlab.preflight, gddlab.train_teacher):
        with pytest.raises(GddlabError, match="config='x': input should be a valid dictionary or instance of T"):
            call("x")  # type: ignore[operator]
    with pytest.raises(GddlabError, match="nproc='2': give an integer"):
        gddlab.train(gddlab.presets.digits(run_dir="r"), nproc="2")  # type: ignore[arg-type]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    mask = gddlab.FreezeMask((), (("w", (1,)),))
    for call in (mask.save, gddlab.FreezeMask.load):
        with pytest.raises(GddlabError, match=f"{tmp_path} is a folder: give "):
            call(tmp_path)
    mask.save(tmp_path / "mask.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        gddlab.FreezeMask.load(tmp_path / "mask.json" / "inside")
    assert [p.name for p in tmp_path.iterdir()] == ["mask.json"]
