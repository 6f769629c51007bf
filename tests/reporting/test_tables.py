"""Runs as tables: nothing unfinished dropped, nothing filled in, nothing mixed; rounded, escaped, stable."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from gddlab.distill.status import write_status
from gddlab.errors import GddlabError
from gddlab.files import read_json, write_json
from gddlab.freezing import select_freeze
from gddlab.reporting.run_summary import Summary, teacher_levels, teacher_scores
from gddlab.reporting.shown_tables import styled
from gddlab.reporting.study_tables import cost_table
from gddlab.reporting.tables import experiment_table, run_table
from gddlab.runs import Run, load_runs
from gddlab.teachers import load_teacher
from tests.evaluation.test_records import record
from tests.reporting.made import made


@pytest.fixture
def runs(tmp_path: Path, tiny_teacher: Path) -> list[Run]:
    mask = select_freeze(load_teacher(tiny_teacher), strategy="random", budget=0.5, seed=1)
    made(tmp_path, tiny_teacher, "all", 0, {0.024: 500.0, 0.048: 90.0})
    made(tmp_path, tiny_teacher, "all", 1, {0.048: 70.0})
    made(tmp_path, tiny_teacher, "masked", 0, {0.048: 60.0}, mask=mask, max_images=20)
    made(tmp_path, tiny_teacher, "masked", 1, {0.024: 80.0}, state="stopped", mask=mask)
    return load_runs(tmp_path)


def test_a_row_a_run_and_a_row_an_experiment(runs: list[Run]) -> None:
    table = run_table(runs)
    assert table["experiment"].tolist() == ["all", "all", "masked", "masked"]
    assert table["value"].tolist()[:3] == [90.0, 70.0, 60.0]
    assert math.isnan(table["value"][3])
    assert table["state"].tolist() == ["done", "done", "done", "stopped at 0.024 of 0.048 kimg"]
    assert table["strategy"].tolist() == ["none", "none", "random", "random"]
    assert table["images"].tolist()[:3] == [64, 64, 20]
    found = experiment_table(table)
    assert found.index.tolist() == ["all", "masked"]
    assert experiment_table(table, sort=True).index.tolist() == ["masked", "all"]
    assert found.loc["all", ["mean", "min", "max", "seeds", "unfinished"]].tolist() == [80.0, 70.0, 90.0, 2, 0]
    assert found.loc["all", "sd"] == pytest.approx(14.1421, rel=1e-4)
    assert found.loc["masked", ["mean", "seeds", "unfinished"]].tolist() == [60.0, 1, 1]
    assert math.isnan(found.loc["masked", "sd"])
    assert found["state"].tolist() == ["done", "stopped at 0.024 of 0.048 kimg"]
    assert found.loc["all", "frozen"] == 0


def test_rows_select_and_order_and_say_what_was_not_run(runs: list[Run]) -> None:
    table = run_table(runs, rows=("masked", "never"))
    assert table["experiment"].tolist() == ["masked", "masked", "never"]
    assert table["state"].tolist()[-1] == "not run"
    assert table["seed"].tolist()[:2] == [0, 1]
    found = experiment_table(table)
    assert found.loc["never", ["seeds", "unfinished", "state"]].tolist() == [0, 0, "not run"]
    assert experiment_table(run_table([], rows=["never"])).index.tolist() == ["never"]
    with pytest.raises(GddlabError, match="no runs given"):
        run_table([])
    with pytest.raises(GddlabError, match="list of experiments"):
        run_table(runs, rows="masked")


def test_scores_that_cannot_be_compared_are_refused(tmp_path: Path, tiny_teacher: Path) -> None:
    made(tmp_path, tiny_teacher, "a", 0, {0.048: 1.0})
    made(tmp_path, tiny_teacher, "a", 1, {0.048: 2.0}, scored={"metric": "fd-lite2@32", "n": 32})
    made(tmp_path, tiny_teacher, "b", 0, {0.048: 2.0}, scored={"extractor_sha256": "f" * 64})
    runs = load_runs(tmp_path)
    with pytest.raises(GddlabError, match="differ in metric"):
        run_table(runs, rows=["a"])
    with pytest.raises(GddlabError, match="differ in extractor_sha256"):
        run_table(runs[:1] + runs[2:])


def test_a_run_that_cannot_be_read_is_a_row_that_says_why(tmp_path: Path, tiny_teacher: Path) -> None:
    states = {}
    for name, spoil in {
        "field": lambda d: (d / "config.json").write_text(
            json.dumps(json.loads((d / "config.json").read_text()) | {"lr": 1})
        ),
        "mask": lambda d: (d / "config.json").write_text("{}"),
        "record": lambda d: (d / "evaluation.jsonl").write_text('{"fid": 3}\n'),
        "line": lambda d: (d / "evaluation.jsonl").write_text("fid 3\n"),
        "unscored": lambda d: (d / "evaluation.jsonl").unlink(),
        "young": lambda d: (d / "status.json").unlink(),
        "failed": lambda d: write_status(d, "failed", nimg=8),
    }.items():
        run = made(tmp_path, tiny_teacher, name, 0, {0.048: 60.0})
        spoil(run.run_dir)
        row = run_table([run]).iloc[0]
        assert math.isnan(row["value"]), name
        states[name] = str(row["state"])
        assert str(tmp_path) not in states[name] and "\n" not in states[name]
    assert states["field"].startswith("older format: unknown configuration field 'lr'")
    assert states["mask"] == "older format: config.json does not say which mask, or none: it is damaged"
    assert states["record"].startswith("older format: not an evaluation record")
    assert states["line"].startswith("older format: ")
    assert states["unscored"] == "no fd-lite2 at the end"
    assert states["young"] == "not started"
    assert states["failed"] == "failed at 0.008 of 0.048 kimg"


def test_the_newest_of_several_scores_counts(tmp_path: Path, tiny_teacher: Path) -> None:
    kernel = tuple(record(metric="kd-lite2@64", value=v, kimg=0.048) for v in (9.0, 0.25))
    run = made(tmp_path, tiny_teacher, "a", 0, {0.048: 60.0}, more=kernel)
    assert run_table([run], "kd-lite2")["value"].tolist() == [0.25]


def test_levels_of_the_teacher(runs: list[Run], tmp_path: Path, tiny_teacher: Path) -> None:
    assert teacher_scores(runs) == {1: 900.0, 18: 50.0}
    assert teacher_levels(runs) == {"teacher, 1 step": 900.0, "teacher, 18 steps": 50.0}
    assert teacher_levels(runs, steps=(18,)) == {"teacher, 18 steps": 50.0}
    assert teacher_levels(runs, "kd-lite2") == {}
    path = runs[0].run_dir / "teacher.json"
    card = read_json(path)
    path.unlink()
    assert teacher_scores(runs[:1]) == {} and teacher_scores(runs) == {1: 900.0, 18: 50.0}
    for damaged, why in ("{", "not JSON"), (json.dumps(card | {"scores": [{}, *card["scores"]]}), "not an evaluation"):
        path.write_text(damaged)
        with pytest.raises(GddlabError, match=why):
            teacher_scores(runs)
    write_json(path, card)
    other = made(tmp_path / "other", tiny_teacher, "a", 0, {0.048: 1.0}, scored={"reference_n": 3})
    assert Summary(other).state == "done"
    with pytest.raises(GddlabError, match="differ in reference_n"):
        teacher_levels([other])


def cost_study() -> pd.DataFrame:
    rows = [
        {"experiment": "gdd", "sec_per_kimg": 6.0, "peak_mem_mib": 1000.0, "trained": 1_000_000, "discriminator": 50},
        {"experiment": "gdd-i", "sec_per_kimg": 3.0, "peak_mem_mib": 900.0, "trained": 200_000, "discriminator": 50},
        {"experiment": "lpips", "state": "no weights of VGG16"},
    ]
    return pd.DataFrame([{"kimg": 12.0, "parameters": 1_000_000, "state": "done", **r} for r in rows])


def test_what_a_step_costs() -> None:
    table = cost_table(cost_study())
    assert table.index.tolist() == ["gdd", "gdd-i", "lpips"]
    assert table["share trained"].tolist()[:2] == [1.0, 0.2]
    assert table["minutes"].tolist()[:2] == [1.2, 0.6]
    assert table.loc["lpips"].drop("state").isna().all()
    text = repr(styled(table, "Cost"))
    assert "20.0%" in text and "1,000,000" in text and "no weights of VGG16" in text


def test_another_table_is_refused() -> None:
    with pytest.raises(GddlabError, match=r"no column 'trained'.*the study 'costs'"):
        cost_table(cost_study().drop(columns="trained"))


def shown_table(state: str = "not run") -> pd.DataFrame:
    columns = {
        "frozen": [0.79965, None],
        "trained": pd.array([207713, None], dtype="Int64"),
        "mean": [59.2677, None],
        "sd": [None, None],
        "kd-lite2@64": [0.01234567, None],
        "state": ["done", state],
    }
    return pd.DataFrame(columns, index=pd.Index(["gdd-i", "a<b"], name="experiment")).astype({"sd": "float64"})


def cells(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html.split("<tbody>")[1], re.DOTALL)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]


def test_numbers_are_rounded_and_empty_cells_say_why() -> None:
    html = styled(shown_table(), "n = 64 & <b>").to_html()
    assert cells(html) == [
        ["gdd-i", "80.0%", "207,713", "59.3", "–", "0.012"],
        ["a&lt;b", "not run", "not run", "not run", "not run", "not run"],
    ]
    assert "n = 64 &amp; &lt;b&gt;" in html and "parameters trained" in html and "state" not in html
    stopped = cells(styled(shown_table("stopped at 3 of 12 kimg")).to_html())
    assert stopped[1] == ["a&lt;b", "–", "–", "–", "–", "–", "stopped at 3 of 12 kimg"]
    assert stopped[0][-1] == "done"
    own = styled(shown_table(), heads={"mean": "FID"}, formats={"mean": "{:.3f}"}).to_html()
    assert "59.268" in own and "FID" in own


def test_numbers_stand_right_and_text_left() -> None:
    html = styled(shown_table("failed")).to_html()
    assert re.search(r"td \{[^}]*text-align: right", html)
    left = re.findall(r"(\S+) \{\s*text-align: left;\s*\}", html)
    assert any("col5" in selector for selector in left) and not any("col2" in selector for selector in left)


def test_output_does_not_change_between_runs() -> None:
    first, second = styled(shown_table(), "a caption"), styled(shown_table(), "a caption")
    assert first.to_html() == second.to_html()
    assert repr(first) == repr(second) and "59.3" in repr(first) and "0x" not in repr(first)


def test_a_table_without_names_shows_no_index() -> None:
    assert cells(styled(shown_table().reset_index(drop=True)).to_html())[0][0] == "80.0%"
