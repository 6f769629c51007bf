"""`Graphed`: an iteration as a CUDA graph, one launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

Given = TypeVar("Given")
WARM = 3
"""Calls that run as they are: in these torch chooses kernels, and optimisers and libraries take their memory."""


class Graphed(Generic[Given]):
    """Runs a function of tensors on a CUDA device: as it is at first, then as the graph that one call recorded.

    Each graph keeps the memory of what it computes for itself.

    Args:
        run: Takes tensors, or what holds tensors, of the same shapes in each call, and returns some. What it changes
            besides must keep its place in memory; no value may be read, and nothing copied from the CPU.
        device: Where the tensors are.
    """

    def __init__(self, run: Callable[[Given], dict[str, Tensor]], device: torch.device):
        self.run, self.device = run, device
        self.calls = 0
        self.replay: Callable[[], object] | None = None
        self.aside: torch.cuda.Stream | None = None

    def __call__(self, given: Given) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= WARM:
            return self._aside(given)
        if self.replay is None:
            self.given: Given = tree_map_only(Tensor, Tensor.clone, given)
            self.replay = self._recorded()
        tree_map(lambda held, new: held.copy_(new) if isinstance(held, Tensor) else held, self.given, given)
        self.replay()
        return tree_map_only(Tensor, Tensor.clone, self.out)

    def _recorded(self) -> Callable[[], object]:
        """Records `run` of `given`; what is returned runs it, and leaves what it gives in `out`."""
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # another thread draws ahead
        with torch.cuda.graph(graph, stream=self.aside, capture_error_mode=mode):
            self.out = self.run(self.given)
        return graph.replay

    def _aside(self, given: Given) -> dict[str, Tensor]:
        """On a stream beside the others, as it will be recorded."""
        here = torch.cuda.current_stream(self.device)
        self.aside = aside = self.aside or torch.cuda.Stream(self.device)  # one: memory is cached by stream
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            out = self.run(given)
        here.wait_stream(aside)
        return out
