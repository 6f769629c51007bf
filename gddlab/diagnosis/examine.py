"""`gddlab.doctor()`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gddlab.diagnosis import machine
from gddlab.diagnosis.devices import device_findings, device_problems
from gddlab.diagnosis.findings import Doctor, Finding
from gddlab.diagnosis.machine import CPU, GPU
from gddlab.diagnosis.packages import package_findings
from gddlab.diagnosis.stored import data_findings, folder_findings, storage_problems, weight_findings
from gddlab.distill.presets import PRESETS

__all__ = ["abilities", "doctor", "needs"]


def needs() -> dict[str, list[str]]:
    """What each ability needs, by the names of findings: the presets as they are, and what they do not use."""
    out = {}
    for name, make in PRESETS.items():
        config = make(run_dir="runs")
        backbones = [f"backbone {b}" for b in config.backbones]
        out[f"preset {name}"] = [f"teacher {config.teacher}", str(config.data), *backbones]
    return out | {
        "LPIPS": ["LPIPS network vgg16", "LPIPS linear layers"],
        "fd and kd on lite2": ["extractor lite2"],
        "FID and KID": ["extractor inception"],
    }


def doctor() -> Doctor:
    """Looks at this machine: devices, versions, weights, data, folders, and what gddlab can therefore do.

    Downloads nothing, loads no weights, makes no folder.

    Returns:
        Findings and problems; `print` it, or see `to_frame` and `to_dict`.
    """
    cpu, gpus = machine.cpu(), machine.cuda_devices()
    packages, missing, unfit = package_findings()
    weights, data = weight_findings(), data_findings()
    findings = (
        *device_findings(cpu, gpus),
        *packages,
        *weights,
        *data,
        *folder_findings(),
        *abilities([*weights, *data], cpu, gpus),
    )
    problems = (
        *missing,
        *unfit,
        *device_problems(cpu, gpus, driver_unused=machine.driver_without_cuda()),
        *storage_problems(weights),
    )
    return Doctor(findings, problems, broken=bool(missing))


def abilities(there: Iterable[Finding], cpu: CPU, gpus: Sequence[GPU]) -> list[Finding]:
    """What can be done with what is there, and on which device."""
    found = {f.name for f in there if f.found}
    out = []
    for name, wanted in needs().items():
        lacks = [w for w in wanted if w not in found]
        value = "lacks " + ", ".join(lacks) if lacks else "yes"
        out.append(Finding("able", name, not lacks, value, details={"lacks": lacks}))
    bf16 = all(g.bf16 for g in gpus) if gpus else bool(cpu.bf16)
    value = "yes" if bf16 else "no: float32 is faster"
    out.append(Finding("able", "bfloat16 training", bf16, value))
    n = len(gpus) if gpus else max(1, int(cpu.usable_cores))
    value = f"on {n} {'CUDA device' if gpus else 'core'}{'s' if n > 1 else ''}, nproc up to {n}"
    out.append(Finding("able", "training", True, value, details={"device": "cuda" if gpus else "cpu", "nproc": n}))
    return out
