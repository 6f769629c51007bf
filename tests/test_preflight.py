"""`preflight`: what is missing is named, what is there is measured, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from gddlab.cli import main
from gddlab.diagnosis.preflight import measure, preflight
from gddlab.distill import presets
from gddlab.distill.config import TrainConfig
from gddlab.distill.projected import Projected
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError
from tests.conftest import tiny_config


def test_a_run_that_can_start_is_measured(tmp_path: Path, tiny_teacher: Path) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher, precision="float32", metric_kimg=0.048)
    found = preflight(config, steps=1, measure_batch=4)
    assert found.ok, str(found)
    assert [c.name for c in found.checks] == ["teacher", "data", "losses", "metric", "fit", "disk"]
    assert [m["batch"] for m in found.measured] == [2, 4]
    assert found.parameters == found.trained == 48_321
    assert found.sec_per_kimg is not None
    assert found.sec_per_kimg == pytest.approx(found.measured[1]["seconds"] / 4 * 1000)
    assert found.hours == pytest.approx(found.sec_per_kimg * 0.048 / 3600)
    assert found.peak_mem_mib is not None
    assert found.peak_mem_mib >= found.measured[1]["peak_mem_mib"] > found.measured[1]["base_mem_mib"]
    assert "s/kimg on 1 process(es)" in str(found)
    assert not (tmp_path / "run").exists()


def test_only_the_iteration_that_is_timed_for_it_has_r1(
    tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    iterate = Trainer.iterate
    monkeypatch.setattr(Trainer, "iterate", lambda t: (seen.append(t.iteration), iterate(t)))
    config = tiny_config(tmp_path / "run", tiny_teacher, r1_interval=2)
    config.write()
    measure(str(config.run_dir), 4, False, 4, print)
    assert seen == [1, 1, 1, 1, 1, 2]


def test_everything_that_is_missing_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDDLAB_OFFLINE", "1")
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("GDDLAB_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    found = preflight(presets.cifar10(run_dir=tmp_path / "run"))
    assert not found.ok
    assert {c.name: c.ok for c in found.checks} == {"teacher": False, "data": False, "losses": False}
    assert found.sec_per_kimg is None
    text = str(found)
    assert str(tmp_path / "cache" / "teachers" / "edm-cifar10-32x32-uncond-ve.pkl") in text
    assert str(tmp_path / "cache" / "backbones" / "vgg16_bn.pth") in text
    with pytest.raises(SystemExit) as e:
        main(["preflight", "cifar10", "--run-dir", str(tmp_path / "run")])
    assert e.value.code == 1


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"steps": 0}, "steps=0"), ({"nproc": 3}, "batch=8 .*3"), ({"measure_batch": 0}, "measure_batch=0")],
)
def test_numbers_that_do_not_fit_are_refused(
    tmp_path: Path, tiny_teacher: Path, fields: dict[str, int], says: str
) -> None:
    with pytest.raises(GddlabError, match=says):
        preflight(tiny_config(tmp_path / "run", tiny_teacher), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_is_whole(tmp_path: Path, name: str) -> None:
    config = presets.preset(name, run_dir=tmp_path / "run")
    assert isinstance(config, TrainConfig)
    text = presets.PRESETS[name].__doc__
    assert text is not None
    for word in ("Reproduces:", "Tested:", f"Launch: `gddlab train {name}", "Expected"):
        assert word in text, word
    fast = presets.preset(name, run_dir=tmp_path / "run", **presets.FAST)
    assert fast.reuse_fakes
    assert fast.precision_d == "bfloat16"


def test_presets_hold_the_authors_settings(tmp_path: Path) -> None:
    """Method of GDD, released settings: lr G, lr D, batch, EMA half-life and duration in kimg, adversarial weight."""
    table = {
        "cifar10": (1e-4, 1e-4, 256, 500, 5000, 64),
        "cifar10_cond": (1e-4, 1e-4, 256, 500, 5000, 64),
        "afhqv2": (2e-5, 4e-5, 256, 500, 10000, 64),
        "ffhq": (2e-5, 4e-5, 256, 500, 10000, 64),
        "imagenet64": (8e-6, 4e-5, 512, 50000, 10000, 128),
    }
    for name, row in table.items():
        c = presets.preset(name, run_dir=tmp_path)
        assert (c.lr_g, c.lr_d, c.batch, c.ema_halflife_kimg, c.total_kimg, c.adversarial_weight) == row
        assert (c.loss, c.r1_gamma, c.r1_interval, c.ema_rampup, c.seed) == ("ns", 1e-4, 16, 0.05, 42)
        assert (c.augment, c.xflip, c.reuse_fakes) == (None, False, False)
        assert isinstance(c.discriminator, Projected)
        assert (c.discriminator.input_size, c.discriminator.cout) == (224, 64)
        first = "vgg16_bn" if name.startswith("cifar10") else "deit_base_distilled_patch16_224"
        assert c.discriminator.backbones == (first, "tf_efficientnet_lite0")


def test_a_preset_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["train", "--batch", "8", "cifar10"], "give it first, gddlab train cifar10"),
        (["train", "cifr10"], "did you mean 'cifar10'"),
        (["train", "digits", "--batch-per-device", "3"], "gddlab: --batch 16, --batch-per-device 3: give a divisor"),
        (["preflight", "digits", "--strategy", "gdd-i", "--mask", "x.json"], "give one of them"),
    ):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
