import pytest

from gddlab.errors import GddlabError
from gddlab.freezing import FreezeMask, MaskComparison, compare, select_freeze
from tests.probing.networks import tiny


@pytest.fixture
def masks(net, result, rule) -> dict[str, FreezeMask]:
    return {
        "rule": rule,
        "more": select_freeze(net, strategy="gdd-i-2"),
        "none": select_freeze(net, strategy="none"),
        "each": select_freeze(result, strategy="per-resolution", score={"rms": 1}, freeze="high", budget=0.5),
    }


def test_overlap(masks):
    overlap = compare(masks).overlap
    assert list(overlap.index) == list(overlap.columns) == list(masks)
    assert all(overlap.loc[n, n] == 1 for n in masks)
    assert overlap.equals(overlap.T)
    assert overlap.loc["rule", "more"] == pytest.approx(masks["rule"].n_frozen / masks["more"].n_frozen)
    assert overlap.loc["rule", "none"] == 0
    sizes = masks["rule"].to_frame().set_index("parameter")["size"]
    a, b = set(masks["rule"].frozen), set(masks["each"].frozen)
    assert overlap.loc["rule", "each"] == pytest.approx(sizes[[*(a & b)]].sum() / sizes[[*(a | b)]].sum())


def test_shares(masks):
    made = compare(masks)
    assert list(made.stages.columns) == ["-", "enc", "dec"]
    assert list(made.resolutions.columns) == ["-", 16, 8]
    for table in (made.stages, made.resolutions, made.kinds):
        assert list(table.index) == list(masks)
        assert (table.loc["none"] == 0).all()
    frame = masks["rule"].to_frame()
    for column, table in (("stage", made.stages), ("kind", made.kinds)):
        for key, part in frame.groupby(column):
            share = part["size"][part["frozen"]].sum() / part["size"].sum()
            assert table.loc["rule", key] == pytest.approx(share)
    here = frame[frame["resolution"] == 16]
    assert made.resolutions.loc["rule", 16] == pytest.approx(here["size"][here["frozen"]].sum() / here["size"].sum())


def test_to_frame(masks):
    table = compare(masks).to_frame()
    assert list(table.columns) == ["strategy", "score", "freeze", "budget", "reached", "tensors", "share"]
    each = masks["each"]
    expected = ["per-resolution", {"rms": 1}, "high", 0.5, each.arguments["reached"], len(each.frozen), each.fraction]
    assert table.loc["each"].tolist() == expected
    assert table.loc["rule", ["strategy", "tensors", "share"]].tolist() == [
        "gdd-i",
        len(masks["rule"].frozen),
        masks["rule"].fraction,
    ]


def test_a_list_is_named_by_strategy(rule, masks):
    assert list(compare([rule, masks["none"], rule, rule]).masks) == ["gdd-i", "none", "gdd-i (2)", "gdd-i (3)"]
    assert list(compare(iter([rule])).masks) == ["gdd-i"]


def test_html(masks):
    html = compare(masks | {"<b>": masks["rule"]})._repr_html_()
    assert f"{masks['rule'].fraction:.2%}" in html
    assert "50.00%" in html
    assert all(text in html for text in ("Jaccard", "by stage", "by resolution", "by kind of layer"))
    assert "<b>" not in html


def test_refusals(rule):
    other = select_freeze(tiny(num_blocks=2), strategy="gdd-i")
    for masks in ([rule, other], {"a": rule, "b": other}):
        with pytest.raises(GddlabError, match="are for different networks"):
            compare(masks)
    for masks, says in (
        ([], "empty"),
        (rule, "masks is a FreezeMask"),
        ({"a": 1}, "mask 'a' is a int"),
        (["x"], "is a str"),
    ):
        with pytest.raises(GddlabError, match=says):
            compare(masks)
    assert isinstance(compare([rule]), MaskComparison)
