"""Shared fixtures: a tiny teacher on disk, a tiny run, a machine without weights."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import URLError

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes of tests share the cores (-n 2 in pyproject.toml)

import pytest
import torch

from gddlab.distill import presets
from gddlab.distill.config import TrainConfig
from gddlab.nets import Precond, from_edm, save_network

TINY: dict[str, Any] = {
    "img_resolution": 16,
    "img_channels": 1,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.1,
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}


def tiny_net(*, label_dim: int = 0, seed: int = 0) -> Precond:
    """A small NCSN++ whose layers all do something (fresh networks have near-zero branches)."""
    torch.manual_seed(seed)
    net = from_edm("EDMPrecond", label_dim=label_dim, **TINY)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "tiny.safetensors"
    save_network(tiny_net(), path, name="tiny", data="digits", sigma_min=0.002, sigma_max=80.0)
    return path


def tiny_config(run_dir: Path, teacher: Path, **fields: Any) -> TrainConfig:
    """Six iterations of batch 8 with small heads, R1 in every second one; parts are given by what differs."""
    parts: dict[str, dict[str, Any]] = {
        "projected": {"input_size": 32, "cout": 4, "head_width": 8, "cache_real": False},
        "stylegan2": {"channel_max": 8},
        "lpips": {"net": "squeeze", "weights": "random", "input_size": 32},
    }
    part = fields.get("discriminator", {})
    if isinstance(part, dict):
        fields["discriminator"] = parts[part.get("kind", "projected")] | part
    settings: dict[str, Any] = {
        "teacher": str(teacher),
        "batch": 8,
        "total_kimg": 0.048,
        "r1_interval": 2,
        "r1_gamma": 1e-3,
        "tick_kimg": 0.016,
        "snapshot_kimg": 0.048,
        "checkpoint_kimg": 0.048,
        "reuse_fakes": False,
    }
    return presets.digits(run_dir=run_dir, **(settings | fields))


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights and without a network."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise URLError("no network")

    import huggingface_hub.constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GDDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GDDLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.delenv("GDDLAB_OFFLINE", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr("pooch.retrieve", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    return tmp_path
