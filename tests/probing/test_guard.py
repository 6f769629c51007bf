import contextlib

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from gddlab.probing.guard import eager
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
