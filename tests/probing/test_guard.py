import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from gddlab.errors import GddlabError
from gddlab.probing.guard import as_it_was, eager
from tests.probing.networks import tiny


def test_the_compilers_stance_comes_back():
    torch._dynamo.reset()
    model = torch.compile(nn.Linear(1, 1), backend="eager")
    with torch.compiler.set_stance("fail_on_recompile"):
        with contextlib.suppress(ZeroDivisionError), eager(model):
            model(torch.ones(1, 1))  # the stance outside would not allow it
            raise ZeroDivisionError
        with pytest.raises(RuntimeError):
            model(torch.ones(1, 1))


def test_nothing_is_changed_where_nothing_is_compiled():
    torch._dynamo.reset()
    counters.clear()
    other = torch.compile(nn.Linear(1, 1), backend="eager")
    with eager(tiny()):
        other(torch.ones(1, 1))
    assert counters["stats"]["unique_graphs"] == 1


def test_an_offloaded_network_runs_where_its_hooks_bring_it():
    """accelerate keeps parameters on the meta device and copies them to where a hook says while a layer runs."""
    net = nn.Sequential(nn.Linear(1, 1, device="meta"), nn.Linear(1, 1, device="meta"))
    net._hf_hook = SimpleNamespace(hooks=[SimpleNamespace(execution_device="cpu"), SimpleNamespace()])
    with as_it_was(net) as target:
        assert target == torch.device("cpu") and not net.training
    assert net.training and net[0].weight.is_meta
    with (
        pytest.raises(GddlabError, match="device='cuda': this network is offloaded and runs on cpu"),
        as_it_was(net, device="cuda"),
    ):
        pass
