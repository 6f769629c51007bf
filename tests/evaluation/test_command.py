"""`gddlab evaluate` and `gddlab reference`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gddlab.cli import main
from gddlab.evaluation import evaluate
from gddlab.nets import save_network
from tests.evaluation.test_evaluate import network


def test_the_command_is_the_call(counter, tmp_path: Path, capsys) -> None:
    net = network("EDMPrecond", label_dim=0)
    save_network(net, tmp_path / "net.safetensors", data="digits")
    main(["reference", "digits", "--out", str(tmp_path / "digits.npz"), "--features"])
    assert str(tmp_path / "digits.npz") in capsys.readouterr().out
    words = ["evaluate", str(tmp_path / "net.safetensors"), "--data", str(tmp_path / "digits.npz"), "--n", "6"]
    words += ["--metrics", "kid", "mind", "--steps", "2", "--solver", "euler", "--S-churn", "2", "--blocks", "2"]
    main([*words, "--out", str(tmp_path / "scores.json")])
    out = capsys.readouterr().out
    scores = evaluate(
        net, data="digits", metrics=("kid", "mind"), n=6, steps=2, solver="euler", S_churn=2.0, blocks=2, progress=False
    )
    assert out.splitlines() == str(scores).splitlines()
    written = json.loads((tmp_path / "scores.json").read_text())
    assert [r["value"] for r in written] == [r.value for r in scores]
    assert {r["sampler"] for r in written} == {"euler-2 S_churn=2.0"}


def test_refusals(capsys, tmp_path: Path) -> None:
    for words, why in (
        (["evaluate", "digits", "--snapshot", "6"], "which is no run directory"),
        (["evaluate", "digits", "--extractor", "clipp"], "did you mean 'clip'"),
        (["evaluate", "digits", "--data", str(tmp_path / "absent.npz"), "--metrics", "fid"], "no such file"),
        (["reference", "digits", "--out", str(tmp_path / "ref.txt")], "ends in .npz"),
    ):
        with pytest.raises(SystemExit) as e:
            main(words)
        assert e.value.code == 2
        err = capsys.readouterr().err
        assert why in err and "Traceback" not in err
