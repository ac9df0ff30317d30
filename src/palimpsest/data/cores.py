"""All cores of this machine: how many there are, whose they are, and work of threads whose results keep their order."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from palimpsest.parallel import gathered

Item = TypeVar("Item")
Result = TypeVar("Result")

MORE = 8  # threads than cores: these wait for the disk meanwhile


def n_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_this_rank() -> int:
    """This rank's share of them where several use the same ones, so that all together use each once; all must call."""
    mine = socket.gethostname(), sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return max(1, n_cores() // gathered(mine).count(mine))


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], cores: int | None = None) -> Iterator[Result]:
    """`map` by threads on as many cores, by default all: for decoding, hashing and writing, which need no lock.

    Items are taken one after the other and only a few ahead of the results, so that they may be many and large. An
    exception is raised in the place of its result.
    """
    n = (cores or n_cores()) + MORE
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(n)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def one_core_each(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` by as many threads as torch may use, for functions that compute: each has one core to itself.

    Without that BLAS and OpenMP would use all cores in each of the threads, which then wait for each other.
    """
    import torch
    from threadpoolctl import threadpool_limits

    n = torch.get_num_threads()
    try:
        with threadpool_limits(1), ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(function, items)
    finally:
        torch.set_num_threads(n)
