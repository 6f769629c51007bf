"""Fresh Python processes: started in one way, and `run_workers`, which shares a job among some of them.

A worker is `python -m gddlab.workers`. It reads its job as one line of JSON from standard input, writes what it has
done to standard output, one JSON value per line, and ends when standard input ends, which its parent keeps open.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from gddlab.errors import GddlabError
from gddlab.limits import usable_cores
from gddlab.memory import keep_memory

SAMPLING = "gddlab.sampling.to_files:make_share"
# By default libgomp's threads spin for milliseconds until others are done. As soon as another process takes a core, a
# run then all but stops; with a thousand turns it is a seventh slower alone, and half as fast beside another.
WAIT = {"GOMP_SPINCOUNT": "1000"}
# The calling process may belong to a cluster's job; what it starts does not.
JOB = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")


def fresh_environment(nproc: int) -> dict[str, str]:
    """Environment of one of `nproc` processes that share this machine: threads, import path, no part in another job."""
    own = {k: v for k, v in os.environ.items() if not JOB.fullmatch(k)}
    env = {"OMP_NUM_THREADS": str(max(1, int(usable_cores()) // nproc)), **WAIT, **own}
    env["PYTHONSAFEPATH"] = "1"  # a random.py in the working folder is not Python's
    root = str(Path(__file__).resolve().parents[1])  # gddlab may be imported from a clone that is not installed
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    return env


def start(
    module: str,
    *words: str,
    log: IO[bytes],
    nproc: int = 1,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Starts `python -m MODULE WORDS` in a fresh environment, as one of `nproc` processes on this machine.

    Standard error goes to `log`; `options` are those of `subprocess.Popen`.
    """
    env = fresh_environment(nproc) | dict(environment or {})
    return subprocess.Popen([sys.executable, "-m", module, *words], stderr=log, env=env, **options)


def run_workers(
    job: dict[str, Any],
    nproc: int = 1,
    report: Callable[[Any], Any] = lambda done: None,
    *,
    entry: str = SAMPLING,
    hint: str = "what is written stays, the same call continues",
    cores_for: int | None = None,
    threads: int | None = None,
) -> list[Any]:
    """Runs a job in `nproc` fresh processes and waits for them; none outlives this call.

    Args:
        job: Arguments of `entry` without `report`.
        nproc: Processes; RANK and WORLD_SIZE in the environment of each say which part is its own.
        report: Gets what processes report: numbers, such as that of images done, or text.
        entry: What each process calls, MODULE:FUNCTION.
        hint: Added to the error when a process has died.
        cores_for: Number of processes among which the machine's cores are divided; `nproc` if None.
        threads: Of each process, whatever the machine's cores and the environment say; also of what it starts.

    Returns:
        What `entry` returned in each process, by rank; JSON values.

    Raises:
        GddlabError: A process refused the job, of the class that it raised; or it died. The others are ended.
    """
    plain = json.dumps({"entry": entry, **job}, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))
    events: queue.Queue[tuple[int, Any]] = queue.Queue()  # rank and what it wrote; None at its end
    results: list[Any] = [None] * nproc
    workers: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    with ExitStack() as stack:
        for rank in range(nproc):
            log: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(nproc)}
            place |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = start("gddlab.workers", log=log, nproc=cores_for or nproc, environment=place, **pipes)
            stack.callback(process.wait)
            stack.callback(process.kill)
            workers.append((process, log))
            threading.Thread(target=_follow, args=(process, rank, plain.encode(), events), daemon=True).start()
        running = nproc
        while running:
            rank, wrote = events.get()
            if isinstance(wrote, int | str):
                report(wrote)
            elif wrote is None:
                running -= 1
                process, log = workers[rank]
                if process.wait() != 0:
                    raise GddlabError(_why(process.returncode, rank, nproc, log, hint))
            elif "refused" in wrote:
                module, name, text = wrote["refused"]
                raise getattr(importlib.import_module(module), name)(text)
            else:
                results[rank] = wrote["result"]
    return results


def _follow(process: subprocess.Popen[bytes], rank: int, job: bytes, events: queue.Queue[tuple[int, Any]]) -> None:
    assert process.stdin is not None and process.stdout is not None
    with suppress(OSError, ValueError):  # the process has died; its return code says how
        process.stdin.write(job + b"\n")
        process.stdin.flush()  # it stays open: its end tells the worker that its parent is gone
        for line in process.stdout:
            events.put((rank, json.loads(line)))
    events.put((rank, None))


def _why(code: int, rank: int, nproc: int, log: IO[bytes], hint: str) -> str:
    """How a process ended, in one line: the signal, or the last line of its log."""
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    how = f"was ended by signal {-code}" if code < 0 else f"failed: {last or f'exit code {code}'}"
    return "; ".join(filter(None, [f"process {rank} of {nproc} {how}", hint]))


def main() -> int:
    """The worker's side of `run_workers`."""
    keep_memory()
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to the log

    module, _, function = job.pop("entry", SAMPLING).partition(":")
    call = getattr(importlib.import_module(module), function)
    try:
        result = call(**job, report=lambda done: out.write(f"{json.dumps(done)}\n"))
    except GddlabError as e:
        out.write(json.dumps({"refused": [type(e).__module__, type(e).__qualname__, str(e)]}) + "\n")
        return 2
    if result is not None:
        out.write(json.dumps({"result": result}) + "\n")
    out.close()
    return 0


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not through sys.stdin: Python takes its lock when it shuts down
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
