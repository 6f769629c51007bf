"""One-step students for use without gddlab: ONNX files and torch.export programs, checked to give equal images."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError
from gddlab.files import atomic_path, check_free, hash_tensors, path_of
from gddlab.nets.denoiser import Denoiser
from gddlab.nets.io import architecture, from_edm
from gddlab.nets.precond import OneStepPrecond, Precond, check_level
from gddlab.progress import progress_bar
from gddlab.provenance import versions

TOLERANCE = {".onnx": 1e-4, ".pt2": 1e-6}
"""Largest accepted difference of a pixel, images in [-1, 1]."""
BATCHES = (1, 3)
OPSETS = range(18, 24)
"""ONNX operator sets that both the exporter and onnxruntime know."""


@dataclass(frozen=True)
class Exported:
    """An exported student; `max_difference` compares its pixels, in [-1, 1], with gddlab's over `batches`."""

    path: Path
    format: str
    size: int
    """Of the file, bytes."""
    max_difference: float
    metadata: dict[str, str]
    batches: tuple[int, ...] = BATCHES

    def __str__(self) -> str:
        sizes = " and ".join(map(str, self.batches))
        difference = f"pixels differ by at most {self.max_difference:.1e} at batch sizes {sizes}"
        return f"{self.path}: {self.format}, {self.size / 1e6:.1f} MB; {difference}"


class OneStep(nn.Module):
    """z ~ N(0, I), (N, C, H, W), and one-hot labels, (N, classes), to images in [-1, 1]."""

    def __init__(self, net: Precond, sigma: float):
        super().__init__()
        self.net, self.sigma = net, sigma

    def forward(self, z: Tensor, class_labels: Tensor | None = None) -> Tensor:
        out: Tensor = self.net(self.sigma * z, self.sigma, class_labels)
        return out.clamp(-1, 1)


def export(
    student: Denoiser,
    out: str | Path,
    *,
    sigma: float | None = None,
    opset: int = 18,
    overwrite: bool = False,
    progress: bool = True,
) -> Exported:
    """Writes a one-step student as ONNX or as a torch.export program, and checks that it gives equal images.

    The file takes `z`, (N, C, H, W), float32, standard normal, and, when the student is conditional, `class_labels`,
    (N, classes), float32, one-hot; N is free. It gives `images`, (N, C, H, W), clipped to [-1, 1], as `gddlab.sample`
    does. Metadata (ONNX: `metadata_props`; torch.export: the extra file `gddlab.json`) names architecture and weights.

    Args:
        student: The network; it is not changed. Exported in float32.
        out: File to write; its suffix, ".onnx" or ".pt2", decides the format.
        sigma: Noise level of the one step, by default the student's own. Needed for a network with another
            preconditioning (SiD's students: `EDMPrecond` at 2.5).
        opset: ONNX operator set, 18 to 23; ignored for .pt2.
        overwrite: Replaces a file that is there.
        progress: Shows a bar at a terminal.

    Returns:
        What was written, and the largest difference found.

    Raises:
        GddlabError: Another suffix, a network without a sigma, a missing package, a failing exporter, or images that
            differ; no file is then written, and an older one is kept.
    """
    out = path_of("out", out)
    if out.suffix not in TOLERANCE:
        raise GddlabError(f"out={str(out)!r}: its suffix decides the format, give .onnx or .pt2")
    check_free(out, overwrite)
    if not isinstance(student, Precond):
        raise GddlabError(f"a {type(student).__name__} cannot be exported: give a network of gddlab, as run.student()")
    if sigma is None:
        sigma = _own_sigma(student)
    check_level(f"sigma={sigma}", student, sigma)
    if opset not in OPSETS:
        raise GddlabError(f"opset={opset}: give {OPSETS[0]} to {OPSETS[-1]}")
    if out.suffix == ".onnx":
        _need_onnx()
    model = OneStep(_plain(student), float(sigma)).eval()
    shape = student.img_channels, student.img_resolution, student.img_resolution
    metadata = {
        "gddlab": versions()["gddlab"],
        "architecture": json.dumps(architecture(student), allow_nan=False),
        "sha256": hash_tensors(student.state_dict()),
        "sigma": repr(float(sigma)),
        "z": f"{('N', *shape)} float32, standard normal".replace("'", ""),
        "class_labels": f"(N, {student.label_dim}) float32, one-hot" if student.label_dim else "none",
        "images": "as z, in [-1, 1]",
    }
    with (
        progress_bar(total=3, desc=f"export {out.name}", unit="step", enabled=progress) as bar,
        atomic_path(out) as tmp,
    ):
        with _quiet():
            try:
                program = _trace(model)
                bar.update()
                if out.suffix == ".onnx":
                    _save_onnx(program, tmp, metadata, opset)
                    run = _open_onnx(tmp)
                else:
                    torch.export.save(program, tmp, extra_files={"gddlab.json": json.dumps(metadata)})
                    run = _open_pt2(tmp)
                bar.update()
                difference = _difference(model, run)
            except Exception as e:  # three packages raise errors of their own
                words = (str(e).strip() or type(e).__name__).splitlines()[0]
                raise GddlabError(f"{out} cannot be exported: {type(e).__name__}: {words}") from e
        if not difference <= TOLERANCE[out.suffix]:
            raise GddlabError(
                f"{out} is not written: its images differ by {difference:.1e} from the student's, accepted is at most "
                f"{TOLERANCE[out.suffix]:g}; give another opset=, or the other format"
            )
        bar.update()
    kind = f"ONNX (opset {opset})" if out.suffix == ".onnx" else "torch.export program"
    return Exported(out, kind, out.stat().st_size, difference, metadata)


def _own_sigma(student: Precond) -> float:
    """Noise level of a student's only step."""
    if not isinstance(student, OneStepPrecond):
        raise GddlabError(
            f"a {type(student).__name__} is no one-step student: give sigma=, the noise level of its step"
        )
    if student.mid_sigmas:
        raise GddlabError(
            f"this student takes {len(student.sigmas)} steps, an exported one takes one: "
            f"give sigma={student.sigma_g:g} for its first"
        )
    return student.sigma_g


def _plain(student: Precond) -> Precond:
    """The student on the CPU in float32, without hooks."""
    spec = architecture(student)
    with torch.device("meta"):
        net = from_edm(spec["precond"], **spec["init_kwargs"])
    state = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in student.state_dict().items()}
    net.load_state_dict(state, strict=True, assign=True)
    return net.requires_grad_(False).eval()


def _inputs(net: Precond, n: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    z = torch.randn(n, net.img_channels, net.img_resolution, net.img_resolution, generator=g)
    return (z, torch.eye(net.label_dim)[torch.arange(n) % net.label_dim]) if net.label_dim else (z,)


def _trace(model: OneStep) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("N", min=1)
    shapes: dict[str, Any] = {"z": {0: batch}, "class_labels": {0: batch} if model.net.label_dim else None}
    with torch.no_grad():
        return torch.export.export(
            model, _inputs(model.net, 2), dynamic_shapes=shapes if model.net.label_dim else (shapes["z"],)
        )


def _difference(model: OneStep, run: Callable[..., Tensor]) -> float:
    """Largest difference of a pixel over `BATCHES`; NaN if any is NaN."""
    with torch.no_grad():
        pairs = [(run(*x), model(*x)) for x in (_inputs(model.net, n) for n in BATCHES)]
    return torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()


def _open_pt2(path: Path) -> Callable[..., Tensor]:
    module: Callable[..., Tensor] = torch.export.load(path).module()
    return module


def _need_onnx() -> None:
    import importlib.util

    if missing := [p for p in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(p) is None]:
        raise GddlabError(
            f"export to ONNX needs {', '.join(missing)}: pip install 'gddlab[export]', or give a .pt2 file"
        )


def _save_onnx(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, str], opset: int) -> None:
    made = torch.onnx.export(program, dynamo=True, opset_version=opset, output_names=["images"], verbose=False)
    assert made is not None
    made.model.metadata_props.update(metadata)
    made.save(path, external_data=False)


def _open_onnx(path: Path) -> Callable[..., Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        feed = {name: t.numpy() for name, t in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(["images"], feed)[0])

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences exporters, which print, warn and log."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield
    finally:
        logging.disable(before)
