"""Shared fixtures: a machine without weights and without a network."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch


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
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    return tmp_path
