"""Alarms: silent on every healthy run that ships, raised once on each kind of sickness, the same after a restart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gddlab.datasets import open_dataset
from gddlab.distill.health import Alarm, Health, Thresholds, distinct_images, fine_share, neighbor_distance
from gddlab.errors import GddlabError
from gddlab.evaluation import load_records
from gddlab.files import data_dir, read_jsonl
from gddlab.runs import load_runs

SHIPPED = [run.run_dir for run in load_runs(data_dir() / "runs" / "first")]
MASKED = (
    *("gdd-i", "gdd", "random", "rel_update-low", "rel_update-high", "ablation-low", "ablation-high"),
    *("sigma_specific-low", "sigma_specific-high", "half-random", "half-ablation-low", "half-ablation-high"),
)
RUNS = [p for p in SHIPPED if p.parent.name in MASKED]
N = 64

HEALTHY = {
    "loss/g": 1.01, "loss/d": 1.12, "logits/real": 0.42, "logits/fake": -0.45, "signs/real": 0.45,
    "nonfinite/g": 0.0, "nonfinite/d": 0.0,
}  # fmt: skip

# loss/d, logits/fake, signs/real of a digits run with constant G (lr_g 1e-8, lr_d 4e-3, no R1), one tick per 64 images.
SATURATING = [
    *[(1.559, -0.736, 0.233), (0.744, -1.452, 0.661), (0.459, -1.952, 0.846)],
    *[(0.391, -2.439, 0.848), (0.294, -2.770, 0.895)],
    *[(0.308, -2.883, 0.871), (0.170, -3.110, 0.977), (0.137, -3.473, 0.973)],
    *[(0.085, -3.661, 0.999), (0.067, -3.848, 1.000)],
    *[(0.063, -4.012, 1.000), (0.056, -4.078, 1.000), (0.051, -4.177, 1.000)],
    *[(0.043, -4.259, 1.000), (0.049, -4.286, 0.999)],
]  # fmt: skip


def sick(kimg: float, **values: float) -> dict[str, float]:
    return {"kimg": kimg, "nimg": kimg * 1000, **HEALTHY, **{k.replace("__", "/"): v for k, v in values.items()}}


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """1,797 real images in an order that is not the dataset's."""
    data = open_dataset("digits")
    return data.images(torch.randperm(len(data), generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def real(digits: Tensor) -> Tensor:
    return digits[:N]


def modes(images: Tensor, m: int, noise: float, seed: int = 0) -> Tensor:
    """64 copies of m images, drawn at random, with noise."""
    g = torch.Generator().manual_seed(seed)
    x = images[torch.randint(m, (N,), generator=g)]
    return (x + noise * torch.randn(x.shape, generator=g)).clamp(-1, 1)


def shown(path: Any) -> Tensor:
    """The 64 images of a run's PNG: 16x16, twice enlarged, a grey pixel between them."""
    a = np.asarray(Image.open(path).convert("L"), dtype=np.float32) / 127.5 - 1
    tiles = [a[33 * i : 33 * i + 32 : 2, 33 * j : 33 * j + 32 : 2] for i in range(8) for j in range(8)]
    return torch.from_numpy(np.stack(tiles))[:, None]


def seen(health: Health, grid: Tensor, kimg: float) -> list[Alarm]:
    """What a grid raises beside noise in its finest detail."""
    return [alarm for alarm in health.observe_images(grid, kimg) if alarm.kind != "detail"]


@pytest.mark.parametrize("run", RUNS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_a_healthy_run_raises_no_alarm(run: Any, real: Tensor) -> None:
    health = Health(real)
    lines = read_jsonl(run / "metrics.jsonl")
    assert len(lines) == 47
    assert [health.observe_tick(line) for line in lines] == [[]] * 47
    assert not (run / "alarms.jsonl").exists()
    records = load_records(run)
    assert records
    for r in records:
        assert r.kimg is not None
        assert health.observe_metric(r.metric, r.value, r.kimg, std=r.std) == []
    for png in (run / "samples").glob("*.png"):
        assert health.observe_images(shown(png), float(png.stem)) == []
        assert 0.85 < health.diversity(shown(png)) < 1.15


def test_all_healthy_runs_are_there() -> None:
    assert {p.parent.name for p in RUNS} == {*MASKED}
    assert len(RUNS) == 36


@pytest.mark.parametrize(("name", "collapsed"), [("scratch", {0, 1, 2}), ("stylegan2", {0, 1})])
def test_a_run_that_collapsed_says_so(name: str, collapsed: set[int]) -> None:
    """StyleGAN2's third seed makes one digit too, but so blurred and varied that its grid has 0.7 of the diversity."""
    said = {
        run.name: [a["kind"] for a in read_jsonl(run / "alarms.jsonl")] for run in SHIPPED if run.parent.name == name
    }
    assert said == {f"seed-{s}": ["collapse"] if s in collapsed else [] for s in range(3)}


def test_other_runs_raise_no_alarm() -> None:
    """Students that are no good, but diverse: other discriminators, baselines, few images."""
    others = [p for p in SHIPPED if p.parent.name not in ("scratch", "stylegan2")]
    assert len(others) > 50
    assert not [p for p in others if (p / "alarms.jsonl").exists()]


def test_no_shipped_run_has_too_much_detail(real: Tensor) -> None:
    for png in (png for run in SHIPPED for png in (run / "samples").glob("*.png")):
        assert "detail" not in [a.kind for a in Health(real).observe_images(shown(png), 12)], png


# Diversity.


def test_distinct_images_of_known_sets() -> None:
    """m images far apart, equally many copies of each, are m; unequal shares p give 1 / sum(p^2)."""
    x = torch.eye(4, dtype=torch.float64).reshape(4, 1, 2, 2)
    assert distinct_images(x.repeat(8, 1, 1, 1), 0.01) == pytest.approx(4)
    assert distinct_images(x[[0, 0, 0, 1]], 0.01) == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert distinct_images(x[[0, 0, 0]], 0.01) == pytest.approx(1)
    # Two images at distance d count as 2 / (1 + exp(-(d / scale)^2)); one of four pixels differs by 1, so d = 1/2.
    pair = torch.stack([x[0], torch.zeros_like(x[0])])
    assert distinct_images(pair, 0.7) == pytest.approx(2 / (1 + math.exp(-((0.5 / 0.7) ** 2))))


def test_neighbor_distance_is_a_mean_over_images() -> None:
    x = torch.tensor([0.0, 0.1, 0.5]).reshape(3, 1, 1, 1).expand(3, 2, 4, 4)
    assert neighbor_distance(x) == pytest.approx((0.1 + 0.1 + 0.4) / 3)


def test_near_copies_are_near() -> None:
    """Distances are exact where a matrix product would leave rounding noise."""
    x = torch.full((N, 1, 16, 16), 0.9) + 1e-6 * torch.randn(N, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert 1e-7 < neighbor_distance(x) < 2e-6


def test_large_images_are_compared_without_their_noise(real: Tensor) -> None:
    """Four modes at 64x64 with noise that would part the copies pixel by pixel."""
    large = torch.nn.functional.interpolate(real, size=64)
    assert Health(large).diversity(large) == pytest.approx(1)
    assert Health(large).diversity(modes(large, 4, 0.4)) < 0.2
    assert Health(real).diversity(modes(real, 4, 0.4)) > 0.5  # at 16x16 the same noise is another picture


def test_diversity_orders_grids(digits: Tensor, real: Tensor) -> None:
    health = Health(real)
    assert health.diversity(real) == pytest.approx(1)
    assert health.diversity(digits[N : 2 * N]) == pytest.approx(1, abs=0.06)  # other real images
    found = [health.diversity(modes(real, m, 0.05)) for m in (1, 2, 4, 8, 16, 32)]
    assert found == sorted(found)
    assert found[0] < 0.03 and found[2] < 0.1 and found[4] < 0.3 < found[5]
    assert health.diversity(modes(real, 4, 0.1)) < 0.15
    assert health.diversity(real.double()) == pytest.approx(1)


# Alarms on grids.


@pytest.mark.parametrize(
    "broken",
    [lambda x: modes(x, 1, 0.05), lambda x: modes(x, 1, 0.1), lambda x: modes(x, 4, 0.0), lambda x: modes(x, 4, 0.1),
     torch.zeros_like],
    ids=["copies", "noisy-copies", "four-modes", "noisy-modes", "grey"],
)  # fmt: skip
def test_collapse(real: Tensor, broken: Callable[[Tensor], Tensor]) -> None:
    """Nothing while the student starts, once when a diverse grid falls together, and again after it recovered."""
    health, grid = Health(real), broken(real)
    assert seen(health, grid, 0) == []
    assert seen(health, grid, 5) == []
    assert seen(health, real, 10) == []
    (alarm,) = seen(health, grid, 15)
    assert (alarm.kind, alarm.kimg, alarm.threshold) == ("collapse", 15, 0.25)
    assert alarm.value == health.diversity(grid) < 0.25
    assert "the most diverse snapshot is that of 10 kimg" in alarm.message and "\n" not in alarm.message
    assert seen(health, grid, 20) == []
    assert seen(health, modes(real, 32, 0.05), 25) == []  # between the thresholds: neither new nor over
    assert seen(health, grid, 30) == []
    assert seen(health, real, 35) == []
    assert [a.kind for a in seen(health, grid, 40)] == ["collapse"]


def test_collapse_of_a_student_that_never_was_diverse(real: Tensor) -> None:
    health = Health(real, Thresholds(grace_kimg=6))
    assert health.observe_images(torch.zeros_like(real), 5.9) == []
    (alarm,) = health.observe_images(torch.zeros_like(real), 6)
    assert alarm.kind == "collapse" and alarm.message.endswith("lower lr_g or raise r1_gamma")


def test_few_images_are_named_as_the_cause(real: Tensor) -> None:
    for images, named in ((50, True), (1797, False)):
        health = Health(real[:50], Thresholds(grace_kimg=0), images=images)
        (alarm,) = health.observe_images(torch.zeros_like(real[:50]), 1)
        assert ("50 training images are few, give more or augment" in alarm.message) == named


def test_images_that_are_all_alike(real: Tensor) -> None:
    for alike in (real[:1], real[:1].repeat(4, 1, 1, 1)):
        health = Health(alike, Thresholds(grace_kimg=0))
        (alarm,) = health.observe_images(alike, 0)
        assert f"training images are all alike, {len(alike)} in all" in alarm.message
        assert health.observe_images(alike, 1) == []
        assert [a.kind for a in health.observe_images(alike * math.nan, 2)] == ["nan"]


@pytest.mark.parametrize("period", [(1, 1), (1, 0), (0, 1)], ids=["checkerboard", "stripes-down", "stripes-across"])
def test_checkerboard(real: Tensor, period: tuple[int, int]) -> None:
    """A pattern of one pixel, faint in each image, is found; a coarser one of the same strength is none."""
    health, i = Health(real), torch.arange(16)
    phase = period[0] * i[:, None] + period[1] * i[None]
    strong, coarse = 0.25 * (1 - 2 * (phase % 2)), 0.25 * (1 - 2 * (phase // 4 % 2))
    assert health.observe_images(real + strong, 0.9) == []  # a student on its way from grey to diverse
    assert health.observe_images(real, 1) == health.observe_images(real + coarse, 2) == []
    (alarm,) = health.observe_images(real + strong, 3)
    assert (alarm.kind, alarm.threshold) == ("detail", 4.0) and alarm.value > 4
    assert "lower lr_g and lr_d" in alarm.message
    assert health.observe_images(real + strong, 4) == health.observe_images(real, 5) == []
    assert [a.kind for a in health.observe_images(real + strong, 6)] == ["detail"]


def test_the_finest_detail(real: Tensor) -> None:
    i = torch.arange(16)
    board = (1.0 - 2 * ((i[:, None] + i) % 2)).expand(1, 2, 16, 16)
    assert fine_share(board) == pytest.approx(1)
    assert fine_share(torch.cos(2 * math.pi * i * 6 / 16).expand(1, 1, 16, 16)) == pytest.approx(0, abs=1e-6)
    assert fine_share(torch.zeros(2, 1, 16, 16)) == 0
    assert fine_share(torch.randn(64, 1, 16, 16)) == pytest.approx(1 - (13 / 16) ** 2, abs=0.02)
    assert 0.001 < fine_share(real) < 0.01


def test_images_that_are_not_finite(real: Tensor) -> None:
    health, lost = Health(real), real.clone()
    lost[3, 0, 0, 0] = math.nan
    (alarm,) = health.observe_images(lost, 1)
    assert (alarm.kind, alarm.value) == ("nan", 1 / N)
    assert health.observe_images(lost, 2) == []
    assert health.observe_images(real, 3) == []
    assert [a.kind for a in health.observe_images(lost, 4)] == ["nan"]


# Alarms on ticks.


def test_saturation_as_it_happens(real: Tensor) -> None:
    health = Health(real)
    found = [
        health.observe_tick(sick((i + 1) * 0.064, loss__d=d, logits__fake=fake, signs__real=signs))
        for i, (d, fake, signs) in enumerate(SATURATING)
    ]
    assert [len(a) for a in found] == [0] * 12 + [1] + [0] * 2  # the fifth tick in a row below 0.1
    (alarm,) = found[12]
    assert (alarm.kind, alarm.value) == ("saturated", 1.0)
    assert "lower lr_d" in alarm.message and "\n" not in alarm.message


def test_saturation_ends_and_returns(real: Tensor) -> None:
    health = Health(real)

    def ticks(n: int, **values: float) -> list[str]:
        return [a.kind for i in range(n) for a in health.observe_tick(sick(i, **values))]

    refused = {"loss__d": 0.4, "logits__fake": -30.0, "signs__real": 0.995}
    assert ticks(4, **refused) == []
    assert ticks(1) == []
    assert ticks(4, **refused) == []  # not in a row
    assert ticks(3, **refused) == ["saturated"]
    assert ticks(1) == []
    assert ticks(9, **refused) == ["saturated"]
    health = Health(real)
    assert ticks(9, loss__d=0.05, signs__real=0.98) == []  # some real images are still refused
    assert ticks(9, loss__d=0.5, logits__fake=-3, signs__real=1.0) == []  # D still learns


@pytest.mark.parametrize(
    "values",
    [{"loss__g": math.nan}, {"loss__d": math.inf}, {"loss__r1": -math.inf}, {"nonfinite__loss": 0.005},
     {"nonfinite__g": 0.02}, {"nonfinite__d": 250.0}, {"sanitised__g": 0.02, "nonfinite__g": 5.0},
     {"nonfinite__g": math.nan}],
    ids=lambda v: "-".join(v),
)  # fmt: skip
def test_not_finite(real: Tensor, values: dict[str, float]) -> None:
    health = Health(real)
    assert health.observe_tick(sick(1)) == []
    (alarm,) = health.observe_tick(sick(2, **values))
    assert alarm.kind == "nan"
    assert "lower lr" in alarm.message and "\n" not in alarm.message
    json.dumps(alarm.to_dict(), allow_nan=False)
    assert health.observe_tick(sick(3, **values)) == []
    assert health.observe_tick(sick(4)) == []
    assert len(health.observe_tick(sick(5, **values))) == 1


def test_a_rare_overflow_is_no_alarm(real: Tensor) -> None:
    health = Health(real)
    assert health.observe_tick(sick(1, nonfinite__g=0.01)) == []
    assert health.observe_tick(sick(2, nonfinite__g=2.0, sanitised__g=0.005)) == []  # one iteration of 200, all tensors


def test_a_run_without_discriminator(real: Tensor) -> None:
    assert Health(real).observe_tick({"kimg": 1.0, "loss/instance": 0.3, "nonfinite/g": 0.0}) == []


# Alarms on metrics.


def test_jump(real: Tensor) -> None:
    health = Health(real)
    scores = [
        (1, 300.0),
        (2, 60.0),
        (3, 40.0),
        (4, 59.0),
        (5, 61.0),
        (6, 200.0),
        (7, 55.0),
        (8, 61.0),
        (9, 41.0),
        (10, 61.0),
    ]
    found = [a for kimg, v in scores for a in health.observe_metric("fd-lite2@1797", v, kimg)]
    assert [(a.kind, a.kimg, a.value, a.threshold) for a in found] == [
        ("jump", 5, 61.0, 60.0),
        ("jump", 10, 61.0, 60.0),
    ]
    assert "the best student is best.safetensors, of 3 kimg (fd-lite2@1797 40)" in found[0].message
    (alarm,) = health.observe_metric("fid@50000", math.nan, 11)
    assert alarm.kind == "jump" and alarm.to_dict()["value"] is None and alarm.to_dict()["threshold"] is None
    # Other alarms know where to go back to.
    assert "best.safetensors, of 3 kimg" in health.observe_tick(sick(12, loss__g=math.nan))[0].message


def test_jump_of_metrics_that_rise_or_pass_zero(real: Tensor) -> None:
    health = Health(real)
    assert [len(health.observe_metric("recall-lite2@1797", v, i)) for i, v in enumerate((0.1, 0.6, 0.41, 0.39))] == [
        0,
        0,
        0,
        1,
    ]
    assert [len(health.observe_metric("kd-lite2@1797", v, i)) for i, v in enumerate((0.2, -1e-4, 2e-4))] == [0, 0, 0]
    known = [health.observe_metric("kd-lite2@500", v, i, std=1e-3) for i, v in enumerate((0.2, -1e-4, 2e-3, 4e-3))]
    assert [len(a) for a in known] == [0, 0, 0, 1]
    assert known[3][0].threshold == pytest.approx(2.9e-3)


# State, refusals.


def test_a_continued_run_raises_the_same_alarms(real: Tensor) -> None:
    """Interrupted after every observation, the state through JSON: equal alarms, equal state."""
    steps: list[Callable[[Health], list[Alarm]]] = []
    for i in range(14):
        saturated = {"loss__d": 0.01, "signs__real": 1.0} if i not in (6, 7) else {}
        line = sick(i, **saturated, **({"nonfinite__d": 1.0} if i in (2, 3, 5) else {}))
        grid = real if i in (1, 6) else modes(real, 3, 0.05, seed=i)
        score = 10.0 + (i % 5) * 3.3
        steps += [
            lambda h, line=line: h.observe_tick(line),
            lambda h, grid=grid, i=i: h.observe_images(grid, i),
            lambda h, score=score, i=i: h.observe_metric("fid@50000", score, i),
        ]
    whole, alarms, resumed = Health(real), [], []
    state = json.dumps(whole.state_dict(), allow_nan=False)
    for step in steps:
        alarms += step(whole)
        part = Health(real)
        part.load_state_dict(json.loads(state))
        resumed += step(part)
        state = json.dumps(part.state_dict(), allow_nan=False)
    assert resumed == alarms
    assert json.loads(state) == json.loads(json.dumps(whole.state_dict()))
    assert {a.kind for a in alarms} == {"nan", "saturated", "collapse", "jump"}
    assert len(alarms) > 6


def test_refusals(real: Tensor) -> None:
    with pytest.raises(GddlabError, match="at least 2"):
        neighbor_distance(real[:1])
    with pytest.raises(GddlabError, match="63 images to compare with 64"):
        Health(real).observe_images(real[:63], 1)
    for bad in ({"patience": 0}, {"collapse": 1.5}, {"diverse": 0.1}, {"jump": 0.9}, {"loss_d": math.nan}):
        with pytest.raises(GddlabError, match=next(iter(bad))):
            Thresholds(**bad)
