"""The command line: the same calls, one line and exit code 2 on bad input."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gddlab
from gddlab.cli import COMMANDS, main
from gddlab.datasets import open_dataset
from gddlab.distill.config import TrainConfig
from gddlab.editing import Inversion
from gddlab.errors import NotFound
from gddlab.files import data_dir, read_json
from gddlab.freezing import FreezeMask
from gddlab.nets import save_network
from gddlab.nets.io import make_student
from gddlab.probing import ProbeResult
from gddlab.runs import load_run
from gddlab.sampling import sample
from gddlab.sampling.grid import to_uint8
from gddlab.teachers import load_teacher
from tests.conftest import tiny_config, tiny_net
from tests.nets.test_dit import tiny_dit
from tests.teachers.pickles import write_snapshot


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as e:
        main(list(argv))
    assert e.value.code == 2
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return out.err


def make_run(folder: Path) -> None:
    """What a finished run of digits leaves, as far as scoring it needs."""
    tiny_config(folder, Path("digits")).write()
    save_network(make_student(gddlab.load_teacher("digits")), folder / "student.safetensors", data="digits")


def test_invert_inpaint_edit(tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, digits = str(tmp_path / "student.safetensors"), "digits:held-out"
    save_network(make_student(load_teacher(tiny_teacher)), student)
    few = ["--images", "2", "--steps", "3", "--restarts", "1"]
    main(["invert", student, digits, *few, "--out", str(tmp_path / "z")])
    assert "Inversion of 2 images" in capsys.readouterr().out
    assert len(Inversion.load(tmp_path / "z" / "inversion.safetensors")) == 2
    assert Image.open(tmp_path / "z" / "images.png").size == (65, 65)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "images.png").write_bytes(b"mine")
    assert "images.png exists" in refused(capsys, "invert", student, digits, *few, "--out", str(tmp_path / "mine"))
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 16, 8))
    mask.save(tmp_path / "mask.png")
    for keep in ("top", str(tmp_path / "mask.png")):
        out = tmp_path / f"{Path(keep).stem}-inpainted.png"
        main(["inpaint", student, digits, *few, "--keep", keep, "--n", "3", "--out", str(out)])
        assert "diversity" in capsys.readouterr().out and Image.open(out).size == (5 * 33 - 1, 2 * 33 - 1)
    top, drawn = (np.asarray(Image.open(tmp_path / f"{name}-inpainted.png")) for name in ("top", "mask"))
    assert (top == drawn).all()
    main(
        [
            "edit",
            student,
            "--seeds",
            "0",
            "1",
            "--towards",
            "5,6",
            "--strength",
            "0.5,1",
            "--out",
            str(tmp_path / "e.png"),
        ]
    )
    assert "2 images at strengths 0.5, 1" in capsys.readouterr().out
    layer = ["--layer", "model.dec.16x16_block0", "--component", "1", "--overwrite"]
    main(["edit", student, *layer, "--strength", "-2", "2", "--out", str(tmp_path / "e.png")])
    assert Image.open(tmp_path / "e.png").size == (3 * 33 - 1, 4 * 33 - 1)
    assert "nothing to change: give --towards" in refused(capsys, "edit", student, "--out", str(tmp_path / "f.png"))
    packed = str(data_dir() / "runs" / "digits" / "gdd-i" / "seed-0")  # in an archive
    main(["inpaint", packed, digits, *few[:4], "--n", "1", "--out", str(tmp_path / "packed.png")])
    assert "diversity" in capsys.readouterr().out
    assert "a grid is a PNG" in refused(capsys, "edit", student, "--label", "1", "--out", "x.jpg")
    assert "--component 5: give 0 to 99, with --layer" in refused(capsys, "edit", student, "--component", "5")
    assert "--layers with --layer: it goes" in refused(capsys, "edit", student, "--layer", "a", "--layers", "b")
    assert "--component -1: give 0 to 99" in refused(capsys, "edit", student, "--component", "-1", "--out", "x.png")
    assert "700 images from 0 on: digits:held-out has 599" in refused(
        capsys, "invert", student, digits, "--images", "700"
    )
    assert "unknown keep 'topp'" in refused(capsys, "inpaint", student, digits, "--keep", "topp", "--out", "x.png")
    assert "cannot be read as an image" in refused(
        capsys, "inpaint", student, digits, "--keep", "no.png", "--out", "x.png"
    )


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
    main(["probe", str(tiny_teacher), "--stats", "rms", "correlation", *how])
    assert sorted(p.name for p in folder.glob("*.png")) == ["correlation.png", "rms.png", "similarities.png"]
    before = {p: p.read_bytes() for p in folder.iterdir()}
    for command, given in (("probe", how), ("ablate", how), ("trace", how[2:])):
        assert f"{folder} exists: give another name" in refused(capsys, command, "digits", *given)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    main(["probe", str(tiny_teacher), "--stats", "rms", *how, "--dry-run"])
    main(["probe", str(tiny_teacher), "--stats", "rms", *how, "--overwrite"])
    assert sorted(p.name for p in folder.glob("*.png")) == ["rms.png"]
    grid = tmp_path / "x.PNG"
    for more in ([], ["--overwrite"]):
        main(["sample", str(tiny_teacher), "--n", "1", "--steps", "1", "--out", str(grid), *more])
    assert "x.PNG exists" in refused(capsys, "sample", str(tiny_teacher), "--n", "1", "--out", str(grid))
    assert "s.jpg is the name of a file" in refused(capsys, "sample", str(tiny_teacher), "--n", "1", "--out", "s.jpg")


def test_only_a_result_of_the_same_kind_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("mine/0.png", "config.json", "page.html"):
        (tmp_path / name).write_text("{}")
    for words, name in (
        ("probe digits", "mine"),
        ("ablate digits", "mine"),
        ("freeze digits", "config.json"),
    ):
        for more in ([], ["--overwrite"]):
            assert "give another name" in refused(capsys, *words.split(), "--out", str(tmp_path / name), *more)
    run = str(Path(gddlab.__file__).parents[1] / "data/runs/digits/gdd/seed-0")
    for name, said in (("config.json", "give a name that ends in .html"), ("page.html", "no page of gddlab")):
        assert said in refused(capsys, "report", run, "--out", str(tmp_path / name))
    assert {p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == {"{}"}
    assert "page.html/x is below a file" in refused(capsys, "freeze", "digits", "--out", str(tmp_path / "page.html/x"))
    assert ".png is the name of a file" in refused(capsys, "sample", "digits", "--out", ".png")


def test_home_in_out_is_found_before_it_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell leaves ~ in --out=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    main(["freeze", "digits", "--out=~/m.json"])
    assert f"{tmp_path}/m.json exists: give another name" in refused(capsys, "freeze", "digits", "--out=~/m.json")
    few = ["--n", "2", "--sigmas", "80", "--layers", "conv", "--stats", "rms"]
    main(["probe", "digits", *few, "--out=~/p"])
    assert f"{tmp_path}/p exists: give another name" in refused(capsys, "probe", "digits", *few, "--out=~/p")
    main(["freeze", "~/p", "--strategy", "budget", "--score", "rms", "--budget", "0.5", "--out", "~/q.json"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "p", "q.json"]


def test_a_name_is_no_run_that_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In runs/, `digits` is the teacher, `./digits` the run."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "digits")
    main(["evaluate", "digits", "--n", "16", "--metrics", "fid", "--steps", "1"])
    assert not (tmp_path / "digits/evaluation.jsonl").exists()
    (tmp_path / "file").touch()
    where = ["--out", "file/x"]
    assert "below a file" in refused(capsys, "evaluate", "./digits", "--n", "16", "--metrics", "fid", *where)
    monkeypatch.setattr("gddlab.cli.check_free", lambda path, overwrite: None)  # the disk fills up meanwhile
    assert "cannot be written" in refused(capsys, "evaluate", "./digits", "--n", "16", "--metrics", "fid", *where)
    assert load_run("digits").evaluation["metric"].tolist() == ["fd-lite2@16"]
    assert "no such file: digits/teacher.safetensors" in refused(capsys, "teacher", "score", "digits")


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
    assert "261,361" in out
    assert "fd-lite2@1198" in out


def test_teacher_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model-channels", "8", "--num-blocks", "1", "--batch", "8", "--total-kimg", "0.016"]
    main(["teacher", "train", "--run-dir", str(tmp_path / "t"), *flags])
    assert (tmp_path / "t" / "teacher.safetensors").exists()
    dit = ["--network", "dit", "--model-channels", "12", "--num-blocks", "1", "--batch", "8", "--total-kimg", "0.016"]
    main(["teacher", "train", "--run-dir", str(tmp_path / "d"), *dit])
    asked = read_json(tmp_path / "d" / "config.json")
    assert (asked["network"], asked["conditional"], asked["label_dropout"], asked["num_heads"]) == ("dit", True, 0.1, 3)


def test_a_teacher_is_no_run(tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finished or not, its folder is refused where a run is asked for, and the other way round; nothing is written."""
    done, begun, run = tmp_path / "done", tmp_path / "begun", tmp_path / "run"
    for folder in (done, begun):
        gddlab.TeacherConfig(run_dir=folder).write()
    shutil.copy(tiny_teacher, done / "teacher.safetensors")
    (begun / "provenance.json").write_text("{}")
    tiny_config(run, tiny_teacher).write()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for folder in (done, begun):
        for words in (["watch"], ["stop"], ["kill"], ["report", "--out", str(tmp_path / "r.html")], ["runs"]):
            said = refused(capsys, *words[:1], str(folder), *words[1:])
            assert f"{folder} is a teacher's folder, not a run: give" in said
        for call in (gddlab.attach, gddlab.load_run):
            with pytest.raises(NotFound, match="is a teacher's folder, not a run"):
                call(folder)
        train = ["train", "digits", "--teacher", str(tiny_teacher), "--run-dir", str(folder)]
        assert f"{folder} holds a teacher, no run: give an empty or new folder" in refused(capsys, *train)
    teacher = ["teacher", "train", "--run-dir", str(run)]
    assert f"{run} holds a run, no teacher: give an empty or new folder" in refused(capsys, *teacher)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert "not finished" in refused(capsys, "sample", str(begun), "--out", str(tmp_path / "x.png"))


def test_who_reads_may_stop(tmp_path: Path) -> None:
    line = f"{sys.executable} -m gddlab.cli train --help | head -1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1


def test_what_is_missing_comes_before_what_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mask.json").write_text("mine")
    said = refused(capsys, "freeze", "nosuch", "--out", str(tmp_path / "mask.json"))
    assert said.startswith("gddlab: unknown teacher 'nosuch': ")
    assert said.endswith("; or a folder that gddlab probe wrote\n")
    assert "a .npz or .npy" in refused(capsys, "prepare", "nosuch", str(tmp_path / "x.zip"))
    assert (tmp_path / "mask.json").read_text() == "mine"


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
    for more in ([], ["--dry-run"]):
        assert "is a file: give a folder" in refused(capsys, "reproduce", "digits", "--out", __file__, *more)
    assert "--ship with --dry-run" in refused(capsys, "reproduce", "digits", "--ship", str(tmp_path / "s"), "--dry-run")
    assert "no run of 'digits'" in refused(
        capsys, "reproduce", "digits", "--ship", str(tmp_path / "s"), "--out", str(tmp_path / "o")
    )
    assert "did you mean 'digits'" in refused(capsys, "train", "digts", "--run-dir", str(tmp_path / "r"))
    assert "--batch 0" in refused(capsys, "train", "--run-dir", str(tmp_path / "r"), "--batch", "0")
    assert not list(tmp_path.iterdir())


def test_a_transformer_is_converted_and_probed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, teacher = tmp_path / "weights.pt", str(tmp_path / "sit.safetensors")
    torch.save(tiny_dit("sit").model.state_dict(), source)
    assert "give --family dit or --family sit" in refused(capsys, "convert", str(source), teacher, "--heads", "2")
    main(["convert", str(source), teacher, "--family", "sit", "--heads", "2"])
    few = ["--n", "2", "--states", "prior", "--stats", "rms", "--layers", "block", "--out", str(tmp_path / "probe")]
    main(["probe", teacher, *few, "--sigmas", "0.1", "0.5", "--unit", "t", "--calls", "mean", "--branch", "all"])
    result = ProbeResult.load(tmp_path / "probe")
    assert result.sigmas == pytest.approx([9.0, 1.0])  # the time of SiT is the share of the image
    assert result.meta["t"] == pytest.approx([0.1, 0.5])
    assert "Accepted: cond, all" in refused(capsys, "probe", teacher, *few, "--branch", "uncond", "--overwrite")
    assert "context" in refused(capsys, "probe", teacher, *few, "--stream", "contxt", "--overwrite")


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
    how = ["--n", "2", "--layers", "model.dec.16x16_up", "model.enc.16x16_block0"]
    main(["trace", teacher, "--out", str(tmp_path / "trace"), "--sigmas", "5", "0.5", *how])
    assert "2 layers at 2 noise levels; statistics trace_pixels_mean, trace_lite0" in capsys.readouterr().out
    assert (tmp_path / "trace" / "trace_pixels_mean.png").exists()
    donor = ["--mode", "donor", "--donor", "digits"]
    assert "give two networks of the same architecture" in refused(
        capsys, "trace", teacher, "--out", str(tmp_path / "other"), "--steps", "2", *how, *donor
    )
    main(["probe", teacher, "--out", str(tmp_path / "student"), "--n", "2", "--states", "student", "--stats", "rms"])
    assert ProbeResult.load(tmp_path / "student").sigmas == [80.0]

    few = ["--sigmas", "80", "1", "--n", "40", "--held-out", "20", "--dims", "8", "--layers", "block"]
    main(["decode", teacher, "--out", str(tmp_path / "decode"), *few, "--targets", "image,sigma"])
    assert "decode_sigma_chance" in capsys.readouterr().out
    assert ProbeResult.load(tmp_path / "decode").stats[0] == "decode_image"
    assert (tmp_path / "decode" / "readouts.png").exists() and (tmp_path / "decode" / "decode_image.png").exists()
    crossed = ["--sigmas", "80", "1", "--nulls", "shuffled", "--null-draws", "2", "--n", "2", "--stats", "rms"]
    main(["probe", teacher, "--out", str(tmp_path / "decode"), "--overwrite", "--told", "cross", *crossed])
    replaced = ProbeResult.load(tmp_path / "decode")
    assert replaced.told == [80.0, 1.0] and len(replaced.nulls["shuffled"]) == 2
    assert {p.name for p in (tmp_path / "decode").glob("*.png")} == {"rms.png"}
    main(["probe", teacher, "--out", str(tmp_path / "told"), "--told", "5", "--sigmas", "1", "--n", "2"])
    assert ProbeResult.load(tmp_path / "told").told == [5.0]
    assert 'give "cross", or noise levels' in refused(capsys, "probe", teacher, "--told", "x", "--out", "y")
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
    main(["mask", "compare", a, c])
    shown = capsys.readouterr().out
    assert "Jaccard" in shown and "parameters differ:" in shown
    assert shown.partition("parameters differ:")[2].count(f"0: {a}") == 1 and " other" not in shown
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
    main(["reproduce", "digits", "--out", str(tmp_path), "--dry-run", "--only", "gdd-i", "random-50", "--seeds", "2"])
    out = capsys.readouterr().out
    assert out.count("to do") == 4
    assert out.count("17_freezing") == 4 and out.count("02_choosing_a_mask") == 2
    assert "0 of 4 are done" in out and "on two cores, 1 at a time" in out
    assert not list(tmp_path.iterdir())
    assert "did you mean 'gdd-i'" in refused(capsys, "reproduce", "digits", "--only", "gddi", "--out", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "train --total-kimg abc",
            "could not convert string to float: 'abc'; the form is --total-kimg FLOAT; see gddlab",
        ),
        ("train digits --bogus 1", "unknown option '--bogus': accepted: --"),
        ("train digits --bogus 1", "(see gddlab train --help)"),
        ("probe --hlep", "unknown option '--hlep': did you mean '--help'? (see gddlab probe --help)"),
        ("--verison", "gddlab: unknown option '--verison': did you mean '--version'?"),
        ("version", "gddlab: unknown command 'version': did you mean '--version'?"),
        ("list", "gddlab: unknown command 'list': accepted: demo, teacher, "),
        ("convert", "arguments are missing: give gddlab convert SOURCE OUT; see gddlab convert --help"),
        ("probe digits --states Prior", "unknown --states 'Prior': did you mean 'prior'? Accepted: noised, prior, "),
        (
            "probe digits --dtype=fp16",
            "unknown --dtype 'fp16': did you mean 'float16'? Accepted: float32, bfloat16",
        ),
        ("ablate digits --mode Mean", "unknown --mode 'Mean': did you mean 'mean'?"),
        ("prepare x y.zip --crop Center", "unknown --crop 'Center': did you mean 'center'?"),
        ("train --stop-on nan,nam", "unknown --stop-on 'nam': did you mean 'nan'?"),
        ("train digits --run-dir https://x/y", "gddlab: --run-dir https://x/y is a URL: give a path on this machine"),
        ("prepare nope", "gddlab: out is missing: give the zip to make, or --dry-run to check the source only"),
        ("sample digits --label 3", "gddlab: --label 3 with an unconditional network: omit it"),
        ("sample digits --seeds", "gddlab: --seeds without a value: give at least one, or omit it"),
        ("train --mask gdd-i", "gddlab: mask 'gdd-i' is a strategy, no file: give --strategy gdd-i"),
        ("freeze digits --strategy budget", "orders layers by a measurement: give the result of a probe"),
        ("runs pyproject.toml", "pyproject.toml is a file: give a folder that holds run directories"),
        ("probe digits --out pyproject.toml", "gddlab: --out pyproject.toml is a file: give a folder"),
        ("train --discriminator.kynd lpips", "unknown option '--discriminator.kynd': did you mean '--discriminator."),
        ("evalute", "gddlab: unknown command 'evalute': did you mean 'evaluate'"),
        ("mask shwo", "gddlab: unknown mask command 'shwo': did you mean 'show'"),
        ("--bogus", "unknown option '--bogus': accepted: --help, --version"),
        ("teacher", "expected one of {train, show, score}; see gddlab teacher --help"),
        ("probe digits --sigmas", "gddlab: --sigmas without a value: give at least one, or omit it"),
        ("reproduce digits --only --dry-run", "gddlab: --only without a value"),
        ("probe digits --sigmas 80 --timesteps 3", "gddlab: --sigmas and --timesteps: give one of them"),
        ("probe digits --sigmas 80;1", "arguments: ['80;1']; the form is --sigmas FLOAT ...; see gddlab probe --help"),
        ("train --classes 3,x", "instantiated from ['3', 'x']; the form is --classes INT ...; see"),
        ("train --lr-g -1", "gddlab: --lr-g -1.0: input should be greater than 0"),
        ("train --discriminator.cout 0", "gddlab: --discriminator.cout 0: input should be"),
        ("train --nproc 3", "gddlab: --batch 16 on 3 processes: give a multiple of 3"),
        ("preflight --strategy gdd-i --mask x.json", "gddlab: --mask x.json and --strategy gdd-i: give one of them"),
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
