"""Work over fresh processes, results in order: never forked from the caller, gone when the caller is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from gddlab.errors import GddlabError

__all__ = ["Workers"]

T = TypeVar("T")


class Workers:
    """A pool of processes; one worker works in the calling process.

    Processes come from a fork server that has imported this package once; they do not import the caller's main module,
    so that scripts need no `if __name__ == "__main__"`.
    """

    def __init__(self, count: int):
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["gddlab.datasets.prepare"])
            self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[..., T], tasks: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """function(*task) for each task, in the order of tasks; few of them wait at a time.

        Raises:
            GddlabError: A process was killed.
        """
        if self._pool is None:
            for task in tasks:
                yield function(*task)
            return
        waiting: deque[Future[T]] = deque()
        try:
            for task in tasks:
                with _no_main():
                    waiting.append(self._pool.submit(function, *task))
                if len(waiting) > 2 * self.count:  # enough that a slow first task leaves nobody idle
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise GddlabError(
                f"one of {self.count} worker processes was killed (out of memory?): run the same command again, it goes on "
                "where it was; workers=1 needs least memory"
            ) from None


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides, and ends the pool
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """An executor's processes wait for work for ever when their parent is killed."""
    parent.join()
    os._exit(1)


@contextmanager
def _no_main() -> Iterator[None]:
    """Hides the caller's main module, which new processes would import; they are started by the first submit."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
