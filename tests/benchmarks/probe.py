"""What hooks cost on a forward pass of the CIFAR-10 NCSN++, or of a transformer: bare, probed, captum, clones;
interleaved pairs; prints JSON.

python tests/benchmarks/probe.py [ROUNDS] [IMAGES] [SIGMAS] [NAME] [CHANNELS]

IMAGES are those of one pass, an even number: correlations are between pairs. NAME "sit" is a SiT of four blocks and 256
tokens, whose linear layers are measured, such as `probe.py 15 2 8 sit 384`. Memory is kept (`gddlab.memory`), as in
gddlab's commands; GDDLAB_KEEP_MEMORY=0 gives it back.
"""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from gddlab.memory import keep_memory
from gddlab.nets import build, from_edm
from gddlab.probing import DEFAULT, Probe
from gddlab.probing.probe import peak_memory
from gddlab.provenance import hardware, versions
from gddlab.sampling import karras_sigmas

CHEAP = ("rms", "mean_abs", "mean", "std")
MOVES = ("rel_update", "rel_update_attn", "rel_update_mlp")


def network(name: str, channels: int | None) -> nn.Module:
    if name != "sit":
        return build(name, **({"model_channels": channels} if channels else {}))
    width = channels or 1152
    sizes = {"img_resolution": 32, "img_channels": 4, "label_dim": 10, "num_blocks": 4}
    return from_edm("DiTPrecond", kind="sit", model_channels=width, num_heads=width // 64, **sizes)


def measured(net: nn.Module) -> list[nn.Module]:
    """Convolutions; linear layers of a network that has hardly any."""
    kinds: tuple[list[nn.Module], ...] = tuple(
        [m for m in net.modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.Linear)
    )
    return max(kinds, key=len)


@contextlib.contextmanager
def clones(net: nn.Module, kept: dict[str, torch.Tensor]) -> Iterator[None]:
    """The hook that everyone writes first: it keeps a copy of every layer's output."""
    layers = {*measured(net)}
    handles = [
        m.register_forward_hook(lambda _m, _a, y, n=n: kept.__setitem__(n, y.detach().clone()))
        for n, m in net.named_modules()
        if m in layers
    ]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def variants(net: nn.Module, sigmas: list[float], images: int) -> dict[str, Callable[[], object]]:
    x = torch.randn(images * len(sigmas), net.img_channels, net.img_resolution, net.img_resolution)
    level = torch.tensor(sigmas).repeat(images)
    x = x * level[:, None, None, None]
    layers = measured(net)
    kind = "conv" if isinstance(layers[0], nn.Conv2d) else "linear"

    def probed(**options: object) -> Callable[[], object]:
        measure = Probe(net, sigmas, layers=kind, **options)

        def run() -> None:
            with measure, measure.images(images):
                net(x, level)

        return run

    def cloned() -> object:
        kept: dict[str, torch.Tensor] = {}
        with clones(net, kept):
            net(x, level)
        return {n: y.square().flatten(1).mean(1) for n, y in kept.items()}

    out: dict[str, Callable[[], object]] = {
        "bare": lambda: net(x, level),
        "four cheapest": probed(stats=CHEAP),
        "four cheapest, correlation": probed(stats=(*CHEAP, "correlation")),
        "four cheapest, cosine": probed(stats=(*CHEAP, "cosine")),
        "default": probed(),
        "default, compiled": probed(compile=True),
        "default, cosine, spectral": probed(stats=(*DEFAULT, "cosine", "spectral_share")),
        "clones, mean square": cloned,
    }
    if kind == "linear":
        out |= {"rms": probed(stats="rms"), "relative updates": probed(stats=MOVES)}
    try:
        from captum.attr import LayerActivation
    except ImportError:
        return out
    out["captum LayerActivation"] = lambda: LayerActivation(net, layers).attribute(x, additional_forward_args=(level,))
    return out


def main(rounds: int, images: int, levels: int, name: str, channels: int | None) -> None:
    kept = keep_memory()
    torch.manual_seed(0)
    net = network(name, channels).eval()
    sigmas = karras_sigmas(levels).tolist()
    runs = variants(net, sigmas, images)
    times: dict[str, list[float]] = {k: [] for k in runs}
    memory: dict[str, list[float]] = {k: [] for k in runs}
    first: dict[str, float] = {}
    with torch.no_grad():
        for i in range(rounds + 1):
            for key, run in list(runs.items())[:: 1 if i % 2 else -1]:  # each is first as often as it is last
                with peak_memory(torch.device("cpu")) as peak:
                    began = time.perf_counter()
                    run()
                    took = time.perf_counter() - began
                if not i:  # it warms up, and compiles
                    first[key] = took
                else:
                    times[key].append(took)
                    memory[key].append(peak[0])
    print(
        json.dumps(
            {
                "what": f"forward pass of {name}, {channels or 'its own'} channels, {images} images at {levels} noise "
                "levels; medians, ratios from pairs within a round",
                "rounds": rounds,
                "memory kept": kept,
                "threads": torch.get_num_threads(),
                "layers": len(measured(net)),
                "seconds": {k: round(statistics.median(t), 3) for k, t in times.items()},
                "ratio_to_bare": {
                    k: round(statistics.median(b / a for a, b in zip(times["bare"], t, strict=True)), 3)
                    for k, t in times.items()
                },
                "ratio_to_bare, each pair": {
                    k: [round(b / a, 2) for a, b in zip(times["bare"], t, strict=True)] for k, t in times.items()
                },
                "seconds of the first pass": {k: round(t, 1) for k, t in first.items()},
                "peak_mib_in_a_pass": {k: round(max(m)) for k, m in memory.items()},
                "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "hardware": hardware(),
                "versions": versions(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    channels = int(given[5]) if 5 in given else None
    main(int(given.get(1, 15)), int(given.get(2, 2)), int(given.get(3, 18)), given.get(4, "ncsnpp-cifar10"), channels)
