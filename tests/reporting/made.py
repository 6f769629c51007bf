"""Run directories as a trainer and an evaluation leave them, without training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gddlab.distill.status import write_status
from gddlab.evaluation import Record, append_records
from gddlab.files import write_json
from gddlab.runs import Run
from tests.conftest import tiny_config
from tests.evaluation.test_records import record


def made(
    folder: Path,
    teacher: Path,
    name: str,
    seed: int,
    values: Mapping[float, float],
    *,
    state: str = "done",
    scored: Mapping[str, Any] | None = None,
    more: tuple[Record, ...] = (),
    **fields: Any,
) -> Run:
    """A run of 0.048 kimg.

    Args:
        values: kimg -> fd-lite2@64.
        state: As in status.json; one that is not "done" stopped at the last of `values`.
        scored: Fields of the records.
        more: Records added.
        **fields: Of the configuration.
    """
    config = tiny_config(folder / name / f"seed-{seed}", teacher, seed=seed, **fields)
    config.write()
    nimg = round(1000 * (config.total_kimg if state == "done" else max(values, default=0)))
    write_status(config.run_dir, state, nimg=nimg)
    append_records(
        config.run_dir, [record(**({"value": v, "kimg": k} | dict(scored or {}))) for k, v in values.items()]
    )
    append_records(config.run_dir, more)
    scores = [record(sampler=f"heun-{n}", value=v).to_dict() for n, v in ((18, 50.0), (1, 900.0))]
    write_json(config.run_dir / "teacher.json", {"parameters": 1000, "scores": scores})
    hardware = {"cpu": "x86_64", "cores": 2, "threads": 1, "cuda": []}
    write_json(config.run_dir / "provenance.json", {"world_size": 1, "hardware": hardware})
    ticks = [
        {"kimg": 0.016 * i, "sec_per_kimg": [90.0, 20.0, 30.0][i - 1], "seconds": 60.0 * i, "peak_mem_mib": 100.0 + i}
        for i in (1, 2, 3)
    ]
    (config.run_dir / "metrics.jsonl").write_text("".join(json.dumps(t) + "\n" for t in ticks))
    return Run(config.run_dir)
