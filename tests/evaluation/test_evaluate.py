"""`evaluate` and `real_split`: what is computed how often, under which name, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import tracemalloc
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gddlab.datasets import ImageDataset, open_dataset
from gddlab.errors import GddlabError
from gddlab.evaluation import EXTRACTORS, compare, evaluate, features, real_split, yardsticks
from gddlab.evaluation.metrics import Statistics, frechet
from gddlab.files import hash_tensors
from gddlab.nets import from_edm, save_network
from gddlab.ranks import Ranks
from gddlab.sampling import sample, sample_files
from gddlab.sampling.grid import to_uint8
from tests.evaluation.conftest import WIDTH, as_float, subset

UNET = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


def network(kind: str = "OneStepPrecond", label_dim: int = 10, resolution: int = 16):
    torch.manual_seed(0)
    return from_edm(kind, img_resolution=resolution, img_channels=1, label_dim=label_dim, **UNET)


def test_a_dataset_against_itself_is_nothing(some, counter):
    scores = evaluate(some, data=some, metrics=("fid", "prc"))
    assert scores["fd-lite2"] == 0
    assert scores["precision-lite2"] == scores["recall-lite2"] == 1


def test_a_frechet_distance_is_never_below_0():
    few = Statistics(torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64))
    near = Statistics(few.mu, few.sigma * (1 + 1e-12))
    assert [frechet(a, b)[0].value >= 0 for a, b in ((few, near), (near, few))] == [True, True]
    assert frechet(few, Statistics(few.mu.clone(), few.sigma.clone()))[0].value == 0
    assert math.isnan(frechet(few, Statistics(few.mu * math.nan, few.sigma))[0].value)


def test_arrays_and_lists_are_scored_as_the_data_set_that_they_hold(some, others, counter, tmp_path):
    want = evaluate(others, data=some, metrics="fid")["fd-lite2"]
    np.savez(tmp_path / "x.npz", others.uint8)
    np.savez(tmp_path / "ref.npz", some.uint8)
    pillow = [Image.fromarray(x[..., 0]) for x in others.uint8]
    for source in (others.uint8, pillow, tuple(pillow), tmp_path / "x.npz", str(tmp_path / "x.npz")):
        assert evaluate(source, data=some, metrics="fid")["fd-lite2"] == want
    for data in (some.uint8, [Image.fromarray(x[..., 0]) for x in some.uint8], tmp_path / "ref.npz"):
        assert evaluate(others, data=data, metrics="fid")["fd-lite2"] == want
    assert len(real_split(some.uint8, metrics="fid").records) == 1
    with pytest.raises(GddlabError, match="source is a dict: give a student, a teacher, a dataset, or images as an"):
        evaluate({}, data=some)


@pytest.mark.parametrize("scale", [(0.5, 0.5), (0.25, 0.5)])
def test_images_that_cannot_be_in_minus_1_to_1_are_refused(some, others, counter, scale):
    x = as_float(others) * scale[0] + scale[1]
    with pytest.raises(GddlabError, match=r"hold no value below 0 \(the least is .*\): give \[-1, 1\]"):
        evaluate(x, data=some, metrics="fid")
    assert counter == []


def test_images_that_are_perhaps_of_another_range_are_named(some, others, counter):
    """Resizing takes [0, 1] a little below 0."""
    x = (as_float(others) + 1) / 2
    with pytest.warns(UserWarning, match=r"images span -0.01 to 0.99, they are read as \[-1, 1\]"):
        evaluate(x - 0.01, data=some, metrics="fid")
    with pytest.warns(UserWarning, match=r"the highest value is 1, of 255; if 1 is white, multiply by 255"):
        evaluate(others.uint8 // 255, data=some, metrics="fid")


@pytest.mark.parametrize(
    ("ours", "theirs", "warns"),
    [("png", "jpg", True), ("jpg", "png", True), ("png", "png+bmp", False), ("jfif", "jpg", False)],
)
def test_jpegs_against_pngs_are_named(some, others, counter, ours, theirs, warns):
    def coded(data, codec):
        return ImageDataset(data.uint8, name=data.name, source="digits", codec=codec)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        evaluate(coded(others, ours), data=coded(some, theirs), metrics="fid")
    assert [str(w.message) for w in seen] == [
        f"other-digits is {ours}, some-digits is {theirs}: their compression counts in the distance"
    ] * warns
    assert all(w.filename == __file__ for w in seen)


def test_real_features_are_computed_once(some, others, counter, cache):
    first = evaluate(as_float(others), data=some, metrics=("kid", "prc"))
    assert counter == [64, 64]
    again = evaluate(as_float(others), data=some, metrics="kid")
    assert counter == [64, 64, 64]
    features._kept.clear()
    from_disk = evaluate(others, data=some, metrics="kid")
    assert counter == [64, 64, 64, 64]
    assert first["kd-lite2"] == again["kd-lite2"] == from_disk["kd-lite2"]
    features._kept.clear()
    for file in [p for p in cache.rglob("*") if p.is_file()]:
        file.unlink()
    assert evaluate(others, data=some, metrics="kid")["kd-lite2"] == first["kd-lite2"]


def test_another_content_or_extractor_is_not_taken_from_the_cache(some, others, counter):
    evaluate(some, data=some, metrics="kid")
    evaluate(some, data=some, metrics="kid", extractor="lite0")
    changed = some.uint8.copy()
    changed[0, 0, 0, 0] += 1
    twin = ImageDataset(changed, some.class_ids, classes=10, name=some.name, source="digits")
    evaluate(twin, data=twin, metrics="kid")
    assert counter == [64, 64, 64]


def test_a_damaged_cache_file_is_replaced(some, counter, cache):
    want = evaluate(some, data=some, metrics="kid")["kd-lite2"]
    (file,) = cache.glob("features-*")
    for content in (b"", file.read_bytes()[:1000], b"not an array"):
        file.write_bytes(content)
        features._kept.clear()
        assert evaluate(some, data=some, metrics="kid")["kd-lite2"] == want
        assert load_file(file)["rows"].shape == (64, WIDTH)


def test_one_rank_of_a_machine_hashes_cached_features(some, counter, monkeypatch):
    class Second(Ranks):
        def all(self, flag):
            return flag

    made, hashed = features.real_rows(some, EXTRACTORS["lite2"]), []
    monkeypatch.setattr(features, "hash_tensors", lambda tensors: hashed.append(1) or hash_tensors(tensors))
    for local in (0, 1):
        features._kept.clear()
        monkeypatch.setenv("LOCAL_RANK", str(local))
        assert torch.equal(features.real_rows(some, EXTRACTORS["lite2"], ranks=Second(local, 2)).rows, made.rows)
        assert (len(counter), len(hashed)) == (1, 1)


def test_hashing_does_not_copy():
    rows = torch.zeros(1 << 20)
    tracemalloc.start()
    assert hash_tensors({"rows": rows}) == hash_tensors({"rows": rows.clone()})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows.nbytes / 4
    assert (
        hash_tensors({"x": rows[:0], "y": rows[0], "z": rows.bfloat16()})
        == "33871c12aa935a4e89a62ecb0d01c9c61af530e45feca4d6c15185352bf20744"
    )


def test_no_writable_cache_is_no_error(some, counter, cache, monkeypatch):
    blocked = cache / "file"
    blocked.write_text("")
    monkeypatch.setenv("GDDLAB_CACHE", str(blocked / "below"))
    evaluate(some, data=some, metrics="kid")
    real_split(some, metrics="kid")
    assert counter == [64]


def test_a_student(some, counter, cache):
    net = network()
    scores = evaluate(net, data=some, metrics="kid", seed=7)
    (record,) = scores
    assert record.metric == "kd-lite2@64"
    assert (record.n, record.seeds, record.sampler, record.reference_n) == (64, (7, 70), "one-step", 64)
    assert record.model_sha256 == hash_tensors(net.state_dict())
    assert record.reference_sha256 == some.manifest.sha256
    assert record.extractor_sha256 == EXTRACTORS["lite2"].sha256 and len(record.extractor_sha256) == 64
    assert record.extractor_input_size == 96
    shutil.rmtree(cache / "generated")
    same = evaluate(net, data=some, metrics="kid", seed=7, batch_size=5)
    assert counter == [64, 64, 64]
    assert same.records[0].images_sha256 == record.images_sha256
    whole = to_uint8(sample(net, 64, seed=7, class_labels=some.class_ids))
    assert record.images_sha256 == hash_tensors({"images": whole})
    assert evaluate(net, data=some, metrics="kid", seed=8).records[0].images_sha256 != record.images_sha256
    (record,) = evaluate(net, data=some, metrics="kid", steps=2, n=6)
    assert record.sampler.startswith("consistency-2 sigmas=80,")


def test_a_teacher(some, counter):
    net = network("EDMPrecond", label_dim=0)
    (record,) = evaluate(net, data=some, metrics="kid", steps=2, n=6)
    assert (record.metric, record.sampler, record.seeds) == ("kd-lite2@6", "heun-2", (0, 5))
    assert record.settings["subset_size"] == 6


def test_classes_follow_the_real_labels(some, counter, monkeypatch):
    asked = []

    def fake(net, how, seeds, labels, **kwargs):
        asked.append(labels.argmax(1))
        return torch.zeros(len(seeds), 1, 16, 16)

    monkeypatch.setattr("gddlab.evaluation.features.draw", fake)
    evaluate(network(), data=some, metrics="kid", n=70, batch_size=32)
    assert torch.cat(asked).tolist() == [*some.class_ids, *some.class_ids[:6]]
    assert [len(a) for a in asked] == [32, 32, 6]
    asked.clear()
    evaluate(network(), data=some, metrics="kid", n=20, batch_size=32)  # fewer: of any class, as data sets are in order
    (few,) = asked
    assert few.tolist() == some.class_ids[torch.randperm(64, generator=torch.Generator().manual_seed(0))[:20]].tolist()


def test_the_card_names_the_dataset(counter):
    net = network()
    with pytest.raises(GddlabError, match="give data="):
        evaluate(net, metrics="kid")
    net.card = SimpleNamespace(data="digits")
    assert evaluate(net, metrics="kid", n=4).records[0].reference == "digits"


def test_fid_is_said_of_inception_only(some, others, counter, monkeypatch, tmp_path):
    names = [r.metric for r in evaluate(some, data=others, metrics=("fid", "kid", "prc"))]
    assert names == ["fd-lite2@64", "kd-lite2@64", "precision-lite2@64", "recall-lite2@64"]
    monkeypatch.setenv("GDDLAB_INCEPTION", str(tmp_path / "absent.pth"))
    with pytest.raises(GddlabError, match="GDDLAB_INCEPTION"):
        evaluate(some, data=others, extractor="inception")
    assert EXTRACTORS["inception"].metric_name("fid") == "fid"


def test_real_split(some, counter, cache):
    first = real_split(some, metrics=("kid", "prc"))
    assert [r.metric for r in first] == ["kd-lite2@32", "precision-lite2@32", "recall-lite2@32"]
    assert first.records[0].reference_n == 32 and first.records[0].sampler == "data"
    assert [r.value for r in real_split(some, metrics=("kid", "prc"))] == [r.value for r in first]
    assert counter == [64]
    assert real_split(some, metrics="kid", seed=1)["kd-lite2"] != first["kd-lite2"]
    odd = real_split(subset(0, 65, "odd"), metrics="kid").records[0]
    assert (odd.n, odd.reference_n) == (32, 33)
    part = real_split(some, metrics="kid", n=10).records[0]
    assert (part.n, part.reference_n) == (10, 10)
    with pytest.raises(GddlabError, match=r"accepted are 2\.\.32"):
        real_split(some, n=33)


def test_refusals(some, counter):
    x = as_float(some)
    with pytest.raises(GddlabError, match="unknown extractor 'lite'"):
        evaluate(some, data=some, extractor="lite")
    with pytest.raises(GddlabError, match=r"unknown metric 'fidd'.*did you mean 'fid'"):
        evaluate(some, data=some, metrics="fidd")
    with pytest.raises(GddlabError, match="did you mean 'digits'"):
        evaluate(some, data="digit")
    with pytest.raises(GddlabError, match="only 64"):
        evaluate(x, data=some, n=65)
    with pytest.raises(GddlabError, match="n=1: input should be greater"):
        evaluate(some, data=some, n=1)
    with pytest.raises(GddlabError, match="only a student takes sigmas"):
        evaluate("data:digits", n=8, sigmas=(80.0,), metrics="fid")
    with pytest.raises(GddlabError, match=r"images are torch.float32 \(0, 1, 16, 16\): give float"):
        evaluate(torch.zeros(0, 1, 16, 16), data="digits", metrics="fid")
    with pytest.raises(GddlabError, match="only a teacher takes steps"):
        evaluate(x, data=some, steps=4)
    with pytest.raises(GddlabError, match="1 of 64 images are not finite"):
        evaluate(torch.where(torch.arange(64).view(-1, 1, 1, 1) == 3, torch.nan, x), data=some)
    with pytest.raises(GddlabError, match="give values in"):
        evaluate(x * 127.5 + 127.5, data=some)
    with pytest.raises(GddlabError, match="give float"):
        evaluate(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), data=some)
    with pytest.raises(GddlabError, match="8x8 with 1 channels, but 'some-digits' has 16x16"):
        evaluate(x[..., :8, :8], data=some)
    with pytest.raises(GddlabError, match="3 channels"):
        evaluate(x.expand(-1, 3, -1, -1), data=some)
    with pytest.raises(GddlabError, match="7 classes"):
        evaluate(network(label_dim=7), data=some)
    with pytest.raises(GddlabError, match="8x8"):
        evaluate(network(resolution=8), data=some)
    with pytest.raises(GddlabError, match="image 0 of the list is a Tensor: give Pillow images"):
        evaluate([x], data=some)
    with pytest.raises(GddlabError, match="unknown teacher 'student'"):
        evaluate("student", data=some)
    with pytest.raises(GddlabError, match="S_churn=3 with a Tensor"):
        evaluate(x, data=some, S_churn=3)
    with pytest.raises(GddlabError, match="did you mean 'S_churn'"):
        evaluate(network("EDMPrecond", label_dim=0), data=some, Schurn=3)
    with pytest.raises(GddlabError, match="no class logits, use extractor='inception'"):
        evaluate(x, data=some, metrics="is")
    with pytest.raises(GddlabError, match="blocks=2 with a Tensor"):
        evaluate(x, data=some, blocks=2)
    with pytest.raises(GddlabError, match="blocks=0"):
        evaluate(x, data=some, blocks=0)
    assert counter == []


def test_cache_folder_follows_the_environment(monkeypatch):
    from gddlab.files import cache_dir

    monkeypatch.delenv("GDDLAB_CACHE")
    assert str(cache_dir()) == os.path.expanduser("~/.cache/gddlab")


def test_records_are_strict_json(some, others, counter):
    for record in evaluate(others, data=some, metrics=("kid", "prc")):
        json.dumps(record.to_dict(), allow_nan=False)


def test_sources_by_name_and_path(some, counter, tmp_path):
    net = network("EDMPrecond", label_dim=0)
    save_network(net, tmp_path / "net.safetensors", data="digits")
    images = sample_files(net, tmp_path / "images", 12, steps=2, progress=False)
    packed = sample_files(net, tmp_path / "images.zip", 12, steps=2, progress=False)
    by_network = evaluate(net, data=some, metrics="kid", n=12, steps=2).records[0]
    by_file = evaluate(tmp_path / "net.safetensors", data=some, metrics="kid", n=12, steps=2).records[0]
    by_folder, by_zip = (evaluate(p, data=some, metrics="kid").records[0] for p in (images, str(packed)))
    assert len({r.value for r in (by_network, by_file, by_folder, by_zip)}) == 1
    assert len({r.images_sha256 for r in (by_network, by_file, by_folder, by_zip)}) == 1
    assert [r.source for r in (by_network, by_file)] == [None, str(tmp_path / "net.safetensors")]
    assert (by_folder.sampler, by_folder.model_sha256, by_folder.n) == ("data", None, 12)
    itself = evaluate("data:digits", metrics="fid").records[0]
    assert abs(itself.value) < 1e-3 and itself.n == 1797 and itself.reference == "digits"


def test_a_sampler_is_named_in_full(some, counter):
    net, student = network("EDMPrecond", label_dim=0), network()
    about = {"data": some, "metrics": "kid", "n": 4}
    r = evaluate(net, steps=3, solver="euler", S_churn=1.5, sigma_max=20, **about).records[0]
    assert r.sampler == "euler-3 sigma_max=20 S_churn=1.5"
    names = [
        evaluate(student, sigmas=s, **about).records[0].sampler
        for s in ((80,), (40,), (80, 0.81234567), (80, 0.8123456))
    ]
    assert names[:2] == ["one-step", "one-step sigmas=40"] and len(set(names)) == 4


def test_blocks(some, counter):
    net = network("EDMPrecond", label_dim=0)
    about = {"data": some, "steps": 1, "n": 8}
    scores = evaluate(net, metrics=("kid", "mind"), blocks=3, seed=5, **about)
    kids = [r for r in scores if r.name == "kd-lite2"]
    assert [r.seeds for r in kids] == [(5, 12), (13, 20), (21, 28)]
    alone = [evaluate(net, metrics="kid", seed=s, **about).records[0] for s in (5, 13, 21)]
    assert [r.value for r in kids] == [r.value for r in alone]
    least = scores.record("kd-lite2-min3")
    assert least.metric == "kd-lite2-min3@8" and least.value == min(r.value for r in kids)
    assert least.seeds == min(kids, key=lambda r: r.value).seeds
    assert least.settings["minimum_of_blocks"] == 3 and "mind-lite2-min3" in scores
    assert scores["kd-lite2"] == kids[0].value
    assert compare(kids[0], alone[1]).difference == kids[0].value - alone[1].value
    with pytest.raises(GddlabError, match="differ in metric"):
        compare(least, kids[0])


def test_images_of_another_range_are_refused(some):
    with pytest.raises(GddlabError, match=r"images span -128..127: give values in \[-1, 1\]"):
        evaluate(as_float(some) * 127.5 - 0.5, data=some)


def test_features_where_tf32_was_allowed_by_the_newer_setting(counter):
    setting = torch.backends.cudnn.conv
    before, setting.fp32_precision = setting.fp32_precision, "tf32"
    try:
        images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
        assert features.image_features(images, EXTRACTORS["lite0"]).shape == (4, 48)
        assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before


def test_a_student_against_either_part(counter):
    net = network()
    net.card = SimpleNamespace(data="digits:train")
    own, held_out = (evaluate(net, data=data, metrics="kid", n=24).records[0] for data in (None, "digits:held-out"))
    assert (own.reference, held_out.reference) == ("digits:train", "digits:held-out")
    assert (own.label, held_out.label) == ("kd-lite2", "kd-lite2:held-out")
    gap = compare(held_out, own, across="reference").difference
    assert gap == held_out.value - own.value != 0
    with pytest.raises(GddlabError, match="differ in reference"):
        compare(held_out, own)


def test_copying_needs_both_parts(some, counter):
    net = network()
    for data, name in (("digits", "digits"), (some, "some-digits")):
        with pytest.raises(GddlabError, match=f"against '{name}': .* give data='{name}:train'"):
            evaluate(net, data=data, metrics="copying")
    lost = ImageDataset(some.uint8, name="lost:train", source="nowhere")
    with pytest.raises(GddlabError, match="'lost:train' is a part of a data set that is not found again"):
        evaluate(net, data=lost, metrics="copying")
    with pytest.raises(GddlabError, match="metric 'copying' of a split"):
        real_split("digits:train", metrics="copying")
    assert counter == []
    copies = open_dataset("digits:train").uint8[np.arange(600) % 40]
    scores = evaluate(copies, data="digits:train", metrics="copying")
    assert scores["copying-lite2"] == 1 and scores["copying-ratio-lite2"] < 1e-3
    for n in (None, 300):
        honest = evaluate("data:digits:held-out", data="digits:train", metrics="copying", n=n)
        low, high = honest.record("copying-lite2").interval
        assert low < 0.5 < high and high - low < 0.3
        assert 0.9 < honest["copying-ratio-lite2"] < 1.1


def test_yardsticks(counter):
    how = {"metrics": ("fid", "copying"), "progress": False}
    with pytest.warns(UserWarning, match="599 images are held out of digits: that line is at n=599, not 1198"):
        lines = yardsticks("digits", **how)
    assert list(lines) == ["copier", "held-out", "missing class", "other half"]
    assert [r.metric for r in lines["copier"]] == ["fd-lite2@1198", "copying-lite2@1198", "copying-ratio-lite2@1198"]
    assert {r.reference for name in list(lines)[:3] for r in lines[name]} == {"digits:train"}
    assert [r.metric for r in lines["other half"]] == ["fd-lite2@599"]
    assert lines["copier"]["fd-lite2"] < lines["held-out"]["fd-lite2"] < lines["missing class"]["fd-lite2"]
    assert lines["copier"]["copying-lite2"] == lines["missing class"]["copying-lite2"] == 1
    assert lines["missing class"].record("fd-lite2").std > 0
    want = evaluate("data:digits:held-out", data="digits:train", metrics="fid").records[0]
    assert lines["held-out"]["fd-lite2"] == want.value
    few = yardsticks("digits:held-out", n=100, seed=1, **how)
    assert {r.n for scores in few.values() for r in scores} == {100}
    student = evaluate(network(), data="digits:train", metrics="fid", n=100).records[0]
    for name in ("copier", "held-out", "missing class"):
        assert compare(student, few[name].record("fd-lite2")).difference > 0
    assert yardsticks("digits", n=100, seed=1, **how)["copier"]["fd-lite2"] == few["copier"]["fd-lite2"]


def test_yardsticks_without_classes(counter, tmp_path):
    np.save(tmp_path / "plain.npy", subset(0, 90).uint8)
    lines = yardsticks(tmp_path / "plain.npy", n=20, metrics="fid", progress=False)
    assert list(lines) == ["copier", "held-out", "other half"]
    assert {r.n for scores in lines.values() for r in scores} == {20}


def test_the_line_of_a_missing_class_is_the_mean_over_classes(counter):
    """Of two classes, each is missing where the images are the other's."""
    pair = open_dataset("digits", classes=[3, 8])
    lines = yardsticks(pair, n=30, metrics="classes", extractor="digits", progress=False)
    assert lines["missing class"]["class-chi2-digits"] == pytest.approx(1, abs=0.1)  # 1 / (K - 1)
    assert lines["missing class"].record("class-chi2-digits").std < 0.1
    assert abs(lines["copier"]["class-chi2-digits"]) < 0.2
