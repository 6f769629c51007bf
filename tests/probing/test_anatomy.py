import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from torch import nn

from gddlab.nets.layers import UNetBlock
from gddlab.probing.layers import anatomy, kind_of, stage_and_resolution, type_of


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
