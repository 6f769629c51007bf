"""In a real Jupyter kernel: two processes from a cell; interrupted, kernel killed, found again, stopped, continued."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from gddlab.launch import attach
from gddlab.lock import held
from tests.launch.conftest import Quick
from tests.launch.faults import kill, processes, until

QUICKSTART = Path(__file__).resolve().parents[2] / "notebooks" / "00_quickstart.ipynb"


class Kernel:
    """A kernel in which cells are executed one by one."""

    def __init__(self, client: NotebookClient):
        self.client = client
        self.pid = int(self.run("import os; print(os.getpid())"))

    def run(self, source: str) -> str:
        """What a cell prints.

        Raises:
            CellExecutionError: It fails.
        """
        cell = nbformat.v4.new_code_cell(source)
        self.client.nb.cells.append(cell)
        done = self.client.execute_cell(cell, len(self.client.nb.cells) - 1)
        self.shown = [kind for o in done.outputs for kind in o.get("data", {})]
        return "".join(o.text for o in done.outputs if o.output_type == "stream" and o.name == "stdout")


@contextmanager
def kernel(folder: Path) -> Iterator[Kernel]:
    client = NotebookClient(
        nbformat.v4.new_notebook(), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    with client.setup_kernel(
        env=os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    ):
        yield Kernel(client)


@pytest.mark.filterwarnings("ignore")
def test_a_run_outlives_its_kernel(tmp_path: Path, tiny_teacher: Path, quick: Quick) -> None:
    config = quick(tmp_path / "run", total_kimg=1.2, checkpoint_kimg=0.16)
    config.write()
    folder = str(config.run_dir)
    before = [
        f"import gddlab; net = gddlab.load_teacher({str(tiny_teacher)!r})",
        "gddlab.probe(net, 2, n=2, states='prior', progress=False)",  # threads exist before processes start
    ]
    launch = f"run = gddlab.train(gddlab.load_run({folder!r}).config, nproc=2); run.watch()"
    outlives_its_kernel(tmp_path, before, launch, repr(folder), kimg=1.2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_quickstart_outlives_its_kernel(tmp_path: Path) -> None:
    cells = [c.source for c in nbformat.read(QUICKSTART, 4).cells if c.cell_type == "code"]
    launch = next(i for i, c in enumerate(cells) if "gddlab.train(" in c)
    assert any("gddlab.probe(" in c for c in cells[:launch]) and "nproc=2" in cells[launch]
    outlives_its_kernel(tmp_path, cells[:launch], cells[launch], "folder / 'run'", kimg=2.0)


def outlives_its_kernel(tmp_path: Path, before: list[str], launch: str, run_dir: str, *, kimg: float) -> None:
    """Launched from a cell after others, interrupted, its kernel killed; found, stopped and continued in another."""
    with suppress(DeadKernelError, RuntimeError), kernel(tmp_path) as first:
        for source in before:
            first.run(source)
        folder = Path(first.run(f"print({run_dir})").strip())
        assert folder.is_relative_to(tmp_path)

        def interrupt() -> None:
            until(lambda: (folder / "status.json").exists() and attach(folder).written_status.get("nimg", 0) > 0)
            os.kill(first.pid, signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            first.run(launch)
        assert first.run("print(run.status)") == "running\n"
        kill(first.pid)
        with pytest.raises((DeadKernelError, RuntimeError)):
            first.run("print('alive')")

    seen = attach(folder).written_status["nimg"]
    until(lambda: attach(folder).written_status["nimg"] > seen)
    with kernel(tmp_path) as second:
        second.run(f"import time, gddlab; run = gddlab.attach({str(folder)!r})")
        took = float(second.run("began = time.monotonic(); run.stop(); print(time.monotonic() - began)"))
        assert took < 60  # tests/benchmarks/launch.py measures it; here other tests may run beside
        assert second.run("print(run.status)") == "stopped\n"
        assert not processes(folder) and not held(folder)
        assert seen <= attach(folder).written_status["nimg"] < 1000 * kimg
        second.run("run = gddlab.train(run.config, nproc=2); run.watch()")
        assert "image/png" in second.shown  # in a kernel that has drawn nothing before
        assert second.run("print(run.status, run.student().card.kimg)") == f"done {kimg}\n"
    assert attach(folder).metrics["nimg"].is_monotonic_increasing
    until(lambda: not processes(folder), 10)
