"""Loading the CIFAR-10 teacher (56 M parameters) from a pickle and from safetensors, on one core, in pairs: `python
tests/benchmarks/load_pickle.py [PAIRS]`.

Each load is a fresh process that has imported gddlab; seconds, and the growth of its peak memory, as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

LOAD = """
import json, re, sys, time
from pathlib import Path
from gddlab.teachers import load_teacher

def peak():  # VmHWM begins anew with a program; ru_maxrss keeps that of its parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before = peak()
began = time.perf_counter()
net = load_teacher(sys.argv[1])
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "peak_growth_mib": peak() - before, "sha256": net.card.sha256}))
"""


def load(path: Path) -> dict[str, float]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    cores = sorted(os.sched_getaffinity(0))[:1]
    out = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)],
        env=env,
        check=True,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return json.loads(out.stdout)


def main(pairs: int = 5) -> None:
    import torch

    from gddlab.nets import build
    from gddlab.provenance import hardware, versions
    from gddlab.teachers import convert
    from tests.teachers.pickles import write_snapshot

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        pickled = write_snapshot(Path(folder) / "ncsnpp-cifar10.pkl", build("ncsnpp-cifar10"))
        convert(pickled, Path(folder) / "ncsnpp-cifar10.safetensors")
        runs = [(load(pickled), load(Path(folder) / "ncsnpp-cifar10.safetensors")) for _ in range(pairs)]
        size = pickled.stat().st_size / 2**20
    assert len({r["sha256"] for pair in runs for r in pair}) == 1

    def medians(i: int) -> dict[str, float]:
        return {k: round(statistics.median(pair[i][k] for pair in runs), 3) for k in ("seconds", "peak_growth_mib")}

    out: dict[str, object] = {
        "file_mib": round(size, 1),
        "pairs": pairs,
        "pickle": medians(0),
        "safetensors": medians(1),
    }
    out |= {"peak_limit_mib": round(3 * size + 200, 1), "hardware": hardware(), "versions": versions()}
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
