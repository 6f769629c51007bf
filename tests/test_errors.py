"""Refusals in one line: of names, and of arguments against their annotations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import nn

import gddlab
from gddlab.errors import GddlabError, validated
from gddlab.launch.handle import RunFailed


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
        ((torch.zeros(3), True), {}, "n=True: give a number"),
        ((torch.zeros(3),), {"kind": 0.5}, r"kind=0.5: give a sequence, such as \(0.5,\)"),
        (([[1.0] * 100] * 100,), {}, "^x=<list>: input should be an instance of Tensor"),
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


def test_a_long_answer_keeps_its_ends() -> None:
    teacher = gddlab.load_teacher("digits")
    for call in (
        lambda: gddlab.probe(teacher, 1, layers=[[1.0] * 1000]),
        lambda: gddlab.probe(teacher, 1, data=[[1.0] * 1000]),
        lambda: gddlab.select_freeze(teacher, strategy=[[1.0] * 1000]),
        lambda: gddlab.presets.digits(run_dir="r", augment=[[1.0] * 1000]),
    ):
        with pytest.raises(GddlabError) as refused:
            call()
        assert len(str(refused.value)) < 700 and "\n" not in str(refused.value)
    assert str(RunFailed("a\n" * 1000)) == "a\n" * 1000  # a traceback


def test_a_network_is_named_not_shown() -> None:
    teacher: Any = gddlab.load_teacher("digits")
    for call in (
        lambda: gddlab.probe(teacher, 1, layers=[teacher.model.enc]),
        lambda: gddlab.probe(teacher, teacher),
        lambda: gddlab.sample(teacher, seeds=teacher),
        lambda: gddlab.sample(teacher, class_labels=teacher),
        lambda: gddlab.select_freeze(teacher, strategy=teacher),
        lambda: gddlab.presets.digits(run_dir="r", augment=teacher),
        lambda: gddlab.load_run("data/runs/digits/cd/seed-0").student(teacher),
    ):
        with pytest.raises(GddlabError) as refused:
            call()
        assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)
    assert str(GddlabError(f"{teacher} does not fit")).count("\n") == 0  # wherever a message shows one


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


def test_a_configuration_as_a_dict_says_what_does_not_fit() -> None:
    for call in (gddlab.scaling, gddlab.preflight, gddlab.train_teacher, gddlab.TrainConfig.model_validate):
        with pytest.raises(GddlabError, match=r"^run_dir is missing: give it$"):
            call({})  # type: ignore[operator]
        with pytest.raises(GddlabError, match=r"^unknown .*field.* 'sed': did you mean 'seed'"):
            call({"run_dir": "r", "sed": 3})  # type: ignore[operator]
    config = gddlab.presets.digits(run_dir="r")
    assert config.model_copy(deep=True) == config == gddlab.TrainConfig.model_validate(config)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**80])
def test_a_seed_has_32_bits(seed: int) -> None:
    images = np.zeros((4, 16, 16, 1), np.uint8)
    for call in (
        lambda: gddlab.presets.digits(run_dir="r", seed=seed),
        lambda: gddlab.TeacherConfig(run_dir="r", seed=seed),
        lambda: gddlab.evaluate(images, data="digits", seed=seed),
        lambda: gddlab.real_split("digits", seed=seed),
        lambda: gddlab.open_dataset("digits", max_images=5, seed=seed),
        lambda: gddlab.prepare("digits", dry_run=True, max_images=5, seed=seed),
    ):
        with pytest.raises(GddlabError, match=f"^seed={seed}: input should be (greater|less) than or equal to "):
            call()


@pytest.mark.parametrize("value", ["x", -1, 0, True, float("nan")])
def test_a_time_to_wait_is_seconds(value: Any, tmp_path: Path) -> None:
    for call in (
        lambda: gddlab.sample_files("digits", tmp_path / "s", 2, timeout_s=value),
        lambda: gddlab.train(gddlab.presets.digits(run_dir=tmp_path / "r"), timeout_s=value),
    ):
        with pytest.raises(GddlabError, match=f"^timeout_s={value!r}: give seconds, more than 0$"):
            call()
    assert not [*tmp_path.iterdir()]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    mask = gddlab.FreezeMask((), (("w", (1,)),))
    for call in (mask.save, gddlab.FreezeMask.load):
        with pytest.raises(GddlabError, match=f"{tmp_path} is a folder: give "):
            call(tmp_path)
    mask.save(tmp_path / "mask.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        gddlab.FreezeMask.load(tmp_path / "mask.json" / "inside")
    assert [p.name for p in tmp_path.iterdir()] == ["mask.json"]


def test_a_truth_value_is_no_number() -> None:
    for call in (
        lambda: gddlab.probe(gddlab.load_teacher("digits"), 2, n=True),
        lambda: gddlab.sample(gddlab.load_teacher("digits"), True),
        lambda: gddlab.presets.digits(run_dir="r", batch=True),
        lambda: gddlab.presets.digits(run_dir="r", discriminator={"cout": True}),
        lambda: gddlab.TeacherConfig(run_dir="r", seed=True),
        lambda: gddlab.train(gddlab.presets.digits(run_dir="r"), nproc=True),
    ):
        with pytest.raises(GddlabError, match=r"^\w+=True: give a(n integer| number)$"):
            call()
    assert gddlab.presets.digits(run_dir="r", xflip=True).xflip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop_on": "nan"}, r"stop_on='nan': give a sequence, such as \('nan',\)$"),
        ({"stop_on": "nam"}, r"unknown stop_on 'nam': did you mean 'nan'\?"),
        ({"classes": 3}, r"classes=3: give a sequence, such as \(3,\)$"),
        ({"mid_sigmas": [float("nan")]}, r"mid_sigmas.0=nan: input should be a finite number$"),
        ({"mid_sigmas": 2}, r"mid_sigmas=2: give a sequence, such as \(2,\)$"),
    ],
)
def test_one_where_several_are_meant(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(GddlabError, match=f"^{message}"):
        gddlab.presets.digits(run_dir="r", **fields)


def test_a_function_of_other_arguments_is_refused() -> None:
    teacher = gddlab.load_teacher("digits")
    one: Any = lambda x: True  # noqa: E731
    two: Any = lambda x, y: True  # noqa: E731
    for call, wanted in (
        (lambda: gddlab.probe(teacher, 1, n=1, layers=one), "layers=<lambda>: give a function of name, module"),
        (lambda: gddlab.select_freeze(teacher, strategy=two), "strategy=<lambda>: give a function of source"),
        (lambda: gddlab.wrap(teacher, two), "denoise=<lambda>: give a function of model, x, sigma, class_labels"),
        (lambda: gddlab.patch(teacher, teacher, measure=two), "measure=<lambda>: give a function of model"),
    ):
        with pytest.raises(GddlabError, match=wanted):
            call()


def test_a_strategy_is_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (lambda: gddlab.presets.digits(run_dir="r", mask="gdd-i"), lambda: gddlab.FreezeMask.load("gdd-i")):
        with pytest.raises(FileNotFoundError, match=r"mask 'gdd-i' is a strategy, no file: give select_freeze\("):
            call()
