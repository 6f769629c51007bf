"""Judges: training, the one that ships, extractors by name or file, and the pixels themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from gddlab.cli import main
from gddlab.datasets import ImageDataset, open_dataset, parts_of
from gddlab.diagnosis.preflight import _found
from gddlab.errors import GddlabError
from gddlab.evaluation import EXTRACTORS, append_records, evaluate, features, find_extractor, reference, train_judge
from gddlab.evaluation.extractors import argument_of, extractor_names
from gddlab.evaluation.features import image_features, real_rows
from gddlab.evaluation.judge import Classifier, accuracy, augmented, bundled_judges, judge_file, load_judge, read_judge
from gddlab.evaluation.metrics import METRICS, names_of
from gddlab.evaluation.records import kind_of, load_records
from gddlab.evaluation.run_scores import missing_scores, score_student
from gddlab.files import file_sha256, read_jsonl
from gddlab.launch import train
from gddlab.nets import save_network
from gddlab.nets.io import make_student
from gddlab.runs import load_run
from tests.conftest import tiny_config, tiny_net
from tests.evaluation.conftest import as_float, subset

ALL = ("fid", "kid", "prc", "is", "mind", "classes", "copying")


def patterns(n: int = 90, side: int = 8, channels: int = 1) -> ImageDataset:
    """Three classes: a bright top, a bright left side, neither; with noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 3
    images = rng.integers(0, 120, (n, side, side, channels))
    images[labels == 0, : side // 2] += 120
    images[labels == 1, :, : side // 2] += 120
    return ImageDataset(images.astype(np.uint8), labels, classes=3, name="patterns", source="made")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a judge of the patterns."""
    return train_judge(patterns(), tmp_path_factory.mktemp("judge") / "patterns", epochs=8, progress=False)


def test_training_is_a_function_of_images_and_settings(made: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again = train_judge(patterns(), tmp_path / "again", epochs=8, progress=False)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    assert file_sha256(again) == file_sha256(made)
    other = train_judge(patterns(), tmp_path / "other", epochs=8, seed=1, progress=False)
    assert file_sha256(other) != file_sha256(made)


def test_what_is_written(made: Path) -> None:
    log, config = read_jsonl(made.parent / "metrics.jsonl"), json.loads((made.parent / "config.json").read_text())
    train_part, held_out = parts_of(patterns())
    assert [line["epoch"] for line in log] == list(range(1, 9))
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["accuracy"] == accuracy(load_judge(made), held_out) == read_judge(made)["accuracy"] > 0.9
    assert config["train"] == {"images": 60, "sha256": train_part.manifest.sha256}
    assert config["held_out"] == {"images": 30, "sha256": held_out.manifest.sha256}
    assert config["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {v.dtype for v in load_file(made).values()} == {torch.float16}
    assert config["parameters"] == sum(p.numel() for p in Classifier(1, 8, 3).parameters())


def test_the_held_out_part_is_not_trained_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = patterns()
    train_part, held_out = parts_of(data)
    noise = np.random.default_rng(1).integers(0, 256, held_out.uint8.shape, dtype=np.uint8)
    spoilt = ImageDataset(noise, held_out.class_ids, classes=3, name=held_out.name, source="made")
    monkeypatch.setattr("gddlab.evaluation.judge.parts_of", lambda *a, **k: (train_part, spoilt))
    other = train_judge(data, tmp_path / "other", epochs=8, progress=False)
    a, b = load_file(made), load_file(other)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert read_judge(other)["accuracy"] < read_judge(made)["accuracy"]


@pytest.mark.parametrize(("name", "counts", "least"), [("digits", (1198, 599), 0.99), ("emoji", (2320, 1137), 0.6)])
def test_a_bundled_judge_is_as_good_as_its_log_says(name: str, counts: tuple[int, int], least: float) -> None:
    assert name in bundled_judges()
    train_part, held_out = open_dataset(f"{name}:train"), open_dataset(f"{name}:held-out")
    file = judge_file(name)
    log, config = read_jsonl(file.parent / "metrics.jsonl"), json.loads((file.parent / "config.json").read_text())
    assert config["train"] == {"images": counts[0], "sha256": train_part.manifest.sha256}
    assert config["held_out"] == {"images": counts[1], "sha256": held_out.manifest.sha256}
    spec = find_extractor(name)
    logits = real_rows(held_out, spec).rows[:, spec.dims :]
    right = int((logits.argmax(1) == torch.from_numpy(held_out.class_ids)).sum())
    assert right / counts[1] == log[-1]["accuracy"] == read_judge(file)["accuracy"] > least
    assert 50_000 < config["parameters"] < 150_000
    assert sum(p.stat().st_size for p in file.parent.iterdir()) < 250_000


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (16, 3), (28, 1), (32, 3), (64, 3)])
def test_any_size_gives_64_features(side: int, channels: int) -> None:
    net = Classifier(channels, side, 5).eval()
    x = torch.randint(0, 256, (3, channels, side, side), dtype=torch.uint8)
    found, logits = net(x)
    assert found.shape == (3, 64) and logits.shape == (3, 5)
    assert 50_000 < sum(p.numel() for p in net.parameters()) < 150_000
    assert_close(net.seen(x.float() / 127.5 - 1)[0], found)
    assert_close(net.head(found), logits)


def test_augmentation_moves_a_little() -> None:
    x = as_float(subset(0, 64))
    y = augmented(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape and x.min() <= y.min() and y.max() <= x.max()
    assert 0.01 < (x - y).square().mean() < 0.5 * (x - x.roll(1, 0)).square().mean()
    assert torch.equal(y, augmented(x, torch.Generator().manual_seed(0)))
    flat = torch.full((2, 3, 8, 8), 0.25)
    assert_close(augmented(flat, torch.Generator().manual_seed(1)), flat)  # the edge is repeated, not black


def test_a_judge_by_name_file_and_folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made.parent, tmp_path / "digits")
    by_file, by_text, by_folder = (find_extractor(s) for s in (made, str(made), made.parent))
    assert by_file == by_text and by_file.identity == by_folder.identity
    assert (by_file.label, by_file.dims, by_file.classes, by_file.input_size) == ("patterns", 64, 3, 8)
    assert find_extractor("digits").classes == 10 and find_extractor(Path("digits")).classes == 3
    assert [find_extractor("digits").metric_name(k) for k in ("fid", "kid", "precision", "class-chi2", "is")] == [
        "fd-digits",
        "kd-digits",
        "precision-digits",
        "class-chi2-digits",
        "is-digits",
    ]
    shutil.copy(judge_file("digits"), tmp_path / "mine.safetensors")
    mine = find_extractor("mine.safetensors")
    assert (mine.label, mine.identity) == ("digits", find_extractor("digits").identity)
    assert (mine.argument, find_extractor("digits").argument) == ("mine.safetensors", "digits")
    assert argument_of(mine.name, mine.sha256) == "digits" and argument_of(mine.name, by_file.sha256) is None
    assert extractor_names() == [*EXTRACTORS, *bundled_judges()]


def test_a_judge_is_not_called_as_another_extractor(tmp_path: Path) -> None:
    data = patterns()
    twin = ImageDataset(data.uint8, data.class_ids, classes=3, name="inception", source="made")
    spec = find_extractor(train_judge(twin, tmp_path, epochs=1, progress=False))
    assert spec.metric_name("fid") == "fd-judge-inception"


def test_refusals(made: Path, tmp_path: Path) -> None:
    data = patterns()
    bare = ImageDataset(data.uint8, name="bare", source="made")
    small = ImageDataset(data.uint8[:, ::2, ::2], data.class_ids, classes=3, name="small", source="made")
    with pytest.raises(GddlabError, match="'bare' has 0 classes: a judge needs labelled images"):
        train_judge(bare, tmp_path / "a")
    with pytest.raises(GddlabError, match="'small' has 4x4 images: a judge takes 8x8 or more"):
        train_judge(small, tmp_path / "a")
    with pytest.raises(GddlabError, match="exists: give another name, or replace it"):
        train_judge(data, made.parent)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(GddlabError, match="holds other files and no judge"):
        train_judge(data, tmp_path / "b", overwrite=True)
    assert not (tmp_path / "a").exists()
    with pytest.raises(GddlabError, match="unknown extractor 'digit': did you mean 'digits'"):
        find_extractor("digit")
    with pytest.raises(GddlabError, match="no such judge"):
        find_extractor(tmp_path / "absent")
    save_network(tiny_net(), tmp_path / "net.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("net", "text"):
        with pytest.raises(GddlabError, match=rf"{name}.safetensors holds no judge"):
            find_extractor(tmp_path / f"{name}.safetensors")
    with pytest.raises(GddlabError, match="judges images of 8x8 with 1 channels, not of 16x16 with 1"):
        evaluate(subset(0, 8), data=subset(8, 16), extractor=made)
    colour = ImageDataset(subset(0, 8).uint8.repeat(3, 3), name="colour", source="made")
    with pytest.raises(GddlabError, match="'digits' judges images of 16x16 with 1 channels, not of 16x16 with 3"):
        evaluate(colour, data=colour, extractor="digits")
    with pytest.raises(GddlabError, match="metric 'classes' with extractor='lite2': it is no judge, use 'digits'"):
        evaluate(subset(0, 8), data=subset(8, 16), metrics="classes")
    with pytest.raises(GddlabError, match="metric 'is' with extractor='pixels'"):
        evaluate(subset(0, 8), data=subset(8, 16), metrics="is", extractor="pixels")


def test_a_damaged_judge(made: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(made, framework="pt") as f:
        about = f.metadata()
    tensors = load_file(made)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "judge.safetensors", metadata=about)
    with pytest.raises(GddlabError, match="is a damaged judge"):
        evaluate(patterns(8), data=patterns(9), metrics="kid", extractor=tmp_path)


def test_a_judge_that_was_replaced_is_not_taken_from_a_cache(tmp_path: Path) -> None:
    data, first = patterns(), train_judge(patterns(), tmp_path / "j", epochs=1, progress=False)
    before = evaluate(data, data=patterns(60), metrics="kid", extractor=first).records[0]
    train_judge(data, tmp_path / "j", epochs=1, seed=1, overwrite=True, progress=False)
    after = evaluate(data, data=patterns(60), metrics="kid", extractor=first).records[0]
    assert before.value != after.value and before.extractor_sha256 != after.extractor_sha256
    assert before.metric == after.metric == "kd-patterns@90"


def test_all_metrics_of_a_judge(made: Path) -> None:
    train_part, held_out = parts_of(patterns())
    data = patterns()
    path = made.parents[1] / "patterns.npz"
    np.savez(path, data.uint8, data.class_ids)
    scores = evaluate(held_out, data=f"{path}:train", metrics=ALL, extractor=made)
    names = [r.name for r in scores]
    assert names == [f"{k}-patterns" for k in ("fd", "kd", "precision", "recall", "is", "mind")] + [
        f"{k}-patterns" for k in ("class-chi2", "confidence", "copying", "copying-ratio")
    ]
    assert scores["is-patterns"] > 1 and scores["confidence-patterns"] > 0.34
    assert scores.record("copying-patterns").settings == {"train": 60, "held_out": 29}
    assert {r.extractor for r in scores} == {"judge-patterns"}
    assert "PATH/judge.safetensors" in str(evaluate(f"data:{path}", metrics="kid", extractor=made).records[0].trace())
    again = evaluate("data:digits:held-out", data="digits:train", metrics="kid", extractor="digits").records[0].trace()
    assert "--extractor digits" in again.repeated_by and "data:digits:held-out" in again.repeated_by
    assert len(train_part) == 60


def test_pixels_are_the_features_themselves() -> None:
    data = subset(0, 8)
    spec = find_extractor("pixels").fitted(1, 16)
    assert (spec.dims, spec.input_size) == (256, 16)
    assert torch.equal(
        image_features(torch.from_numpy(data.uint8).permute(0, 3, 1, 2), spec), as_float(data).flatten(1)
    )
    colour = ImageDataset(subset(0, 9).uint8.repeat(3, 3), name="colour", source="made")
    (record,) = evaluate(colour, data=colour, metrics="kid", extractor="pixels")
    assert (record.metric, record.extractor, record.extractor_input_size) == ("kd-pixels@9", "pixels", 16)
    assert real_rows(colour, find_extractor("pixels").fitted(3, 16)).rows.shape == (9, 768)
    with pytest.raises(AssertionError, match="shape is not known"):
        image_features(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), find_extractor("pixels"))


@pytest.mark.parametrize("extractor", ["pixels", "digits"])
def test_a_reference_file_of_theirs(extractor: str, tmp_path: Path) -> None:
    data, path = open_dataset("digits:train", max_images=80), tmp_path / "r.npz"
    reference(data, path, extractor=extractor, features=True)
    about = {"metrics": ("fid", "kid"), "extractor": extractor}
    for a, b in zip(
        evaluate(subset(0, 70), data=path, **about), evaluate(subset(0, 70), data=data, **about), strict=True
    ):
        assert (a.value, a.extractor_sha256) == (b.value, b.extractor_sha256)
    other = {"pixels": "digits", "digits": "pixels"}[extractor]
    with pytest.raises(GddlabError, match="was made with another extractor"):
        evaluate(subset(0, 70), data=path, metrics="fid", extractor=other)
    for metric in ("copying", "classes")[: 1 + (extractor == "digits")]:
        with pytest.raises(GddlabError, match=f"metric '{metric}'"):
            evaluate(subset(0, 70), data=path, metrics=metric, extractor=extractor)


def test_processes_find_a_judge_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copy(judge_file("digits"), tmp_path / "judge.safetensors")
    about = {"data": subset(0, 12), "metrics": "kid", "n": 8, "steps": 1, "batch_size": 4}
    both = evaluate(tiny_net(), nproc=2, extractor=tmp_path, **about)
    alone = evaluate(tiny_net(), extractor="digits", seed=0, **about)  # from the cache: the same weights
    assert both["kd-digits"] == alone["kd-digits"]


def test_every_kind_of_score_is_known_by_its_name() -> None:
    for name in extractor_names():
        for kind in (k for m in METRICS for k in names_of(m)):
            assert kind_of(find_extractor(name).metric_name(kind)) == kind
            assert kind_of(f"{find_extractor(name).metric_name(kind)}-min3") == kind


def test_nothing_is_missing_once_it_was_scored(tiny_teacher: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", tiny_teacher, data="digits:train")
    config.write()
    student = make_student(tiny_net())
    save_network(student, tmp_path / "run" / "student.safetensors", data="digits:train", kimg=config.end_kimg)
    run = load_run(tmp_path / "run")
    metrics = ("kid", "prc", "is", "classes", "copying")
    assert missing_scores(run, metrics, extractor="digits") == list(metrics)
    records = score_student(run, metrics, extractor="digits", n=20)
    assert {r.reference for r in records} == {"digits:train"}
    assert missing_scores(run, metrics, extractor="digits") == []
    assert missing_scores(run, ("classes",), extractor="digits", blocks=3) == []
    assert missing_scores(run, ("kid", "copying"), extractor="pixels") == ["kid", "copying"]
    held = evaluate(run.student(), data="digits:held-out", metrics=("kid", "copying"), n=20, extractor="digits")
    assert [r.n for r in held] == [20, 20, 20] and held.records[0].reference == "digits:held-out"
    copied = [r.value for r in records if r.name.startswith("copying")]
    assert [held["copying-digits"], held["copying-ratio-digits"]] == copied  # both parts count, whichever is named
    append_records(tmp_path / "run", held)
    assert all(r.interval is None or len(r.interval) == 2 for r in load_records(tmp_path / "run"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = patterns()
    np.savez(tmp_path / "p.npz", data.uint8, data.class_ids)
    words = ["judge", str(tmp_path / "p.npz"), "--run-dir", str(tmp_path / "j"), "--epochs", "2"]
    main(words)
    log = read_jsonl(tmp_path / "j" / "metrics.jsonl")
    out = capsys.readouterr().out
    assert str(tmp_path / "j" / "judge.safetensors") in out and f"{log[-1]['accuracy']:.2%}" in out
    with pytest.raises(SystemExit) as e:
        main(words)
    assert e.value.code == 2 and "--overwrite" in capsys.readouterr().err
    main([*words, "--overwrite", "--seed", "1"])


def test_a_run_may_be_judged_while_it_trains(made: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    how = {"data": "digits:train", "metric_kimg": 0.048, "metric_n": 8}
    config = tiny_config(tmp_path / "a", tiny_teacher, metric_extractor=str(made), **how)
    with pytest.raises(GddlabError, match="judges images of 8x8") as refused:
        train(config)

    def metric(extractor: str) -> tuple[bool, str]:
        config = tiny_config(tmp_path / "b", tiny_teacher, metric_extractor=extractor, **how)
        return next((c.ok, c.detail) for c in _found(config, 1) if c.name == "metric")

    assert metric(str(made)) == (False, str(refused.value))
    assert metric("digits")[0] and "fd-digits: weights at" in metric("digits")[1]
    assert metric("pixels")[0] and "fd-pixels: no weights" in metric("pixels")[1]


def test_a_path_in_a_configuration_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lite2").mkdir()
    shutil.copy(judge_file("digits"), tmp_path / "lite2" / "judge.safetensors")
    for given, want in (("lite2", "lite2"), ("./lite2", str(tmp_path / "lite2"))):
        assert tiny_config(tmp_path / "r", Path("digits"), metric_extractor=given).metric_extractor == want


def test_the_cache_of_features_is_by_content(made: Path, cache: Path) -> None:
    some = open_dataset("digits:train", max_images=16)
    for name in ("digits", "pixels"):
        evaluate(some, data=some, metrics="kid", extractor=name)
    assert sorted(p.name.split("-")[1] for p in cache.glob("features-*")) == ["judge", "pixels"]
    features._kept.clear()
    spec = find_extractor("digits")
    assert real_rows(some, spec).rows.shape == (16, 74)
