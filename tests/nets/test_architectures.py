"""Named architectures: the published parameter counts, and what students keep of them."""

from __future__ import annotations

import pytest
import torch

from gddlab.errors import GddlabError
from gddlab.nets import EDM2Precond, architectures, build
from gddlab.nets.io import make_student
from gddlab.nets.precond import EDMPrecond


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ncsnpp-cifar10", 56_395_523),
        ("ncsnpp-ffhq-64", 62_758_787),
        ("ncsnpp-afhqv2-64", 62_758_787),
        ("adm-imagenet-64", 295_899_267),
    ],
)
def test_students_have_the_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count(make_student(build(name))) == parameters


@pytest.mark.parametrize("name", architectures())
def test_every_architecture_builds(name: str) -> None:
    with torch.device("meta"):
        net = build(name)
    classes = 1000 if "-im" in name else 10 if name.endswith("cond") else 0
    classes = 0 if name.endswith("uncond") else classes
    resolution, channels = 32 if "cifar10" in name else 64, 4 if "img512" in name else 3
    assert (net.img_resolution, net.img_channels, net.label_dim) == (resolution, channels, classes)
    assert name.startswith("edm2") == isinstance(net, EDM2Precond)
    augmented = any("map_augment" in n for n, _ in net.named_parameters())
    assert augmented == (isinstance(net, EDMPrecond) and "adm" not in name)
    if name.startswith("iddpm"):
        assert net.sigma_min < 0.01 and net.sigma_max > 80


@pytest.mark.parametrize(
    ("size", "millions"), [("xs", 125), ("s", 280), ("m", 498), ("l", 777), ("xl", 1119), ("xxl", 1523)]
)
def test_edm2_has_the_sizes_of_its_paper(size: str, millions: int) -> None:
    """Karras et al. 2024, table 2: millions of parameters of a class-conditional network of latents."""
    with torch.device("meta"):
        assert round(count(build(f"edm2-img512-{size}")) / 1e6) == millions


def test_changes_and_refusals() -> None:
    with torch.device("meta"):
        assert build("ncsnpp-cifar10", label_dim=3).label_dim == 3
        assert build("ncsnpp-cifar10").init_kwargs["label_dim"] == 0  # the table is not touched
    with pytest.raises(GddlabError, match="unknown architecture 'ncsnp-cifar10': did you mean 'ncsnpp-cifar10'"):
        build("ncsnp-cifar10")
    with pytest.raises(GddlabError, match="wdth"):
        build("ncsnpp-cifar10", wdth=3)
