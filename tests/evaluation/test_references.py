"""Scores against files of statistics: ours, and EDM's form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError
from gddlab.evaluation import compare, evaluate, reference
from gddlab.evaluation.extractors import EXTRACTORS, Extractor
from tests.evaluation.conftest import WIDTH, as_float
from tests.evaluation.test_evaluate import network


def test_a_file_stands_for_its_dataset(some, counter, tmp_path):
    path = reference(some, tmp_path / "ref.npz", features=True)
    net = network()  # conditional: the labels come from the file too
    kinds = ("fid", "kid", "prc", "mind")
    by_data, by_file = (evaluate(net, data=d, metrics=kinds, n=70) for d in (some, str(path)))
    for a, b in zip(by_data, by_file, strict=True):
        assert compare(a, b).difference == pytest.approx(0, abs=1e-9 * abs(a.value))
        assert a.images_sha256 == b.images_sha256
    assert by_file.records[0].reference_sha256 == some.manifest.sha256
    assert by_file.records[0].data == str(path)
    assert evaluate(net, data=path, metrics="fid").records[0].n == 64
    with np.load(path, allow_pickle=False) as f:
        assert f["mu"].dtype == f["sigma"].dtype == np.float64
        assert sorted(f.files) == ["about", "class_ids", "features", "mu", "sigma"]
    with pytest.raises(GddlabError, match="exists: give another name"):
        reference(some, path)
    with np.load(reference(some, path, overwrite=True), allow_pickle=False) as f:
        assert "features" not in f.files


def test_statistics_alone_give_the_frechet_distance_only(some, others, counter, tmp_path):
    path = reference(some, tmp_path / "ref.npz")
    got = evaluate(others, data=path, metrics="fid")["fd-lite2"]
    assert got == pytest.approx(evaluate(others, data=some, metrics="fid")["fd-lite2"], rel=1e-9)
    with pytest.raises(GddlabError, match="'kid' needs the features of each real image"):
        evaluate(others, data=path)


def test_edm_statistics(some, counter, tmp_path, monkeypatch):
    """Arrays mu and sigma, of Inception; here a small network takes its name."""
    spec = Extractor("lite2", "1280", WIDTH, 96, "timm", "inception", "none")
    monkeypatch.setitem(EXTRACTORS, "inception", spec)
    path = tmp_path / "digits-16x16.npz"
    f = np.random.default_rng(0).normal(size=(2000, WIDTH))
    np.savez(path, mu=f.mean(0), sigma=np.cov(f.T))
    (record,) = evaluate(as_float(some), data=path, metrics="fid", extractor="inception")
    assert (record.metric, record.reference, record.reference_n) == ("fid@64", "digits-16x16.npz", None)
    assert len(record.reference_sha256) == 64 and record.value > 0
    with pytest.raises(GddlabError, match="asked is extractor='lite2'"):
        evaluate(as_float(some), data=path, metrics="fid")


def test_adm_reference_batches_hold_images_and_statistics(some, others, counter, tmp_path, monkeypatch):
    path = tmp_path / "VIRTUAL_digits16.npz"
    np.savez(path, some.uint8, mu=np.zeros(WIDTH), sigma=np.eye(WIDTH))
    (record,) = evaluate(others, data=path, metrics="fid")
    assert (record.reference, record.reference_n) == ("VIRTUAL_digits16", 64)
    assert record.value == evaluate(others, data=some, metrics="fid")["fd-lite2"]
    monkeypatch.setitem(EXTRACTORS, "inception", Extractor("lite2", "1280", WIDTH, 96, "timm", "inception", "none"))
    (record,) = evaluate(others, data=path, metrics="fid", extractor="inception")
    assert (record.reference, record.reference_n) == ("VIRTUAL_digits16.npz", None)


def test_a_reference_of_an_array_knows_its_codec(some, others, counter, tmp_path):
    jpeg = ImageDataset(some.uint8, name="some", source="digits", codec="jpg")
    png = ImageDataset(others.uint8, name="others", source="digits", codec="png")
    path = reference(jpeg, tmp_path / "ref.npz")
    with pytest.warns(UserWarning, match="others is png, some is jpg: their compression counts"):
        evaluate(png, data=path, metrics="fid")
    assert evaluate(some.uint8, data=reference(some.uint8, tmp_path / "a.npz"), metrics="fid")["fd-lite2"] == 0


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_what_is_no_reference_is_refused(some, counter, tmp_path, monkeypatch):
    good = reference(some, tmp_path / "good.npz")
    x, d = as_float(some), WIDTH
    eye, zero = np.eye(d), np.zeros(d)
    cases = {
        "lacks sigma": save(tmp_path / "a.npz", mu=zero),
        "give float": save(tmp_path / "b.npz", mu=zero, sigma=np.eye(3)),
        "sigma int64": save(tmp_path / "c.npz", mu=zero, sigma=np.eye(d, dtype=np.int64)),
        "not finite": save(tmp_path / "d.npz", mu=zero + np.nan, sigma=eye),
        "holds x, y: give the images as arr_0": save(tmp_path / "k.npz", x=zero, y=zero),
        "cannot be read": save(tmp_path / "e.npz", mu=np.array([{}], dtype=object), sigma=eye),
        "is no reference that gddlab wrote": save(tmp_path / "f.npz", mu=zero, sigma=eye, about=np.array("{}")),
        "no such file": tmp_path / "absent.npz",
    }
    with np.load(good) as f:
        arrays = dict(f)
    about = str(arrays.pop("about"))
    cases["another extractor, sha256"] = save(
        tmp_path / "g.npz", about=np.array(about.replace(EXTRACTORS["lite2"].sha256, "0" * 64)), **arrays
    )
    cases["do not fit each other"] = save(
        tmp_path / "h.npz", about=np.array(about), **(arrays | {"class_ids": np.zeros(3, dtype=np.int64)})
    )
    (tmp_path / "i.npz").write_bytes(good.read_bytes()[:4000])
    (tmp_path / "j.npz").write_bytes(b"no zip")
    for match, path in [*cases.items(), *(("cannot be read", tmp_path / f) for f in ("i.npz", "j.npz"))]:
        with pytest.raises(GddlabError, match=match) as e:
            evaluate(x, data=path, metrics="fid")
        assert "\n" not in str(e.value)
    with pytest.raises(GddlabError, match="another extractor, name 'lite2'"):
        evaluate(x, data=good, metrics="fid", extractor="lite0")
    with pytest.raises(GddlabError, match=r"ends in \.npz"):
        reference(some, tmp_path / "ref.zip")
    with pytest.raises(GddlabError, match="8x8"):
        evaluate(x[..., :8, :8], data=good, metrics="fid")
    assert torch.is_tensor(x)
