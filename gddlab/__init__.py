"""What the layers of a diffusion model do at each noise level, and how that makes it a one-step generator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gddlab import nets
    from gddlab.datasets import open_dataset, prepare
    from gddlab.diagnosis.doctor import doctor
    from gddlab.diagnosis.preflight import preflight
    from gddlab.diagnosis.scaling import scaling
    from gddlab.distill import presets
    from gddlab.distill.adversarial import adversarial_problem
    from gddlab.distill.augment import Augment
    from gddlab.distill.config import TrainConfig
    from gddlab.distill.instance import Consistency, FromNoise, Progressive, Trajectory
    from gddlab.distill.lpips import LPIPS
    from gddlab.distill.projected import Projected
    from gddlab.distill.stylegan2 import StyleGAN2
    from gddlab.distill.teacher import TeacherConfig, train_teacher
    from gddlab.errors import GddlabError
    from gddlab.evaluation import evaluate, real_split, reference
    from gddlab.experiments import reproduce
    from gddlab.freezing import FreezeMask, compare, controls, select_freeze
    from gddlab.launch import attach, train
    from gddlab.nets.export import export
    from gddlab.probing import (
        Probe,
        ProbeResult,
        ablate,
        attribute,
        estimate,
        grad_probe,
        patch,
        probe,
        weight_change,
        wrap,
    )
    from gddlab.reporting.report import report
    from gddlab.runs import load_run, load_runs, load_study
    from gddlab.sampling import sample, sample_files
    from gddlab.teachers import convert, load_teacher

__version__ = "0.1.0"

__all__ = [
    "LPIPS",
    "Augment",
    "Consistency",
    "FreezeMask",
    "FromNoise",
    "GddlabError",
    "Probe",
    "ProbeResult",
    "Progressive",
    "Projected",
    "StyleGAN2",
    "TeacherConfig",
    "TrainConfig",
    "Trajectory",
    "ablate",
    "adversarial_problem",
    "attach",
    "attribute",
    "compare",
    "controls",
    "convert",
    "doctor",
    "estimate",
    "evaluate",
    "export",
    "grad_probe",
    "load_run",
    "load_runs",
    "load_study",
    "load_teacher",
    "nets",
    "open_dataset",
    "patch",
    "preflight",
    "prepare",
    "presets",
    "probe",
    "real_split",
    "reference",
    "report",
    "reproduce",
    "sample",
    "sample_files",
    "scaling",
    "select_freeze",
    "train",
    "train_teacher",
    "weight_change",
    "wrap",
]

# Where each name lives; it is imported when first used, since torch, pandas and timm cost seconds.
_HOME = {
    "LPIPS": "gddlab.distill.lpips",
    "Augment": "gddlab.distill.augment",
    "Consistency": "gddlab.distill.instance",
    "FreezeMask": "gddlab.freezing",
    "FromNoise": "gddlab.distill.instance",
    "GddlabError": "gddlab.errors",
    "Probe": "gddlab.probing",
    "ProbeResult": "gddlab.probing",
    "Progressive": "gddlab.distill.instance",
    "Projected": "gddlab.distill.projected",
    "StyleGAN2": "gddlab.distill.stylegan2",
    "TeacherConfig": "gddlab.distill.teacher",
    "TrainConfig": "gddlab.distill.config",
    "Trajectory": "gddlab.distill.instance",
    "ablate": "gddlab.probing",
    "adversarial_problem": "gddlab.distill.adversarial",
    "attach": "gddlab.launch",
    "attribute": "gddlab.probing",
    "compare": "gddlab.freezing",
    "controls": "gddlab.freezing",
    "convert": "gddlab.teachers",
    "doctor": "gddlab.diagnosis",
    "estimate": "gddlab.probing",
    "evaluate": "gddlab.evaluation",
    "export": "gddlab.nets.export",
    "grad_probe": "gddlab.probing",
    "load_run": "gddlab.runs",
    "load_runs": "gddlab.runs",
    "load_study": "gddlab.runs",
    "load_teacher": "gddlab.teachers",
    "nets": "gddlab",
    "open_dataset": "gddlab.datasets",
    "patch": "gddlab.probing",
    "preflight": "gddlab.diagnosis.preflight",
    "prepare": "gddlab.datasets",
    "presets": "gddlab.distill",
    "probe": "gddlab.probing",
    "real_split": "gddlab.evaluation",
    "reference": "gddlab.evaluation",
    "report": "gddlab.reporting.report",
    "reproduce": "gddlab.experiments",
    "sample": "gddlab.sampling",
    "sample_files": "gddlab.sampling",
    "scaling": "gddlab.diagnosis.scaling",
    "select_freeze": "gddlab.freezing",
    "train": "gddlab.launch",
    "train_teacher": "gddlab.distill.teacher",
    "weight_change": "gddlab.probing",
    "wrap": "gddlab.probing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'gddlab' has no attribute {name!r}")
    home = _HOME[name]
    if name in ("nets", "presets"):
        value: Any = importlib.import_module(f"{home}.{name}")
    else:
        value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
