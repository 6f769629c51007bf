"""The teacher card: what a network is, where it comes from, how good it is."""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from gddlab.files import hash_tensors
from gddlab.nets import SIGMA_MAX, SIGMA_MIN, Precond
from gddlab.nets.unets import UNETS


@dataclass(frozen=True, repr=False)
class TeacherCard:
    """Facts about a teacher; printed, it is a small table.

    `sigma_min` and `sigma_max` are the noise levels it was trained for; `scores` holds the evaluation records that were
    made with the teacher (distance, sample count, seeds, extractor and reference of each).
    """

    name: str
    precond: str
    unet: str
    init_kwargs: dict[str, Any]
    resolution: int
    channels: int
    classes: int
    parameters: int
    sigma_min: float
    sigma_max: float
    data: str | None
    sha256: str
    source: str
    kimg: float | None = None
    original: dict[str, Any] | None = None
    """For a network read from a pickle: file, its sha256, class, key, and the data set that it names."""
    licence: str | None = None
    scores: tuple[dict[str, Any], ...] = field(default=())

    @classmethod
    def of(
        cls, net: Precond, *, name: str, source: str, meta: dict[str, Any], scores: list[dict[str, Any]]
    ) -> TeacherCard:
        return cls(
            name=name,
            precond=type(net).__name__,
            unet=type(net.model).__name__,
            init_kwargs=net.init_kwargs,
            resolution=net.img_resolution,
            channels=net.img_channels,
            classes=net.label_dim,
            parameters=sum(p.numel() for p in net.parameters()),
            sigma_min=float(meta.get("sigma_min", net.sigma_min or SIGMA_MIN)),
            sigma_max=float(meta.get("sigma_max", net.sigma_max if math.isfinite(net.sigma_max) else SIGMA_MAX)),
            data=meta.get("data"),
            sha256=hash_tensors(net.state_dict()),
            source=source,
            kimg=meta.get("kimg"),
            original=meta.get("original"),
            licence=meta.get("licence"),
            scores=tuple(scores),
        )

    def to_meta(self) -> dict[str, Any]:
        """What a weights file keeps of the card: all that cannot be derived from the network."""
        keep = ("name", "data", "sigma_min", "sigma_max", "kimg", "original", "licence")
        return {k: v for k in keep if (v := getattr(self, k)) is not None}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __repr__(self) -> str:
        kw = {k: p.default for k, p in inspect.signature(UNETS[self.unet]).parameters.items()} | self.init_kwargs
        levels = f"{kw['model_channels']} x {list(kw['channel_mult'])}, {kw['num_blocks']} blocks per level"
        rows = [
            ("teacher", self.name),
            ("network", f"{self.unet} ({kw.get('encoder_type', 'ADM')} encoder), {levels}"),
            ("preconditioning", self.precond),
            ("images", f"{self.resolution}x{self.resolution}, {self.channels} channel{'s' * (self.channels > 1)}"),
            ("classes", str(self.classes) if self.classes else "none (unconditional)"),
            ("parameters", f"{self.parameters:,}"),
            ("sigma", f"{self.sigma_min:g} to {self.sigma_max:g}"),
            ("data", self.data or "not known"),
        ]
        if self.original is not None:
            o = self.original
            rows.append(("original", f"{o['class']} in {o['file']}, sha256 {o['sha256'][:16]}"))
            if "data" in o:
                rows.append(("data, it says", o["data"]))
        if self.licence is not None:
            rows.append(("licence", self.licence))
        if self.kimg is not None:
            rows.append(("trained on", f"{self.kimg:g} thousand images"))
        rows += [("sha256", self.sha256[:16]), ("file", self.source)]
        rows += [(s["metric"], f"{s['value']:.4g}  ({s['sampler']}, n = {s['n']})") for s in self.scores]
        width = max(len(k) for k, _ in rows)
        return "\n".join(f"{k:<{width}}  {v}" for k, v in rows)
