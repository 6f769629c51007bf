"""prepare of 512-pixel JPEG and PNG files to 64, with one process and with two, in pairs; prints JSON. Linux.

python tests/benchmarks/prepare.py [PAIRS] [IMAGES]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from gddlab.datasets import prepare
from gddlab.limits import usable_cores
from gddlab.provenance import hardware, versions

TICK = os.sysconf("SC_CLK_TCK")


def synthetic(folder: Path, images: int, unique: int = 16) -> None:
    """Clouds with a little noise, so that files have about a photograph's size; the same few under many names."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(unique):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize(
            (640, 512), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, dtype=np.float32) + rng.normal(0, 4, (512, 640, 3))
        im = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        im.save(folder.parent / f"{i}.jpg", quality=90) if i % 2 else im.save(folder.parent / f"{i}.png")
    for i in range(images):
        source = folder.parent / (f"{i % unique}.jpg" if i % 2 else f"{i % unique}.png")
        os.link(source, folder / f"{i:05d}{source.suffix}")


def cpu_of_session() -> dict[int, float]:
    """Seconds of CPU so far of each process of this session."""
    out = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == os.getsid(0):
            out[int(path.parent.name)] = (int(fields[11]) + int(fields[12])) / TICK
    return out


def cpu_of_machine() -> float:
    user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + soft) / TICK


def measure(source: Path, out: Path, workers: int) -> dict[str, float]:
    """Whole time, and rates between the first part and the last: without the start of processes."""
    seen: dict[int, float] = {}
    rows: list[tuple[float, int, float, float]] = []
    done = threading.Event()
    parts = out.with_name(out.name + ".parts")

    def sample() -> None:
        while not done.wait(0.05):
            seen.update(cpu_of_session())
            count = len(list(parts.glob("part-*.zip"))) if parts.is_dir() else -1
            rows.append((time.perf_counter(), count, sum(seen.values()), cpu_of_machine()))

    thread = threading.Thread(target=sample)
    thread.start()
    began = time.perf_counter()
    images = prepare(source, out, resolution=64, crop="center", workers=workers).images
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    out.unlink()
    most = max(n for _, n, _, _ in rows)
    (t0, n0, c0, m0) = next(row for row in rows if row[1] > 0)
    (t1, n1, c1, m1) = next(row for row in rows if row[1] == most)
    per_part = images / most
    return {
        "seconds": seconds,
        "images_per_s_whole": images / seconds,
        "images_per_s": (n1 - n0) * per_part / (t1 - t0),
        "cores_busy": (c1 - c0) / (t1 - t0),
        "cores_busy_by_others": max(0.0, (m1 - m0 - c1 + c0) / (t1 - t0)),
        "cores_idle": max(0.0, usable_cores() - (m1 - m0) / (t1 - t0)),
    }


def main(pairs: int, images: int) -> None:
    if os.getsid(0) != os.getpid() and os.getpgrp() != os.getpid():
        os.setsid()
    results: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "images"
        synthetic(source, images)
        for i in range(pairs):
            for workers in (1, 2) if i % 2 else (2, 1):
                results[workers].append(measure(source, Path(folder) / "out.zip", workers))
    medians = {w: {key: round(statistics.median(r[key] for r in rs), 3) for key in rs[0]} for w, rs in results.items()}
    print(
        json.dumps(
            {
                "what": f"prepare {images} images of 640x512, half JPEG, half PNG, to 64x64; medians",
                "pairs": pairs,
                "one_process": medians[1],
                "two_processes": medians[2],
                "speedup": round(
                    statistics.median(
                        b["images_per_s"] / a["images_per_s"] for a, b in zip(results[1], results[2], strict=True)
                    ),
                    3,
                ),
                "cores": usable_cores(),
                "hardware": hardware(),
                "versions": versions(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]), *(5, 800)[len(sys.argv) - 1 :])
