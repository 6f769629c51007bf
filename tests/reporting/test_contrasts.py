"""Arms and their differences: intervals, effect sizes and p are those of the textbooks."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gddlab.errors import GddlabError
from gddlab.files import read_json, write_json
from gddlab.reporting.contrasts import (
    arm_table,
    arm_text,
    change_table,
    contrast_table,
    contrast_text,
    draw_arms,
    draw_dose,
)
from gddlab.reporting.statistics import corrected, difference, holm, interval
from gddlab.reporting.study_tables import followed_table, rewound_table
from gddlab.reporting.style import draw_levels, look
from gddlab.reporting.tables import run_table
from gddlab.runs import Run, load_runs
from tests.evaluation.test_records import record
from tests.reporting.made import made

VALUES = {"gdd": (70.0, 66.0, 78.0), "gdd-i": (58.0, 62.0, 56.0), "one": (60.0,)}


@pytest.fixture
def runs(tmp_path: Path, tiny_teacher: Path) -> list[Run]:
    for name, values in VALUES.items():
        for seed, value in enumerate(values):
            held_out = record(metric="kd-lite2@64", value=value / 1000, kimg=0.048, reference="digits:held-out")
            inside = record(metric="kd-lite2@64", value=value / 900, kimg=0.048)
            made(tmp_path, tiny_teacher, name, seed, {0.024: 2 * value, 0.048: value}, more=(held_out, inside))
    return load_runs(tmp_path)


def test_a_row_per_score_and_arm(runs: list[Run]) -> None:
    metrics = ("fd-lite2", "kd-lite2:held-out")
    found = arm_table(runs, ("gdd", "gdd-i", "one", "never"), metrics=metrics)
    assert found["experiment"].tolist() == ["gdd", "gdd-i", "one", "never"] * 2
    rows = found[found["metric"] == "fd-lite2"].set_index("experiment")
    assert rows["seeds"].tolist() == [3, 3, 1, 0]
    assert rows.loc["gdd", "mean"] == pytest.approx(71.333333)
    # Student's t with 2 degrees of freedom: 4.302653 sd / sqrt(3)
    half = 4.302653 * np.std(VALUES["gdd-i"], ddof=1) / np.sqrt(3)
    assert rows.loc["gdd-i", "high"] - rows.loc["gdd-i", "mean"] == pytest.approx(half, rel=1e-6)
    assert np.isnan(rows.loc["one", "low"]) and rows.loc["never", "state"] == "not run"
    for metric, named in (("kd-lite2", "kd-lite2@64"), ("kd-lite2:held-out", "kd-lite2@64:held-out")):
        assert run_table(runs, metric, rows=["gdd"])["metric"].unique().tolist() == [named]
    seen = arm_table(runs, ("gdd",), metrics=("kd-lite2",))
    assert seen["mean"].item() == pytest.approx(0.0713333 * 1000 / 900)
    held_out = found[found["metric"] == "kd-lite2:held-out"].set_index("experiment")
    assert held_out.loc["gdd", "mean"] == pytest.approx(0.0713333)
    early = arm_table(runs, ("gdd", "gdd-i"), at={"gdd": 0.024}).set_index("experiment")
    assert early.loc["gdd", "mean"] == pytest.approx(142.666667)
    assert early.loc["gdd-i", "mean"] == rows.loc["gdd-i", "mean"]  # at its end


def test_seeds_without_a_score_are_told(runs: list[Run], tmp_path: Path, tiny_teacher: Path) -> None:
    more = made(tmp_path, tiny_teacher, "gdd", 7, {0.024: 70.0, 0.048: 60.0}, scored={"metric": "fd-lite0@64"})
    found = arm_table([*runs, more], ("gdd", "gdd-i")).set_index("experiment")
    assert found["seeds"].tolist() == [3, 3]
    assert found["state"].tolist() == ["3 of 4 seeds; others: no fd-lite2 at the end", "done"]
    (row,) = contrast_table([*runs, more], [("gdd-i", "gdd")]).itertuples()
    assert row.state == "GDD (preset's rate): 3 of 4 seeds; others: no fd-lite2 at the end"


def test_differences_between_pairs(runs: list[Run]) -> None:
    pairs = [("gdd-i", "gdd"), ("one", "gdd-i"), ("never", "gdd")]
    found = contrast_table(runs, pairs).set_index("experiment")
    assert found["difference"].tolist()[:2] == pytest.approx([-12.666667, 60 - 58.666667])
    assert found[["seeds", "seeds_against"]].to_numpy().tolist() == [[3, 3], [1, 3], [0, 3]]
    assert np.isfinite(found.loc["gdd-i", "low"]) and np.isnan(found.loc["one", "low"])
    assert found["p"].isna().all()  # three seeds
    assert found.loc["never", "state"] == "never: not run"


def test_a_pair_differs_where_it_does_by_each_score() -> None:
    rows = [("a", "x", "fd", -2.0, 0.01), ("a", "x", "kd", -1.0, 0.02), ("b", "x", "fd", -2.0, 0.001)]
    rows += [("b", "x", "kd", 0.1, 0.002), ("c", "x", "fd", 1.0, 0.03), ("c", "x", "kd", 1.0, np.nan)]
    table = pd.DataFrame(rows, columns=["experiment", "against", "metric", "difference", "p"])
    found = corrected(table)["p_holm"].tolist()
    assert found[:2] == [0.04, 0.04]  # the larger of its scores, and two pairs
    assert found[2:4] == [1.0, 1.0] and np.isnan(found[4:]).all()


def test_a_change_is_of_the_same_seeds(runs: list[Run], tmp_path: Path, tiny_teacher: Path) -> None:
    more = made(tmp_path, tiny_teacher, "gdd", 7, {0.048: 60.0})
    found = change_table([*runs, more], ("gdd",), metrics=("fd-lite2",), start=0.024, end=0.048)
    assert found.loc[0, "seeds"] == 3 and found.loc[0, "mean"] == pytest.approx(-71.333333)
    assert found.loc[0, "state"] == "3 of 4 seeds; others: no fd-lite2 at 0.024 kimg"
    assert arm_table(runs, ("gdd",), at=0.096)["state"].item() == "ends at 0.048 kimg"


def test_welch_and_hedges_by_hand() -> None:
    from scipy.stats import t

    x, y = np.array([58.0, 62.0, 56.0, 60.0, 59.0]), np.array([70.0, 66.0, 78.0, 71.0, 69.0, 68.0])
    found = difference(x, y)
    error = np.sqrt(x.var(ddof=1) / 5 + y.var(ddof=1) / 6)
    gap = x.mean() - y.mean()
    pooled = np.sqrt((4 * x.var(ddof=1) + 5 * y.var(ddof=1)) / 9)
    assert found["g"] == pytest.approx(gap / pooled * (1 - 3 / 35))
    assert (found["low"] + found["high"]) / 2 == pytest.approx(gap)
    freedom = error**4 / ((x.var(ddof=1) / 5) ** 2 / 4 + (y.var(ddof=1) / 6) ** 2 / 5)
    assert found["p"] == pytest.approx(2 * t.sf(abs(gap) / error, freedom))
    assert np.isnan(difference(x[:4], y)["p"]) and np.isfinite(difference(x[:4], y)["low"])
    assert difference(x[:1], y)["difference"] == pytest.approx(58 - y.mean())
    assert np.isnan(difference(x[:2], y)["low"]) and np.isnan(difference(x[:0], y)["difference"])
    assert all(np.isnan(interval(x[:2])))


def test_an_interval_holds_the_mean_95_times_in_100() -> None:
    draw = np.random.default_rng(0)
    bounds = [interval(draw.normal(size=5)) for _ in range(2000)]
    assert 0.935 < np.mean([low < 0 < high for low, high in bounds]) < 0.965


def test_holm() -> None:
    found = holm(np.array([0.01, np.nan, 0.04, 0.03, 0.005]))
    np.testing.assert_allclose(found, [0.03, np.nan, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])).max() <= 1


def test_refusals(runs: list[Run]) -> None:
    with pytest.raises(GddlabError, match="rows='gdd': give a list of experiments"):
        arm_table(runs, "gdd")
    path = runs[0].run_dir / "provenance.json"
    write_json(path, read_json(path) | {"trainer": 2})
    name = f"{runs[0].run_dir.parent.name}/{runs[0].run_dir.name}"
    with pytest.raises(GddlabError, match=f"was trained by trainer 1, {name} by 2, whose numbers differ"):
        run_table(runs)
    path.unlink()  # a run that has not begun says nothing of its trainer
    assert len(run_table(runs)) == 7


def test_levels_are_told_in_the_digits_that_they_need() -> None:
    ax = plt.figure().add_subplot()
    draw_levels(ax, {"one step": 1441.0, "copier": 0.0123, "precision": 0.834}, "y", told=True)
    assert [line.get_label() for line in ax.get_lines()] == ["one step: 1441", "copier: 0.0123", "precision: 0.834"]
    plt.close("all")


def test_two_runs_of_one_seed_are_no_two_seeds(runs: list[Run]) -> None:
    with pytest.raises(GddlabError, match="arm 'gdd' has two runs of seed"):
        arm_table([*runs, runs[0]], ("gdd", "gdd-i"))


def test_no_pairs_and_no_scores_are_empty(runs: list[Run]) -> None:
    none = contrast_table(runs, ())
    assert not len(none) and "p_holm" in none and not len(contrast_text(none))
    arms = arm_table(runs, ("gdd",), metrics=())
    assert not len(arm_text(arms))
    assert draw_dose(arms, {"all": ["gdd"]}).axes and draw_arms(arms).axes
    plt.close("all")


def test_figures(runs: list[Run]) -> None:
    found = arm_table(runs, ("gdd", "gdd-i", "one", "never"), metrics=("fd-lite2", "kd-lite2"))
    figure = draw_dose(found, {"all": ("gdd", "gdd-i", "never")}, levels={"fd-lite2": {"teacher": 63.0}})
    assert [ax.get_title() for ax in figure.axes] == ["fd-lite2", "kd-lite2"]
    assert len(figure.axes[0].get_lines()) > len(figure.axes[1].get_lines())  # with the level
    figure = draw_arms(found, levels={"fd-lite2": {"teacher": 63.0}})
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["GDD (preset's rate)", "GDD-I", "one"]
    dots = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == pytest.approx([71.333333, 58.666667, 60.0])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["teacher"]
    figure = draw_arms(found, levels={"fd-lite2": {"teacher": 63.0, "copier": 19.0}, "kd-lite2": {"copier": 0.0}})
    styles = [{x.get_label(): x.get_linestyle() for x in ax.get_lines()} for ax in figure.axes]
    assert styles[0]["copier"] == styles[1]["copier"] != styles[0]["teacher"] and "teacher" not in styles[1]
    figure = draw_dose(found, {"GDD": ("gdd", "gdd-i")}, places={"gdd": 10, "gdd-i": 1}, xlabel="age", log=True)
    (line,) = figure.axes[0].get_lines()[:1]
    assert line.get_xdata().tolist() == [1, 10] and figure.axes[0].get_xlabel() == "age"
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1", "10"]
    for groups, own in (({"a": ["gdd"], "b": ["gdd-i"]}, True), ({"a": ["one", "gdd"], "b": ["gdd"]}, False)):
        drawn = [c.lines[0].get_color() for c in draw_dose(found, groups).axes[0].containers]
        assert len({str(c) for c in drawn}) == 2  # two lines of one method, too
        assert ([str(c) for c in drawn] == [look("gdd").colour, look("gdd-i").colour]) == own
    many = pd.concat([found.assign(metric=f"score-{i}") for i in range(3)] + [found])  # five: four beside each other
    first, *_, fifth, off = (ax.get_position() for ax in draw_arms(many).axes[:6])
    assert fifth.y1 < first.y0 and fifth.x0 == pytest.approx(first.x0) and off.y0 == pytest.approx(fifth.y0)
    between = contrast_table(runs, [("gdd-i", "gdd"), ("never", "gdd")])
    figure = draw_arms(between)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["GDD-I against GDD (preset's rate)"]
    (dot,) = (line for line in figure.axes[0].get_lines() if line.get_marker() == "o")
    assert float(dot.get_xdata()[0]) == pytest.approx(-12.666667)
    for p, style, told in ((float("nan"), "full", False), (0.2, "none", True), (0.01, "full", True)):
        figure = draw_arms(between.assign(p_holm=p))
        (dot,) = (line for line in figure.axes[0].get_lines() if line.get_marker() == "o")
        assert dot.get_fillstyle() == style and figure.get_suptitle().endswith("filled: p < 0.05, corrected") == told
    plt.close("all")


def test_scales_of_a_dose() -> None:
    """A wide interval does not forbid a log scale; many places have no tick each."""
    rows = [(f"random-{10 * i}", 0.1 * i, 50.0 * 2**i, 30.0 * 2**i) for i in range(8)]
    arms = pd.DataFrame(rows, columns=["experiment", "frozen", "mean", "half"])
    arms = arms.assign(metric="fd-lite2", seeds=3, low=arms["mean"] - arms["half"], high=arms["mean"] + arms["half"])
    arms.loc[7, "low"] = -1000.0
    names, places = arms["experiment"], {f"random-{10 * i}": i + 1 for i in range(8)}
    (few,) = draw_dose(arms, {"all": list(names[:3])}, places=places, log=True).axes
    assert [t.get_text() for t in few.get_xticklabels()] == ["1", "2", "3"]
    (ax,) = draw_dose(arms, {"all": list(names)}, places=places, log=True).axes
    assert len(ax.get_xticks()) <= 6
    assert ax.get_yscale() == "log" and ax.get_ylim()[1] > arms["high"].max()
    plt.close("all")


def test_followers_over_the_share(tmp_path: Path) -> None:
    rows = [("gdd", 0, 0.0, 0.2, 0.5), ("gdd", 1, 0.0, 0.4, 0.3), ("gdd-i", 0, 0.8, 0.9, 0.1)]
    study = pd.DataFrame(rows, columns=["experiment", "seed", "frozen", "found", "correlation"])
    table = followed_table(study).set_index(["metric", "experiment"])
    assert table.loc[("teacher's image found", "gdd"), "mean"] == pytest.approx(0.3)
    assert table.loc[("correlation with it", "gdd-i"), "seeds"] == 1
    figure = draw_dose(followed_table(study), {"all": ("gdd", "gdd-i")})
    assert figure.axes[0].get_lines()[0].get_xdata().tolist() == [0, 80]
    plt.close("all")
    with pytest.raises(GddlabError, match="give the table of the study 'followed'"):
        followed_table(study.drop(columns="correlation"))


def test_groups_put_back() -> None:
    rows = [
        ("student", g, x, "fd-lite2@8", v) for g, x, v in (("none", 0.0, 60.0), ("dec", 0.7, 80.0), ("all", 1.0, 900.0))
    ]
    study = pd.DataFrame([*rows, ("teacher", "none", 0.0, "fd-lite2@8", 900.0)])
    study.columns = pd.Index(["into", "group", "share", "metric", "value"])
    table = rewound_table(study).set_index("experiment")
    assert table["mean"].tolist() == [60, 80, 900] and table["frozen"].tolist() == [0, 0.7, 1]
    figure = draw_arms(rewound_table(study), title="one seed")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["none", "dec", "all"]
    plt.close("all")


def test_arms_and_contrasts_in_words(runs: list[Run]) -> None:
    shown = arm_text(arm_table(runs, ("gdd", "gdd-i", "one", "never"), metrics=("fd-lite2", "kd-lite2")))
    assert shown.index.tolist() == ["GDD (preset's rate)", "GDD-I", "one", "never"]
    assert shown.columns.tolist() == ["frozen", "seeds", "fd-lite2 (95 %)", "kd-lite2 (95 %)", "state"]
    assert shown.loc["GDD-I"].tolist()[1:3] == ["3", "58.7 (51.1 to 66.3)"]
    assert shown.loc["one", "fd-lite2 (95 %)"] == "60.0" and shown.loc["never", "state"] == "not run"
    pairs = contrast_text(contrast_table(runs, [("gdd-i", "gdd"), ("one", "gdd"), ("never", "gdd")]))
    assert pairs.columns.tolist() == ["seeds", "fd-lite2 (95 %)", "g, fd-lite2", "p, Holm", "state"]
    assert pairs.loc["GDD-I against GDD (preset's rate)"].tolist()[:2] == ["3 and 3", "-12.7 (-25.4 to 0.0)"]
    assert (
        pairs.loc["one against GDD (preset's rate)", "fd-lite2 (95 %)"] == "-11.3"
        and pairs.loc["never against GDD (preset's rate)"].iloc[1] == ""
    )


def test_seeds_of_different_length_are_not_averaged(runs: list[Run], tmp_path: Path, tiny_teacher: Path) -> None:
    longer = made(tmp_path, tiny_teacher, "gdd", 7, {0.048: 70.0, 0.096: 60.0}, total_kimg=0.096)
    with pytest.raises(GddlabError, match=r"runs of .gdd. end at 0\.048 and 0\.096 thousand images: give at="):
        contrast_table([*runs, longer], [("gdd-i", "gdd")])
    assert arm_table([*runs, longer], ("gdd", "gdd-i"), at=0.048)["seeds"].tolist() == [4, 3]
