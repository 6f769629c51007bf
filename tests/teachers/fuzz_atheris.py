"""Fuzzes the reader guided by coverage; no test: `python -m tests.teachers.fuzz_atheris FOLDER -max_total_time=600`.

It needs `pip install atheris`, which writes each file that raises anything but a refusal, or does anything but read.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["gddlab.teachers"]):
        import gddlab.teachers.edm  # noqa: F401
    from tests.teachers.attacks import corpus, load

    if len(sys.argv) > 1 and not sys.argv[1].startswith("-") and not any(Path(sys.argv[1]).iterdir()):
        for i, content in enumerate(corpus().values()):
            (Path(sys.argv[1]) / f"{i:04}").write_bytes(content)
    path = Path(tempfile.mkdtemp()) / "x.pkl"

    def one(content: bytes) -> None:
        path.write_bytes(content)
        load(path)

    atheris.Setup([*sys.argv, "-max_len=100000", "-timeout=20"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
