"""Work in several processes, results in order. None of them outlives the process that started them, however it ends."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Work], Result], works: Iterable[Work], processes: int
) -> Iterator[tuple[Work, Result]]:
    """Each piece of work with what `function` makes of it, in order, a few pieces ahead of the one asked for.

    Args:
        function: picklable; what it raises is raised here.
        works: picklable.
        processes: how many.

    Raises:
        ChildProcessError: a process was killed; the others are gone then.
    """
    # spawn: a fork would inherit threads of OpenCV, torch and our own in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=leave_with_parent) as pool:
        waiting: deque[tuple[Work, Future[Result]]] = deque()
        try:
            for work in works:
                waiting.append((work, pool.submit(function, work)))
                if len(waiting) >= 2 * processes:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool as err:
            raise ChildProcessError("one of the processes that share the work was killed (out of memory?)") from err
        finally:
            pool.shutdown(cancel_futures=True)


def leave_with_parent() -> None:
    """End this process as soon as the one that started it is gone, which a worker that waits for work never notices.

    Not by PR_SET_PDEATHSIG: that is sent when the parent's thread ends, and only Linux has it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_wait_and_leave, args=(parent.sentinel,), daemon=True).start()


def _wait_and_leave(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)
