"""The studies on a tiny teacher and students made of it: every column, and numbers computed a second way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from gddlab.datasets import digits, open_dataset
from gddlab.distill.distributed import World
from gddlab.distill.trainer import Trainer
from gddlab.editing import inpaint
from gddlab.errors import GddlabError
from gddlab.evaluation import evaluate
from gddlab.evaluation.images import drawn
from gddlab.experiments.digits import STILL
from gddlab.experiments.experiment import Judge, StudyInputs, StudyResult
from gddlab.experiments.factorial import groups
from gddlab.experiments.questions import OWN_RATE
from gddlab.experiments.studies import STUDIES
from gddlab.nets.io import make_student
from gddlab.probing.reductions import radial_power
from gddlab.sampling import sample
from gddlab.teachers import load_teacher
from tests.conftest import tiny_config
from tests.evaluation.conftest import small_features

N = 24


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "cache"))
    small_features(monkeypatch)


@pytest.fixture(scope="module")
def subjects(tiny_teacher: Path) -> StudyInputs:
    teacher = load_teacher(tiny_teacher)
    same, other = make_student(teacher), make_student(teacher)
    with torch.no_grad():
        other.get_parameter("model.dec.16x16_block1.conv1.weight").mul_(1.5)
    return StudyInputs(teacher, "digits", {"gdd": same, "gdd-i": other}, (1, 2, 3), Judge(n=N))


def test_the_full_teacher_has_blocks(subjects: StudyInputs) -> None:
    thrice = replace(subjects, steps=(1, 2), judge=Judge(n=N, blocks=2))
    frame = STUDIES[0].measure(thrice).frame
    count = frame[frame["metric"].str.startswith("fd-lite2")].groupby(["steps", "metric"]).size().to_dict()
    assert count == {(1, f"fd-lite2@{N}"): 1, (2, f"fd-lite2@{N}"): 2, (2, f"fd-lite2-min2@{N}"): 1}


def found(name: str, subjects: StudyInputs) -> StudyResult:
    return next(s for s in STUDIES if s.name == name).measure(subjects)


def test_teacher_steps(subjects: StudyInputs) -> None:
    f = found("teacher-steps", subjects)
    by_teacher = f.frame
    assert by_teacher["steps"].unique().tolist() == [1, 2, 3]
    assert by_teacher["nfe"].unique().tolist() == [1, 3, 5]
    names = {f"{m}@{N}" for m in ("fd-lite2", "kd-lite2", "precision-lite2", "recall-lite2")}
    assert set(by_teacher["metric"]) == names
    two = evaluate(subjects.teacher, data="digits", metrics=("fid",), n=N, steps=2, progress=False)
    row = by_teacher.query(f"steps == 2 and metric == 'fd-lite2@{N}'").iloc[0]
    assert_close(row["value"], two["fd-lite2"], rtol=1e-9, atol=0)
    assert row["seeds"] == f"0 to {N - 1}"
    assert [r.value for r in f.records] == f.frame["value"].tolist()


def test_known_cases(subjects: StudyInputs) -> None:
    halves = found("known-cases", subjects).frame
    assert set(halves["case"]) == {"other half"} and (halves["n"] == 898).all()
    judge = Judge(held_out="digits:held-out", n=N)
    frame = found("known-cases", replace(subjects, data="digits:train", judge=judge)).frame.set_index("case")
    assert [*dict.fromkeys(frame.index)] == ["copier", "held-out", "missing class", "other half"]
    copier, classless = (frame.loc[case].set_index("label")["value"] for case in ("copier", "missing class"))
    assert copier["fd-lite2"] < classless["fd-lite2"]
    assert "kd-lite2:held-out" in copier and "kd-lite2:held-out" not in classless
    in_blocks = found("known-cases", replace(subjects, judge=Judge(n=N, blocks=2))).frame
    assert in_blocks["label"].tolist() == halves["label"].tolist()


def test_a_student_that_is_not_there_is_named(subjects: StudyInputs) -> None:
    for name, needed in (("rewound", "gdd"), ("pulls", "warm")):
        with pytest.raises(GddlabError, match=f"needs a student of '{needed}', which is not there"):
            found(name, replace(subjects, students={}))


def test_followed(subjects: StudyInputs) -> None:
    students = {"gdd/seed-0": subjects.students["gdd"], "gdd-i/seed-1": subjects.students["gdd-i"]}
    frame = found("followed", replace(subjects, students=students)).frame.set_index("experiment")
    assert frame["seed"].to_dict() == {"gdd": 0, "gdd-i": 1}
    assert frame.loc["gdd", "frozen"] == 1 and 0.5 < frame.loc["gdd-i", "frozen"] < 1
    assert frame["found"].between(0, 1).all() and frame["correlation"].between(-1, 1).all()
    perfect = replace(subjects, students={"gdd": subjects.teacher}, steps=(18,))  # its own images
    row = found("followed", perfect).frame.iloc[0]
    assert row["found"] == 1 and row["correlation"] == pytest.approx(1)


def test_each_step(subjects: StudyInputs) -> None:
    two = make_student(subjects.teacher, mid_sigmas=(0.8,))
    students = {"gdd-i/seed-1": subjects.students["gdd-i"], "second-step-0.8/seed-0": two}
    f = found("each-step", replace(subjects, students=students)).frame
    assert f.groupby("experiment", sort=False)["steps"].unique().map(list).to_dict() == {
        "gdd-i": [1],
        "second-step-0.8": [1, 2, 0],
    }
    f = f[f["metric"] == "fd-lite2"].set_index(["experiment", "steps"])
    for steps, sigmas in ((1, (80.0,)), (2, (80.0, 0.8))):
        scores = evaluate(two, data="digits", metrics=("fid",), n=N, sigmas=sigmas, progress=False)
        assert f.loc[("second-step-0.8", steps), "value"] == pytest.approx(scores["fd-lite2"])
    ends = f.loc["second-step-0.8", "level"]
    assert ends[0] == pytest.approx((ends[1] + ends[2]) / 2, abs=0.03)  # images of other noises
    assert f["data_level"].unique() == pytest.approx([digits().uint8.mean() / 255])


def test_completed(subjects: StudyInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COMPLETED": 4, "WAYS": 2, "PARTS": ("top",), "SEARCHED": (1, 3), "TAUGHT": (2,)}.items():
        monkeypatch.setattr(f"gddlab.experiments.studies.{name}", value)
    judge = Judge(held_out="digits:held-out", n=N)
    two = make_student(subjects.teacher, mid_sigmas=(0.8,))
    students = {**subjects.students, "second-step-0.8": two}
    given: list[torch.Tensor] = []
    monkeypatch.setattr("gddlab.experiments.studies.inpaint", lambda *a, **k: given.append(a[1]) or inpaint(*a, **k))
    frame = found("completed", replace(subjects, data="digits:train", judge=judge, students=students)).frame
    settings = ["hidden truth", "pasted", "student, search of 1 steps", "student, search of 3 steps"]
    assert frame["setting"].tolist() == [*settings, "student of two steps, rounds", "teacher, 2 steps"]
    rows = frame.set_index("setting")
    assert rows.loc["hidden truth", "pixels"] == 0 and rows.loc["pasted", "pixels"] > 0
    assert rows.loc["student, search of 3 steps", "error"] < rows.loc["student, search of 1 steps", "error"]
    held_out = open_dataset("digits:held-out")  # settings of the search were chosen with its first 256 images
    assert all(torch.equal(x, held_out.images([256, 370, 484, 598])) for x in given)
    assert rows["kd"].notna().all() and rows["calls"].tolist() == [0, 0, 8 + 2, 8 + 4, 5, 2]


def test_pulls(subjects: StudyInputs, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PULLED": 16, "PROBED": 2, "ABLATED": 2}.items():
        monkeypatch.setattr(f"gddlab.experiments.studies.{name}", value)
    config = tiny_config(tmp_path / "warm", tiny_teacher, total_kimg=0.016, lr_g=STILL)
    config.write()
    trainer = Trainer(config, World(0, 1, torch.device("cpu")))
    assert trainer.train() == "done"
    still = dict(trainer.step.g.named_parameters())
    moved = [(still[k] - p).abs().max().item() for k, p in subjects.teacher.named_parameters() if k in still]
    assert max(moved) < 1e-6  # the student stays the teacher
    students = {"warm": trainer.ema, "gdd/seed-0": subjects.students["gdd-i"], "gdd/seed-1": subjects.students["gdd-i"]}
    given = replace(subjects, students=students, folders={"warm": config.run_dir})
    frame = found("pulls", given).frame
    assert set(frame["group"]) == set(groups(subjects.teacher))
    table = frame.pivot(index="layer", columns="measure", values="value")
    names = {f"{loss} {stat}" for loss in ("gan", "denoising") for stat in ("fisher", "taylor", "grad_snr")}
    assert names < set(table) and (table["gan fisher"] > 0).all() and (table["denoising fisher"] > 0).all()
    layer = "model.dec.16x16_block1.conv1"  # alone was moved, half as far again, in both alike
    assert table["moved"].drop(layer).max() == 0 and 0.4 < table.loc[layer, "moved"] < 0.6
    assert table.loc[layer, "agreement"] == pytest.approx(1) and table.loc[layer, "ablation"] > 0
    assert table["rel_update"].notna().sum() > len(table) / 2


def test_rewound(subjects: StudyInputs) -> None:
    with torch.no_grad():
        moved = make_student(subjects.teacher)
        for name in (
            "model.dec.16x16_block1.conv1.weight",
            "model.enc.16x16_block0.affine.weight",
            "model.map_layer0.weight",
        ):
            moved.get_parameter(name).mul_(1.5)
    study = found("rewound", replace(subjects, students={"gdd": subjects.students["gdd"], OWN_RATE: moved}))
    assert study.about["student"] == OWN_RATE
    f = study.frame
    f = f[f["metric"] == "fd-lite2"].set_index(["into", "group"])
    own, theirs = (
        evaluate(net, data="digits", metrics=("fid",), n=N, steps=1, progress=False)["fd-lite2"]
        for net in (moved, make_student(subjects.teacher))
    )
    assert own != pytest.approx(theirs, rel=1e-3)
    values = f["value"]
    assert_close(values["student", "none"], own, rtol=1e-6, atol=0)
    assert_close(values["student", "all"], theirs, rtol=1e-6, atol=0)
    assert_close(values["teacher", "none"], theirs, rtol=1e-6, atol=0)
    assert_close(values["teacher", "all"], own, rtol=1e-6, atol=0)
    shares = f.loc["student", "share"]
    assert set(shares[shares > 0].index) == {"dec 16x16 conv1", "enc 16x16 embedding", "rest", "all"}
    assert shares.drop("all").sum() == pytest.approx(1) and shares["none"] == 0
    with torch.no_grad():  # a group by hand
        moved.get_parameter("model.dec.16x16_block1.conv1.weight").div_(1.5)
    once = evaluate(moved, data="digits", metrics=("fid",), n=N, progress=False)["fd-lite2"]
    assert_close(values["student", "dec 16x16 conv1"], once, rtol=1e-4, atol=0)


def test_gdd_is_measured_at_its_own_learning_rate_where_a_list_has_it(subjects: StudyInputs) -> None:
    gdd, other = subjects.students["gdd"], subjects.students["gdd-i"]
    own = {OWN_RATE: gdd, f"{OWN_RATE}/seed-1": other, "gdd": other}
    frame = found("line", replace(subjects, students=own)).frame
    assert set(zip(frame["a"], frame["b"], strict=True)) == {("teacher", OWN_RATE), (OWN_RATE, f"{OWN_RATE}/seed-1")}


def test_line(subjects: StudyInputs) -> None:
    frame = found("line", subjects).frame
    assert set(zip(frame["a"], frame["b"], strict=True)) == {("teacher", "gdd"), ("gdd", "gdd-i")}
    f = frame[(frame["metric"] == "fd-lite2") & (frame["b"] == "gdd-i")].set_index("t")
    own = evaluate(subjects.students["gdd-i"], data="digits", metrics=("fid",), n=N, progress=False)["fd-lite2"]
    assert_close(f.loc[1.0, "value"], own, rtol=1e-6, atol=0)
    other = subjects.students["gdd-i"].get_parameter("model.dec.16x16_block1.conv1.weight")
    assert_close(f["length"].iloc[0], (other / 3).norm().item(), rtol=1e-5, atol=0)  # 1.5 w - w
    full = sample(subjects.teacher, N, steps=3, seed=0).clamp(-1, 1)
    rms = (sample(subjects.students["gdd-i"], N, seed=0).clamp(-1, 1) - full).square().mean().sqrt()
    assert_close(f.loc[1.0, "copied"], rms.item(), rtol=0, atol=2 / 255)
    assert (frame[frame["b"] == "gdd"].groupby("metric")["value"].nunique() == 1).all()  # the same weights


def test_local_minima(subjects: StudyInputs) -> None:
    f = found("local-minima", subjects).frame.set_index(["a", "b", "distance"])
    networks = ["teacher-2", "teacher-3", "gdd", "gdd-i"]
    assert set(f.xs("data", level="b").index) == {(n, "fd-lite2") for n in networks}
    scores = evaluate(subjects.students["gdd"], data="digits", metrics=("fid",), n=N, progress=False)
    assert_close(f.loc[("gdd", "data", "fd-lite2"), "value"], scores["fd-lite2"], rtol=1e-6, atol=0)
    assert len(f.xs("pixel", level="distance")) == 6 + 1
    a, b = (sample(subjects.students[n], N, seed=0).clamp(-1, 1) for n in ("gdd", "gdd-i"))
    rms = (a - b).square().flatten(1).mean(1).sqrt()
    row = f.loc[("gdd", "gdd-i", "pixel")]
    assert_close(row["value"], rms.mean().item(), rtol=0, atol=2 / 255)
    assert row["sem"] > 0 and (f["n"] == N).all()
    yardstick = f.loc[("teacher-3", "teacher-3, other noise", "pixel"), "value"]
    assert yardstick > 2 / 255


def test_layers(subjects: StudyInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gddlab.experiments.studies.PROBED", 8)
    f = found("layers", subjects).frame
    assert set(f["network"]) == {"teacher", "gdd", "gdd-i"}
    assert set(f["states"]) == {"noised", "student", "weights"}
    stats = {"rms", "active_fraction", "rel_update", "cosine", *(f"spectral_share_{i}" for i in range(4))}
    assert set(f["stat"]) == {*stats, "weight_change"}
    assert f.loc[f["states"] == "noised", "sigma"].nunique() == 18
    moved = f[f["stat"] == "weight_change"]
    assert set(moved["network"]) == {"gdd", "gdd-i"}
    nonzero = moved[moved["value"] > 0]
    assert nonzero[["network", "layer"]].to_numpy().tolist() == [["gdd-i", "model.dec.16x16_block1.conv1"]]
    assert not moved["layer"].isin(["model", "model.dec", "model.dec.16x16_block1"]).any()


def test_input_or_level(subjects: StudyInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gddlab.experiments.studies.PROBED", 4)
    monkeypatch.setattr("gddlab.experiments.studies.DRAWS", 2)
    monkeypatch.setattr("gddlab.experiments.studies.NULLS", ("init",))
    alone = replace(subjects, students={"gdd-i": subjects.students["gdd-i"]})
    f = found("input-or-level", alone).frame
    assert set(f["network"]) == {"tiny", "gdd-i"}
    responses = f[f["what"] == "response"]
    assert set(responses["null"]) == {"trained", "init"}
    assert set(responses["stat"]) == {"correlation", "cosine", "rel_update"} and len(responses) == 2 * 3 * 3 * 2
    effects = f[(f["what"] == "effect") & (f["stat"] == "rms") & (f["varied"] != "spread")]
    shares = effects.groupby(["network", "layer"], observed=True)["value"].sum()
    assert shares.between(1 - 1e-9, 1 + 1e-9).all() and len(shares) == len(effects) / 3
    above = f[f["what"] == "above null"]
    assert (above["draws"] == 2).all() and set(above["differs"]) == {True, False}


def test_architectures(subjects: StudyInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROBED": 4, "ABLATED": 2, "DRAWS": 1, "NULLS": ("init",)}.items():
        monkeypatch.setattr(f"gddlab.experiments.studies.{name}", value)
    monkeypatch.setattr("gddlab.experiments.studies.bundled_teachers", lambda: ["digits-dit"])
    f = found("architectures", replace(subjects, data="digits:train")).frame
    assert set(f["network"]) == {"tiny", "digits-dit"}
    assert set(f["what"]) == {"level", "needed", "response", "effect", "above null"}
    level = f[f["what"] == "level"]
    assert level["sigma"].nunique() == 18 and set(level["null"]) == {"trained", "init"}
    parts = level[level["stat"] == "rel_update_mlp"]
    assert set(parts["network"]) == {"digits-dit"} and parts["value"].gt(0).any()
    places = f.dropna(subset="layer").groupby("network", observed=True)["position"].agg(["min", "max", "nunique"])
    assert places.loc["digits-dit"].tolist() == [0, 1, 6] and places.loc["tiny", ["min", "max"]].tolist() == [0, 1]
    needed = f[f["what"] == "needed"].groupby("network", observed=True)["layer"].nunique()
    assert needed["digits-dit"] == 6


def test_spectra(subjects: StudyInputs) -> None:
    f = found("spectra", subjects).frame
    keys = f[["network", "source"]].drop_duplicates().to_numpy().tolist()
    assert keys[0] == ["data", "data"]
    assert {tuple(k) for k in keys} == {
        ("data", "data"),
        ("data", "noised"),
        ("teacher", "denoised"),
        *((n, "sampled") for n in ("teacher-2", "teacher-3", "gdd", "gdd-i")),
    }
    assert f["frequency"].unique().tolist() == list(range(9))
    real = open_dataset("digits")
    some = drawn(len(real), N, 0)
    assert len({*real.class_ids[some.numpy()].tolist()}) > 5  # not the first ones, which may be of one class
    _, power = radial_power(real.images(some.numpy()))
    assert_close(torch.tensor(f.loc[f["source"] == "data", "power"].to_numpy()), power.mean(0))
    noised = f[(f["source"] == "noised") & (f["sigma"] == 80.0)]
    assert_close(
        torch.tensor(noised["power"].to_numpy()), torch.full((9,), 6400.0, dtype=torch.float64), rtol=0.2, atol=0
    )


@pytest.mark.slow
def test_costs(subjects: StudyInputs, tiny_teacher: Path, tmp_path: Path) -> None:
    fields = {"lite": {}, "stylegan2": {"kind": "stylegan2"}, "vgg": {"backbones": ("vgg16_bn",)}}
    configs = {n: tiny_config(tmp_path / n, tiny_teacher, discriminator=f) for n, f in fields.items()}
    frame = found("costs", replace(subjects, configs=configs)).frame.set_index("experiment")
    assert frame.index.tolist() == list(fields)
    assert (frame.loc[["lite", "stylegan2"], "sec_per_kimg"] > 0).all()
    assert frame.loc["vgg", "state"].startswith("no weights of vgg16_bn")
    assert not list(tmp_path.iterdir())
