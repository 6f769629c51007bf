"""Fresh processes that share one job, `sample_files` or another: `python -m gddlab.workers`, the job as a line of JSON on standard input."""

from __future__ import annotations

import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import IO, Any

from gddlab.errors import GddlabError
from gddlab.runtime import fresh_environment

__all__ = ["run_workers"]

SAMPLING = "gddlab.sampling.files:make_share"


def run_workers(
    job: dict[str, Any],
    nproc: int,
    report: Callable[[int], Any],
    *,
    entry: str = SAMPLING,
    hint: str = "what is written stays, the same call continues",
) -> None:
    """Starts `nproc` processes on a job and waits for them; none outlives this call, however it ends.

    Args:
        job: Arguments of `entry` without `report`.
        report: Called with a number of images whenever a part is there.
        entry: What each process calls, MODULE:FUNCTION; RANK and WORLD_SIZE in its environment say which part is its.
        hint: What to do when a process has died.

    Raises:
        GddlabError: The refusal of a process, or how it died; the others are ended.
    """
    line = (
        json.dumps({"entry": entry, **job}, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)).encode()
        + b"\n"
    )
    env = fresh_environment(nproc)
    events: queue.Queue[tuple[int, int | None]] = queue.Queue()  # rank, images done; None when it has ended
    workers: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    try:
        for rank in range(nproc):
            log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
            process = subprocess.Popen(
                [sys.executable, "-m", "gddlab.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc)},
            )
            workers.append((process, log))
            threading.Thread(target=_follow, args=(process, rank, line, events), daemon=True).start()
        running = nproc
        while running:
            rank, images = events.get()
            if images is not None:
                report(images)
                continue
            running -= 1
            process, log = workers[rank]
            if process.wait() != 0:
                raise GddlabError(_why(process.returncode, rank, nproc, log, hint))
    finally:
        for process, _ in workers:
            process.kill()
        for process, log in workers:
            process.wait()
            log.close()


def _follow(
    process: subprocess.Popen[bytes], rank: int, line: bytes, events: queue.Queue[tuple[int, int | None]]
) -> None:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()  # and stays open: its end tells the worker that this process is gone
        for count in process.stdout:
            events.put((rank, int(count)))
    except (OSError, ValueError):
        pass  # the process has died; its return code says how
    events.put((rank, None))


def _why(code: int, rank: int, nproc: int, log: IO[bytes], hint: str) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    if code == 2 and last.startswith("gddlab: "):
        return last.removeprefix("gddlab: ")
    how = f"was ended by signal {-code}" if code < 0 else f"failed: {last or f'exit code {code}'}"
    return "; ".join(filter(None, [f"process {rank} of {nproc} {how}", hint]))


def main() -> int:
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log, not among the counts

    module, _, function = job.pop("entry", SAMPLING).partition(":")
    call = getattr(importlib.import_module(module), function)
    try:
        call(**job, report=lambda images: out.write(f"{images}\n"))
    except GddlabError as e:
        sys.stderr.write(f"gddlab: {e}\n")
        return 2
    return 0


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not through sys.stdin, whose lock the interpreter wants when it ends
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
