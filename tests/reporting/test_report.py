"""A page of runs: what it says, that it stands alone, and that no run is dropped."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from dataclasses import replace
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
import torch

import gddlab
from gddlab.cli import main
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.status import write_status
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError, NotFound
from gddlab.evaluation import Record, append_records, load_records
from gddlab.files import data_dir, read_json, write_json
from gddlab.lock import take
from gddlab.reporting import run_pages as module
from gddlab.reporting.run_summary import Summary
from gddlab.runs import Run, load_run
from tests.conftest import tiny_config

DIGITS = data_dir() / "runs" / "first"


def text_of(page: Path) -> str:
    """What a reader sees, without pictures and styles."""
    html = re.sub(r"<style>.*?</style>|<img[^>]*>", "", page.read_text(), flags=re.DOTALL)
    return unescape(re.sub(r"<[^>]+>", " ", html))


def alone(page: Path) -> None:
    """Nothing is fetched from elsewhere."""
    html = page.read_text()
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(", html)
    assert all(src.startswith("data:image/png;base64,") for src in re.findall(r'src="([^"]*)"', html))


def copied(tmp_path: Path, name: str, *, source: str = "gdd-i/seed-0") -> Path:
    folder = tmp_path / name
    shutil.copytree(load_run(DIGITS / source).run_dir, folder)
    return folder


def stopped(run_dir: Path, teacher: Path, **fields: Any) -> TrainConfig:
    """A run that was configured and never came far."""
    config = tiny_config(run_dir, teacher, **fields)
    run_dir.mkdir(parents=True)
    config.write()
    write_status(run_dir, "stopped", nimg=16, total_nimg=48)
    return config


def distances(run_dir: Path) -> list[Record]:
    return [r for r in load_records(run_dir) if r.name == "fd-lite2"]


def test_foreign_pictures_and_a_damaged_line_do_not_end_a_report(tmp_path: Path) -> None:
    run_dir = copied(tmp_path, "run")
    (run_dir / "samples" / "holiday.png").write_text("no image")
    with (run_dir / "metrics.jsonl").open("a") as f:
        f.write("oops\n")
    page = gddlab.report(run_dir, out=tmp_path / "page.html")
    assert "metrics.jsonl is damaged: the line that begins 'oops' is no JSON object" in " ".join(text_of(page).split())


def test_a_damaged_grid_is_named(tmp_path: Path) -> None:
    run_dir = copied(tmp_path, "run")
    (run_dir / "samples" / "000000.900.png").write_text("no image")
    with pytest.raises(GddlabError, match=r"000000\.900\.png is no image .*: remove it$"):
        gddlab.report(run_dir, out=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_shipped_run_is_told_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, out = load_run(DIGITS / "gdd-i" / "seed-0").run_dir, tmp_path / "page.html"
    main(["report", str(run_dir), "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    alone(out)
    seen = text_of(out)
    final = distances(run_dir)[-1]
    mask = load_run(run_dir).config.mask
    assert mask is not None
    for wanted in (
        "Run gdd-i/seed-0",
        f"{final.value:.2f}",
        f"{mask.fraction:.2%} of {mask.n_params:,} parameters frozen",
        "projected on tf_efficientnet_lite0",
        "non-saturating, factor 64; R1 0.0001 every 16 iterations",
        read_json(run_dir / "provenance.json")["commit"],
        mask.hash,
        "0 to 1796",
        "teacher, 18 steps",
        "two halves of the real images",
        "fd-lite2@1797 and fd-lite2@898 cannot stand beside each other: they differ in n, 1797 and 898",
        "s per thousand images (median of 47 ticks)",
        "12 thousand images",
        f"The nearest to the data of 4 scored: fd-lite2@1797 {final.value:.2f} at 12 kimg",
    ):
        assert wanted in seen, wanted
    alts = re.findall(r'<img alt="([^"]*)"', out.read_text())
    assert {"fd-lite2@1797 over the training", "loss", "mean logit", "learning rate", "12 thousand images"} <= set(alts)
    grid = re.search(r'alt="12 thousand images" src="data:image/png;base64,([^"]*)"', out.read_text())
    assert grid is not None
    assert base64.b64decode(grid[1]) == load_run(run_dir).grids()[-1].read_bytes()


def test_a_run_fresh_from_training(tmp_path: Path, tiny_teacher: Path) -> None:
    """Grids of the first, middle and last moment; curves; a mask chosen here."""
    mask = gddlab.select_freeze(gddlab.load_teacher(tiny_teacher), strategy="gdd-i")
    config = tiny_config(tmp_path / "run", tiny_teacher, mask=mask, snapshot_kimg=0.008)
    config.write()
    Trainer(config, World(0, 1, torch.device("cpu"))).train()
    out = gddlab.report(tmp_path / "run", tmp_path / "p.html")
    alone(out)
    seen = text_of(out)
    assert "done" in seen and "GDD-I" in seen and f"{mask.fraction:.2%}" in seen
    shown = re.findall(r"<figcaption>(.*?) thousand images</figcaption>", out.read_text())
    assert shown == ["0", "0.024", "0.048"]
    alts = re.findall(r'<img alt="([^"]*)"', out.read_text())
    assert {"loss", "mean logit", "R1: squared gradient norm", "learning rate"} <= set(alts)
    assert "never scored" in seen


def test_the_call_on_the_page_makes_the_same_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = load_run(DIGITS / "gdd-i" / "seed-0").run_dir
    code = re.findall(r"<pre>(.*?)</pre>", gddlab.report(run_dir, tmp_path / "p.html").read_text(), re.DOTALL)[-1]
    monkeypatch.chdir(run_dir)
    made: list[TrainConfig] = []
    monkeypatch.setattr(gddlab, "train", lambda config, **_: made.append(config))
    exec(unescape(code), {})
    assert made[0].first_difference(read_json(run_dir / "config.json")) is None


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [load_run(DIGITS / name).run_dir for name in ("gdd/seed-0", "gdd/seed-1", "gdd-i/seed-0")]
    out = gddlab.report(runs, tmp_path / "p.html")
    alone(out)
    html = out.read_text()
    head = re.findall(r"<th[^>]*>(.*?)</th>", html)
    assert head[:6] == ["run", "state", "kimg", "mask", "seed", "fd-lite2@1797"]
    table = html.split("<tr>")[2:5]
    for run_dir, row in zip(runs, table, strict=True):
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
        assert cells[0] == f"{run_dir.parent.name}/{run_dir.name}"
        assert cells[5] == f"{distances(run_dir)[-1].value:.2f}"
    assert html.count("12 thousand images</figcaption>") == 2
    assert "Without samples: gdd/seed-1." in html  # one grid of an experiment ships
    assert "cannot stand beside" not in html


def test_a_folder_stands_for_the_runs_in_it(tmp_path: Path) -> None:
    out = gddlab.report([DIGITS / "gdd", load_run(DIGITS / "gdd" / "seed-0")], tmp_path / "p.html")
    assert "3 runs" in text_of(out)
    assert re.findall(r"<h3>(.*?)</h3>", out.read_text()) == ["gdd/seed-0", "gdd/seed-1", "gdd/seed-2"]
    outer = copied(tmp_path, "outer")
    copied(outer, "inner")
    assert "Run outer" in text_of(gddlab.report(outer, tmp_path / "p.html"))


def test_scores_of_another_kind_are_kept_apart_and_said(tmp_path: Path) -> None:
    one, two, three = (copied(tmp_path, name) for name in ("one", "two", "three"))
    records = [r.to_dict() for r in distances(one)]
    (two / "evaluation.jsonl").unlink()
    append_records(two, [Record.from_dict(r | {"metric": "fd-lite2@64", "n": 64}) for r in records])
    (three / "evaluation.jsonl").unlink()
    append_records(three, [Record.from_dict(r | {"reference_sha256": "f" * 64}) for r in records])
    html = gddlab.report([one, two, three], tmp_path / "p.html").read_text()
    head = re.findall(r"<th[^>]*>(.*?)</th>", html)
    assert len([h for h in head if h.startswith("fd-lite2@")]) == 3
    assert len(set(head)) == len(head)
    assert "fd-lite2@1797 and fd-lite2@64 cannot stand beside each other: they differ in n, 1797 and 64" in html
    assert "they differ in reference_sha256" in html
    figures = re.findall(r'alt="(fd-lite2@[^"]*) over the training"', html)
    assert len(figures) == 3
    assert "Without such a score: two, three." in html


def test_a_page_shows_the_scores_that_count(tmp_path: Path) -> None:
    """Those by another sampler stand in the list of all scores alone; one that was made anew replaces the old one."""
    run_dir = copied(tmp_path, "run")
    last = distances(run_dir)[-1]
    other = replace(last, sampler="consistency-2 sigmas=80,0.8", value=1.25)
    append_records(run_dir, [replace(last, value=43.21), other])
    seen = text_of(gddlab.report(run_dir, tmp_path / "page.html"))
    assert "The nearest to the data of 4 scored: fd-lite2@1797 43.21 at 12 kimg" in seen
    assert seen.count("1.25") == 1  # in the list
    html = gddlab.report([run_dir, copied(tmp_path, "two")], tmp_path / "p.html").read_text()
    assert "43.21" in html and "1.25<" not in html


def test_no_run_is_dropped(tmp_path: Path, tiny_teacher: Path) -> None:
    """Not finished, failed, dead, of another version, damaged, never scored: all are on the page as what they are."""
    stopped(tmp_path / "stopped", tiny_teacher)
    failed = stopped(tmp_path / "failed", tiny_teacher).run_dir
    write_status(failed, "failed", rank=0, error="Traceback: a <b>bad</b> thing", message="RuntimeError: a bad thing")
    (failed / "log").mkdir()
    (failed / "log" / "rank0.txt").write_text("line of the log\n")
    dead = stopped(tmp_path / "dead", tiny_teacher).run_dir
    write_status(dead, "running", nimg=16, total_nimg=48)
    older = copied(tmp_path, "older")
    config = read_json(older / "config.json")
    write_json(older / "config.json", config | {"a_field_of_old": 1})
    damaged = copied(tmp_path, "damaged")
    (damaged / "mask.json").write_text("{")
    (damaged / "metrics.jsonl").write_text("no json\n")
    (damaged / "teacher.json").unlink()
    names = ["stopped", "failed", "dead", "older", "damaged"]
    page = gddlab.report([tmp_path / n for n in names], tmp_path / "all.html")
    alone(page)
    seen, html = text_of(page), page.read_text()
    assert re.findall(r"<h3>(.*?)</h3>", html) == [
        "stopped",
        "failed",
        "Why it failed",
        "dead",
        "Why it failed",
        *names[3:],
    ]
    for wanted in (
        "stopped at 0.016 of 0.048 kimg",
        "RuntimeError: a bad thing",
        "Traceback: a <b>bad</b> thing",
        "line of the log",
        "its processes ended without an error",
        "unknown configuration field 'a_field_of_old'",
        "teacher.json: not there",
        "mask.json: mask.json is not JSON",
        "metrics.jsonl is damaged: the line that begins",
        "Without such a score: stopped, failed, dead.",
        "Without samples: stopped, failed, dead.",
    ):
        assert wanted in seen, wanted
    for name in names:
        alone(gddlab.report(tmp_path / name, tmp_path / f"{name}.html"))
    assert "This run was never scored" in text_of(tmp_path / "stopped.html")
    assert "a_field_of_old" in text_of(tmp_path / "older.html")


def test_a_run_that_goes_on_is_running(tmp_path: Path, tiny_teacher: Path) -> None:
    run_dir = stopped(tmp_path / "run", tiny_teacher).run_dir
    write_status(run_dir, "running", nimg=16, total_nimg=48)
    fd = take(run_dir)
    assert Summary(Run(run_dir), "run").state == "running at 0.016 of 0.048 kimg"
    os.close(fd)
    assert Summary(Run(run_dir), "run").short_state == "failed"


def test_alarms_best_student_and_a_judge_of_its_own_kin(tmp_path: Path) -> None:
    run_dir = copied(tmp_path, "run")
    alarm = {"kind": "jump", "kimg": 6.0, "message": "a <jump>", "value": 9.0, "threshold": 1.5}
    (run_dir / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    write_json(run_dir / "best.json", {"metric": "fd-lite2@1797", "value": 55.5, "kimg": 6.0})
    own = load_records(run_dir)[-1].to_dict() | {"metric": "fd-lite0@1797", "extractor": "lite0"}
    append_records(run_dir, [Record.from_dict(own)])
    html = gddlab.report(run_dir, tmp_path / "p.html").read_text()
    assert "a &lt;jump&gt;" in html
    assert "fd-lite2@1797 55.5 at 6 kimg" in html
    assert "lite0 is a backbone of the discriminator, and no neutral judge" in html
    assert "lite2 is a backbone" not in html
    for damaged in ("{", '{"metric": "fd-lite2@1797"}'):  # told, and not made up
        (run_dir / "best.json").write_text(damaged)
        html = gddlab.report(run_dir, tmp_path / "p.html").read_text()
        assert "best.json: " in html and "The best student scored during training" not in html


def test_names_are_escaped(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>&"
    folder = tmp_path / "<script>alert(1)<"
    shutil.copytree(load_run(DIGITS / "gdd-i" / "seed-0").run_dir, folder / "script>&")
    other = copied(tmp_path, "other")
    for out in (
        gddlab.report(folder / "script>&", tmp_path / "1.html"),
        gddlab.report([folder, other], tmp_path / "2.html"),
    ):
        alone(out)
    assert escape(name) in (tmp_path / "2.html").read_text()


def test_what_cannot_be_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFound, match=r"^no such folder: .*nowhere: give a folder that holds run directories$"):
        gddlab.report(tmp_path / "nowhere")
    with pytest.raises(NotFound, match=r"^no run below .*: give a folder that holds run directories"):
        gddlab.report(tmp_path)
    with pytest.raises(GddlabError, match=r"^no runs given"):
        gddlab.report([])
    with pytest.raises(GddlabError, match=r"is a folder"):
        gddlab.report(DIGITS / "gdd" / "seed-0", tmp_path)
    with pytest.raises(SystemExit) as e:
        main(["report", str(tmp_path / "nowhere")])
    assert e.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_page_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "p.html"
    out.write_text(old := '<meta name="generator" content="gddlab">old')

    def fail(*_: object, **__: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(module, "render", fail)
    with pytest.raises(OSError, match="disk full"):
        gddlab.report(DIGITS / "gdd" / "seed-0", out)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        gddlab.report(DIGITS / "gdd" / "seed-0", out)
    assert out.read_text() == old
    assert [p.name for p in tmp_path.iterdir()] == ["p.html"]
