import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gddlab.errors import GddlabError, NotFound
from gddlab.probing import ProbeResult, probe
from gddlab.probing.result import COLUMNS
from tests.probing.networks import tiny


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_the_frame_is_tidy(result):
    frame = result.frame
    assert tuple(frame.columns) == COLUMNS
    assert not frame.duplicated(["layer", "sigma", "stat"]).any()
    assert (frame["n_images"] == 6).all()
    assert frame["value"].notna().all()
    assert frame["sem"].notna().all()
    row = frame[(frame["layer"] == "model.dec.8x8_in0") & (frame["stat"] == "rel_update")].iloc[0]
    assert (row["stage"], row["resolution"], row["unit"], row["sigma"]) == ("dec", 8, "ratio", 80.0)
    cosine = frame[(frame["stat"] == "cosine") & (frame["sigma"] == 80.0)]
    assert np.allclose(cosine["value"], 1)


def test_pivot_is_in_the_order_of_the_network(result):
    table = result.pivot("rms")
    assert list(table.columns) == [80.0, 1.0, 0.01]
    depth = result.frame.drop_duplicates("layer").set_index("layer")["depth"]
    assert depth[table.index].is_monotonic_increasing
    with pytest.raises(GddlabError, match="did you mean 'rms'"):
        result.pivot("rsm")


def test_gram_is_normalised(result):
    for matrix in result.gram.values():
        assert matrix.shape == (3, 3)
        assert np.allclose(np.diag(matrix), 1)
        assert np.allclose(matrix, matrix.T)


def test_save_and_load(result, tmp_path):
    result.save(tmp_path / "probe")
    result.save(tmp_path / "probe")
    assert sorted(p.name for p in (tmp_path / "probe").iterdir()) == ["frame.parquet", "gram.npz", "meta.json"]
    other = ProbeResult.load(tmp_path / "probe")
    pd.testing.assert_frame_equal(other.frame, result.frame, check_exact=True)
    assert other.gram.keys() == result.gram.keys()
    assert all(np.array_equal(other.gram[k], result.gram[k]) for k in result.gram)
    assert (other.meta, other.hash, other.sigmas) == (result.meta, result.hash, result.sigmas)


def test_files_that_do_not_belong_together_are_refused(result, tmp_path):
    with pytest.raises(NotFound, match="no such file"):
        ProbeResult.load(tmp_path / "none")
    result.save(tmp_path)
    (tmp_path / "gram.npz").write_bytes(b"half")
    with pytest.raises(GddlabError, match=r"gram.npz is not the file that meta.json names"):
        ProbeResult.load(tmp_path)
    (tmp_path / "gram.npz").unlink()
    with pytest.raises(NotFound, match=r"gram\.npz"):
        ProbeResult.load(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(GddlabError, match="holds no probe result"):
        ProbeResult.load(tmp_path)


def test_a_failed_save_leaves_the_old_files(result, tmp_path, monkeypatch):
    result.save(tmp_path)
    bad = ProbeResult(result.frame, result.gram, {**result.meta, "seed": float("nan")})
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
    one.heatmap("cosine").figure.canvas.draw()
    _, ax = plt.subplots(figsize=(4, 1.5))
    result.heatmap("rms", ax=ax).figure.canvas.draw()
    assert 1 < len(ax.get_yticks()) < len(result.pivot("rms"))


def test_similarity(result):
    ax = result.similarity("model.enc.16x16_conv")
    assert ax.get_title() == "model.enc.16x16_conv"
    with pytest.raises(GddlabError, match=r"did you mean 'model.enc.16x16_conv'"):
        result.similarity("model.enc.16x16_con")


def test_notebook_view(result):
    html = result._repr_html_()
    assert "pictures" in html
    assert "rel_update" in html
