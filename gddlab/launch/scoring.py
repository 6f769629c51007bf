"""Scores a student while its run goes on: what the trainer is given where `metric_kimg` is set."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from gddlab.datasets import open_dataset
from gddlab.distill.config import TrainConfig
from gddlab.distill.trainer import Score
from gddlab.errors import GddlabError
from gddlab.evaluation import append_records, evaluate, load_records
from gddlab.evaluation.extractors import find_extractor
from gddlab.runs import load_run

__all__ = ["scorer"]


def scorer(config: TrainConfig, device: torch.device) -> Score:
    """A function from the file of a student to its score, by the metric of the configuration.

    Records go to the run's evaluation.jsonl; a student that was scored before the run was interrupted is not scored again.
    The real images are all of the data's (of the classes trained on), also where the run trains on some of them.

    Raises:
        GddlabError: The extractor is unknown, or its weights are missing.
    """
    spec = find_extractor(config.metric_extractor)
    metric = spec.metric_name(config.metric)

    def score(file: Path) -> tuple[str, float, float | None]:
        net = load_run(config.run_dir).student(file).to(device)
        known = [r for r in load_records(config.run_dir) if r.model_sha256 == net.card.sha256 and r.name == metric]
        if not known:
            try:
                scores = evaluate(
                    net,
                    data=open_dataset(config.data, classes=config.classes, progress=False),
                    metrics=(config.metric,),
                    n=config.metric_n,
                    extractor=config.metric_extractor,
                    progress=False,
                )
            except GddlabError as e:  # images or score are not finite
                sys.stdout.write(f"no score: {e}\n")
                return metric, math.nan, None
            known = [scores.record(metric)]
            append_records(config.run_dir, known)
        return known[-1].metric, known[-1].value, known[-1].std

    return score
