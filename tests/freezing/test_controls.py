import pytest

from gddlab.errors import GddlabError
from gddlab.freezing import FreezeMask, controls, select_freeze
from tests.freezing.conftest import convs, frozen_layers, with_values


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
