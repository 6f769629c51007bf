"""What it gains that the C library keeps memory (`gddlab.memory.keep_memory`), on a CPU; prints JSON.

python tests/benchmarks/memory.py [PAIRS] [TASK ...]

Each measurement is a process of its own, by turns without and with kept memory. Seconds are medians of the repetitions
within a process, after one that warms up, then over processes; ratios are of pairs. Page faults are those of one
repetition, the peak is the system's for the process. On a machine that others use too, take OMP_NUM_THREADS=1 and the
processor seconds, which they lengthen little.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from gddlab.memory import keep_memory
from gddlab.provenance import hardware, versions
from gddlab.runtime import peak_memory_mib

MODES: dict[str, dict[str, str]] = {"given back": {"GDDLAB_KEEP_MEMORY": "0"}, "kept": {}}
Run = Callable[[], object]


def probing(rows: int, hooks: bool) -> Run:
    from gddlab.nets import build
    from gddlab.probing import Probe
    from gddlab.sampling import karras_sigmas

    net, levels = build("ncsnpp-cifar10", model_channels=64).eval(), 4
    sigmas, images = karras_sigmas(levels).tolist(), 16
    level = torch.tensor(sigmas).repeat(images)
    x = torch.randn(len(level), 3, 32, 32) * level[:, None, None, None]
    measure = Probe(net, sigmas)

    @torch.no_grad()
    def run() -> None:
        for i in range(0, len(level), rows):
            part = slice(i, i + rows)
            if hooks:
                with measure, measure.images(rows // levels):
                    net(x[part], level[part])
            else:
                net(x[part], level[part])

    return run


def sampling(n: int) -> Run:
    from gddlab.nets import build
    from gddlab.nets.io import make_student
    from gddlab.sampling import sample

    net = make_student(build("ncsnpp-cifar10", model_channels=64)).eval().requires_grad_(False)
    return lambda: sample(net, n, batch_size=n)


def training(**fields: object) -> Run:
    from gddlab.distill.build import build_step
    from gddlab.distill.distributed import World
    from gddlab.distill.presets import cifar10
    from gddlab.freezing import select_freeze
    from gddlab.nets import build

    teacher = build("ncsnpp-cifar10")
    mask = select_freeze(teacher, strategy="gdd-i")
    weights = {"vgg16_bn": "random"}
    config = cifar10(run_dir="unused", mask=mask, batch=8, discriminator={"weights": weights}, **fields)
    step, _ = build_step(config, teacher, World(0, 1, torch.device("cpu")))
    real, z_g, z_d = torch.randn(3, 8, 3, 32, 32)

    def run() -> None:
        _, features = step.g_step(z_g, None)
        if not config.reuse_fakes:
            del features
            features = step.fake_features(z_d, None)
        step.d_step(features, step.real_features(real), None)

    return run


def fast_training() -> Run:
    from gddlab.distill.presets import FAST

    return training(**FAST)


def digits_training() -> Run:
    from gddlab.distill.distributed import World
    from gddlab.distill.presets import digits
    from gddlab.distill.trainer import Trainer
    from gddlab.freezing import select_freeze
    from gddlab.teachers import load_teacher

    mask = select_freeze(load_teacher("digits"), strategy="gdd-i")
    trainer = Trainer(digits(run_dir="unused", mask=mask), World(0, 1, torch.device("cpu")))
    return lambda: [trainer.iterate() for _ in range(16)]


def teacher_training() -> Run:
    from gddlab.nets import build
    from gddlab.nets.precond import edm_loss

    net = build("ncsnpp-cifar10", model_channels=64).train()
    opt = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    (x, noise), sigma = torch.randn(2, 16, 3, 32, 32), torch.rand(16) + 0.1

    def run() -> None:
        opt.zero_grad(set_to_none=True)
        edm_loss(net(x + sigma[:, None, None, None] * noise, sigma), x, sigma).mean().backward()
        opt.step()

    return run


def features() -> Run:
    from gddlab.evaluation import find_extractor
    from gddlab.evaluation.features import image_features

    extractor = find_extractor("lite2")
    images = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)
    return lambda: image_features(images, extractor)


TASKS: dict[str, tuple[Callable[[], Run], int]] = {
    "bare, 16 rows a pass": (lambda: probing(16, False), 3),
    "bare, 64 rows a pass": (lambda: probing(64, False), 3),
    "probe, 64 rows a pass": (lambda: probing(64, True), 3),
    **{f"sample {n} images": (lambda n=n: sampling(n), r) for n, r in ((8, 7), (32, 3), (128, 2), (256, 1))},
    "train, CIFAR-10, batch 8": (training, 2),
    "train, CIFAR-10, batch 8, fast": (fast_training, 3),
    "train, digits, 16 iterations": (digits_training, 3),
    "train a teacher, batch 16": (teacher_training, 3),
    "evaluate, features of 512 images": (features, 3),
}


def child(task: str) -> dict[str, float]:
    keep_memory()
    torch.manual_seed(0)
    make, repetitions = TASKS[task]
    run = make()
    run()
    seconds, processor, faults = [], [], []
    for _ in range(repetitions):
        before, began, used = faulted(), time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - began)
        processor.append(time.process_time() - used)
        faults.append(faulted() - before)
    found = {"seconds": seconds, "processor seconds": processor, "page faults": faults}
    return {k: statistics.median(v) for k, v in found.items()} | {"peak MiB": peak_memory_mib()}


def faulted() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measured(task: str, mode: str) -> dict[str, float]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | MODES[mode]
    here = [sys.executable, __file__, "--child", task]
    return json.loads(subprocess.run(here, env=own, capture_output=True, text=True, check=True).stdout)


def main(pairs: int, tasks: list[str]) -> None:
    results: dict[str, object] = {}
    for task in tasks or TASKS:
        rounds = [{m: measured(task, m) for m in list(MODES)[:: 1 if i % 2 else -1]} for i in range(pairs)]
        found = {
            mode: {k: round(statistics.median(r[mode][k] for r in rounds), 3) for k in rounds[0][mode]}
            for mode in MODES
        }
        ratios = {
            f"times as fast by {k}, each pair": [round(r["given back"][k] / r["kept"][k], 2) for r in rounds]
            for k in ("seconds", "processor seconds")
        }
        results[task] = {"medians": found, **ratios}
        sys.stderr.write(f"{task}: {found}\n")
    what = "one measurement is a process; medians"
    about = {
        "what": what,
        "pairs": pairs,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions(),
    }
    print(json.dumps(about | {"results": results}, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, sys.argv[2:])
