"""Work done in threads before it is asked for: decoding beside the network (OpenCV releases Python's lock)."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_THREADS = 4


def num_threads() -> int:
    """Threads for decoding and drawing: as many as there are processors, a few at most."""
    return min(len(os.sched_getaffinity(0)), MOST_THREADS)


def mapped_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
    """`function` of each item, in order; a few are computed in threads before they are asked for."""
    iterator, waiting = iter(items), deque[Future[Result]]()
    threads = num_threads()
    with ThreadPoolExecutor(threads, thread_name_prefix="cigpose-ahead") as pool:
        try:
            for item in itertools.islice(iterator, threads + 1):
                waiting.append(pool.submit(function, item))
            while waiting:
                yield waiting.popleft().result()
                for item in itertools.islice(iterator, 1):
                    waiting.append(pool.submit(function, item))
        finally:
            for future in waiting:
                future.cancel()


def read_ahead(items: Iterable[Item], size: int) -> Generator[Item]:
    """The same items, taken by a thread that is up to `size` of them ahead."""
    ready: queue.Queue[tuple[str, Item | BaseException | None]] = queue.Queue(size)
    over = threading.Event()

    def put(kind: str, value: Item | BaseException | None) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((kind, value), timeout=0.1)
                return

    def read() -> None:
        try:
            for item in items:
                put("item", item)
                if over.is_set():
                    return
            put("end", None)
        except BaseException as err:  # it is raised where the items are used
            put("error", err)

    thread = threading.Thread(target=read, name="cigpose-reader", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]
    finally:
        over.set()
        thread.join()
