import itertools
import subprocess
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import FuncNorm, LogNorm, Normalize, SymLogNorm, to_hex

from gddlab.errors import GddlabError
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.nets import from_edm
from gddlab.probing import ProbeResult, probe
from gddlab.probing.layers import inventory, is_conv
from gddlab.probing.plots.axes import plain
from gddlab.probing.plots.heatmaps import draw_over_training
from gddlab.theme import PALETTE, RESOLUTIONS
from tests.probing.networks import tiny

SIGMAS = (80.0, 1.0, 0.1, 0.002)
CIFAR = {
    "img_resolution": 32,
    "img_channels": 3,
    "model_type": "SongUNet",
    "model_channels": 128,
    "channel_mult": [2, 2, 2],
    "num_blocks": 4,
    "attn_resolutions": [16],
    "embedding_type": "fourier",
    "encoder_type": "residual",
}


def probed(net, values, sigmas=SIGMAS, states="noised"):
    """What is read of a probe: `values` takes the number of a layer and of a sigma."""
    modules = dict(net.named_modules())
    layers = [layer for name, layer in inventory(net).items() if is_conv(modules[name])]
    rows = [
        (layer.name, "", layer.kind, layer.stage, layer.resolution, layer.depth, layer.n_params)
        + (sigma, stat, value, 0.1 * abs(value), 6, unit)
        for i, layer in enumerate(layers)
        for stat, unit in (("rms", "activation"), ("cosine", "similarity"))
        for j, sigma in enumerate(sigmas)
        for value in [values(i, j) if stat == "rms" else 1.0 - 0.1 * j]
    ]
    columns = "layer block kind stage resolution depth n_params sigma stat value sem n_images unit"
    frame = pd.DataFrame(rows, columns=columns.split()).astype({"resolution": "Int64"})
    i, j = np.indices([len(sigmas)] * 2)
    grid = 1 - 0.1 * np.abs(i - j) - 0.001 * np.abs(i**2 - j**2)  # no symmetry but the diagonal's
    cosine = {layer.name: grid - 0.01 * k * (grid < 1) for k, layer in enumerate(layers)}
    meta = {"n_images": 6, "states": states, "data": {"name": "pictures"}, "layers": [a.to_dict() for a in layers]}
    meta["parameters"] = [[name, list(p.shape)] for name, p in net.named_parameters()]
    return ProbeResult(frame, meta, {"cosine": cosine})


@pytest.fixture(scope="module")
def small():
    return probed(tiny(), lambda i, j: 1 + 0.1 * i + 0.01 * j)


@pytest.fixture(scope="module")
def large():
    """102 convolutions."""
    with torch.device("meta"):
        net = from_edm("EDMPrecond", **CIFAR)
    return probed(net, lambda i, j: 1.0 + i % 7 + j)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def names_of(result):
    return list(dict.fromkeys(result.frame["layer"]))


def changed(result, change):
    """`result` with other values of "rms"."""
    frame = result.frame.copy()
    part = frame["stat"] == "rms"
    frame.loc[part, "value"] = change(frame.loc[part, "value"].to_numpy())
    return replace(result, frame=frame)


def texts(artist):
    return [t.get_text() for t in artist]


def places_of(ax):
    """Names on the strip beside the layers."""
    return [t.get_text().replace("\n", " ") for t in ax.texts]


def assert_apart(labels, axis):
    """No two neighbours overlap, and none is cut off by the figure."""
    boxes = [t.get_window_extent() for t in labels if t.get_text()]
    figure = labels[0].figure.bbox
    starts = sorted((b.y0, b.y1) if axis == "y" else (b.x0, b.x1) for b in boxes)
    assert all(a[1] <= b[0] + 2.5 for a, b in itertools.pairwise(starts))  # boxes are higher than lower-case letters
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.x1 and b.y1 <= figure.y1 for b in boxes)


def test_importing_them_does_not_import_matplotlib():
    code = "import sys, gddlab.probing; print(sorted({'matplotlib', 'pandas'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_numbers_are_plain():
    assert [plain(x) for x in (0.0, 0.0020000000000000003, 0.585, 13.4, 80.0, 157.4)] == [
        "0",
        "0.002",
        "0.58",
        "13",
        "80",
        "157",
    ]
    assert [plain(x, 6) for x in (12.5, 1.25, 1e-7)] == ["12.5", "1.25", "1e-7"]


def test_heat_map_shows_each_value_where_its_layer_and_sigma_are(small):
    ax = small.heatmap("rms")
    mesh = ax.collections[0]
    table = small.frame[small.frame["stat"] == "rms"].pivot(index="layer", columns="sigma", values="value")
    np.testing.assert_allclose(mesh.get_array(), table.loc[names_of(small)])  # sigma ascends to the right
    ax.figure.canvas.draw()
    assert texts(ax.get_yticklabels()) == [n.removeprefix("model.") for n in names_of(small)]
    assert texts(ax.get_xticklabels()) == ["0.002", "0.1", "1", "80"]
    assert ax.get_title("left") == "rms: pictures, noised, n = 6"
    assert ax.get_xlabel() == "noise level σ" and ax.collections[0].colorbar.ax.get_ylabel() == "rms (activation)"
    _, own = plt.subplots(figsize=(6, 4))
    assert small.heatmap("rms", own) is own


def test_what_is_no_mask_and_what_are_no_axes_is_refused(small):
    with pytest.raises(GddlabError, match="mask='gdd-i': give a FreezeMask"):
        small.heatmap("rms", mask="gdd-i")
    with pytest.raises(GddlabError, match="ax=5: give matplotlib's Axes"):
        small.heatmap("rms", 5)


def test_the_strip_says_stage_and_resolution_of_its_layers(small):
    ax = small.heatmap("rms")
    assert places_of(ax) == ["encoder 16", "encoder 8", "decoder 8", "decoder 16"]
    where = small.frame.drop_duplicates("layer").reset_index(drop=True)
    said = [""] * len(where)
    for text, patch in zip(places_of(ax), ax.patches, strict=True):
        for row in range(round(patch.get_y()), round(patch.get_y() + patch.get_height())):
            said[row] += text
    stages = where["stage"].map({"enc": "encoder", "dec": "decoder"})
    assert said == list(stages + " " + where["resolution"].astype(str))
    assert [to_hex(p.get_facecolor()) for p in ax.patches] == [RESOLUTIONS[i] for i in (0, 1, 1, 0)]


def test_networks_without_stages_and_resolutions_have_no_bands(small):
    frame = small.frame.assign(stage="", resolution=pd.array([pd.NA] * len(small.frame), dtype="Int64"))
    bare = replace(small, frame=frame)
    for ax in (bare.heatmap("rms"), bare.stem("rms"), bare.lines("rms")):
        ax.figure.canvas.draw()
        assert places_of(ax) == []
    assert bare.similarities("*conv0", matrices=True).axes[0].get_ylabel() == ""
    assert bare.similarities("*conv0").axes[0].get_title("left") == "all: 10 layers"


def test_102_layers_are_legible(large):
    assert len(names_of(large)) == 102
    ax = large.heatmap("rms", mask=FreezeMask((), large.meta["parameters"]))
    ax.figure.canvas.draw()
    assert len(texts(ax.get_yticklabels())) == 102
    assert_apart(ax.get_yticklabels(), "y")
    assert places_of(ax) == [
        f"{s} {r}" for s in ("encoder", "decoder") for r in ([32, 16, 8] if s == "encoder" else [8, 16, 32])
    ]
    for ax in (large.stem("rms"), large.lines("rms", over="depth")):
        ax.figure.canvas.draw()
        assert len([t for t in texts(ax.get_xticklabels()) if t]) == 102
        assert_apart(ax.get_xticklabels(), "x")


def test_small_axes_name_some_layers_and_hide_what_does_not_fit(large):
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.5))
    large.heatmap("rms", axes[0])
    large.stem("rms", ax=axes[1])
    figure.canvas.draw()
    labels = axes[0].get_yticklabels()
    assert 3 < len(labels) < 40
    assert_apart(labels, "y")
    assert "20" in texts(axes[1].get_xticklabels())  # no room for names: depth
    bar = axes[0].collections[0].colorbar.ax.get_tightbbox()
    assert bar.x1 <= axes[1].get_tightbbox().x0


@pytest.mark.parametrize(
    ("change", "norm", "limits", "note"),
    [
        (lambda v: v, Normalize, None, ""),
        (lambda v: np.linspace(0.1, 10, len(v)), LogNorm, (0.1, 10), "log scale"),
        (lambda v: np.linspace(-1, 3, len(v)), Normalize, (-3, 3), ""),
        (
            lambda v: np.where(np.arange(len(v)) == 3, 900.0, np.linspace(-1, 1, len(v))),
            SymLogNorm,
            (-900, 900),
            "away",
        ),
        (lambda v: np.where(np.arange(len(v)) == 3, np.nan, v), Normalize, None, "grey: no value"),
        (lambda v: np.where(np.arange(len(v)) < 9, 0, np.geomspace(0.01, 10, len(v))), SymLogNorm, (0, 10), "away"),
    ],
    ids=["plain", "wide", "signed", "signed and wide", "missing", "zeros"],
)
def test_the_colour_scale_suits_the_values(small, change, norm, limits, note):
    result = changed(small, change)
    ax = result.heatmap("rms")
    mesh = ax.collections[0]
    assert type(mesh.norm) is norm
    values = result.frame.loc[result.frame["stat"] == "rms", "value"]
    assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx(limits or (values[values > 0].min(), values.max()))
    assert note in mesh.colorbar.ax.get_ylabel()
    if "signed" in str(change) or values.min() < 0:
        assert mesh.cmap.name == "vlag"
        assert mesh.norm(0.0) == pytest.approx(0.5)
    if values.isna().any():
        assert mesh.get_array().mask.sum() == 1 and to_hex(ax.get_facecolor()) == "#cccccc"


def with_unit(result, unit):
    frame = result.frame.copy()
    frame.loc[frame["stat"] == "rms", "unit"] = unit
    return replace(result, frame=frame)


@pytest.mark.parametrize(("top", "norm"), [(1.4, LogNorm), (40, FuncNorm)])
def test_ratios_on_both_sides_of_1_have_two_hues_around_it(small, top, norm):
    result = with_unit(changed(small, lambda v: np.r_[0.9, np.full(len(v) - 2, 1.04), top]), "ratio")
    ax = result.heatmap("rms")
    mesh = ax.collections[0]
    assert type(mesh.norm) is norm and mesh.cmap.name == "vlag"
    assert mesh.norm(1.0) == pytest.approx(0.5)
    assert mesh.norm(top) == pytest.approx(1)
    assert mesh.norm(0.9) == pytest.approx(1 - mesh.norm(1 / 0.9))  # as far as its inverse
    assert mesh.norm(0.9) < 0.4  # to be seen, however large others are
    np.testing.assert_allclose(mesh.norm.inverse(mesh.norm(np.array([0.9, 1.04, 5.0]))), [0.9, 1.04, 5.0])
    bar = mesh.colorbar.ax
    assert bar.get_ylim() == pytest.approx((0.9, top))  # what occurs
    assert "1" in texts(bar.get_yticklabels()) and len(bar.get_yticks()) > 3
    for drawn in (result.lines("rms"), result.stem("rms", 80.0), result.against(result, "rms")):
        drawn.figure.canvas.draw()
        assert any(set(line.get_ydata()) == {1.0} for line in drawn.lines)  # what is neutral
        assert drawn.get_ylim()[0] < 0.95
    one_side = with_unit(changed(small, lambda v: np.linspace(1.1, 3, len(v))), "ratio").heatmap("rms").collections[0]
    assert one_side.cmap.name == "viridis" and type(one_side.norm) is Normalize
    zeros = with_unit(changed(small, lambda v: np.linspace(0, 3, len(v))), "ratio").heatmap("rms").collections[0]
    assert zeros.cmap.name == "viridis"  # 0 has no logarithm


def test_similarities_use_their_range(small):
    for low in (0.8, -0.3):
        result = with_unit(changed(small, lambda v, low=low: np.linspace(low, 1, len(v))), "similarity")
        mesh = result.heatmap("rms").collections[0]
        assert (mesh.norm.vmin, mesh.norm.vmax) == (low, 1) and mesh.cmap.name == "viridis"
    same = with_unit(changed(small, np.ones_like), "similarity").heatmap("rms").collections[0]
    assert (same.norm.vmin, same.norm.vmax) == (0, 1)


def test_a_mask_is_drawn_beside_its_layers(small):
    net = tiny()
    parameters = tuple((name, tuple(p.shape)) for name, p in net.named_parameters())
    frozen = ["model.enc.16x16_conv.weight", "model.enc.16x16_conv.bias", "model.dec.8x8_in0.conv0.weight"]
    mask = FreezeMask(tuple(frozen), parameters)
    ax = small.heatmap("rms", mask=mask)
    strip = ax.child_axes[0].collections[0].get_array().ravel()
    shares = dict(zip(names_of(small), strip, strict=True))
    part = net.model.dec["8x8_in0"].conv0
    expected = dict.fromkeys(shares, 0.0) | {"model.enc.16x16_conv": 1.0}
    expected["model.dec.8x8_in0.conv0"] = part.weight.numel() / (part.weight.numel() + part.bias.numel())
    assert shares == pytest.approx(expected)
    assert texts(ax.get_legend().get_texts()) == [f"frozen, {mask.fraction:.1%} of all parameters", "trained"]
    blocks = probe(net, [80.0], layers="block", stats="rms", states="prior", n=2, progress=False)
    ax = blocks.heatmap("rms", mask=select_freeze(net, strategy="gdd-i"))  # which freezes a part of each
    assert [t.partition(" ")[0] for t in texts(ax.get_legend().get_texts())] == ["frozen", "75%", "50%", "trained"]
    for other in ((("other.weight", (3,)),), (*parameters, ("model.map_label.weight", (8, 10)))):
        with pytest.raises(GddlabError, match=r"for another network than was probed: '(other|model.map_label).weight'"):
            small.heatmap("rms", mask=FreezeMask((), other))
    added = FreezeMask(tuple(frozen), (*parameters, ("model.map_target0.weight", (8, 8))))  # of a student's
    assert small.heatmap("rms", mask=added) is not None


def test_few_lines_have_names_and_bands_of_one_standard_error(small):
    chosen = names_of(small)[:3]
    ax = small.lines("rms", chosen)
    assert texts(ax.get_legend().get_texts()) == [n.removeprefix("model.enc.") for n in chosen]
    assert len({line.get_color() for line in ax.lines}) == 3
    assert ax.get_title("left").endswith("bands: standard error over images")
    np.testing.assert_allclose(ax.lines[1].get_xdata(), sorted(SIGMAS))
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [1.13, 1.12, 1.11, 1.1])
    band = ax.collections[1].get_paths()[0].vertices
    at80 = band[np.isclose(band[:, 0], 80), 1]
    assert (at80.min(), at80.max()) == pytest.approx((0.99, 1.21))
    assert ax.get_xscale() == "log"
    assert "0.002" in texts(ax.get_xticklabels()) and "80" in texts(ax.get_xticklabels())


def test_many_lines_are_coloured_by_resolution_with_medians(small):
    ax = small.lines("rms")
    table = small.frame[small.frame["stat"] == "rms"]
    layers = [line for line in ax.lines if line.get_linewidth() == 0.8]
    assert len(layers) == len(names_of(small))
    part = table[(table["stage"] == "dec") & (table["resolution"] == 8)]
    label = f"decoder 8: median of {part['layer'].nunique()}"
    handles, labels = ax.get_legend_handles_labels()
    look = handles[labels.index(label)]
    assert look.get_color() == RESOLUTIONS[1]
    medians = [line for line in ax.lines if line.get_linewidth() == 2 and len(line.get_xdata())]
    assert len(medians) == len(labels) == 4
    np.testing.assert_allclose(medians[2].get_ydata(), part.groupby("sigma")["value"].median())
    assert medians[2].is_dashed() and not medians[0].is_dashed()
    assert {line.get_color() for line in medians} == set(RESOLUTIONS[:2])


def test_lines_along_depth(small):
    layers = small.frame.drop_duplicates("layer")
    ax = small.lines("rms", over="depth", at=[70, 0.003])
    assert texts(ax.get_legend().get_texts()) == ["σ = 80", "σ = 0.002"]
    line = next(line for line in ax.lines if line.get_label() == "σ = 80")
    np.testing.assert_array_equal(line.get_xdata(), layers["depth"])
    np.testing.assert_allclose(line.get_ydata(), 1 + 0.1 * np.arange(len(layers)))
    many = probed(tiny(), lambda i, j: 1 + i, np.geomspace(80, 0.002, 18))
    legend = texts(many.lines("rms", "*conv0", over="depth").get_legend().get_texts())
    assert (legend[0], legend[-1], len(legend)) == ("σ = 80", "σ = 0.002", 5)


def test_stem(small):
    ax = small.stem("rms", at=1.3)
    ax.figure.canvas.draw()
    assert ax.get_title("left") == "rms at σ = 1: pictures, noised, n = 6, bars: standard error over images"
    points = np.concatenate([c.lines[0].get_xydata() for c in ax.containers])
    layers = small.frame.drop_duplicates("layer")
    np.testing.assert_allclose(points, np.stack([layers["depth"], 1.01 + 0.1 * np.arange(len(layers))], 1))
    colours = [c.lines[0].get_color() for c in ax.containers]
    assert [k for k, _ in itertools.groupby(colours)] == [RESOLUTIONS[0], RESOLUTIONS[1], RESOLUTIONS[0]]  # 16 8 | 8 16
    ends = ax.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert ends == pytest.approx([0.909, 1.111])
    assert places_of(ax) == ["encoder 16", "encoder 8", "decoder 8", "decoder 16"]
    assert "1 of" in changed(small, lambda v: np.where(v == v[0], np.nan, v)).stem("rms").get_title("left")


def test_layers_that_share_a_depth_stand_in_order(small):
    frame = small.frame.assign(depth=small.frame["depth"] // 2)
    ax = replace(small, frame=frame).stem("rms")
    xs = np.concatenate([c.lines[0].get_xdata() for c in ax.containers])
    np.testing.assert_array_equal(xs, np.arange(len(names_of(small))))


def test_pair_shows_both_and_the_range_of_the_teacher(small):
    student = probed(tiny(), lambda i, j: 2 + 0.1 * i, [80.0], "student")
    ax = small.against(student, "rms")
    n = len(names_of(small))
    ours, theirs = (next(c for c in ax.containers if c.get_label() == f"{w}, σ = 80") for w in ("teacher", "student"))
    np.testing.assert_allclose(ours.lines[0].get_ydata(), 1 + 0.1 * np.arange(n))
    np.testing.assert_allclose(theirs.lines[0].get_ydata(), 2 + 0.1 * np.arange(n))
    (bars,) = (c for c in ax.containers if c.get_label() == "teacher, σ 0.002 to 80")
    np.testing.assert_allclose([(b.get_y(), b.get_height()) for b in bars], [(1 + 0.1 * i, 0.03) for i in range(n)])
    assert len(ax.get_legend().get_texts()) == 3
    fewer = replace(student, frame=student.frame[student.frame["kind"] != "conv0"])
    with pytest.raises(GddlabError, match=r"the teacher has rms of '.*conv0', the student has not \(\d+ such layers\)"):
        small.against(fewer, "rms")
    with pytest.raises(GddlabError, match=r"the student has rms of '.*conv0', the teacher has not"):
        fewer.against(student, "rms")


def test_course(small):
    student = small.frame[small.frame["sigma"] == 80.0]
    frame = pd.concat([student.assign(kimg=k, value=student["value"] + k) for k in (0, 10, 2.5)])
    ax = draw_over_training(frame, "rms")
    values = student.loc[student["stat"] == "rms", "value"].to_numpy()
    np.testing.assert_allclose(ax.collections[0].get_array(), values[:, None] + np.array([0, 2.5, 10]))
    ax.figure.canvas.draw()
    assert texts(ax.get_xticklabels()) == ["0", "2.5", "10"]
    assert ax.get_title("left") == "rms at σ = 80: n = 6"
    with pytest.raises(GddlabError, match='no column "kimg"'):
        draw_over_training(student, "rms")
    with pytest.raises(GddlabError, match=r"4 noise levels \(80, 1, 0.1, 0.002\): keep one"):
        draw_over_training(small.frame.assign(kimg=0), "rms")
    with pytest.raises(GddlabError, match="twice at kimg 0: keep one run"):
        draw_over_training(pd.concat([student, student]).assign(kimg=0), "rms")
    with pytest.raises(GddlabError, match="did you mean 'rms'"):
        draw_over_training(frame, "rsm")


def test_similarity_ascends_to_the_right_and_upwards(small):
    layer = names_of(small)[2]
    ax = small.similarity(layer)
    matrix = small.matrices["cosine"][layer]
    mesh = ax.collections[0]
    np.testing.assert_allclose(mesh.get_array(), matrix[::-1, ::-1])
    assert ax.get_ylim()[0] < ax.get_ylim()[1]
    assert texts(ax.get_xticklabels()) == texts(ax.get_yticklabels()) == ["0.002", "0.1", "1", "80"]
    assert ax.get_title("left") == f"{layer}\npictures, noised, n = 6"
    assert (mesh.norm.vmin, mesh.norm.vmax) == (matrix.min(), 1)  # its range
    with pytest.raises(GddlabError, match=f"did you mean '{layer}'"):
        small.similarity(layer[:-1])
    with pytest.raises(GddlabError, match="unknown similarity 'cka': accepted: cosine"):
        small.similarity(layer, kind="cka")
    with pytest.raises(GddlabError, match="'correlation' between noise levels was not measured: probe with stats="):
        replace(small, matrices={}).similarities()


def panels_of(figure):
    """Axes with lines by title, and the label and colour of each entry of the legend."""
    panels = {ax.get_title("left").partition(":")[0]: ax for ax in figure.axes if ax.lines}
    handles = figure.legends[0].legend_handles
    return panels, {h.get_label(): to_hex(h.get_color()) for h in handles}


def thin(ax):
    return [line for line in ax.lines if line.get_linewidth() == 0.8 and len(line.get_xdata()) > 2]


def test_similarities_are_a_line_per_layer_in_a_panel_per_stage(small):
    figure = small.similarities()
    panels, legend = panels_of(figure)
    assert list(panels) == ["encoder 16", "encoder 8", "decoder 8", "decoder 16"]
    where = small.frame.drop_duplicates("layer").set_index("layer")
    for place, ax in panels.items():
        stage, _, size = place.partition("oder ")
        here = where.index[(where["stage"] == stage[:3]) & (where["resolution"] == int(size))]
        assert ax.get_title("left") == f"{place}: {len(here)} layers"
        lines = thin(ax)
        assert len(lines) == len(here)
        for line, name in zip(lines, here, strict=True):
            np.testing.assert_allclose(line.get_xdata(), sorted(SIGMAS))
            np.testing.assert_allclose(line.get_ydata(), small.matrices["cosine"][name][0, ::-1])
            kind = where.loc[name, "kind"]
            assert to_hex(line.get_color()) == legend[f"{kind} ({(where['kind'] == kind).sum()})"]
        (middle,) = (line for line in ax.lines if to_hex(line.get_color()) == legend["median of the panel"])
        np.testing.assert_allclose(middle.get_ydata(), np.median([line.get_ydata() for line in lines], axis=0))
        assert ax.get_xscale() == "log"
    first, *_, last = panels.values()
    assert first.get_ylabel() == "cosine with σ = 80" and last.get_ylabel() == ""
    assert first.get_shared_y_axes().joined(first, last)
    assert figure.get_suptitle() == "cosine: pictures, noised, n = 6"
    low = min(m.min() for m in small.matrices["cosine"].values())
    assert first.get_ylim()[0] < min(low, 0) and first.get_ylim()[1] > 1


def test_similarities_to_another_noise_level_and_of_another_kind(small):
    cosine = small.matrices["cosine"]
    matrices = {"cosine": cosine, "cka": {name: matrix / 2 for name, matrix in cosine.items()}}
    cka = small.frame[small.frame["stat"] == "cosine"].assign(stat="cka")
    both = replace(small, frame=pd.concat([small.frame, cka]), matrices=matrices)
    panels, legend = panels_of(both.similarities(at=0.13, kind="cka"))
    assert panels["encoder 16"].get_ylabel() == "cka with σ = 0.1" and "σ = 0.1" in legend
    name = names_of(small)[0]
    np.testing.assert_allclose(thin(panels["encoder 16"])[0].get_ydata(), matrices["cka"][name][2, ::-1])
    assert panels_of(both.similarities())[0]["encoder 16"].get_ylabel().startswith("cosine")
    with pytest.raises(GddlabError, match="at=0: give a noise level above 0"):
        both.similarities(at=0)


def test_similarities_of_many_kinds_and_of_layers_without_a_value(large, small):
    kinds = {n: f"kind{i % 12}" for i, n in enumerate(names_of(large))}
    many = replace(large, frame=large.frame.assign(kind=large.frame["layer"].map(kinds)))
    _, legend = panels_of(many.similarities())
    assert sum("kind" in label for label in legend) == len(PALETTE) - 1
    rest = sum(int(label.split("(")[1][:-1]) for label in legend if "kind" in label)
    assert f"other ({102 - rest})" in legend
    matrices = {n: np.full_like(m, np.nan) if i < 2 else m for i, (n, m) in enumerate(small.matrices["cosine"].items())}
    figure = replace(small, matrices={"cosine": matrices}).similarities()
    assert figure.get_suptitle().endswith(f"; 2 of {len(matrices)} layers without a value")


def test_matrices_are_grouped_and_share_a_scale(large):
    figure = large.similarities(matrices=True)
    *panels, bar = (ax for ax in figure.axes if ax.images or ax.get_ylabel() == "cosine")
    assert len(panels) == 102
    for ax, name in zip(panels, names_of(large), strict=True):
        np.testing.assert_allclose(ax.images[0].get_array(), large.matrices["cosine"][name][::-1, ::-1])
    assert len({id(ax.images[0].norm) for ax in panels}) == 1
    lowest = min(m.min() for m in large.matrices["cosine"].values())
    assert (panels[0].images[0].norm.vmin, panels[0].images[0].norm.vmax) == (lowest, 1)
    assert bar.get_ylabel() == "cosine"
    assert panels[1].get_title() == "block0.conv0"
    groups = [f"{s} {r}" for s, r in zip(["encoder"] * 3 + ["decoder"] * 3, [32, 16, 8, 8, 16, 32], strict=True)]
    assert [ax.get_ylabel() for ax in panels if ax.get_ylabel()] == groups
    lines = sorted({round(ax.get_position().y0, 6) for ax in panels}, reverse=True)
    where = large.frame.drop_duplicates("layer")
    by_line = {
        (round(a.get_position().y0, 6), s, r)
        for a, s, r in zip(panels, where["stage"], where["resolution"], strict=True)
    }
    assert len(by_line) == len(lines)  # a line has one stage and one resolution
    figure.canvas.draw()
    boxes = [ax.title.get_window_extent() for ax in panels]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes) if abs(a.y0 - b.y0) < 1)


def test_similarities_of_some_layers(small):
    count = sum(n.endswith("conv0") for n in names_of(small))
    assert sum(bool(ax.images) for ax in small.similarities("*conv0", matrices=True).axes) == count
    assert sum(len(thin(ax)) for ax in small.similarities("*conv0").axes) == count


def test_a_matrix_that_does_not_fit_the_noise_levels_is_refused(small):
    layer = names_of(small)[0]
    less = replace(small, matrices={"cosine": {layer: np.eye(2)}})
    for draw in (lambda: less.similarity(layer), less.similarities, lambda: less.similarities(matrices=True)):
        with pytest.raises(GddlabError, match=r"is 2 x 2, for 4 noise levels"):
            draw()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.heatmap("rsm"), "unknown statistic of this result 'rsm': did you mean 'rms'"),
        (lambda r: r.stem("speed"), "unknown statistic of this result 'speed'"),
        (lambda r: r.stem("rms", at=0), "at=0: give a noise level above 0"),
        (lambda r: r.lines("rms", "model.enc.16x16_con"), "did you mean 'model.enc.16x16_conv'"),
        (lambda r: r.lines("rms", ["*conv0", "*none*"]), "unknown layer '\\*none\\*'"),
        (lambda r: r.lines("rms", []), "layers is an empty list"),
        (lambda r: r.lines("rms", len), "give a name, a glob, 're:...', a list of these, or one of conv"),
        (lambda r: r.lines("rms", over="time"), "unknown over 'time'"),
        (lambda r: r.lines("rms", at=80), "chooses noise levels of over="),
        (lambda r: r.lines("rms", over="depth", at=[]), "at is an empty list"),
        (lambda r: r.lines("rms", over="depth", at="80"), "at='80': give a noise level"),
        (lambda r: r.against(r, "rms", at=-1), "at=-1: give a noise level"),
        (lambda r: r.similarity("model.enc"), "unknown layer with cosine between noise levels"),
        (lambda r: r.against(r, "rsm"), "did you mean 'rms'"),
    ],
)
def test_refusals_are_one_line_and_leave_no_figure(small, call, message):
    with pytest.raises(GddlabError, match=message) as caught:
        call(small)
    assert "\n" not in str(caught.value)
    assert plt.get_fignums() == []


def test_results_draw_themselves(result):
    ax = result.heatmap("rel_update")
    ax.figure.canvas.draw()
    assert len(ax.get_yticklabels()) == result.frame.loc[result.frame["stat"] == "rel_update", "layer"].nunique()
    assert result.similarities().axes
    assert result.against(result, "rms").get_legend()
