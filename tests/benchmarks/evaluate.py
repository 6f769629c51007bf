"""Evaluation of the digits student, 1,797 images against 1,797, on the CPU; prints JSON.

python tests/benchmarks/evaluate.py [RUNS] [NPROC]

first: a process with an empty cache. cached: a process that finds the features of both sets. Each in a process of its
own; "call" is `evaluate` alone, "process" also
Python's start and the imports, "cpu" the processor time of the whole, which other work on the machine lengthens less
than the clock's. parts: where the time of a first evaluation goes, each part by itself: seconds, and processor
seconds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CALL = """
import json, resource, sys, time
began = time.perf_counter()
import gddlab
from gddlab.nets.io import make_student
student = make_student(gddlab.load_teacher("digits")).eval().requires_grad_(False)
loaded = time.perf_counter()
nproc = int(sys.argv[1])
scores = gddlab.evaluate(student, data="digits", nproc=nproc if nproc > 1 else None, progress=False)
call = time.perf_counter() - loaded
used = [sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
found = {r.metric: r.value for r in scores}
print(json.dumps({"call": call, "cpu": sum(used), "imports": loaded - began, "scores": found}))
"""


def one(cache: Path, nproc: int) -> dict[str, Any]:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CALL, str(nproc)],
        env=os.environ | {"GDDLAB_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return {"process": time.perf_counter() - began, **json.loads(done.stdout.splitlines()[-1])}


def parts() -> dict[str, list[float]]:
    import torch

    import gddlab
    from gddlab.evaluation import find_extractor
    from gddlab.evaluation.features import image_features
    from gddlab.evaluation.metrics import frechet, kernel, mind
    from gddlab.files import hash_tensors
    from gddlab.nets.io import make_student
    from gddlab.sampling.grid import to_uint8

    out = {}

    def timed(name: str, call: Any) -> Any:
        began, used = time.perf_counter(), time.process_time()
        value = call()
        out[name] = [round(time.perf_counter() - began, 3), round(time.process_time() - used, 3)]
        return value

    student = make_student(gddlab.load_teacher("digits")).eval().requires_grad_(False)
    real = torch.from_numpy(gddlab.open_dataset("digits").uint8).permute(0, 3, 1, 2)
    images = timed("sampling", lambda: to_uint8(gddlab.sample(student, 1797)))
    timed("hashing", lambda: hash_tensors({"images": images}))
    spec = find_extractor("lite2")
    timed("building the extractor", spec.build)
    a = timed("features of one set", lambda: image_features(images, spec))
    b = image_features(real, spec)
    timed("Frechet distance", lambda: frechet(a, b))
    timed("kernel distance", lambda: kernel(a, b))
    timed("MIND", lambda: mind(a, b))
    return out


def main(runs: int, nproc: int) -> dict[str, Any]:
    load = os.getloadavg()[0]
    first, cached = [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            first.append(one(Path(folder), nproc))
            cached.append(one(Path(folder), nproc))
    assert len({json.dumps(r["scores"]) for r in (*first, *cached)}) == 1, "the scores of one student differ"
    from gddlab.provenance import hardware, versions

    def medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {k: statistics.median(r[k] for r in rows) for k in ("call", "process", "cpu")} | {
            "all": [round(r["call"], 2) for r in rows]
        }

    return {
        "what": "evaluate, fid and kid on lite2, 1797 against 1797 digits, one-step student; seconds, medians",
        "runs": runs,
        "nproc": nproc,
        "first": medians(first),
        "cached": medians(cached),
        "parts": parts(),
        "load_before": load,
        "hardware": hardware(),
        "versions": versions(),
    }


if __name__ == "__main__":
    given = [int(a) for a in sys.argv[1:]]
    print(json.dumps(main(*given, *(3, 1)[len(given) :]), indent=2))
