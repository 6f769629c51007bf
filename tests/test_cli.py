"""The command line: the same calls, one line and exit code 2 on bad input."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gddlab
from gddlab.cli import COMMANDS, main
from gddlab.datasets import open_dataset
from gddlab.distill.config import TrainConfig
from gddlab.freezing import FreezeMask
from gddlab.probing import ProbeResult
from gddlab.runs import load_run
from gddlab.sampling import sample
from gddlab.sampling.grid import to_uint8
from tests.conftest import tiny_net
from tests.teachers.pickles import write_snapshot


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
    assert "mask.json exists: give another name" in refused(capsys, "freeze", teacher, "--out", str(mask))
    assert FreezeMask.load(mask).strategy == "budget"
    main(["freeze", teacher, "--out", str(mask), "--overwrite"])
    assert "gdd-i: 77.32% of 48,321 parameters frozen" in capsys.readouterr().out

    run = tmp_path / "run"
    flags = [
        "--batch",
        "8",
        "--total-kimg",
        "0.016",
        "--discriminator.input-size",
        "32",
        "--discriminator.cout",
        "4",
        "--discriminator.head-width",
        "8",
        "--tick-kimg",
        "0.008",
        "--discriminator.no-cache-real",
    ]
    main(["train", "--run-dir", str(run), "--teacher", teacher, "--mask", str(mask), *flags])
    assert "done" in capsys.readouterr().out
    config = TrainConfig.load(run)
    assert config.mask is not None
    assert config.mask.strategy == "gdd-i"
    assert (config.batch, config.to_json()["discriminator"]["head_width"]) == (8, 8)

    main(["sample", str(run), "--n", "4", "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    for named in (["--solver", "heun", "--rho", "7"], ["--solver=heun"]):
        assert "--solver heun with a one-step student" in refused(capsys, "sample", str(run), *named)
        assert "--solver heun with a one-step student" in refused(capsys, "evaluate", str(run), *named)
    (run / "evaluation.jsonl").mkdir()
    with pytest.raises(SystemExit) as e:
        main(["evaluate", str(run), "--metrics", "kid", "--n", "64", "--steps", "1"])
    assert e.value.code == 2
    assert "kd-lite2@64" in capsys.readouterr().out  # what was computed is shown although it cannot be kept
    (run / "evaluation.jsonl").rmdir()
    main(["evaluate", str(run), "--metrics", "kid", "--n", "64", "--steps", "1"])
    assert "kd-lite2@64" in capsys.readouterr().out
    assert load_run(run).evaluation["metric"].tolist() == ["kd-lite2@64"]
    assert "another process" not in capsys.readouterr().err
    assert "head_width is 8 there, 16 here" in refused(
        capsys,
        "train",
        "--run-dir",
        str(run),
        "--teacher",
        teacher,
        "--mask",
        str(mask),
        *flags,
        "--discriminator.head-width",
        "16",
    )


def test_a_result_is_replaced_as_a_whole_and_when_asked(
    tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, how = tmp_path / "p", ["--timesteps", "2", "--n", "2", "--out", str(tmp_path / "p")]
    main(["probe", str(tiny_teacher), "--stats", "rms", "mean", *how])
    before = {p: p.read_bytes() for p in folder.iterdir()}
    for command in ("probe", "ablate"):
        assert f"{folder} exists: give another name" in refused(capsys, command, "digits", *how)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    main(["probe", str(tiny_teacher), "--stats", "rms", *how, "--dry-run"])
    main(["probe", str(tiny_teacher), "--stats", "rms", *how, "--overwrite"])
    assert sorted(p.name for p in folder.glob("*.png")) == ["rms.png"]
    grid = tmp_path / "x.PNG"
    for more in ([], ["--overwrite"]):
        main(["sample", str(tiny_teacher), "--n", "1", "--steps", "1", "--out", str(grid), *more])
    assert "x.PNG exists" in refused(capsys, "sample", str(tiny_teacher), "--n", "1", "--out", str(grid))
    assert "s.jpg is the name of a file" in refused(capsys, "sample", str(tiny_teacher), "--n", "1", "--out", "s.jpg")


@pytest.mark.parametrize("name", ["probe", "ablate", "freeze", "reproduce", "train", "preflight", "teacher train"])
def test_a_command_alone_starts_no_work(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"see gddlab {name} --help" in refused(capsys, *name.split())


def test_own_teacher_and_own_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a pickle and a folder of photographs to a run and its samples: every command on the way."""
    photos = tmp_path / "photos"
    for label in ("cat", "dog"):
        (photos / label).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 255, (20, 24), dtype=np.uint8)
            Image.fromarray(pixels).save(photos / label / f"{i}.png")
    with pytest.raises(SystemExit) as e:
        main(["prepare", str(photos), "--dry-run", "--resolution", "16"])
    assert e.value.code == 2
    assert "cat/0.png" in capsys.readouterr().out
    data, teacher = str(tmp_path / "photos.zip"), str(tmp_path / "teacher.safetensors")
    main(["prepare", str(photos), data, "--resolution", "16", "--crop", "center"])
    assert "12 images, 16x16, grey, 2 classes" in capsys.readouterr().out

    pickled = write_snapshot(tmp_path / "network-snapshot.pkl", tiny_net())
    main(["teacher", "show", str(pickled)])
    assert "network-snapshot.pkl" in capsys.readouterr().out
    main(["convert", str(pickled), teacher])
    assert "bit for bit" in capsys.readouterr().out
    main(["probe", str(pickled), "--data", data, "--out", str(tmp_path / "probe"), "--timesteps", "2", "--n", "2"])

    run = str(tmp_path / "run")
    flags = ["--batch", "4", "--total-kimg", "0.008", "--discriminator.input-size", "32"]
    flags += ["--discriminator.cout", "4", "--discriminator.head-width", "8"]
    main(["train", "--run-dir", run, "--teacher", teacher, "--data", data, *flags, "--tick-kimg", "0.004"])
    assert "done" in capsys.readouterr().out
    images = tmp_path / "samples.zip"
    main(["sample", run, "--out", str(images), "--n", "5", "--batch-size", "2"])
    drawn = open_dataset(images)
    assert (len(drawn), drawn.resolution, drawn.channels) == (5, 16, 1)
    expected = to_uint8(sample(load_run(run).student(), 5)).float() / 127.5 - 1
    assert (drawn.images() - expected).abs().max() < 1.5 / 127.5  # another batch may round a pixel the other way
    assert "no one-step student" in refused(capsys, "export", teacher, str(tmp_path / "x.pt2"))
    main(["export", run, str(tmp_path / "x.pt2")])
    assert "pixels differ by at most" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main([*name.split(), "--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    assert COMMANDS[name].summary[:60] in " ".join(text.split())
    described = re.sub(r"^ *(-\S+)( \S+)*$\n", "", text, flags=re.MULTILINE)
    assert not re.findall(r"^ *--\S+ +\(default.*", described, flags=re.MULTILINE)


def test_an_option_is_what_the_function_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signature gives name, type and default, its docstring the help; what is not given is not passed on."""
    seen = []

    def export(model: object, out: Path, *, opset: int = 7, layers: Sequence[str] = ("a", "b"), deep: bool = False):
        """Exports.

        Args:
            opset: Version of the `layers`; None is the newest. In Python also a.b.c, or a list. The end.
            layers, deep: What else.
        """
        seen.append((out, opset, layers, deep))

    monkeypatch.setattr("gddlab.nets.export.export", export)
    monkeypatch.setattr("gddlab.export", export, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--opset INT Version of the --layers; None is the newest. The end. (default: 7)" in text
    assert "--layers STR ... What else. (default: a b)" in text
    assert "--deep What else." in text and "--no-deep" not in text
    main(["export", "digits", "x.pt2"])
    main(["export", "digits", "x.pt2", "--layers", "c", "--deep", "--opset", "9"])
    assert seen == [(Path("x.pt2"), 7, ("a", "b"), False), (Path("x.pt2"), 9, ("c",), True)]


def test_parts_of_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    for words, shown, hidden in (
        ([], ["--discriminator.kind", "--discriminator.cout", "--augment.ops"], "--instance.steps"),
        (["--discriminator.kind=stylegan2"], ["--discriminator.channel-max"], "--discriminator.cout"),
        (["--discriminator.kind", "none", "--instance.kind", "pd"], ["--instance.steps"], "--augment.ops"),
    ):
        with pytest.raises(SystemExit):
            main(["train", *words, "--help"])
        text = capsys.readouterr().out
        assert all(option in text for option in shown)
        assert hidden not in text
    assert "did you mean 'stylegan2'" in refused(capsys, "train", "--discriminator.kind", "stylegan3")
    assert "nothing is trained" in refused(capsys, "train", "--discriminator.kind", "none")


def test_overviews_and_runs_do_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys, gddlab.cli as c\ntry: c.main(sys.argv[1:])\nfinally: print({'torch', 'pandas'} & {*sys.modules})"
    )
    code = code.replace("finally", "except SystemExit: pass\nfinally")
    (tmp_path / "config.json").write_text('{"teacher": "digits", "mask": null}')
    lines = (["--help"], "preflight"), (["mask", "--help"], "compare"), (["runs", str(tmp_path)], "stopped")
    lines += (["--version"], gddlab.__version__), (["evalute"], "")
    for words, listed in *lines, (["report", "--help"], "several runs"), (["demo", "--help"], "--recompute"):
        out = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout
        assert listed in out
        assert out.splitlines()[-1] == "set()"


def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder may be relative; a terminal gets a table."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "config.json").write_text('{"teacher": "digits", "mask": null}')
    monkeypatch.chdir(tmp_path)
    main(["runs", "a"])
    assert "b stopped" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    main(["runs", "a"])
    assert "b    stopped" in capsys.readouterr().out
    assert "no such folder" in refused(capsys, "runs", "c")


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
    for strategy in ("gdd_i", "GDD-I"):
        assert "did you mean 'gdd-i'" in refused(capsys, "freeze", "digits", "--strategy", strategy)
    assert "did you mean 'rms'" in refused(
        capsys, "probe", "digits", "--stats", "rsm", "--n", "2", "--out", str(tmp_path / "p")
    )
    layers = refused(capsys, "probe", "digits", "--layers", "model.enc.*conv9", "--out", str(tmp_path / "p"))
    assert "unknown layer 'model.enc.*conv9': did you mean" in layers
    assert "sigma" in refused(capsys, "probe", "digits", "--sigmas", "0", "--out", str(tmp_path / "p"))
    assert "did you mean 'fid'" in refused(capsys, "evaluate", "digits", "--metrics", "fed")
    assert "did you mean 'digits'" in refused(capsys, "evaluate", "digits", "--data", "digit")
    assert "budget" in refused(capsys, "freeze", "digits", "--strategy", "random", "--budget", "1.5")
    assert "--device nope cannot be used" in refused(
        capsys, "probe", "digits", "--device", "nope", "--n", "2", "--out", str(tmp_path / "p")
    )
    assert "is a file: give a folder" in refused(capsys, "probe", "digits", "--out", __file__)
    assert "is a file: give a folder" in refused(capsys, "ablate", "digits", "--out", __file__)
    assert "is a folder: give a file" in refused(capsys, "mask", "show", str(Path(__file__).parent))
    assert "cannot be written" in refused(capsys, "reproduce", "digits", "--out", __file__)
    assert "--ship with --dry-run" in refused(capsys, "reproduce", "digits", "--ship", str(tmp_path / "s"), "--dry-run")
    assert "no run of 'digits'" in refused(
        capsys, "reproduce", "digits", "--ship", str(tmp_path / "s"), "--out", str(tmp_path / "o")
    )
    assert "did you mean 'digits'" in refused(capsys, "train", "digts", "--run-dir", str(tmp_path / "r"))
    assert "--batch 0" in refused(capsys, "train", "--run-dir", str(tmp_path / "r"), "--batch", "0")
    assert not list(tmp_path.iterdir())


def test_measure_and_choose(tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, folder = str(tiny_teacher), tmp_path / "probe"
    few = ["--sigmas", "80", "1", "--n", "2"]
    main(["probe", teacher, "--out", str(folder), *few, "--dry-run"])
    assert "2 images, 1 pass of 4 rows" in capsys.readouterr().out
    assert not folder.exists()
    main(["probe", teacher, "--out", str(folder), *few, "--states", "trajectory", "--per-channel", "--start", "3"])
    result = ProbeResult.load(folder)
    assert result.meta["images"] == [[0, 3, 5]]
    assert result.channels
    main(["ablate", teacher, "--out", str(tmp_path / "ablation"), *few, "--layers", "block", "--mode", "zero"])
    assert "ablation_output_zero" in capsys.readouterr().out
    assert (tmp_path / "ablation" / "ablation_loss_zero.png").exists()
    main(["probe", teacher, "--out", str(tmp_path / "student"), "--n", "2", "--states", "student", "--stats", "rms"])
    assert ProbeResult.load(tmp_path / "student").sigmas == [80.0]

    few = ["--sigmas", "80", "1", "--n", "40", "--held-out", "20", "--dims", "8", "--layers", "block"]
    main(["decode", teacher, "--out", str(tmp_path / "decode"), *few, "--targets", "image,sigma"])
    assert "decode_sigma_chance" in capsys.readouterr().out
    assert ProbeResult.load(tmp_path / "decode").stats[0] == "decode_image"
    assert (tmp_path / "decode" / "readouts.png").exists() and (tmp_path / "decode" / "decode_image.png").exists()
    several = refused(capsys, "decode", teacher, "--out", str(tmp_path / "d"), "--sigmas", "1", "--targets", "imge")
    assert "imge" in several
    for mode in ("bypass", "readout"):
        where = tmp_path / "lens" / mode
        main(["lens", teacher, "--out", str(where), "--sigmas", "5", "--n", "2", "--fit", "20", "--mode", mode])
        assert "lens" in capsys.readouterr().out
        assert gddlab.Lens.load(where).sigmas == (5.0,)
        assert {"grid.png", "distances.csv"} <= {p.name for p in where.iterdir()}
    assert "exists: give another name" in refused(capsys, "lens", teacher, "--out", str(where))

    a, b, c = (str(tmp_path / f"{x}.json") for x in "abc")
    main(["freeze", str(folder), "--strategy", "budget", "--score", "rms", "--budget", "0.5", "--out", a])
    main(["freeze", str(folder), "--strategy", "threshold", "--score", "rms", "--threshold", "0.5", "--out", b])
    main(["freeze", teacher, "--strategy", "invert", "--mask", a, "--out", c])
    capsys.readouterr()
    main(["mask", "show", a])
    shown = capsys.readouterr().out
    assert "budget" in shown and "total" in shown
    for name in ("compare", "diff"):
        main(["mask", name, a, c])
        shown = capsys.readouterr().out
        assert "Jaccard" in shown and "parameters differ:" in shown
    assert "1 given: name two files" in refused(capsys, "mask", "compare", a)
    assert "no such file" in refused(capsys, "mask", "show", str(tmp_path / "none.json"))


def test_several_values_may_have_commas_between_them(
    tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for given in (["80", "1"], ["80,1"], ["80,", "1"]):
        layers = ["--layers", ",".join(["block", "norm"])] if "," in given[0] else ["--layers", "block", "norm"]
        main(["probe", str(tiny_teacher), "--n", "2", "--dry-run", "--stats=rms,std", "--sigmas", *given, *layers])
        said.append(capsys.readouterr().out.partition(": ")[2].partition(";")[0])
    assert len({*said}) == 1 and "at 2 noise levels, 2 images" in said[0]
    assert "--mid-sigmas 3.0 0.0: give desc" in refused(capsys, "train", "--classes=3,4", "--mid-sigmas", "3,0")


def test_the_plan_of_experiments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["reproduce", "digits", "--out", str(tmp_path), "--dry-run", "--only", "gdd-i", "random", "--seeds", "2"])
    out = capsys.readouterr().out
    assert out.count("to do") == 4
    assert out.count("(02_choosing_a_mask, 17_freezing") == 4
    assert "0 of 4 are done" in out
    assert not list(tmp_path.iterdir())
    assert "did you mean 'gdd-i'" in refused(capsys, "reproduce", "digits", "--only", "gddi", "--out", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "train --total-kimg abc",
            "could not convert string to float: 'abc'; the form is --total-kimg FLOAT; see gddlab",
        ),
        ("train digits --bogus 1", "unrecognized options: --bogus, 1; see gddlab train --help"),
        ("train --discriminator.kynd lpips", "did you mean --discriminator.kind; see gddlab train --help"),
        ("evalute", "gddlab: unknown command 'evalute': did you mean 'evaluate'"),
        ("mask shwo", "gddlab: unknown mask command 'shwo': did you mean 'show'"),
        ("--bogus", "available subcommands: demo, teacher, "),
        ("teacher", "expected one of {train, show, score}; see gddlab teacher --help"),
        ("probe digits --sigmas 80;1", "arguments: ['80;1']; the form is --sigmas FLOAT ...; see gddlab probe --help"),
        ("train --classes 3,x", "instantiated from ['3', 'x']; the form is --classes {None}|{[INT"),
        ("train --lr-g -1", "gddlab: --lr-g -1.0: input should be greater than 0"),
        ("train --discriminator.cout 0", "gddlab: --discriminator.cout 0: input should be"),
        ("train --nproc 3", "gddlab: --batch 16 on 3 processes: give a multiple of 3"),
        ("preflight --rule gdd-i --mask x.json", "gddlab: --mask x.json and --strategy gdd-i: give one of them"),
    ],
)
def test_a_wrong_line_is_refused_in_one(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(words.split())
    assert e.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("gddlab: ") and said in err and err.count("\n") == 1 and not out


def test_warnings_of_a_command_are_one_line_and_only_of_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = warnings.formatwarning, []
    monkeypatch.setattr(
        gddlab, "load_teacher", lambda source: seen.append(warnings.formatwarning("pale", UserWarning, "", 1))
    )
    with pytest.raises(AttributeError, match="card"):
        main(["teacher", "show", "digits"])  # what was loaded has no card
    assert seen == ["gddlab: pale\n"]
    assert warnings.formatwarning is before
