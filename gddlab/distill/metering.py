"""Means over the iterations of a tick, kept on the device; what is not finite is counted, not averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gddlab.distill.distributed import World

__all__ = ["Meter"]


class Meter:
    """Sums and counts of scalars by name, without waiting for the device until `means`.

    `streak` is how many iterations in a row, up to the last one, had a loss that is not finite; `longest` since the last `reset`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.kind = torch.float64 if device.type == "cpu" else torch.float32
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.streak = torch.zeros((), device=device)
        self.longest = torch.zeros((), device=device)

    def add(self, stats: Mapping[str, Tensor]) -> None:
        """Adds an iteration's scalars; and what share of iterations had gradients that were sanitised, or a loss that was not finite."""
        losses = [v.detach() for k, v in stats.items() if k.startswith("loss/")]
        finite = torch.stack([x.isfinite() for x in losses]).all()
        self.streak = torch.where(finite, 0.0, self.streak + 1)
        self.longest = torch.maximum(self.longest, self.streak)
        shares = {f"sanitised/{k[-1]}": v > 0 for k, v in stats.items() if k.startswith("nonfinite/")}
        for name, value in {**stats, **shares, "nonfinite/loss": ~finite}.items():
            value = value.detach().to(self.kind)
            known = value.isfinite()
            zero = torch.zeros((), device=self.device, dtype=self.kind)
            self.sums[name] = self.sums.get(name, zero) + torch.where(known, value, 0.0)
            self.counts[name] = self.counts.get(name, zero) + known

    def means(self, world: World) -> dict[str, float]:
        """Means over iterations and ranks since the last `reset`; a name without any finite value is left out."""
        names = sorted(self.sums)
        flat = world.mean(torch.stack([*(self.sums[k] for k in names), *(self.counts[k] for k in names)])).tolist()
        pairs = zip(names, flat, flat[len(names) :], strict=False)
        return {k: total / count for k, total, count in pairs if count}

    def reset(self) -> None:
        self.sums.clear()
        self.counts.clear()
        self.longest = self.streak.clone()

    def state_dict(self, world: World) -> dict[str, Any]:
        """Sums and counts, means over ranks, as JSON."""
        sums = {k: world.mean(v).item() for k, v in sorted(self.sums.items())}
        counts = {k: world.mean(v).item() for k, v in sorted(self.counts.items())}
        return {"sums": sums, "counts": counts, "streak": self.streak.item(), "longest": self.longest.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        def tensor(x: float) -> Tensor:
            return torch.tensor(x, dtype=self.kind, device=self.device)

        self.sums = {k: tensor(v) for k, v in state["sums"].items()}
        self.counts = {k: tensor(v) for k, v in state["counts"].items()}
        self.streak = torch.tensor(state["streak"], device=self.device)
        self.longest = torch.tensor(state["longest"], device=self.device)
