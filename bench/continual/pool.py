"""Runs work in several processes. A piece of work that fails, or whose process dies, does not affect the others."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from .runs import BusyError

Outcome = Any  # the result of the work, or the exception that ended it


def parallel(
    function: Callable[..., Any],
    work: Sequence[tuple[Any, ...]],
    jobs: int,
    on_outcome: Callable[[str, Outcome], None],
) -> list[Outcome]:
    """Calls `function(*arguments, wait=..., position=...)` for each piece of work and returns the outcomes.

    Work that another process is doing (BusyError) is postponed to the end; then the call waits for it.

    Args:
        function: a function of a module, so that other processes can import it.
        work: the arguments of each call. The first argument, or its first element, has a `name`.
        jobs: number of processes; 1: this process only.
        on_outcome: called with the name and the outcome of each piece of work as soon as it is known.
    """
    outcomes: list[Outcome] = [None] * len(work)
    waiting: queue.Queue[tuple[int, bool]] = queue.Queue()
    for index in range(len(work)):
        waiting.put((index, False))

    def drain(call: Callable[..., Any], position: int) -> None:
        while True:
            try:
                index, wait = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                outcomes[index] = call(*work[index], wait=wait, position=position)
            except BusyError:
                waiting.put((index, True))
                continue
            except Exception as error:
                outcomes[index] = error
            first = work[index][0]
            on_outcome((first[0] if isinstance(first, list) else first).name, outcomes[index])

    if jobs == 1:
        drain(function, 0)
        return outcomes
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    lock = context.RLock()
    tqdm.set_lock(lock)

    def slot(position: int) -> None:
        # Every slot has its own pool, because a process that dies breaks its pool.
        pool = partial(ProcessPoolExecutor, 1, context, initializer=_prepare, initargs=(threads, lock))
        current = pool()

        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal current
            try:
                return current.submit(function, *arguments, **named).result()
            except BrokenProcessPool:
                current.shutdown(wait=False)
                current = pool()
                raise

        drain(call, position)
        current.shutdown()

    with ThreadPoolExecutor(jobs) as slots:
        list(slots.map(slot, range(min(jobs, len(work)))))
    return outcomes


def _prepare(threads: int, lock: Any) -> None:
    """Sets up a process: its share of the threads, and the lock that all progress bars share."""
    torch.set_num_threads(threads)
    tqdm.set_lock(lock)
