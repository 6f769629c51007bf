"""The command line: the same calls, one line and exit code 2 on bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from gddlab.cli import main
from gddlab.distill.config import TrainConfig
from gddlab.freezing import FreezeMask
from gddlab.probing import ProbeResult
from gddlab.runs import load_run


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as e:
        main(list(argv))
    assert e.value.code == 2
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return out.err


def test_probe_freeze_train_sample_evaluate(
    tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = str(tiny_teacher)
    main(["probe", teacher, "--out", str(tmp_path / "probe"), "--timesteps", "3", "--n", "2"])
    result = ProbeResult.load(tmp_path / "probe")
    assert len(result.sigmas) == 3
    assert (tmp_path / "probe" / "rms.png").exists()

    mask = tmp_path / "mask.json"
    main(
        [
            "freeze",
            str(tmp_path / "probe"),
            "--strategy",
            "budget",
            "--score",
            "rms",
            "--budget",
            "0.5",
            "--out",
            str(mask),
        ]
    )
    assert FreezeMask.load(mask).strategy == "budget"
    main(["freeze", teacher, "--out", str(mask)])
    assert "parameters frozen by gdd-i" in capsys.readouterr().out

    run = tmp_path / "run"
    flags = [
        "--batch",
        "8",
        "--total-kimg",
        "0.016",
        "--input-size",
        "32",
        "--cout",
        "4",
        "--head-width",
        "8",
        "--tick-kimg",
        "0.008",
        "--no-cache-real",
    ]
    main(["train", "--run-dir", str(run), "--teacher", teacher, "--mask", str(mask), *flags])
    assert "done" in capsys.readouterr().out
    config = TrainConfig.load(run)
    assert config.mask is not None
    assert config.mask.strategy == "gdd-i"
    assert (config.batch, config.head_width) == (8, 8)

    main(["sample", str(run), "--n", "4", "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    main(["evaluate", str(run), "--metrics", "kid", "--n", "64"])
    assert "kd-lite2@64" in capsys.readouterr().out
    assert load_run(run).evaluation["metric"].tolist() == ["kd-lite2@64"]
    assert "another process" not in capsys.readouterr().err
    assert "head_width is 8 there, 16 here" in refused(
        capsys, "train", "--run-dir", str(run), "--teacher", teacher, "--mask", str(mask), *flags, "--head-width", "16"
    )


def test_teacher_show(capsys: pytest.CaptureFixture[str]) -> None:
    main(["teacher", "show", "digits"])
    out = capsys.readouterr().out
    assert "1,036,769" in out
    assert "fd-lite2@1797" in out


def test_teacher_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model-channels", "8", "--num-blocks", "1", "--batch", "8", "--total-kimg", "0.016"]
    main(["teacher", "train", "--run-dir", str(tmp_path / "t"), *flags])
    assert (tmp_path / "t" / "teacher.safetensors").exists()


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'digits'" in refused(capsys, "teacher", "show", "digts")
    assert "did you mean 'gdd-i'" in refused(capsys, "freeze", "digits", "--strategy", "gdd_i")
    assert "did you mean 'rms'" in refused(
        capsys, "probe", "digits", "--stats", "rsm", "--n", "2", "--out", str(tmp_path / "p")
    )
    layers = refused(capsys, "probe", "digits", "--layers", "model.enc.*conv9", "--out", str(tmp_path / "p"))
    assert "unknown layer 'model.enc.*conv9': did you mean" in layers
    assert "sigma" in refused(capsys, "probe", "digits", "--sigmas", "0", "--out", str(tmp_path / "p"))
    assert "did you mean 'fid'" in refused(capsys, "evaluate", "digits", "--metrics", "fed")
    assert "did you mean 'digits'" in refused(capsys, "evaluate", "digits", "--data", "digit")
    assert "budget" in refused(capsys, "freeze", "digits", "--strategy", "random", "--budget", "1.5")
    assert "did you mean 'digits'" in refused(capsys, "train", "digts", "--run-dir", str(tmp_path / "r"))
    assert "batch=0" in refused(capsys, "train", "--run-dir", str(tmp_path / "r"), "--batch", "0")
    assert not list(tmp_path.iterdir())
