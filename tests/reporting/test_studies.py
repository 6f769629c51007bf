"""Figures and tables of studies: what they say of known tables, and what they refuse."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import gddlab
from gddlab.errors import GddlabError
from gddlab.files import data_dir
from gddlab.reporting.frequencies import draw_bands, draw_denoised, draw_spectra, spectrum_table
from gddlab.reporting.layer_changes import (
    activation_ratio,
    draw_activations,
    draw_depth,
    draw_moved,
    draw_told,
    family,
    measured_layers,
    moved_layers,
    moved_table,
    squared_norms,
)
from gddlab.reporting.local_minima import (
    between,
    draw_between,
    draw_line,
    draw_minima,
    frechet_name,
    line_table,
    minima_table,
)
from gddlab.reporting.samples import cut_grid, draw_rows, draw_same_noise, found_again
from gddlab.reporting.style import look
from gddlab.sampling import save_grid
from tests.conftest import tiny_net

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ("11_samples", "14_local_minima", "15_activations", "16_moved_parameters", "22_frequencies")
SIGMAS = (80.0, 1.0, 0.01)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def minima_study() -> pd.DataFrame:
    """GDD is near to the data and away from its teacher; CD copies the teacher and is far from the data."""
    to_data = {"teacher-2": 2000.0, "teacher-18": 63.0, "gdd": 70.0, "cd": 400.0, "gdd-cd": 90.0}
    to_teacher = {"teacher-2": (1900.0, 1.1, 40.0), "gdd": (60.0, 0.3, 20.0), "cd": (300.0, 0.15, 16.0)}
    to_teacher["gdd-cd"] = (80.0, 0.2, 18.0)
    rows: list[tuple[Any, ...]] = [(n, "data", "fd-lite2", v, None, 64, "squared") for n, v in to_data.items()]
    for name, values in to_teacher.items():
        for distance, value in zip(("fd-lite2", "pixel", "feature"), values, strict=True):
            rows.append((name, "teacher-18", distance, value, None if distance == "fd-lite2" else 0.01, 64, "unit"))
    other = "teacher-18, other noise"
    rows += [
        ("teacher-18", other, "pixel", 0.6, 0.01, 64, "unit"),
        ("teacher-18", other, "feature", 40.0, 0.5, 64, "unit"),
    ]
    return pd.DataFrame(rows, columns=["a", "b", "distance", "value", "sem", "n", "unit"])


def layers_study() -> pd.DataFrame:
    """Students of a tiny network: "gdd" has twice the teacher's activation and moved, "gdd-i" kept its convolutions."""
    net = tiny_net()
    first = gddlab.weight_change(net, net)
    places = first.frame.drop_duplicates("layer").drop(columns=["sigma", "stat", "value", "sem", "n_images", "unit"])
    parts = []
    for network, factor in (("teacher", 1.0), ("gdd", 2.0), ("gdd-i", 1.0)):
        measured = places[places["kind"].isin(["conv0", "conv1", "skip"])]
        for states, sigma in [("noised", s) for s in SIGMAS] + [("student", 80.0)]:
            about: dict[str, Any] = {"sigma": sigma, "sem": 0.01, "n_images": 4, "network": network, "states": states}
            parts.append(measured.assign(stat="rms", unit="activation", value=factor * (1 + sigma), **about))
            parts.append(measured.assign(stat="rel_update", unit="ratio", value=factor, **about))
            parts.append(measured.assign(stat="cosine", unit="similarity", value=0.5 - factor / 2, **about))
            for i, share in enumerate((0.4, 0.3, 0.2, 0.1)):
                parts.append(measured.assign(stat=f"spectral_share_{i}", unit="share", value=share, **about))
        if network != "teacher":
            still = places["kind"].isin(["conv0", "conv1", "proj"]) & (network == "gdd-i")
            about = {"sigma": 80.0, "sem": np.nan, "n_images": 0, "network": network, "states": "weights"}
            moved = places.assign(stat="weight_change", unit="ratio", value=np.where(still, 0.0, 0.1), **about)
            parts.append(moved)
    out = pd.concat(parts, ignore_index=True)
    return out.astype(
        dict.fromkeys(("layer", "block", "kind", "stage", "stat", "unit", "network", "states"), "category")
    )


def spectra_study() -> pd.DataFrame:
    rows = []
    for network, source, sigma, factor in (
        ("data", "data", np.nan, 1.0),
        ("teacher-2", "sampled", np.nan, 30.0),
        ("gdd", "sampled", np.nan, 1.5),
        ("data", "noised", 80.0, 1000.0),
        ("teacher", "denoised", 80.0, 0.5),
        ("data", "noised", 0.1, 1.2),
        ("teacher", "denoised", 0.1, 0.9),
    ):
        rows += [(network, source, sigma, f, factor * 4.0**-f, 0.01 * 4.0**-f, 32) for f in range(9)]
    return pd.DataFrame(rows, columns=["network", "source", "sigma", "frequency", "power", "sem", "n"])


def crossed_study() -> pd.DataFrame:
    rows = [
        (network, null, what, stat, varied, 0.5, 0.1)
        for network in ("digits", "gdd-i")
        for null in ("trained", "shuffled")
        for stat in ("correlation", "cosine", "rel_update")
        for what, varied in (("response", "the input"), ("effect", "told"))
    ]
    return pd.DataFrame(rows, columns=["network", "null", "what", "stat", "varied", "value", "sem"])


def texts_of(figure: Any) -> list[str]:
    return [t.get_text() for t in figure.findobj(plt.Text)]


def saved(figure: Any, path: Path) -> None:
    """Drawing must need no warning, such as of a layout that had no room."""
    figure.savefig(path, dpi=40)


def test_what_is_due_to_the_level_told_is_drawn_by_network_and_statistic(tmp_path: Path) -> None:
    rows = [
        (network, "effect", stat, varied, i / 2, share * (i + 1) / 3, 0.01)
        for network, share in (("digits", 0.03), ("digits-dit", 0.9))
        for stat in ("rms", "correlation")
        for varied in ("told", "input")
        for i in (2, 0, 1)
    ]
    study = pd.DataFrame(rows, columns=["network", "what", "stat", "varied", "position", "value", "sem"])
    figure = draw_told(study, ["correlation"])
    line = next(line for line in figure.axes[0].lines if line.get_label() == "digits-dit")
    np.testing.assert_allclose(line.get_xydata(), [[0, 0.3], [0.5, 0.6], [1, 0.9]])
    assert len(figure.axes[0].lines) == 2
    saved(figure, tmp_path / "told.png")
    assert [ax.get_title() for ax in draw_told(study, ["rms", "correlation"]).axes] == ["rms", "correlation"]
    with pytest.raises(GddlabError, match="unknown stat 'rsm'"):
        draw_told(study, ["rsm"])


@pytest.mark.parametrize("scale", [1, 2])
def test_a_grid_is_cut_into_the_images_that_it_was_made_of(tmp_path: Path, scale: int) -> None:
    images = torch.rand(19, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_grid(images, tmp_path / "grid.png", columns=8, scale=scale)
    found = cut_grid(np.asarray(Image.open(tmp_path / "grid.png")), size=5)
    assert found.shape == (24, 3, 5, 5)
    torch.testing.assert_close(found[:19], images, atol=0.5 / 127.5 + 1e-6, rtol=0)
    with pytest.raises(GddlabError, match="no grid of 8 columns of images of 6 pixels"):
        cut_grid(np.asarray(Image.open(tmp_path / "grid.png")), size=6)
    with pytest.raises(GddlabError, match="give uint8"):
        cut_grid(found.numpy(), size=5)


def test_rows_of_images() -> None:
    one, two = torch.full((3, 1, 4, 4), 1.0), torch.full((3, 2, 1, 4, 4), -1.0)
    (drawn,) = draw_rows(one, two, title="rows").get_images()
    pixels = np.asarray(drawn.get_array())
    assert pixels.shape == (3 * 5 - 1, 3 * 5 - 1, 3)
    assert (pixels[:4, :4] == 255).all() and (pixels[:4, 5:9] == 0).all() and (pixels[10:, 10:] == 0).all()


def test_the_shipped_grids_of_teacher_and_runs_are_of_seeds_0_to_63() -> None:
    teacher = gddlab.load_teacher("digits")
    pixels = np.asarray(Image.open(data_dir() / "teachers" / "digits" / "samples-1.png"))
    last = gddlab.sample(teacher, seeds=[0, 9, 63], steps=1)
    found = cut_grid(pixels, size=16)
    assert len(found) == 64
    torch.testing.assert_close(found[[0, 9, 63], :1], last, atol=0.6 / 127.5, rtol=0)
    grids = gddlab.load_run(data_dir() / "runs" / "first" / "gdd" / "seed-0").grids()
    assert len(cut_grid(np.asarray(Image.open(grids[-1])), size=16)) == 64


def test_the_same_noise_stands_in_one_column() -> None:
    images = {"a": torch.full((4, 1, 3, 3), -1.0), "b": torch.ones(4, 3, 3, 3)}
    images["a"][2] = 90 / 127.5 - 1  # as grey as the lines that image_grid draws
    ax = draw_same_noise(images, [0, 2, 3])
    shown = np.asarray(ax.images[0].get_array())
    assert shown.shape == (7, 11, 3)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "2", "3"]
    assert shown[1, [1, 5, 9], 0].tolist() == [0, 90, 0]
    assert (shown[5, [1, 5, 9]] == 255).all()
    assert (shown[3] == 255).all() and (shown[:, [3, 7]] == 255).all()
    with pytest.raises(GddlabError, match="'a' has images of seeds 0 to 3, not of 4"):
        draw_same_noise(images, [0, 4])
    with pytest.raises(GddlabError, match="all of one size"):
        draw_same_noise({**images, "c": torch.ones(4, 1, 2, 2)}, [0])
    with pytest.raises(GddlabError, match="nothing to draw"):
        draw_same_noise({}, [0])


def test_minima_show_who_copies_and_who_is_near_to_the_data() -> None:
    table = minima_table(minima_study())
    assert table.index.tolist() == ["teacher-2", "teacher-18", "gdd", "cd", "gdd-cd"]
    assert table.loc["cd", "pixel"] < table.loc["gdd", "pixel"]
    assert table.loc["cd", "data"] > table.loc["gdd", "data"]
    assert table.loc["gdd", "pixel_share"] == pytest.approx(0.3 / 0.6)
    assert table.loc["gdd", "feature_share"] == pytest.approx(0.5)
    assert table.loc["teacher-18", ["teacher", "pixel", "feature"]].tolist() == [0, 0, 0]
    assert table["sort"].tolist() == ["teacher", "teacher", "GAN loss", "instance loss", "GAN and instance loss"]


@pytest.mark.filterwarnings("error")
def test_minima_are_drawn_with_their_yardsticks(tmp_path: Path) -> None:
    figure = draw_minima(minima_study())
    panels = figure.axes
    assert [ax.get_xscale() for ax in panels] == ["log", "log", "linear", "linear"]
    yardsticks = [line for ax in panels for line in ax.lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in yardsticks] == [[63.0, 63.0], [0.6, 0.6], [40.0, 40.0]]
    dots = panels[0].collections[0].get_offsets()
    assert [float(x) for x, _ in dots] == [2000.0, 63.0, 70.0, 400.0, 90.0]
    assert {"CD", "GDD (preset's rate)", "teacher, 18 steps", "other noise", "instance loss"} <= set(texts_of(figure))
    saved(figure, tmp_path / "minima.png")
    alone = draw_minima(minima_study(), ["teacher-18"])
    assert alone.axes[2].get_xlim()[1] > 0.6  # the yardstick stays in sight
    saved(alone, tmp_path / "alone.png")
    with pytest.raises(GddlabError, match="unknown network 'ctm'"):
        draw_minima(minima_study(), ["ctm"])


@pytest.mark.filterwarnings("error")
def test_all_pairs_are_symmetric_and_those_not_measured_stay_empty(tmp_path: Path) -> None:
    study = minima_study()
    assert frechet_name(study) == "fd-lite2"
    table = between(study)
    assert table.index.tolist() == ["data", "teacher-2", "teacher-18", "gdd", "cd", "gdd-cd"]
    assert table.loc["data", "cd"] == table.loc["cd", "data"] == 400
    assert np.isnan(table.loc["gdd", "cd"]) and np.isnan(table.loc["cd", "cd"])
    assert "data" not in between(study, "pixel").index
    pd.testing.assert_frame_equal(between(pd.concat([study, study])), table)
    last = pd.concat([study, study.rename(columns={"a": "b", "b": "a"}).assign(value=7.0)])
    assert (between(last).fillna(7.0) == 7.0).all(axis=None)  # in either order
    ax = draw_between(table)
    assert "400" in [t.get_text() for t in ax.texts]
    saved(ax.figure, tmp_path / "between.png")
    many = [f"network {i}" for i in range(18)]
    _, small = plt.subplots(figsize=(3.2, 3))
    assert not draw_between(pd.DataFrame(2.0, many, many), ax=small).texts  # no room for numbers
    with pytest.raises(GddlabError, match="unknown distance 'pixels'"):
        between(study, "pixels")
    with pytest.raises(GddlabError, match="give the table of the study 'local-minima'"):
        between(study.drop(columns="b"))
    with pytest.raises(GddlabError, match="no distance to a teacher"):
        minima_table(study[~study["b"].str.contains("other")])
    with pytest.raises(GddlabError, match="no rows"):
        minima_table(study.iloc[:0])


def line_study() -> pd.DataFrame:
    """A hill of 400 between GDD and RCD, and none between two seeds of RCD."""
    rows = []
    for a, b, values in (("gdd", "rcd", (70.0, 400.0, 90.0)), ("rcd/seed-0", "rcd/seed-1", (90.0, 80.0, 85.0))):
        for t, value in zip((0.0, 0.5, 1.0), values, strict=True):
            about = {"a": a, "b": b, "t": t, "length": 12.0, "copied": 0.2 + t / 10, "n": 64}
            rows += [
                about | {"metric": "fd-lite2", "value": value},
                about | {"metric": "kd-lite2", "value": value - 80},
            ]
    return pd.DataFrame(rows)


@pytest.mark.filterwarnings("error")
def test_hills_on_the_line_between_two_networks(tmp_path: Path) -> None:
    table = line_table(line_study()).set_index(["metric", "pair"])
    hill = table.loc[("fd-lite2", "GDD (preset's rate) to RCD")]
    assert hill[["length", "first", "second", "highest", "at", "barrier"]].tolist() == [12, 70, 90, 400, 0.5, 310]
    assert table.loc[("fd-lite2", "RCD, two seeds"), "barrier"] == 0
    assert table.loc[("to the teacher's images", "GDD (preset's rate) to RCD"), "second"] == pytest.approx(0.3)
    figure = draw_line(line_study())
    assert [ax.get_title() for ax in figure.axes] == ["fd-lite2", "kd-lite2", "to the teacher's images"]
    assert [ax.get_yscale() for ax in figure.axes] == ["log", "linear", "linear"]
    drawn = [line.get_ydata().tolist() for line in figure.axes[0].lines if len(line.get_ydata())]
    assert drawn == [[70, 400, 90], [90, 80, 85]]
    saved(figure, tmp_path / "line.png")
    with pytest.raises(GddlabError, match="give the table of the study 'line'"):
        draw_line(minima_study())


def test_a_students_activation_is_compared_with_its_teachers() -> None:
    study = layers_study()
    ratio = activation_ratio(study, "rms", "gdd")
    assert ratio.columns.tolist() == sorted(SIGMAS)
    np.testing.assert_allclose(ratio, 1.0)
    np.testing.assert_allclose(activation_ratio(study, "rms", "gdd-i"), 0.0)
    assert activation_ratio(study, "cosine", "gdd").isna().all(axis=None)
    assert set(measured_layers(study, "gdd", "rms", states="student")["sigma"]) == {80.0}
    with pytest.raises(GddlabError, match="unknown network 'gdd-j': did you mean 'gdd-i'"):
        measured_layers(study, "gdd-j", "rms")
    with pytest.raises(GddlabError, match="unknown stat 'rsm'"):
        draw_activations(study, "rsm", "gdd")
    with pytest.raises(GddlabError, match="no column 'states'"):
        draw_depth(study.drop(columns="states"), "rms")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("stat", ["rms", "cosine"])
def test_three_heat_maps_share_their_rows(tmp_path: Path, stat: str) -> None:
    figure = draw_activations(layers_study(), stat, "gdd")
    teacher, student, third = figure.axes[:3]
    assert [ax.get_title("left") for ax in (teacher, student)] == ["teacher", "GDD (preset's rate)"]
    meshes = [ax.collections[0] for ax in (teacher, student, third)]
    assert meshes[0].norm is meshes[1].norm
    assert meshes[2].norm.vmin == -meshes[2].norm.vmax
    expected = 1.0 if stat == "rms" else -0.5
    np.testing.assert_allclose(np.ma.getdata(meshes[2].get_array()), expected)
    assert ("log2(GDD (preset's rate) / teacher)" if stat == "rms" else "GDD (preset's rate) - teacher") in texts_of(
        figure
    )
    saved(figure, tmp_path / "activations.png")


@pytest.mark.filterwarnings("error")
def test_along_depth_the_teacher_stands_beside_its_students(tmp_path: Path) -> None:
    ax = draw_depth(layers_study(), "rms")
    lines = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert [float(line.get_ydata()[0]) for line in lines] == [81.0, 162.0, 81.0]
    assert {"teacher", "GDD (preset's rate)", "GDD-I"} <= set(texts_of(ax.figure))
    saved(ax.figure, tmp_path / "depth.png")
    _, own = plt.subplots()
    assert draw_depth(layers_study(), "rms", ["gdd"], ax=own) is own


def test_what_moved_is_summed_in_squares() -> None:
    study, net = layers_study(), tiny_net()
    norms = squared_norms(net)
    layers = moved_layers(study, ["gdd", "gdd-i"])
    again = pd.concat([study, study.assign(value=7.0)])
    pd.testing.assert_frame_equal(moved_layers(again, ["gdd", "gdd-i"]), layers)
    assert not any(a != b and b.startswith(f"{a}.") for a, b in itertools.product(layers["layer"], repeat=2))
    table = moved_table(study, norms, ["gdd", "gdd-i"])
    np.testing.assert_allclose(table["gdd"], 0.1)  # all layers by the same share, so every group too
    assert table["gdd share"].sum() == pytest.approx(1) == table["gdd-i share"].sum()
    assert table.loc[("convolution", "enc"), ["gdd-i", "gdd-i share", "gdd-i unmoved"]].tolist() == [0, 0, 1]
    assert table["gdd unmoved"].max() == 0
    assert table["parameters"].sum() == layers["n_params"].sum()
    name = layers.loc[layers["family"] == "convolution", "layer"].iloc[0]
    changed = study.assign(
        value=study["value"].where((study["layer"] != name) | (study["stat"] != "weight_change"), 0.7)
    )
    group = layers[
        (layers["family"] == "convolution") & (layers["stage"] == layers.set_index("layer").loc[name, "stage"])
    ]
    sizes = {n: norms[n] for n in group["layer"]}
    moved = sum((0.7 if n == name else 0.1) ** 2 * s for n, s in sizes.items())
    found = moved_table(changed, norms, ["gdd"]).loc[("convolution", group["stage"].iloc[0]), "gdd"]
    assert found == pytest.approx((moved / sum(sizes.values())) ** 0.5)
    with pytest.raises(GddlabError, match="no norm of layer"):
        moved_table(study, {})
    with pytest.raises(GddlabError, match="no weight_change"):
        moved_layers(study[study["stat"] == "rms"])
    with pytest.raises(GddlabError, match="unknown student 'teacher'"):
        moved_layers(study, ["teacher"])


def test_norms_are_those_that_weight_change_is_relative_to() -> None:
    net, other = tiny_net(), tiny_net(seed=1)
    change = gddlab.weight_change(other, net).frame.set_index("layer")["value"]
    norms = squared_norms(net)
    theirs = dict(other.named_modules())
    for name, module in net.named_modules():
        if name in change:
            squares = sum(
                (p - q).detach().double().square().sum()
                for p, q in zip(module.parameters(), theirs[name].parameters(), strict=True)
            )
            assert change[name] ** 2 * norms[name] == pytest.approx(float(squares), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("conv0", "convolution"),
        ("conv", "first, last, auxiliary"),
        ("aux_conv", "first, last, auxiliary"),
        ("aux_norm", "normalisation"),
        ("out_conv", "first, last, auxiliary"),
        ("skip", "skip convolution"),
        ("qkv", "attention"),
        ("affine", "noise embedding"),
        ("map_layer1", "noise embedding"),
        ("unheard", "other"),
    ],
)
def test_kinds_of_layers_are_put_together(kind: str, expected: str) -> None:
    assert family(kind) == expected


@pytest.mark.filterwarnings("error")
def test_layers_that_did_not_move_are_marked(tmp_path: Path) -> None:
    figure = draw_moved(layers_study())
    first, second = figure.axes
    floor = first.get_ylim()[0]
    dots = [ax.collections[-1].get_offsets()[:, 1] for ax in (first, second)]
    still = [int(np.isclose(y.astype(float), floor).sum()) for y in dots]
    layers = moved_layers(layers_study())
    assert still == [0, int((layers["gdd-i"] == 0).sum())]
    assert first.get_title(loc="left") == "GDD (preset's rate): all layers moved"
    assert f"{still[1]} of {len(layers)} layers unmoved" in second.get_title(loc="left")
    saved(figure, tmp_path / "moved.png")
    heights = [ax.get_position().height for ax in (first, second)]
    assert min(heights) > 0.15
    none = layers_study()
    none["value"] = none["value"].where(none["stat"] != "weight_change", 0.0)
    with pytest.raises(GddlabError, match="no layer of these students has moved"):
        draw_moved(none)


@pytest.mark.filterwarnings("error")
def test_spectra_stand_beside_the_datas(tmp_path: Path) -> None:
    study = spectra_study()
    table = spectrum_table(study)
    assert table.index.tolist() == ["teacher-2", "gdd"]
    assert table.columns.tolist() == list(range(1, 9))
    np.testing.assert_allclose(table.loc["gdd"], 1.5)
    figure = draw_spectra(study, ["gdd"])
    left, right = figure.axes
    assert [len(ax.lines) for ax in (left, right)] == [2, 2]
    np.testing.assert_allclose(right.lines[0].get_ydata(), 1.0)
    np.testing.assert_allclose(right.lines[1].get_ydata(), 1.5)
    saved(figure, tmp_path / "spectra.png")
    denoised = draw_denoised(study)
    assert [ax.get_title(loc="left") for ax in denoised.axes[:2]] == ["σ = 80", "σ = 0.1"]
    saved(denoised, tmp_path / "denoised.png")
    with pytest.raises(GddlabError, match="unknown network 'gdd-i'"):
        draw_spectra(study, ["gdd-i"])
    with pytest.raises(GddlabError, match="no denoised images"):
        draw_denoised(study[study["source"] != "denoised"])
    with pytest.raises(GddlabError, match="unknown images 'data data'"):
        spectrum_table(study[study["source"] != "data"])


@pytest.mark.filterwarnings("error")
def test_bands_are_means_over_the_layers_of_a_place(tmp_path: Path) -> None:
    figure = draw_bands(layers_study(), "gdd")
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert len(lines) == 8
    assert sorted({round(float(line.get_ydata()[0]), 6) for line in lines}) == [0.1, 0.2, 0.3, 0.4]
    assert sum(line.is_dashed() for line in lines) == 4
    saved(figure, tmp_path / "bands.png")
    with pytest.raises(GddlabError, match="unknown network"):
        draw_bands(layers_study(), "pd")


def test_names_of_networks() -> None:
    assert look("teacher-1").label == "teacher, 1 step"
    assert look("teacher-18").sort == "teacher"
    assert look("gdd-i").label == "GDD-I"
    rates = {look(name).colour for name in ("gdd", "gdd-lr-0.0002")}
    assert len(rates) == 2  # both stand in one figure
    assert look("gdd-cd").sort == "GAN and instance loss"
    assert look("half-random").label == "half-random"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_thin(name: str) -> None:
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    code = [c["source"] for c in book.cells if c["cell_type"] == "code"]
    assert not [s for s in code if "def " in s or "class " in s]
    assert [c["source"].split(" = ")[0] for c in book.cells if "parameters" in c["metadata"].get("tags", ())] == [
        "runs"
    ]
    assert any("runs_folder(globals())" in s for s in code)
    assert len("\n".join(code).splitlines()) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize("filled", [False, True], ids=["without studies", "with studies"])
def test_notebooks_run(name: str, filled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what they show they say so, and with it they show it."""
    from nbclient import NotebookClient

    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # the kernel's own, not the tests'
    (tmp_path / "digits").mkdir()
    if filled:
        studies = {"local-minima": minima_study(), "layers": layers_study(), "spectra": spectra_study()}
        studies["input-or-level"] = crossed_study()
        for study, frame in studies.items():
            folder = tmp_path / "digits" / study
            folder.mkdir()
            frame.to_parquet(folder / "frame.parquet")
            (folder / "meta.json").write_text(json.dumps({"name": study, "what": "made up", "n": 4, "seed": 0}))
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in book.cells:
        if "parameters" in cell["metadata"].get("tags", ()):
            cell["source"] = f"runs = {str(tmp_path)!r}"
    if name == "16_moved_parameters" and filled:  # the table is made of a network that is not the bundled one
        book.cells = [c for c in book.cells if "moved_table(" not in c["source"]]
    done = NotebookClient(book, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [o for c in done.cells if c["cell_type"] == "code" for o in c["outputs"]]
    said = "".join(o.get("text", "") for o in outputs)
    pictures = sum("image/png" in o.get("data", {}) for o in outputs)
    assert ("not run: gddlab reproduce digits --only" in said) == (not filled or name == "11_samples")
    assert (pictures > 0) == (filled or name == "11_samples")


def test_who_makes_the_same_image_of_the_same_noise() -> None:
    target = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    other = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images = {"same": 0.5 * target + 3, "noisy": target + 0.3 * other, "more": target.repeat(2, 1, 1, 1)}
    table = found_again(images | {"other": other}, target)
    assert table.loc[[*images], "found"].tolist() == [1, 1, 1] and table.loc["other", "found"] < 0.4
    assert table.loc["same", "correlation"] == pytest.approx(1) and abs(table.loc["other", "correlation"]) < 0.2
    with pytest.raises(GddlabError, match=r"images of 'few' are \(3, 1, 8, 8\): give 16 of \(8, 8\) pixels"):
        found_again({"few": target[:3]}, target)
