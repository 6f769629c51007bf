"""Time of `import gddlab` beside torch's own import, each in a fresh process, in pairs; prints JSON.

python tests/benchmarks/import_time.py [PAIRS]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

CODE = "import time; import torch; a = time.perf_counter(); {what}; print(time.perf_counter() - a)"
EVERYTHING = "import gddlab; [getattr(gddlab, n) for n in gddlab.__all__]"


def seconds(what: str) -> float:
    return float(
        subprocess.run(
            [sys.executable, "-c", CODE.format(what=what)], capture_output=True, text=True, check=True
        ).stdout
    )


def main(pairs: int) -> None:
    times: dict[str, list[float]] = {"import gddlab": [], EVERYTHING: []}
    for i in range(pairs + 1):
        for what in times:
            t = seconds(what)
            if i:
                times[what].append(t)
    out = {
        "what": "seconds after `import torch`, medians",
        "pairs": pairs,
        "import_gddlab": statistics.median(times["import gddlab"]),
        "every_public_name": statistics.median(times[EVERYTHING]),
    }
    print(json.dumps(out, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
