import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gddlab.errors import GddlabError, NotFound
from gddlab.probing import Layer, ProbeResult, probe
from gddlab.probing.result import COLUMNS
from tests.probing.networks import tiny


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_the_frame_is_tidy(result):
    frame = result.frame
    assert len(repr(result)) < 300 and "noise levels" in repr(result)
    assert tuple(frame.columns) == COLUMNS
    assert not frame.duplicated(["layer", "sigma", "stat"]).any()
    assert (frame["n_images"] == 6).all()
    assert frame["value"].notna().all()
    assert frame["sem"].notna().all()
    row = frame[(frame["layer"] == "model.dec.8x8_in0") & (frame["stat"] == "rel_update")].iloc[0]
    assert (row["stage"], row["resolution"], row["unit"], row["sigma"]) == ("dec", 8, "ratio", 80.0)
    same = frame[(frame["stat"] == "correlation") & (frame["sigma"] == 80.0)]
    assert np.allclose(same["value"], 1)


def test_pivot_is_in_the_order_of_the_network(result):
    table = result.pivot("rms")
    assert list(table.columns) == [80.0, 1.0, 0.01]
    depth = result.frame.drop_duplicates("layer").set_index("layer")["depth"]
    assert depth[table.index].is_monotonic_increasing
    with pytest.raises(GddlabError, match="did you mean 'rms'"):
        result.pivot("rsm")


def test_matrices_are_normalised(result, pictures):
    assert result.matrices.get("cosine", {}) == {}
    other = probe(tiny(), [80.0, 1.0, 0.01], data=pictures, n=2, stats="cosine")
    for matrix in (*result.matrices["correlation"].values(), *other.matrices.get("cosine", {}).values()):
        assert matrix.shape == (3, 3)
        assert np.allclose(np.diag(matrix), 1)
        assert np.allclose(matrix, matrix.T)


def test_save_and_load(result, tmp_path):
    result.save(tmp_path / "probe")
    result.save(tmp_path / "probe")
    assert sorted(p.name for p in (tmp_path / "probe").iterdir()) == ["arrays.npz", "frame.parquet", "meta.json"]
    other = ProbeResult.load(tmp_path / "probe")
    pd.testing.assert_frame_equal(other.frame, result.frame, check_exact=True)
    ours, theirs = (r.matrices["correlation"] for r in (result, other))
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[k], ours[k]) for k in ours)
    assert (other.meta, other.hash, other.sigmas) == (result.meta, result.hash, result.sigmas)
    again = ProbeResult.of(
        [Layer(**d) for d in other.meta["layers"] if d["name"] in other.statistics],
        other.sigmas,
        other.statistics,
        other.meta,
    )
    key = ["layer", "stat", "sigma"]
    a, b = (r.frame.sort_values(key)["value"].to_numpy() for r in (again, result))
    assert np.array_equal(a, b)  # the sums came back, so that a loaded result merges
    assert other.merge().meta["n_images"] == 6


def test_channels_come_back(tmp_path, pictures):
    full = probe(tiny(), [2.0, 1.0], data=pictures, n=2, stats="rms", per_channel=True)
    full.save(tmp_path)
    other = ProbeResult.load(tmp_path)
    assert other.channels.keys() == full.channels.keys()
    found = other.channels["model.enc.16x16_conv"]
    assert found["mean"].shape == found["var"].shape == (2, 8)
    assert np.array_equal(found["var"], full.channels["model.enc.16x16_conv"]["var"])


def test_contrast(result):
    table = result.contrast("rms", at=70.0)
    values = result.pivot("rms")
    assert np.allclose(table["at"], values[80.0])
    assert np.allclose(table["others"], (values[1.0] + values[0.01]) / 2)
    assert np.allclose(table["ratio"], table["at"] / table["others"])
    assert np.allclose(table["difference"], table["at"] - table["others"])
    with pytest.raises(GddlabError, match="at=-1"):
        result.contrast("rms", at=-1)
    with pytest.raises(GddlabError, match="at sigma 80 alone"):
        probe(tiny(), [80.0], states="prior", n=2).contrast("rms")


def test_files_that_do_not_belong_together_are_refused(result, tmp_path):
    with pytest.raises(NotFound, match="no such file"):
        ProbeResult.load(tmp_path / "none")
    result.save(tmp_path)
    (tmp_path / "arrays.npz").write_bytes(b"half")
    with pytest.raises(GddlabError, match=r"arrays.npz is not the file that meta.json names"):
        ProbeResult.load(tmp_path)
    (tmp_path / "arrays.npz").unlink()
    with pytest.raises(NotFound, match=r"arrays\.npz"):
        ProbeResult.load(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(GddlabError, match="holds no probe result"):
        ProbeResult.load(tmp_path)


def test_a_failed_save_leaves_the_old_files(result, tmp_path, monkeypatch):
    result.save(tmp_path)
    bad = result.copy(meta={**result.meta, "seed": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        bad.save(tmp_path)
    assert ProbeResult.load(tmp_path).hash == result.hash


def test_heatmap(result):
    ax = result.heatmap("rms")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.01", "1", "80"]
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == [n.removeprefix("model.") for n in result.pivot("rms").index]
    _, own = plt.subplots(figsize=(3, 1))
    assert result.heatmap("rel_update", ax=own) is own
    with pytest.raises(GddlabError, match="unknown statistic"):
        result.heatmap("speed")


def test_heatmap_of_one_sigma_and_of_many_layers_in_a_small_figure(result):
    one = probe(tiny(), states="student", n=2)
    one.heatmap("correlation").figure.canvas.draw()
    _, ax = plt.subplots(figsize=(4, 1.5))
    result.heatmap("rms", ax=ax).figure.canvas.draw()
    assert 1 < len(ax.get_yticks()) < len(result.pivot("rms"))


def test_similarity(result):
    ax = result.similarity("model.enc.16x16_conv")
    assert ax.get_title("left").startswith("model.enc.16x16_conv\n")
    with pytest.raises(GddlabError, match=r"did you mean 'model.enc.16x16_conv'"):
        result.similarity("model.enc.16x16_con")


def test_notebook_view(result):
    html = result._repr_html_()
    assert "pictures" in html
    assert "rel_update" in html


@pytest.fixture(scope="session")
def images(pictures):
    """Results of one image each."""
    options = {"data": pictures, "layers": "model.enc.16x16_conv", "stats": ("rms", "std", "cosine", "mean")}
    return [probe(tiny(), [80.0, 1.0], n=1, start=i, per_channel=True, **options) for i in range(5)]


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(5)), cut=st.integers(1, 4))
def test_merging_is_associative_and_free_of_order(images, order, cut):
    whole = images[0].merge(*images[1:])
    parts = [images[i] for i in order]
    left, right = parts[0].merge(*parts[1:cut]), parts[cut].merge(*parts[cut + 1 :])
    merged = left.merge(right)
    pd.testing.assert_frame_equal(merged.frame, whole.frame, rtol=1e-9, atol=1e-12)
    assert merged.meta["n_images"] == 5
    for layer, matrix in whole.matrices.get("cosine", {}).items():
        np.testing.assert_allclose(merged.matrices.get("cosine", {})[layer], matrix, rtol=1e-9)
        np.testing.assert_allclose(merged.channels[layer]["var"], whole.channels[layer]["var"], rtol=1e-9)
    with pytest.raises(GddlabError, match="both results saw images"):
        merged.merge(parts[0])


def test_sums_saved_under_the_names_of_classes_still_merge(images, tmp_path):
    """Older files name module and class of gddlab's own statistics."""
    first = images[0].copy()
    for about in first.meta["stats"].values():
        about["class"] = "gddlab.probing.statistics.AnyName"
    first.save(tmp_path)
    merged = ProbeResult.load(tmp_path).merge(images[1])
    pd.testing.assert_frame_equal(merged.frame, images[0].merge(images[1]).frame)
