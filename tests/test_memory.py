"""Memory that the C library keeps: tensors that come and go are not fetched anew, in processes of their own."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gddlab import cli
from gddlab.errors import GddlabError, NotFound
from gddlab.launch import RunFailed, rank
from gddlab.memory import keep_memory
from gddlab.workers import run_workers

glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc"
)
ALONE = "import tests.test_memory as t; print(t.keep_memory(), t.fetched())"


def fetched(report: object = None) -> int:
    """How many of ten tensors of 64 MiB, one after the other, had their memory fetched: 16 page faults and more.

    Where pages are huge (2 MiB) a tensor has 32. One of the ten may be fetched although memory is kept, where a
    thread that starts has put something small in the midst of what was free.
    """
    found = 0
    for _ in range(4):
        torch.zeros(1 << 24).add_(1)
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(1 << 24).add_(1)
        found += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before >= 16
    return found


def in_a_process(**environment: str) -> tuple[bool, int]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment
    out = subprocess.run([sys.executable, "-c", ALONE], env=own, capture_output=True, text=True, check=True).stdout
    took, found = out.split()
    return took == "True", int(found)


@glibc
def test_kept_memory_is_not_fetched_again() -> None:
    took, found = in_a_process()
    assert took and found <= 2


@glibc
@pytest.mark.parametrize("environment", [{"GDDLAB_KEEP_MEMORY": "0"}, {"MALLOC_TRIM_THRESHOLD_": "131072"}], ids=str)
def test_it_is_switched_off(environment: dict[str, str]) -> None:
    """By gddlab's own variable, and by a setting of glibc's, which is not overwritten."""
    took, found = in_a_process(**environment)
    assert not took and found == 10


@glibc
def test_workers_keep_memory() -> None:
    (found,) = run_workers({}, entry="tests.test_memory:fetched")
    assert found <= 2


def fails(kind: str, **_: object) -> None:
    raise {"failed": RunFailed, "absent": NotFound, "other": GddlabError}[kind]("the reason\n  of two lines")


@pytest.mark.parametrize(("kind", "error"), [("failed", RunFailed), ("absent", NotFound), ("other", GddlabError)])
def test_a_refusal_of_a_worker_keeps_its_class_and_its_text(kind: str, error: type[GddlabError]) -> None:
    with pytest.raises(GddlabError) as caught:
        run_workers({"kind": kind}, entry="tests.test_memory:fails")
    assert type(caught.value) is error and str(caught.value) == "the reason\n  of two lines"


class Kept(Exception):
    """Raised in place of keeping the memory of the tests' own process."""


def refuse() -> None:
    raise Kept


def test_commands_and_ranks_keep_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the process is their own: not where a test, or a notebook, calls a command as a function."""
    monkeypatch.setattr(cli, "keep_memory", refuse)
    monkeypatch.setattr(rank, "keep_memory", refuse)
    with pytest.raises(Kept):
        cli.main()
    cli.main(["--version"])
    with pytest.raises(Kept):
        rank.run_rank(tmp_path)


def test_elsewhere_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_memory() is False
