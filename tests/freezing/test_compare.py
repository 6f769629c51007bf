import pytest

from gddlab.errors import GddlabError
from gddlab.freezing import FreezeMask, MaskComparison, compare, controls, select_freeze
from tests.freezing.conftest import convs, frozen_layers, with_values
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


def test_names_and_budgets(net, result, rule):
    measured = select_freeze(result, strategy="budget", score="rms", budget=0.4)
    for mask in (rule, measured):
        made = controls(mask, seeds=(0, 7))
        assert list(made) == ["inverse", "random-0", "random-7"]
        smallest = min(layer.n_params for layer in convs(net).values())
        for other in made.values():
            assert 0 <= mask.n_frozen - other.n_frozen < 40 * smallest
            assert set(frozen_layers(other)) <= set(convs(net))
            assert other.arguments["budget"] == mask.fraction
            assert other.arguments["reached"] == other.fraction
            assert other.hash != mask.hash
            other.apply(net)
    assert list(controls(rule)) == ["inverse", "random-0", "random-1", "random-2"]


def test_random_controls_are_the_random_strategy(net, rule):
    for mask in (rule, select_freeze(net, strategy="random", budget=0.04, candidates="linear", seed=5)):
        other = select_freeze(net, strategy="random", mask=mask, seed=2)
        assert controls(mask, [2])["random-2"].frozen == other.frozen


@pytest.mark.parametrize("freeze", ["low", "high"])
@pytest.mark.parametrize("budget", [0.2, 0.7])
def test_the_inverse_goes_by_the_opposite_order(net, result, freeze, budget):
    names = list(convs(net))
    values = {n: float((5 * i) % len(names)) for i, n in enumerate(names)}
    made = with_values(result, "rms", values)
    mask = select_freeze(made, strategy="budget", score="rms", budget=budget, freeze=freeze)
    inverse = controls(mask)["inverse"]
    order = sorted(names, key=lambda n: values[n], reverse=freeze == "low")
    mine = set(frozen_layers(mask))
    room, expected = mask.n_frozen, set()
    for n in sorted(order, key=lambda n: n in mine):  # what the mask trains comes first
        if convs(net)[n].n_params <= room:
            expected.add(n)
            room -= convs(net)[n].n_params
    assert set(frozen_layers(inverse)) == expected
    assert inverse.arguments["freeze"] == ("high" if freeze == "low" else "low")
    again = sum(convs(net)[n].n_params for n in expected & mine)
    left = [convs(net)[n].n_params for n in set(names) - mine - expected]
    assert again < min(left, default=mask.n_params)  # layers of the mask fill what no other fits into


def test_without_scores_the_trained_come_first(net, rule):
    inverse = controls(rule)["inverse"]
    trained = set(convs(net)) - set(frozen_layers(rule))
    assert trained <= set(frozen_layers(inverse))
    assert inverse == controls(rule, [])["inverse"]
    assert inverse.hash not in {m.hash for n, m in controls(rule).items() if n != "inverse"}


def test_unscored_candidates_come_after_scored_ones(net, result):
    mask = select_freeze(result, strategy="budget", score="active_fraction", budget=0.2)
    inverse = controls(mask)["inverse"]
    assert {n.rpartition(".")[2] for n in frozen_layers(inverse)} <= {"conv0", "conv1"}
    assert not set(inverse.frozen) & set(mask.frozen)


@pytest.mark.parametrize("granularity", ["block", "tensor"])
def test_granularity_is_kept(net, result, granularity):
    mask = select_freeze(result, strategy="budget", score="rms", budget=0.4, granularity=granularity)
    made = controls(FreezeMask.from_dict(mask.to_dict()))
    assert made == controls(mask)
    for other in made.values():
        frozen = set(other.frozen)
        pairs = [(f"{n}.weight" in frozen, f"{n}.bias" in frozen) for n in convs(net)]
        if granularity == "block":
            assert all(a == b for a, b in pairs)
            for layers in mask.candidates.values():
                assert len({f"{n}.weight" in frozen for n in layers}) == 1
    if granularity == "tensor":
        assert any(a != b for a, b in pairs)


def test_masks_without_another_choice_are_refused(net):
    with pytest.raises(GddlabError, match="freezes nothing: no other choice has its budget"):
        controls(select_freeze(net, strategy="none"))
    for strategy in ("all-conv", "norms-only"):
        with pytest.raises(GddlabError, match=r"freezes all of its \d+ candidates"):
            controls(select_freeze(net, strategy=strategy))


def test_bad_input(rule):
    for seeds in ((0, 0), (0.5,), (True,), 3):
        with pytest.raises(GddlabError, match=r"seeds=.*: give whole numbers, each once"):
            controls(rule, seeds)
    with pytest.raises(GddlabError, match="mask is a str: give a FreezeMask"):
        controls("mask.json")
