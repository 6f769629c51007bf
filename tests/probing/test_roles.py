"""Roles of layers, transformer blocks, and the points of their residual streams, in networks of other families."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gddlab.nets.bare import unwrap
from gddlab.nets.dit import Attention
from gddlab.probing import null, select_layers
from gddlab.probing.layers import (
    ROLES,
    anatomy,
    depth_of,
    inventory,
    is_adapter,
    named_layers,
    owner_of,
    parameter_table,
    plain_name,
    points_of,
    role_of,
    streams_of,
    transformer_blocks,
    type_of,
)
from tests.models import NEWER, network, zimage
from tests.probing.families import FAMILIES, ROWS, TEXT, TRANSFORMERS, authors_dit
from tests.probing.networks import tiny

EDM2 = Path(__file__).parents[1] / "golden" / "models"


def names(net, layers):
    return [layer.name for layer in select_layers(net, layers)]


def roles_of(net):
    """Role of each parameter: its layer's, or its own where a block holds it."""
    layers = inventory(net)
    return {p: layers[owner_of(p)].role if owner_of(p) in layers else "" for p, _ in parameter_table(net)}


def unknown_in(net):
    return [p for p, role in roles_of(net).items() if role not in ROLES and role_of(p) not in ROLES]


@pytest.mark.parametrize("name", [*NEWER, "zimage"])
def test_every_parameter_of_newer_networks_has_a_role(name):
    assert unknown_in(zimage() if name == "zimage" else network(name)) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_a_role(name):
    assert unknown_in(FAMILIES[name].make()) == []


def test_every_parameter_of_gddlab_and_of_the_authors_dit_has_a_role():
    assert unknown_in(tiny(label_dim=3)) == []
    assert unknown_in(authors_dit(2, 16, 10)) == []
    assert unknown_in(nn.ModuleDict({"model": authors_dit(2, 16, 10)})) == []


EDM2_ROLES = {
    **{
        "unet.emb_noise.weight": "embed",
        "unet.emb_label.weight": "embed",
        "unet.enc.8x8_block0.emb_linear.weight": "modulation",
    },
    **{"unet.out_gain": "gain", "unet.enc.8x8_down.emb_gain": "gain", "logvar_linear.weight": "ends"},
    **{
        "unet.out_conv.weight": "ends",
        "unet.enc.16x16_conv.weight": "ends",
        "unet.dec.8x8_in0.conv_skip.weight": "skip",
    },
    **{f"unet.dec.8x8_block0.conv_res{i}.weight": "res.conv" for i in (0, 1)},
    **{"unet.dec.8x8_in0.attn_qkv.weight": "attn.qkv", "unet.dec.8x8_in0.attn_proj.weight": "attn.out"},
}


@pytest.mark.parametrize(
    ("parameter", "role"),
    [
        *EDM2_ROLES.items(),
        ("model.enc.16x16_block0.conv0.weight", "res.conv"),
        ("model.enc.8x8_aux_residual.weight", "ends"),
        ("model.enc.8x8_block0.proj.bias", "attn.out"),
        ("model.dec.8x8_in0.affine.bias", "modulation"),
        ("model.dec.16x16_aux_norm.bias", "norm"),
        ("model.map_layer1.weight", "embed"),
        ("down_blocks.0.resnets.0.time_emb_proj.weight", "modulation"),
        ("down_blocks.0.resnets.0.conv_shortcut.weight", "skip"),
        ("down_blocks.0.downsamplers.0.conv.weight", "resample"),
        ("down_blocks.0.attentions.0.proj_in.weight", "attn.io"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", "mlp"),
        ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight", "embed"),
        ("transformer_blocks.0.norm1.linear.weight", "modulation"),
        ("transformer_blocks.0.scale_shift_table", "modulation"),
        ("transformer_blocks.0.attn.norm_added_q.weight", "norm"),
        ("transformer_blocks.0.attn.to_add_out.bias", "attn.out"),
        ("transformer_blocks.0.attn.to_added_qkv.bias", "attn.qkv"),
        ("single_transformer_blocks.0.proj_out.weight", "mlp"),
        ("proj_out.weight", "ends"),
        ("proj_out_1.weight", "modulation"),
        ("time_embed.linear.weight", "modulation"),
        ("blocks.0.attn.proj.weight", "attn.out"),
        ("blocks.0.attn.in_proj_weight", "attn.qkv"),
        ("x_embedder.proj.weight", "embed"),
        ("t_embedder.mlp.0.weight", "embed"),
        ("final_layer.linear.weight", "ends"),
        ("final_layer.adaLN_modulation.1.weight", "modulation"),
        ("pos_embed", "embed"),
        ("a.0.weight", ""),
        ("fc.weight", ""),
    ],
)
def test_what_a_name_says_of_a_role(parameter, role):
    assert (role_of(owner_of(parameter)) or role_of(parameter)) == role


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.out = nn.Linear(4, 12), nn.Linear(4, 4)


class ResBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.shift, self.scaled = nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.BatchNorm2d(4)


class AttnUpBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = nn.Conv2d(4, 4, 3)


def test_classes_say_what_names_do_not():
    net = nn.ModuleDict(
        {
            "x": FeedForward(),
            "y": SelfAttention(),
            "z": ResBlock(),
            "w": AttnUpBlock(),
            "table": nn.Embedding(3, 4),
        }
    )
    assert {n: layer.role for n, layer in inventory(net).items() if layer.role or "." in n} == {
        **{"x.first": "mlp", "x.second": "mlp", "y.heads": "attn.qkv", "y.out": "attn.out"},
        **{"z.a": "res.conv", "z.shift": "modulation", "z.scaled": "norm", "w.odd": "", "table": "embed"},
    }


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_of_transformers(name):
    net = FAMILIES[name].make()
    layers = inventory(net)
    blocks = [n for n in layers if n.split(".")[-1].isdigit() and n.split(".")[0].endswith("transformer_blocks")]
    blocks = [n for n in blocks if n.count(".") == 1]
    assert names(net, "block") == blocks and len(blocks) >= 3
    assert depth_of(net) == "blocks"
    for i, n in enumerate(blocks):
        assert (layers[n].type, layers[n].kind, layers[n].index, layers[n].depth) == ("block", "block", i, i)
        assert (layers[n].block, layers[n].stage, layers[n].resolution, layers[n].role) == (n, "", None, "")
        inside = [layer for other, layer in layers.items() if other.startswith(f"{n}.")]
        assert {(layer.block, layer.index, layer.depth) for layer in inside} == {(n, i, i)}
    end = layers["proj_out_2" if name == "dit" else "proj_out"]
    assert (end.block, end.index, end.depth, end.role) == ("", None, len(blocks), "ends")
    assert next(iter(layers.values())).depth == 0


def test_blocks_of_both_kinds_in_a_u_net():
    net = FAMILIES["sdxl"].make()
    layers = inventory(net)
    found = names(net, "block")
    tokens = [n for n in found if ".transformer_blocks." in n]
    assert {type(net.get_submodule(n)).__name__ for n in found} == {"ResnetBlock2D", "BasicTransformerBlock"}
    assert set(tokens) == set(transformer_blocks(named_layers(net))) and len(tokens) > 4
    assert sorted(layers[n].index for n in found) == list(range(len(found)))
    assert depth_of(net) == depth_of(tiny()) == "convolutions"
    inside = layers[f"{tokens[0]}.attn2.to_q"]
    assert (inside.block, inside.stage, inside.role) == (tokens[0], "enc", "attn.qkv")
    assert names(net, r"re:transformer_blocks\.\d+$") == tokens


class OwnLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(8, 1), nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))


def test_blocks_of_an_unknown_transformer_are_the_innermost_alike_in_a_list():
    net = nn.ModuleDict({"stages": nn.ModuleList(nn.Sequential(OwnLayer(), OwnLayer()) for _ in range(2))})
    assert names(net, "block") == [f"stages.{i}.{j}" for i in range(2) for j in range(2)]
    mixed = nn.ModuleList([OwnLayer(), nn.Linear(8, 8)])
    assert [layer.type for layer in inventory(mixed).values()].count("block") == 0
    assert [p.part for p in points_of(OwnLayer())] == ["", "all"]


def test_a_class_of_the_same_name_without_its_parts_is_no_block():
    other = type("DiTBlock", (nn.Module,), {})()
    other.linear = nn.Linear(2, 2)
    assert type_of(other) == "" and points_of(other) == [] and points_of(nn.Linear(2, 2)) == []
    assert type_of(authors_dit(1, 8, 2).blocks[0]) == "block"


def test_what_a_u_net_shows_is_as_before(net):
    layers = inventory(net)
    assert points_of(net.get_submodule(names(net, "block")[0])) == []
    assert {layer.depth for layer in layers.values()} == set(range(len(names(net, "conv"))))
    assert [layers[n].index for n in names(net, "block")] == list(range(len(names(net, "block"))))
    unet = FAMILIES["unet2d"].make()
    blocks = {type(unet.get_submodule(n)).__name__ for n in names(unet, "block")}
    assert blocks == {"ResnetBlock2D", "Attention"}
    held = [n for n, m in unet.named_modules() if type(m).__name__ == "Attention"]
    held.sort(key=lambda n: ("down_blocks", "mid_block", "up_blocks").index(n.split(".")[0]))
    assert names(unet, "attention") == [f"{n}.{leaf}" for n in held for leaf in ("to_q", "to_k", "to_v", "to_out.0")]


@pytest.mark.parametrize(
    ("name", "preset", "leaves"),
    [
        ("dit", "attention", ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]),
        ("dit", "mlp", ["ff.net.0.proj", "ff.net.2"]),
        ("dit", "modulation", ["norm1.linear"]),
        ("sana", "mlp", ["ff.conv_inverted", "ff.conv_depth", "ff.conv_point"]),
        ("flux", "modulation", ["norm1.linear", "norm1_context.linear"]),
        ("flux", "mlp", ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]),
        (
            "flux",
            "attention",
            [f"attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")]
            + ["attn.to_add_out"],
        ),
    ],
)
def test_presets_by_role(name, preset, leaves):
    net = FAMILIES[name].make()
    block = "transformer_blocks.0."
    found = [n.removeprefix(block) for n in names(net, preset) if n.startswith(block)]
    assert found == leaves


def test_presets_of_single_blocks_and_of_what_is_outside():
    net = FAMILIES["flux"].make()
    single = "single_transformer_blocks.1."
    assert [n for n in names(net, "mlp") if n.startswith(single)] == [f"{single}proj_mlp", f"{single}proj_out"]
    assert names(net, "modulation")[-1] == "norm_out.linear"
    assert names(authors_dit(1, 8, 2), "mlp") == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    assert names(authors_dit(1, 8, 2), "attention") == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]


def fused(net):
    for block in net.transformer_blocks:
        for one in (block.attn1, block.attn2):
            if one is not None:
                one.fuse_projections()
    return net


def test_fused_attention_takes_the_place_of_what_it_is_made_of():
    assert names(FAMILIES["dit"].make(), "attention")[0] == "transformer_blocks.0.attn1.to_q"
    net = fused(FAMILIES["dit"].make())
    assert names(net, "attention")[:2] == ["transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.attn1.to_qkv"]
    assert not set(names(net, "linear")) & {f"transformer_blocks.0.attn1.to_{k}" for k in "qkv"}
    assert inventory(net)["transformer_blocks.0.attn1.to_qkv"].role == "attn.qkv"
    found = names(fused(FAMILIES["pixart"].make()), "attention")
    assert [n.rpartition(".0.attn2.")[2] for n in found if ".0.attn2." in n] == ["to_q", "to_out.0", "to_kv"]


# Streams.


def seen(net, family):
    """Inputs and outputs of all modules in one call, by name; an input is the first argument or `hidden_states`."""
    inputs, outputs, context = {}, {}, {}
    handles = []
    for name, module in net.named_modules():

        def hook(_, args, kwargs, y, name=name):
            inputs[name] = kwargs.get("hidden_states", args[0] if args else None)
            context[name] = kwargs.get("encoder_hidden_states")
            outputs[name] = y

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    family.run(net)
    for handle in handles:
        handle.remove()
    return inputs, outputs, context


def read(net, block, point, found):
    """A stream's tensor at a point."""
    inputs, outputs, context = found
    name = f"{block}.{point.module}" if point.module else block
    if point.side == "input":
        return inputs[name] if point.stream == "image" or point.module else context[name]
    y = outputs[name]
    return y if isinstance(y, torch.Tensor) else y[streams_of(net.get_submodule(name)).index(point.stream)]


BRANCHES = {
    ("attn", "image"): ("attn1", "attn"),
    ("attn", "context"): ("attn",),
    ("cross", "image"): ("attn2",),
    ("mlp", "image"): ("ff",),
    ("mlp", "context"): ("ff_context",),
    ("all", "image"): ("proj_out",),
    ("all", "context"): ("proj_out",),
}


def added(net, block, part, stream, outputs):
    """What the branch of a part gave, before its gate."""
    module = net.get_submodule(block)
    name = next(n for n in BRANCHES[part, stream] if isinstance(getattr(module, n, None), nn.Module))
    y = outputs[f"{block}.{name}"]
    if not isinstance(y, torch.Tensor):
        y = y[streams_of(module.get_submodule(name)).index(stream)]
    if part == "all":  # tokens of context and image in one
        y = y[:, :TEXT] if stream == "context" else y[:, TEXT:]
    return y.flatten(2).transpose(1, 2) if y.ndim == 4 else y


EXPECTED = {
    "sd": ["", "attn", "cross", "mlp"],
    "sdxl": ["", "attn", "cross", "mlp"],
    "dit": ["", "attn", "mlp"],
    "pixart": ["", "attn", "cross", "mlp"],
    "sana": ["", "attn", "cross", "mlp"],
    "sd3": ["", "attn", "mlp"],
    "flux": ["", "attn", "mlp"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_between_two_points_lies_what_the_part_has_added(name):
    """The difference of two points is the part's output times a gate, a number for each image and channel."""
    family = FAMILIES[name]
    net = family.make()
    found = seen(net, family)
    for block in transformer_blocks(named_layers(net)):
        points = points_of(net.get_submodule(block))
        streams = list(dict.fromkeys(p.stream for p in points))
        last_of_sd3 = name == "sd3" and block.endswith(".2")
        assert streams == (["image", "context"] if name in ("sd3", "flux") and not last_of_sd3 else ["image"])
        for stream in streams:
            mine = [p for p in points if p.stream == stream]
            single = block.startswith("single_")
            assert [p.part for p in mine] == (["", "all"] if single else EXPECTED[name])
            values = [read(net, block, p, found) for p in mine]
            for point, before, after in zip(mine[1:], values, values[1:], strict=False):
                if name == "sd3" and block.endswith(".0") and (point.part, stream) == ("attn", "image"):
                    continue  # two attentions, two gates
                branch = added(net, block, point.part, stream, found[1])
                difference = after - before
                gate = (difference * branch).sum(1, keepdim=True) / branch.square().sum(1, keepdim=True)
                torch.testing.assert_close(gate * branch, difference, rtol=1e-3, atol=2e-5)
                assert difference.abs().max() > 1e-4


def test_names_of_streams():
    for name, tokens in (("sd3", 16), ("flux", 16)):
        family = FAMILIES[name]
        net = family.make()
        _, outputs, _ = seen(net, family)
        for n, module in net.named_modules():
            if streams := streams_of(module):
                parts = dict(zip(streams, outputs[n], strict=True))
                assert parts["image"].shape[:2] == (ROWS, tokens)
                assert parts["context"] is None or parts["context"].shape[:2] == (ROWS, TEXT)
        with_streams = [n for n, m in net.named_modules() if streams_of(m)]
        assert set(transformer_blocks(named_layers(net))) <= set(with_streams)
        joint = [n for n in with_streams if n.endswith(".attn")]
        assert joint and all(streams_of(net.get_submodule(n)) == ("image", "context") for n in joint)
        assert not any(n.startswith("single_") for n in joint)
    assert not any(streams_of(m) for m in FAMILIES["dit"].make().modules())


# EDM2.


class Block(nn.Module):
    """Names of EDM2's block."""

    def __init__(self, encoder, skip=True):
        super().__init__()
        self.conv_res0, self.conv_res1 = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.conv_skip = nn.Conv2d(4, 4, 1) if skip else None
        self.norm = type("PixelNorm", (nn.Module,), {})() if encoder else None
        self.attn_qkv, self.attn_proj = nn.Conv2d(4, 12, 1), nn.Conv2d(4, 4, 1)


def test_edm2_blocks_show_their_skip_path():
    encoder, decoder = anatomy(Block(True)), anatomy(Block(False))
    assert (encoder.skip, decoder.skip) == ("norm", "conv_skip")
    assert decoder.branch == "conv_res1" and decoder.activated == ("conv_res0", "conv_res1")
    assert (decoder.attention, decoder.attention_base) == ("attn_proj", "attn_qkv")
    assert anatomy(type("Block", (nn.Module,), {})()) is None
    net = nn.ModuleDict({"unet": nn.ModuleDict({"enc": nn.ModuleDict({"8x8_block0": Block(True)})})})
    layers = inventory(net)
    block = layers["unet.enc.8x8_block0"]
    assert (block.type, block.stage, block.resolution) == ("block", "enc", 8)
    assert layers["unet.enc.8x8_block0.conv_res0"].activated_input
    assert names(net, "attention") == ["unet.enc.8x8_block0.attn_qkv", "unet.enc.8x8_block0.attn_proj"]


@pytest.mark.parametrize("case", sorted(EDM2.glob("edm2*.npz")), ids=lambda p: p.stem)
def test_every_parameter_of_edm2_has_a_role(case):
    meta = json.loads(str(np.load(case)["meta"]))
    assert meta["params"] and all(role_of(owner_of(name)) or role_of(name) for name in meta["params"])


# LoRA.


class Adapted(nn.Module):
    """In the form of PEFT: the layer, and beside it two matrices whose product is added."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapted(net):
    for block in net.blocks:
        block.attn.qkv = Adapted(block.attn.qkv)
    return net


def test_lora_leaves_names_as_they_were():
    plain, net = authors_dit(2, 16, 10), adapted(authors_dit(2, 16, 10))
    assert plain_name("base_model.model.blocks.0.attn.qkv.base_layer.weight") == "blocks.0.attn.qkv.weight"
    assert plain_name("a.base_layer.base_layer.bias") == "a.bias" and plain_name("a.base_layer") == "a"
    assert parameter_table(net) == parameter_table(plain)
    for preset in ("attention", "linear", "all", "block"):
        assert names(net, preset) == names(plain, preset)
    assert named_layers(net)["blocks.0.attn.qkv"] is net.blocks[0].attn.qkv  # what runs, with what it adds
    whole = nn.ModuleDict({"base_model": nn.ModuleDict({"model": net})})
    assert parameter_table(whole) == parameter_table(plain)


class LoraModel(nn.Module):
    """In the form of PEFT's tuners, which are known by the class that they are made from."""

    def __init__(self, model):
        super().__init__()
        self.model = model


class PeftModel(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.base_model = type("LoHaModel", (type("BaseTuner", (LoraModel,), {}),), {})(model)


def test_networks_are_found_inside_of_any_tuner():
    net = authors_dit(2, 16, 10)
    assert unwrap(PeftModel(net)) is net
    assert all(is_adapter(f"blocks.0.attn.qkv.{n}") for n in ("lora_A.default", "hada_w1_a.default", "ia3_l.default"))
    assert not is_adapter("loras.conv")


def test_networks_of_diffusers_are_made_anew_by_their_class():
    for name in ("sd3", "pixart", "flux"):
        net = network(name)
        for p in net.parameters():
            nn.init.normal_(p.data, mean=3.0)
        anew = null(net, "init", seed=1)
        torch.manual_seed(1)
        fresh = dict(type(net).from_config(net.config).named_parameters())
        found = dict(anew.named_parameters())
        begun = [n for n, p in fresh.items() if p.ndim < 2 or p.square().mean().sqrt() > 0.01]
        assert len(begun) > len(found) / 2
        for n in begun:
            torch.testing.assert_close(found[n], fresh[n])
    net = network("sd3")
    net.transformer_blocks[0].attn.to_q = Adapted(net.transformer_blocks[0].attn.to_q)
    made = null(net, "init", seed=1).transformer_blocks[0].attn.to_q
    torch.manual_seed(1)
    fresh = type(net).from_config(net.config).transformer_blocks[0].attn.to_q
    torch.testing.assert_close(made.base_layer.weight, fresh.weight)
    assert not torch.equal(made.lora_A["default"].weight, net.transformer_blocks[0].attn.to_q.lora_A["default"].weight)
