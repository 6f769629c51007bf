import itertools

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex

from gddlab.freezing import FreezeMask, compare, controls, select_freeze
from gddlab.freezing.mask import block_of
from gddlab.theme import FROZEN, TRAINED


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def ticks(axis) -> list[str]:
    return [t.get_text() for t in axis.get_ticklabels()]


def test_mask(rule):
    ax = rule.plot()
    total, still = ax.containers
    assert sum(p.get_height() for p in total) == pytest.approx(100)
    assert sum(p.get_height() for p in still) == pytest.approx(100 * rule.fraction)
    assert ticks(ax.xaxis)[:4] == ["map_layer0", "map_layer1", "conv", "block0"]
    assert [t.get_text().replace("\n", " ") for t in ax.texts] == ["encoder 16", "encoder 8", "decoder 8", "decoder 16"]
    assert ax.get_legend().get_texts()[0].get_text() == f"frozen, {100 * rule.fraction:.1f} %"
    assert ax.get_title("left") == "gdd-i"
    assert rule.plot(ax=ax) is ax


def test_the_title_names_the_score(result):
    mask = select_freeze(result, strategy="budget", score={"rms": 1, "mean": -0.5}, freeze="high", budget=0.4)
    assert mask.plot().get_title("left") == "budget: +1 rms -0.5 mean, high first"


def test_comparison(result, rule):
    masks = {"rule": rule} | controls(rule, seeds=[0])
    masks["norms"] = select_freeze(result, strategy="norms-only")
    ax = compare(masks).plot()
    ax.figure.draw_without_rendering()
    assert ticks(ax.yaxis) == [f"{name}  {100 * mask.fraction:.1f} %" for name, mask in masks.items()]
    values = ax.collections[0].get_array()
    blocks = rule.to_frame().groupby("block", sort=False)
    assert values.shape == (4, len(blocks))
    frame = blocks.get_group("model.enc.16x16_block0")
    share = 100 * frame["size"][frame["frozen"]].sum() / frame["size"].sum()
    assert values[0, ticks(ax.xaxis).index("block0")] == pytest.approx(share)
    colours = ax.collections[0]
    assert [to_hex(colours.cmap(colours.norm(v))) for v in (0, 100)] == [TRAINED, FROZEN]
    boxes = [t.get_window_extent() for t in ax.xaxis.get_ticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert compare(masks).plot(ax=ax) is ax


def test_networks_whose_names_say_nothing():
    names = ("down_blocks.0.resnets.1.conv1", "mid_block.attentions.0.to_out.0", "0", "head")
    mask = FreezeMask(("0.weight",), tuple((f"{n}.weight", (2, 2)) for n in names))
    ax = mask.plot()
    assert ticks(ax.xaxis) == [block_of(n) for n in names]
    assert [t.get_text() for t in ax.texts] == ["encoder", "middle"]
    assert compare([mask, mask]).plot() is not ax


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("model.enc.16x16_block0.conv0", "model.enc.16x16_block0"),
        ("model.dec.16x16_aux_conv", "model.dec.16x16_aux_conv"),
        ("model.map_layer0", "model.map_layer0"),
        ("down_blocks.0.resnets.1.conv1", "down_blocks.0.resnets.1"),
        ("mid_block.attentions.0.to_out.0", "mid_block.attentions.0"),
        ("layers.3", "layers.3"),
    ],
)
def test_blocks_by_name(layer, block):
    assert block_of(layer) == block
