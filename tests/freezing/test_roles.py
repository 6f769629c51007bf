"""Masks by what layers are there for: rules, candidates and scores in networks of other families."""

import re
import warnings

import pandas as pd
import pytest
import torch
from torch import nn

from gddlab.errors import GddlabError
from gddlab.freezing import FreezeMask, controls, select_freeze
from gddlab.freezing.candidates import Network, choose, recorded
from gddlab.freezing.select import score_units
from gddlab.freezing.strategies import RULES
from gddlab.nets.architectures import ARCHITECTURES
from gddlab.nets.io import from_edm
from gddlab.probing.layers import parameter_table
from tests.freezing.conftest import convs, frozen_layers
from tests.probing.families import FAMILIES, TRANSFORMERS, authors_dit
from tests.probing.networks import tiny
from tests.probing.test_roles import adapted, fused

WORDS = {"gdd-i": ("conv", "proj"), "gdd-i-2": ("conv", "proj", "qkv"), "gdd-i-3": ("conv", "proj", "qkv", "skip")}
PLACES = ("block", "up", "down", "in")


def by_words(net: nn.Module, rule: str) -> FreezeMask:
    """What the authors' code freezes: names that contain one of some words, and one of some places."""
    parameters = parameter_table(net)
    names = [n for n, _ in parameters if any(p in n for p in PLACES) and any(w in n for w in WORDS[rule])]
    return FreezeMask(tuple(names), parameters)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if not n.startswith("edm2")])  # whose skip paths end in conv
def test_masks_of_published_networks_are_those_of_the_authors_words(name):
    kind, kwargs = ARCHITECTURES[name]
    with torch.device("meta"):
        net = from_edm(kind, **kwargs)
    for rule in RULES:
        mask = select_freeze(net, strategy=rule)
        assert mask.hash == by_words(net, rule).hash
        assert mask.arguments["roles"] == list(RULES[rule])


def shares(net: nn.Module) -> list[float]:
    return [round(100 * select_freeze(net, strategy=rule).fraction, 2) for rule in RULES]


PUBLISHED = {  # millions of parameters; words; options 1, 2, 3: frozen, per cent
    "dit": (749.8, 19.84, [44.63, 59.51, 59.51]),
    "pixart": (610.9, 25.34, [60.87, 97.40, 97.40]),
    "sana": (1604.5, 47.70, [59.58, 97.11, 97.11]),
    "sd3": (2028.3, 30.26, [49.22, 65.98, 65.98]),
    "flux": (11901.4, 43.70, [54.25, 72.33, 72.33]),
    "sd": (859.5, 83.09, [86.03, 94.02, 96.73]),
    "sdxl": (2567.5, 46.53, [69.26, 98.48, 99.01]),
    "unet2d": (35.7, 94.57, [84.88, 88.19, 91.82]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shares_of_published_networks(name):
    millions, words, expected = PUBLISHED[name]
    with torch.device("meta"):
        net = FAMILIES[name].make(published=True)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions
    assert shares(net) == expected
    assert round(100 * by_words(net, "gdd-i").fraction, 2) == words


def test_shares_of_the_authors_dit():
    with torch.device("meta"):
        net = authors_dit()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 675.1
    assert shares(net) == [49.56, 66.09, 66.09]
    assert round(100 * by_words(net, "gdd-i").fraction, 2) == 5.51


@pytest.mark.parametrize("kind", ["dit", "sit"])
def test_shares_of_gddlabs_own_dit(kind):
    pytest.importorskip("gddlab.nets.dit")
    with torch.device("meta"):
        net = from_edm("DiTPrecond", kind=kind, img_resolution=32, img_channels=4, label_dim=1000, learn_sigma=True)
    assert shares(net) == [49.56, 66.09, 66.09]


def test_shares_of_edm2():
    pytest.importorskip("gddlab.nets.edm2")
    with torch.device("meta"):
        net = from_edm("Precond", img_resolution=64, img_channels=3, label_dim=1000, model_channels=192)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 280.2
    assert shares(net) == [83.86, 91.39, 94.77]
    assert round(100 * by_words(net, "gdd-i").fraction, 2) == 87.24


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_in_networks_of_other_families(name):
    net = FAMILIES[name].make()
    masks = [select_freeze(net, strategy=rule) for rule in RULES]
    frames = [mask.to_frame().set_index("parameter") for mask in masks]
    for mask, frame, rule in zip(masks, frames, RULES, strict=True):
        assert set(frame.index[frame["frozen"]]) == set(mask.frozen)
        assert set(frame.loc[frame["frozen"], "role"]) <= set(RULES[rule])
        assert not set(frame.loc[~frame["frozen"], "role"]) & set(RULES[rule])
        assert "" not in set(frame["role"])
    one, two, three = (set(mask.frozen) for mask in masks)
    assert one < two <= three
    assert (two < three) == (name in ("unet2d", "sd", "sdxl"))  # the others have no skip paths
    masks[1].apply(net)
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == two


def test_a_mask_says_what_is_frozen_of_a_transformer():
    mask = select_freeze(authors_dit(2, 16, 10), strategy="gdd-i-2")
    assert "frozen attn.qkv, attn.proj, mlp.fc; trained pos_embed, proj, mlp, embedding_table" in str(mask)
    frame = mask.to_frame().set_index("parameter")
    assert frame.loc["blocks.1.mlp.fc2.bias", ["block", "kind", "role"]].tolist() == ["blocks.1", "mlp.fc2", "mlp"]
    assert frame.loc["pos_embed", ["block", "kind", "role"]].tolist() == ["pos_embed", "pos_embed", "embed"]
    pixart = select_freeze(FAMILIES["pixart"].make(), strategy="gdd-i").to_frame().set_index("parameter")
    table = pixart.loc["transformer_blocks.1.scale_shift_table", ["block", "kind", "role", "frozen"]].tolist()
    assert table == ["transformer_blocks.1", "scale_shift_table", "modulation", False]
    mlp = pixart.loc["transformer_blocks.1.ff.net.0.proj.weight", ["block", "kind", "frozen"]].tolist()
    assert mlp == ["transformer_blocks.1", "ff.net.0.proj", True]


# What is not understood.


class Odd(nn.Module):
    """A DiT beside a part that nothing says what it is, a share of the DiT's size."""

    def __init__(self, share: float):
        super().__init__()
        self.known = authors_dit(2, 16, 10)
        size = int((share * sum(p.numel() for p in self.known.parameters())) ** 0.5)
        self.mystery = nn.ModuleDict({"a": nn.Linear(size, size), "b": nn.Linear(1, 1)})


def test_a_network_that_is_not_understood_is_refused():
    says = r"known of 9\d\.\d% of this network, not of mystery.a.weight, mystery.a.bias, mystery.b.weight, .*: give"
    with pytest.raises(GddlabError, match=says):
        select_freeze(Odd(0.08), strategy="gdd-i")
    few = Odd(0.03)
    known = select_freeze(few.known, strategy="gdd-i").frozen
    assert select_freeze(few, strategy="gdd-i").frozen == tuple(f"known.{n}" for n in known)
    with pytest.raises(GddlabError, match=r"known of 0\.0% of this network, not of 0\.weight, .* and 1 more: give"):
        select_freeze(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), strategy="gdd-i-2")


def test_a_rule_that_freezes_nothing_is_refused():
    with pytest.raises(GddlabError, match="neither residual blocks nor transformer blocks"):
        select_freeze(nn.ModuleDict({"conv_in": nn.Conv2d(1, 1, 1), "norm": nn.GroupNorm(1, 1)}), strategy="gdd-i")


def test_a_share_that_is_unusual_is_worth_a_warning(net):
    says = r'strategy="<lambda>" freezes 0\.0\d% of this network: see mask.summary'
    with pytest.warns(UserWarning, match=says) as seen:
        select_freeze(net, strategy=lambda _: ["model.map_layer0.bias"])
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match=r"freezes 100\.00% of this network"):
        select_freeze(net, strategy=lambda _: ["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for strategy in ("gdd-i", "none", "all-conv"):
            select_freeze(net, strategy=strategy)


# Candidates.


def test_candidates_of_a_u_net_are_its_convolutions(net, result):
    for source in (net, result, parameter_table(net)):
        network = Network(source)
        assert [n for n in network.names if n in network.auto()] == [
            "model.enc.16x16_conv",
            *convs(net),
            "model.dec.16x16_aux_conv",
        ]
    assert select_freeze(net, strategy="random", budget=0.5) == select_freeze(
        net, strategy="random", budget=0.5, candidates="auto"
    )
    same = select_freeze(net, strategy="random", budget=0.5, candidates="conv")
    assert same.frozen == select_freeze(net, strategy="random", budget=0.5).frozen
    more = select_freeze(net, strategy="random", budget=0.5, candidates=["auto", "*.affine"])
    assert set(more.candidates) == {*convs(net), *(n for n, _ in net.named_modules() if n.endswith(".affine"))}
    unet = FAMILIES["unet2d"].make()
    assert select_freeze(unet, strategy="random", budget=0.5).candidates.keys() == set(
        select_freeze(unet, strategy="random", budget=0.5, candidates="conv").candidates
    )


@pytest.mark.parametrize("name", [*TRANSFORMERS, "sdxl"])
def test_candidates_of_a_network_with_transformer_blocks(name):
    net = FAMILIES[name].make()
    mask = select_freeze(net, strategy="random", budget=0.2)
    network = Network(net)
    roles = {network.role(n) for n in mask.candidates}
    more = {"attn.io", "res.conv", "resample", "skip"} if name == "sdxl" else set()
    assert roles == {"attn.qkv", "attn.out", "mlp"} | more
    frozen = select_freeze(net, strategy="gdd-i-2").frozen
    among = {p for n in mask.candidates for p in network.own[n]}
    assert set(frozen) <= among
    assert {u.name for u in recorded(FreezeMask((), parameter_table(net)))} == set(mask.candidates)
    rule = select_freeze(net, strategy="gdd-i")
    assert 0 < controls(rule, seeds=[0])["random-0"].fraction <= rule.fraction


# Scores.


def sited(result, twice):
    """As of a network with guidance and two streams, one layer of which runs twice: other places have other values."""
    frame = result.frame.assign(stream="image", branch="cond", call=1)
    own = frame[frame["stat"] == "rms"]
    context = own.assign(layer=own["layer"] + ":context", stream="context", value=own["value"] + 100)
    uncond = own.assign(layer=own["layer"] + ":uncond", branch="uncond", value=own["value"] + 1000)
    both = own.assign(layer=own["layer"] + ":context:uncond", stream="context", branch="uncond", value=-own["value"])
    again = own.assign(layer=f"{twice}@2", call=2, value=own["value"] + 2)[own["layer"] == twice]
    return result.copy(frame=pd.concat([context, uncond, frame, again, both], ignore_index=True))


def scores(result):
    network = Network(result)
    return score_units(result, network, choose(network, "auto", ("first", "last"), "layer"), "rms", 80.0)[0]


def test_scores_are_of_the_image_under_the_condition_and_the_mean_over_calls(net, result):
    twice = next(iter(convs(net)))
    plain = scores(result)
    assert scores(sited(result, twice)) == pytest.approx(plain | {twice: plain[twice] + 1})


def test_what_was_measured_elsewhere_alone_counts(net, result):
    made, plain = sited(result, next(iter(convs(net)))), scores(result)
    context = made.copy(frame=made.frame[made.frame["stream"] == "context"])
    assert scores(context) == pytest.approx({n: v + 100 for n, v in plain.items()})
    uncond = made.copy(frame=made.frame[made.frame["branch"] == "uncond"])
    assert scores(uncond) == pytest.approx({n: v + 1000 for n, v in plain.items()})


# Other families, fused attention, LoRA, quantised weights.


def test_from_a_small_network_of_a_family_to_a_large_one():
    small, large = authors_dit(4, 16, 10), authors_dit(10, 32, 10)
    for rule in RULES:
        mask = select_freeze(small, strategy=rule).transfer(large)
        assert mask.frozen == select_freeze(large, strategy=rule).frozen
        assert mask.arguments["mapped"] == 1 and mask.arguments["unmapped"] == []
    some = FreezeMask(("blocks.0.attn.proj.weight", "blocks.3.mlp.fc1.weight"), parameter_table(small))
    moved = some.transfer(large)
    assert moved.frozen == (
        *(f"blocks.{i}.attn.proj.weight" for i in (0, 1)),
        *(f"blocks.{i}.mlp.fc1.weight" for i in (8, 9)),
    )  # neither x_embedder.proj, nor t_embedder.mlp
    back = FreezeMask(("x_embedder.proj.weight",), parameter_table(small)).transfer(large)
    assert back.frozen == ("x_embedder.proj.weight",)


def test_to_another_family_by_role_and_relative_depth():
    ours, theirs = authors_dit(6, 16, 10), FAMILIES["dit"].make()
    layers = ("blocks.0.attn.qkv", "blocks.5.mlp", "blocks.2.attn.proj")
    names = [n for n, _ in parameter_table(ours) if n.startswith(layers)]
    moved = FreezeMask(tuple(names), parameter_table(ours)).transfer(theirs)
    blocks = [n.removeprefix("transformer_blocks.") for n in moved.frozen]
    assert set(blocks) == {
        *(f"0.attn1.to_{k}.{t}" for k in "qkv" for t in ("weight", "bias")),
        *(f"1.attn1.to_out.0.{t}" for t in ("weight", "bias")),
        *(f"2.ff.net.{layer}.{t}" for layer in ("0.proj", "2") for t in ("weight", "bias")),
    }
    assert "-/-/proj_out_1" in moved.arguments["unmapped"]
    rule = select_freeze(ours, strategy="gdd-i-2").transfer(theirs)
    assert rule.frozen == select_freeze(theirs, strategy="gdd-i-2").frozen
    crossed = select_freeze(FAMILIES["pixart"].make(), strategy="gdd-i-2")
    assert crossed.transfer(ours).frozen == select_freeze(ours, strategy="gdd-i-2").frozen


def test_parts_of_equal_name_in_one_block_are_told_apart():
    net = FAMILIES["pixart"].make()
    frozen = [n for n, _ in parameter_table(net) if ".attn2.to_q." in n]
    mask = FreezeMask(tuple(frozen), parameter_table(net))
    assert mask.transfer(net).frozen == mask.frozen


def test_a_mask_made_before_attention_was_fused_is_refused_after():
    mask = select_freeze(FAMILIES["dit"].make(), strategy="gdd-i-2")
    after = fused(FAMILIES["dit"].make())
    with pytest.raises(GddlabError, match=r"to_qkv.weight. is missing in the mask.*: its attention was fused or split"):
        mask.apply(after)
    own = select_freeze(after, strategy="gdd-i-2")
    assert any(".to_qkv." in n for n in own.frozen)
    own.apply(after)
    with pytest.raises(GddlabError, match="fused or split"):
        own.apply(FAMILIES["dit"].make())
    chosen = select_freeze(after, strategy="random", candidates="attention", budget=0.1)
    assert {n.rpartition(".attn1.")[2] for n in chosen.candidates} == {"to_qkv", "to_out.0"}


def test_lora_is_always_trained():
    plain, net = authors_dit(2, 16, 10), adapted(authors_dit(2, 16, 10))
    mask = select_freeze(plain, strategy="gdd-i-2")
    assert select_freeze(net, strategy="gdd-i-2") == mask
    mask.apply(net)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" in n} == {n for n, _ in net.named_parameters() if "lora_" in n} != set()
    assert not net.blocks[0].attn.qkv.base_layer.weight.requires_grad
    assert {n for n, _ in mask.trainable(net)} == {n.replace(".base_layer", "") for n in trained}
    twin = adapted(authors_dit(2, 16, 10))
    twin.load_state_dict(net.state_dict())
    mask.verify(net, twin)
    with torch.no_grad():
        net.blocks[1].attn.qkv.base_layer.weight.add_(1)
    with pytest.raises(
        GddlabError, match=r"1 of .* frozen tensors differ from the teacher.s: blocks.1.attn.qkv.weight"
    ):
        mask.verify(net, twin)


def test_quantised_weights_are_refused():
    mask = select_freeze(authors_dit(2, 16, 10), strategy="gdd-i")
    net = authors_dit(2, 16, 10)
    packed = torch.zeros(48 * 8, 1, dtype=torch.uint8)
    net.blocks[1].attn.qkv.weight = nn.Parameter(packed, requires_grad=False)
    says = re.escape("'blocks.1.attn.qkv.weight' is uint8: quantised weights cannot be trained")
    for act in (
        lambda: select_freeze(net, strategy="gdd-i"),
        lambda: select_freeze(net, strategy="random", budget=0.5),
        lambda: mask.apply(net),
        lambda: mask.apply(net, force=True),
        lambda: mask.transfer(net),
    ):
        with pytest.raises(GddlabError, match=says):
            act()


def test_old_results_without_roles_still_make_masks(net, result):
    new = ("role", "index")
    layers = [{k: v for k, v in layer.items() if k not in new} for layer in result.meta["layers"]]
    old = result.copy(meta={**result.meta, "layers": layers})
    assert select_freeze(old, strategy="gdd-i") == select_freeze(net, strategy="gdd-i")
    assert frozen_layers(select_freeze(old, strategy="all-conv")) == list(convs(tiny()))
