"""What `RunHandle.watch` shows: a live figure in a notebook, a live line at a terminal, a line now and then in a log."""

from __future__ import annotations

import io
import os
import sys
import time
from typing import TYPE_CHECKING

from gddlab.files import last_jsonl, thin_jsonl
from gddlab.progress import duration, interactive

if TYPE_CHECKING:
    from gddlab.launch.handle import RunHandle

__all__ = ["audience", "follow", "line"]

LOSSES = {"loss/g": "G", "loss/d": "D", "loss/instance": "instance"}
LOGITS = {"logits/fake": "generated", "logits/real": "real"}
LOG_SECONDS = 30
"""Seconds between two lines where nobody sees them live."""


def line(run: RunHandle) -> str:
    """One line: state, progress, losses, time left."""
    s, last = run.written_status, last_jsonl(run.run_dir / "metrics.jsonl")
    if last is None or "total_nimg" not in s:
        return f"{run.run_dir.name}: {run.status}"
    seconds = (s["total_nimg"] - last["nimg"]) / 1000 * last["sec_per_kimg"]
    left = f"  {duration(seconds)} left" if seconds else ""
    losses = "  ".join(f"{title} {last[name]:.3f}" for name, title in LOSSES.items() if name in last)
    alarm = f"  ALARM {s['alarm']}" if "alarm" in s else ""
    return (
        f"{run.run_dir.name}: {run.status}  {last['kimg']:.1f} of {s['total_nimg'] / 1000:.1f} kimg  "
        f"loss {losses}  {last['sec_per_kimg']:.1f} s/kimg{left}{alarm}"
    )


def audience() -> str:
    """Who looks: "notebook", "terminal", "log" (a pipe or a file), or "nobody" (a test, whose output must not vary)."""
    if "PYTEST_VERSION" in os.environ:
        return "nobody"
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and hasattr(shell, "kernel"):
        return "notebook"
    return "terminal" if interactive() else "log"


def follow(run: RunHandle, interval: float) -> None:
    """Shows a run until it ends."""
    who = audience()
    if who == "nobody":
        return
    handle = None
    if who == "notebook":
        from IPython.display import display

        handle = display(_shown(run), display_id=True)
    shown, spoke = -1, time.monotonic()
    while True:
        running = run.status in ("starting", "running")
        nimg = int(run.written_status.get("nimg", 0))
        if handle is not None and (nimg != shown or not running):
            handle.update(_shown(run))
        elif who == "terminal":
            sys.stderr.write("\r\x1b[K" + line(run) + ("" if running else "\n"))
            sys.stderr.flush()
        elif who == "log" and (time.monotonic() - spoke > LOG_SECONDS or not running):
            spoke = time.monotonic()
            sys.stderr.write(line(run) + "\n")
        shown = nimg
        if not running:
            return
        time.sleep(interval)


def _shown(run: RunHandle):  # type: ignore[no-untyped-def]
    """The picture as a notebook takes it; a figure would be shown as text where nothing has set matplotlib up for notebooks."""
    from IPython.display import Image

    fig, content = _picture(run), io.BytesIO()
    fig.savefig(content, format="png", dpi=2 * fig.dpi)
    return Image(content.getvalue(), width=round(fig.get_figwidth() * fig.dpi))


def _picture(run: RunHandle):  # type: ignore[no-untyped-def]
    """Losses, logits and the newest grid, as one figure."""
    import pandas as pd
    from matplotlib.figure import Figure

    m = pd.DataFrame(thin_jsonl(run.run_dir / "metrics.jsonl"))
    fig = Figure(figsize=(10, 2.8), layout="constrained")
    axes = fig.subplots(1, 3)
    for ax, names, title in ((axes[0], LOSSES, "loss"), (axes[1], LOGITS, "mean logit")):
        for name, label in names.items():
            if name in m:
                ax.plot(m["kimg"], m[name], label=label)
        ax.set(xlabel="kimg", title=title)
        if ax.lines:
            ax.legend(frameon=False)
    grids = run.grids()
    axes[2].axis("off")
    if grids:
        from PIL import Image

        with Image.open(grids[-1]) as image:
            axes[2].imshow(image)
        axes[2].set_title(f"{float(grids[-1].stem):.1f} kimg")
    fig.suptitle(line(run), fontsize=9)
    return fig
