import pytest
import torch
from torch import distributed, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from gddlab.errors import GddlabError
from gddlab.probing.layers import denoiser_of, named_layers, owner_of, parameter_table, plain_name, unwrap
from gddlab.probing.wrap import wrap
from tests.probing.networks import tiny


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
