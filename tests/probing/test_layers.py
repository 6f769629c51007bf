"""Names of wrapped networks, what is known of a layer, and selections."""

import re

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import distributed, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from gddlab.errors import GddlabError
from gddlab.nets.bare import denoiser_of, unwrap
from gddlab.nets.blocks import UNetBlock
from gddlab.probing import select_layers
from gddlab.probing.layers import (
    PRESETS,
    anatomy,
    inventory,
    kind_of,
    named_layers,
    owner_of,
    parameter_table,
    plain_name,
    stage_and_resolution,
    type_of,
)
from gddlab.teachers.wrap import wrap
from tests.probing.networks import tiny, tiny_adm


def names(net, layers):
    return [layer.name for layer in select_layers(net, layers)]


def of_type(net, *types):
    return [n for n, m in net.named_modules() if isinstance(m, types)]


def test_presets(net):
    assert names(net, "conv") == of_type(net, nn.Conv2d)
    assert names(net, "block") == of_type(net, UNetBlock)
    assert names(net, "linear") == of_type(net, nn.Linear)
    assert names(net, "norm") == of_type(net, nn.GroupNorm)
    assert names(net, "all") == of_type(net, nn.Conv2d, UNetBlock, nn.Linear, nn.GroupNorm)
    with_attention = [n for n, m in net.named_modules() if isinstance(m, UNetBlock) and m.num_heads]
    assert names(net, "attention") == [f"{n}.{leaf}" for n in with_attention for leaf in ("qkv", "proj")]


def test_a_container_means_what_is_inside(net):
    inside = [n for n in names(net, "all") if n.startswith("model.enc.")]
    assert names(net, "model.enc") == ["model.enc"]  # weights can be taken of a container
    for selection in ("model.enc", "re:^model.enc", lambda name, module: name == "model.enc"):
        found = [layer.name for layer in select_layers(net, selection, run=True)]
        assert [n for n in found if n in inside] == inside and "model.enc" not in found
    empty = nn.ModuleDict({"a": nn.ModuleList(), "b": nn.Linear(1, 1)})
    with pytest.raises(GddlabError, match="'a' holds no layer: give names, globs"):
        select_layers(empty, "a", run=True)


@pytest.mark.parametrize("layers", [nn.Conv2d, nn.Linear(1, 1)])
def test_a_module_or_its_class_is_no_selection(net, layers):
    with pytest.raises(GddlabError, match=r"give names, globs, or a function such as lambda name, module: isinstance"):
        select_layers(net, layers)


def test_attention_is_told_by_what_lies_side_by_side():
    net = nn.ModuleDict(
        {
            "patch": nn.ModuleDict({"proj": nn.Conv2d(1, 4, 2)}),
            "time_emb_proj": nn.Linear(4, 4),
            "mixer": nn.ModuleDict(
                {"qkv": nn.Conv1d(4, 12, 1), "norm": nn.LayerNorm(4), "proj_out": nn.Conv1d(4, 4, 1)}
            ),
        }
    )
    assert names(net, "attention") == ["mixer.qkv", "mixer.proj_out"]


def test_patterns_lists_and_functions(net):
    convs = names(net, "conv")
    assert names(net, "model.dec.*.conv1") == [n for n in convs if re.fullmatch(r"model\.dec\..*\.conv1", n)]
    assert names(net, "re:qkv|proj$") == [n for n in convs if n.endswith(("qkv", "proj"))]
    assert names(net, ["model.enc.16x16_conv", "*.qkv"]) == [n for n in convs if n.endswith(("16x16_conv", "qkv"))]
    assert names(net, ["attention", "model.map_layer0"]) == ["model.map_layer0", *names(net, "attention")]
    assert names(net, lambda n, m: isinstance(m, nn.Linear) and "map" in n) == ["model.map_layer0", "model.map_layer1"]


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("model.enc.16x16_con", "did you mean 'model.enc.16x16_conv'"),
        (["model.enc.16x16_conv", "model.enc.8x8_block0.conv9"], "unknown layer 'model.enc.8x8_block0.conv9': did you"),
        ("re:(", "no regular expression"),
        (lambda n, m: False, "accepts none"),
        ([], "empty list"),
        ([3], "layers: 3 is no name"),
        (3, "layers=3"),
    ],
)
def test_what_matches_nothing_is_refused(net, layers, says):
    with pytest.raises(GddlabError, match=re.escape(says)):
        select_layers(net, layers)


@pytest.mark.parametrize("preset", sorted({*PRESETS} - {"conv", "all"}))
def test_a_preset_that_a_network_has_none_of_is_refused(preset):
    with pytest.raises(GddlabError, match="has none"):
        select_layers(nn.Sequential(nn.Conv2d(1, 1, 1)), preset)


def test_what_is_known_of_a_layer(net):
    layers = inventory(net)
    conv = layers["model.enc.8x8_block0.conv0"]
    assert (conv.block, conv.kind, conv.stage, conv.resolution) == ("model.enc.8x8_block0", "conv0", "enc", 8)
    assert (conv.type, conv.n_params, conv.activated_input) == ("conv", 8 * 16 * 9 + 16, True)
    first, last = layers["model.enc.16x16_conv"], layers["model.dec.16x16_aux_conv"]
    assert (first.kind, first.depth, first.block, first.activated_input) == ("conv", 0, "", False)
    assert (last.depth, last.activated_input) == (len(names(net, "conv")) - 1, True)
    block = layers["model.enc.8x8_block0"]
    assert (block.type, block.kind, block.block) == ("block", "block", block.name)
    assert layers["model.map_layer0"].resolution is None
    assert inventory(tiny_adm())["model.out_conv"].activated_input


class _OwnConv(nn.Module):
    """A convolution without `nn.Conv2d`, as in EDM's own code."""

    def __init__(self, channels_in, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels_in, 3, 3))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, padding=1)


class _StandardizedConv(nn.Module):
    """Its weight is computed each time."""

    def __init__(self, channels_in, channels):
        super().__init__()
        self.raw = nn.Parameter(torch.randn(channels, channels_in, 3, 3))

    @property
    def weight(self):
        return self.raw - self.raw.mean()

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, padding=1)


def test_convolutions_of_other_classes_are_found():
    net = nn.Sequential(_OwnConv(1, 2), _StandardizedConv(2, 2), nn.Embedding(3, 4), nn.Linear(2, 2), nn.Identity())
    assert names(net, "conv") == ["0", "1"]
    assert names(net, "linear") == ["3"]


@pytest.mark.parametrize("parametrize", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_a_parametrized_convolution_is_one_layer(parametrize):
    net = nn.Sequential(parametrize(nn.Conv2d(1, 4, 3)), nn.SiLU(), nn.Sequential(parametrize(nn.Linear(4, 4))))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    layers = inventory(net)
    assert list(layers) == ["0", "1", "2", "2.0"]
    assert [layer.type for layer in layers.values()] == ["conv", "", "", "linear"]
    assert layers["0"].n_params == sum(p.numel() for p in net[0].parameters())
    assert names(net, "all") == ["0", "2.0"]
    assert "0.parametrizations.weight" in named_layers(net)
    for k, v in net.state_dict().items():
        assert torch.equal(v, before[k]), k  # spectral norm's power iteration stands still


def test_names_as_a_wrapped_network_gives_them_are_understood():
    net = tiny()
    compiled = torch.compile(net, backend="eager")
    wanted = [n for n, _ in compiled.named_modules() if n.endswith("conv1")]
    assert all(n.startswith("_orig_mod.") for n in wanted)
    assert names(compiled, wanted) == names(net, "*.conv1")


def compiled(net):
    return torch.compile(net, backend="eager")


def wrapped(net):
    return wrap(net, lambda net, x, sigma, labels: net(x, sigma, labels))


def in_part(net):
    net.model = compiled(net.model)
    return net


@pytest.fixture
def group(tmp_path):
    """A process group of one."""
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_wrappers_do_not_change_names():
    assert plain_name("module._orig_mod.model.enc.a.weight") == "model.enc.a.weight"
    assert plain_name("_orig_mod.module.gddlab_bare.model._orig_mod.b") == "model.b"
    net = tiny(augment_dim=9)
    assert not any("map_augment" in n for n, _ in parameter_table(net))
    assert parameter_table(nn.ModuleDict({"module": net})) == parameter_table(tiny())


@pytest.mark.parametrize(
    "wrap_it",
    [
        compiled,
        in_part,
        nn.DataParallel,
        AveragedModel,
        wrapped,
        lambda net: wrapped(wrapped(net)),
        lambda net: compiled(wrapped(compiled(net))),
        lambda net: nn.DataParallel(wrapped(in_part(net))),
    ],
)
def test_layers_and_parameters_keep_the_names_of_the_bare_network(wrap_it):
    net = tiny()
    model = wrap_it(tiny())
    assert list(named_layers(model)) == list(named_layers(net))
    assert parameter_table(model) == parameter_table(net)
    assert type(unwrap(model)) is type(net)


@pytest.mark.usefixtures("group")
def test_distributed_data_parallel_does_not_change_names():
    net = tiny()
    model = nn.parallel.DistributedDataParallel(wrapped(tiny()))
    assert list(named_layers(model)) == list(named_layers(net))
    assert parameter_table(model) == parameter_table(net)


def test_what_is_called_is_the_denoiser_not_the_bare_network():
    net = tiny()
    denoiser = wrapped(compiled(net))
    assert denoiser_of(nn.DataParallel(compiled(denoiser))) is denoiser
    assert unwrap(denoiser) is net


def test_modules_of_one_plain_name_are_refused():
    net = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "module": nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)})})
    with pytest.raises(GddlabError, match=r"two modules are called 'conv', one of them 'module\.conv'"):
        named_layers(net)


def test_a_parametrized_weight_belongs_to_its_convolution():
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(1, 1, 1)))
    assert {owner_of(n) for n, _ in net.named_parameters()} == {"0"}
    assert owner_of("model.enc.a.weight") == "model.enc.a"
    assert owner_of("scale") == ""


def resnet(cls=ResnetBlock2D, **kwargs):
    torch.manual_seed(0)
    return cls(**{"in_channels": 8, "temb_channels": 8, "groups": 4} | kwargs).eval()


def seen(block, *args):
    """Inputs and outputs of the block's children, and its own."""
    inputs, outputs = {}, {}
    handles = []
    for name, module in block.named_modules():

        def hook(_, x, y, name=name):
            inputs[name], outputs[name] = x[0].clone(), y.clone()

        handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        block(*args)
    for h in handles:
        h.remove()
    return inputs, outputs


@pytest.mark.parametrize("out_channels", [8, 16])
@pytest.mark.parametrize("cls", [ResnetBlock2D, ResnetBlockCondNorm2D])
def test_diffusers_blocks_are_the_sum_of_branch_and_skip_path(cls, out_channels):
    block = resnet(cls, out_channels=out_channels, output_scale_factor=2.0)
    parts = anatomy(block)
    assert type_of(block) == "block"
    inputs, outputs = seen(block, torch.randn(3, 8, 8, 8), torch.randn(3, 8))
    skip = outputs.get(parts.skip, inputs[""])
    torch.testing.assert_close(outputs[""], (skip + outputs[parts.branch]) / 2)
    assert (parts.skip in outputs) == (out_channels != 8)
    silu = block.nonlinearity
    torch.testing.assert_close(inputs["conv1"], silu(outputs["norm1"]))
    torch.testing.assert_close(inputs["conv2"], silu(outputs["norm2"]))
    assert parts.activated == ("conv1", "conv2")


def test_upsampling_by_repetition_keeps_mean_squares_and_shares():
    block = resnet(up=True)
    parts = anatomy(block)
    inputs, outputs = seen(block, torch.randn(3, 8, 8, 8), torch.randn(3, 8))
    skip = outputs[""] - outputs["conv2"]
    torch.testing.assert_close(skip.square().mean((1, 2, 3)), inputs[""].square().mean((1, 2, 3)))
    before = block.nonlinearity(outputs["norm1"])
    torch.testing.assert_close((inputs["conv1"] > 0).float().mean(), (before > 0).float().mean())
    assert parts.skip not in outputs
    assert parts.activated == ("conv1", "conv2")


@pytest.mark.parametrize("kwargs", [{"down": True}, {"down": True, "kernel": "fir"}, {"up": True, "kernel": "fir"}])
def test_behind_other_resampling_neither_the_skip_path_nor_an_activation_is_seen(kwargs):
    parts = anatomy(resnet(**kwargs))
    assert parts.skip is None
    assert parts.activated == ("conv2",)
    assert anatomy(resnet(out_channels=16, **kwargs)).skip == "conv_shortcut"


def test_diffusers_attention_is_a_block_where_it_adds_its_input():
    attention = Attention(8, heads=2, dim_head=4, norm_num_groups=4, residual_connection=True).eval()
    parts = anatomy(attention)
    inputs, outputs = seen(attention, torch.randn(3, 8, 4, 4))
    branch = outputs[parts.branch].transpose(1, 2).reshape(3, 8, 4, 4)
    torch.testing.assert_close(outputs[""], inputs[""] + branch)
    assert anatomy(Attention(8, heads=2, dim_head=4)) is None


def test_a_class_of_the_same_name_and_other_parts_is_no_block():
    attention = type("Attention", (nn.Module,), {})()
    attention.qkv, attention.proj = nn.Linear(4, 12), nn.Linear(4, 4)
    unet_block = type("UNetBlock", (nn.Module,), {})()
    assert anatomy(attention) is None
    assert anatomy(unet_block) is None
    assert anatomy(UNetBlock(4, 4, 4)) is not None
    assert anatomy(None) is None


def test_a_module_around_a_norm_is_no_norm():
    pre_norm = type("PreNorm", (nn.Module,), {})()
    pre_norm.norm, pre_norm.fn = nn.LayerNorm(4), nn.Linear(4, 4)
    assert type_of(pre_norm) == ""
    assert [type_of(m) for m in (nn.GroupNorm(1, 4), nn.LayerNorm(4), nn.BatchNorm2d(4))] == ["norm"] * 3


@pytest.mark.parametrize(
    ("name", "kind", "where"),
    [
        ("model.dec.32x32_block0.conv1", "conv1", ("dec", 32)),
        ("model.enc.8x8_conv", "conv", ("enc", 8)),
        ("down_blocks.1.attentions.0.to_out.0", "to_out", ("enc", None)),
        ("mid_block.resnets.0.conv1", "conv1", ("mid", None)),
        ("up_blocks.0.upsamplers.0.conv", "conv", ("dec", None)),
        ("0", "0", ("", None)),
    ],
)
def test_what_a_name_says(name, kind, where):
    assert kind_of(name) == kind
    assert stage_and_resolution(name) == where
