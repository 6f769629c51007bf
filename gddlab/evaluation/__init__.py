"""Scores of generated images against real ones, on torch-fidelity's features and others, each with its provenance."""

from __future__ import annotations

from gddlab.evaluation.evaluate import evaluate, real_split, yardsticks
from gddlab.evaluation.extractors import EXTRACTORS, Extractor, find_extractor, register
from gddlab.evaluation.judge import train_judge
from gddlab.evaluation.metrics import METRICS
from gddlab.evaluation.records import (
    Comparison,
    Record,
    Scores,
    Trace,
    append_records,
    compare,
    load_records,
    scores_of,
)
from gddlab.evaluation.references import reference
from gddlab.evaluation.run_scores import evaluate_snapshots, missing_scores, score_student, scorer
from gddlab.evaluation.trace import trace

__all__ = [
    "EXTRACTORS",
    "METRICS",
    "Comparison",
    "Extractor",
    "Record",
    "Scores",
    "Trace",
    "append_records",
    "compare",
    "evaluate",
    "evaluate_snapshots",
    "find_extractor",
    "load_records",
    "missing_scores",
    "real_split",
    "reference",
    "register",
    "score_student",
    "scorer",
    "scores_of",
    "trace",
    "train_judge",
    "yardsticks",
]
