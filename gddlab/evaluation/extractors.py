"""Feature extractors by name: what they are, where their weights lie, how their distances are called."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gddlab.errors import GddlabError, unknown
from gddlab.files import hash_json
from gddlab.nets.lite import lite_weights

__all__ = ["EXTRACTORS", "Extractor", "find_extractor", "register"]

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into features.

    Attributes:
        name: Name here and in torch-fidelity's registry.
        layer: Feature layer in torch-fidelity's terms.
        dims: Features an image.
        input_size: Side that images are resized to, pixels, bilinear.
        package: Distribution whose code defines the network.
    """

    name: str
    layer: str
    dims: int
    input_size: int
    package: str

    @property
    def weights(self) -> Path:
        """Path of the weights.

        Raises:
            GddlabError: They are not on this machine; the message says how to get them.
        """
        if self.name != "inception-v3-compat":
            return lite_weights(f"tf_efficientnet_{self.name}")
        given = os.environ.get("GDDLAB_INCEPTION")
        path = Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        if not path.is_file():
            raise GddlabError(f"no Inception weights at {path}: put {INCEPTION_URL} there or set GDDLAB_INCEPTION=PATH")
        return path

    @property
    def sha256(self) -> str:
        """sha256 of the weights file."""
        return _file_sha256(self.weights)

    @property
    def identity(self) -> str:
        """Hash of all that features depend on: weights, layer, input size, version of the code."""
        about = [self.name, self.layer, self.dims, self.input_size, self.sha256, version(self.package)]
        return hash_json(about)

    def metric_name(self, kind: str) -> str:
        """Name of a score without its n: "fid" is reserved for Inception, others are `fd-lite2` and the like."""
        if self.name == "inception-v3-compat":
            return kind
        return f"{ {'fid': 'fd', 'kid': 'kd'}.get(kind, kind) }-{self.name}"

    def build(self) -> Any:
        """The network as a torch-fidelity feature extractor, uint8 (B, 3, H, W) -> ((B, dims),); built once."""
        return _build(self.name, str(self.weights))


EXTRACTORS = {
    "lite2": Extractor("lite2", "1280", 1280, 96, "timm"),
    "lite0": Extractor("lite0", "1280", 1280, 96, "timm"),
    "inception": Extractor("inception-v3-compat", "2048", 2048, 299, "torch-fidelity"),
}


def find_extractor(name: str) -> Extractor:
    """An extractor by name, "lite2", "lite0" or "inception"; refused with near matches otherwise."""
    if name not in EXTRACTORS:
        raise unknown("extractor", name, EXTRACTORS)
    return EXTRACTORS[name]


def register() -> None:
    """Makes "lite0" and "lite2" known to torch-fidelity, so that `torch_fidelity.calculate_metrics` takes them too."""
    from torch_fidelity import register_feature_extractor
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    from gddlab.evaluation.fidelity_lite import FeatureExtractorLite0, FeatureExtractorLite2

    for name, cls in (("lite0", FeatureExtractorLite0), ("lite2", FeatureExtractorLite2)):
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(name, cls)


@functools.lru_cache(maxsize=2)
def _build(name: str, weights: str) -> Any:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    register()
    layer = next(e.layer for e in EXTRACTORS.values() if e.name == name)
    net = FEATURE_EXTRACTORS_REGISTRY[name](name, [layer], feature_extractor_weights_path=weights)
    return net.eval().requires_grad_(False)


@functools.lru_cache(maxsize=8)
def _file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
