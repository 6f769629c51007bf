"""EfficientNet-lite, DINOv2 and open_nsfw as torch-fidelity extractors; imported only when features are wanted."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

from gddlab.pretrained.backbones import LITE_MEAN, LITE_STD, lite_backbone
from gddlab.pretrained.published import load_fitting, read_state

LITE_SIZE = 96
"""Side that images are resized to, pixels: the digits take 11 s on one core, 23 s at 128."""
LITE_LAYER = "1280"


def _resize(x: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, side, side), bilinear."""
    shrinks = max(x.shape[2:]) > side  # without antialiasing only every k-th pixel would count
    how: dict[str, Any] = {"mode": "bilinear", "align_corners": False, "antialias": shrinks}
    return torch.nn.functional.interpolate(x, size=(side, side), **how)


class Pooled(FeatureExtractorBase):
    """A network with one layer of features: the mean over positions of what `maps` gives."""

    layer: str

    def maps(self, x: Tensor) -> Tensor:
        """uint8 images, (B, 3, H, W) -> float32, (B, features, h, w)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of images.

        Args:
            x: uint8, (B, 3, H, W).

        Returns:
            float32, (B, features), in a tuple.
        """
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"images are {x.dtype} {tuple(x.shape)}: give uint8 (B, 3, H, W)")
        out = {self.layer: self.maps(x).mean((2, 3)).float()}
        return tuple(out[name] for name in self.features_list)

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return (cls.layer,)

    @classmethod
    def get_default_feature_layer_for_metric(cls, metric: str) -> str:
        return {"fid": cls.layer, "kid": cls.layer, "prc": cls.layer}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False


class FeatureExtractorLite(Pooled):
    """The 1280 pooled features after `conv_head` of a timm EfficientNet-lite (Tan & Le 2019) with ImageNet weights."""

    backbone: str
    layer = LITE_LAYER

    def __init__(self, name: str, features_list: list[str], **kwargs: Any):
        super().__init__(name, features_list)
        self.net: Any = lite_backbone(self.backbone).to(memory_format=torch.channels_last)

    def maps(self, x: Tensor) -> Tensor:
        y = _resize((x.float() / 255 - LITE_MEAN) / LITE_STD, LITE_SIZE)
        return self.net.forward_features(y.contiguous(memory_format=torch.channels_last))  # (B, 1280, 3, 3)

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 16, 16, dtype=torch.uint8)


class FeatureExtractorLite0(FeatureExtractorLite):
    backbone = "tf_efficientnet_lite0"


class FeatureExtractorLite2(FeatureExtractorLite):
    backbone = "tf_efficientnet_lite2"


NSFW_LAYER = "1024"
NSFW_SIZE = 96
"""Side that images are resized to, pixels, as for EfficientNet-lite; at 224, its training size, the digits take seven
times as long."""
NSFW_LAST = "Relu_48:0"
"""Output of the last block of convolutions, which is averaged."""
NSFW_MEAN = (104.0, 117.0, 123.0)
"""Of blue, green, red; subtracted from pixels of 0 to 255."""


class FeatureExtractorOpenNsfw(Pooled):
    """The 1024 pooled features of Yahoo's open_nsfw: a ResNet-50 (He et al. 2016) of half the width, by onnxruntime.

    It was trained on ImageNet, then to tell images that are not safe for work. It runs on the CPU.
    """

    layer = NSFW_LAYER

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ):
        super().__init__(name, features_list)
        assert feature_extractor_weights_path is not None, "give the path of the weights"
        import onnx
        from google.protobuf.message import DecodeError
        from onnxruntime import InferenceSession, SessionOptions

        try:
            model = onnx.load(feature_extractor_weights_path)
        except DecodeError:
            raise ValueError("it is no ONNX file") from None
        made = [node.output[0] for node in model.graph.node]
        if NSFW_LAST not in made:
            raise ValueError(f"its graph has no {NSFW_LAST}")
        del model.graph.node[made.index(NSFW_LAST) + 1 :]  # the pooling of 7x7, and the classifier
        for i, side in enumerate(("height", "width"), 1):  # a network of convolutions takes any
            model.graph.input[0].type.tensor_type.shape.dim[i].dim_param = side
        del model.graph.output[:]
        model.graph.output.append(onnx.ValueInfoProto(name=NSFW_LAST))
        options = SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # it warns of weights that the classifier alone had used
        self.session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def maps(self, x: Tensor) -> Tensor:
        y = _resize(x.cpu().float(), NSFW_SIZE).flip(1).permute(0, 2, 3, 1) - torch.tensor(NSFW_MEAN)
        (last,) = self.session.run(None, {self.session.get_inputs()[0].name: y.numpy()})  # (B, 1024, 3, 3)
        return torch.from_numpy(last).to(x.device)


GRID = 16
"""Patches per side: 224 / 14."""
OFFSET = 0.1
"""Added to the grid by the authors when they resize the position embedding."""


class FeatureExtractorTimmDinoV2(FeatureExtractorDinoV2):
    """torch-fidelity's DINOv2 ViT-L/14 with the authors' file, in timm's implementation.

    torch-fidelity itself runs code that torch.hub fetches, and takes no file. The position embedding, made for 37x37
    patches, is resized to 16x16 as that code does (bicubic, offset 0.1), so that features are the same up to rounding.
    """

    architecture = "vit_large_patch14_dinov2"

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ):
        FeatureExtractorBase.__init__(self, name, features_list)
        assert feature_extractor_weights_path is not None, "give the path of the weights"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm

        with torch.device("meta"):
            net = timm.create_model(self.architecture, pretrained=False, num_classes=0, img_size=14 * GRID)
        state = read_state(feature_extractor_weights_path)
        state = {k: v for k, v in state.items() if k != "mask_token"}  # of training alone
        if "pos_embed" in state:
            state["pos_embed"] = _resized(state["pos_embed"])
        self.feature_extractor_internal_dtype = torch.float32
        self.model = net.to_empty(device="cpu")
        load_fitting(self.model, state, feature_extractor_weights_path)
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def can_be_compiled() -> bool:
        return False


def _resized(embedding: Tensor) -> Tensor:
    """Position embedding for GRID x GRID patches.  (1, 1 + m * m, d) -> (1, 1 + GRID * GRID, d)"""
    m = int((embedding.shape[1] - 1) ** 0.5)
    if embedding.ndim != 3 or m in (0, GRID) or m * m != embedding.shape[1] - 1:
        return embedding
    grid = embedding[:, 1:].float().reshape(1, m, m, -1).permute(0, 3, 1, 2)
    scale = (GRID + OFFSET) / m
    grid = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([embedding[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
