"""Loader processes: they live as long as a training and write its crops into shared batches, epoch after epoch.

Each process decodes its pictures in the order in which they are due and writes every crop to its place (`ring`). A crop
whose batch has no place yet, as some of a picture with many persons, waits in the process; a picture that nobody needs
yet is not begun. So no process waits for another, and the one that reads batches waits for the processes only.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import selectors
import signal
import traceback
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import numpy as np
import torch

from cigpose.loader.epochs import Epoch, Epochs
from cigpose.loader.ring import Ring
from cigpose.pool import leave_with_parent

AHEAD = 8
"""Persons that may be decoded beyond the coming batches, for each process: so that none waits for another's picture."""
_PATIENCE_S = 0.2
"""Longest wait without looking again: two processes may each miss that the other begins to wait."""
_FAREWELL_S = 2.0


class _OverError(Exception):
    """The reader wants no more."""


class LoaderProcesses:
    """The processes, from the side of the one that reads batches."""

    def __init__(self, epochs: Epochs, num: int) -> None:
        """Start them.

        Args:
            epochs: what is to be made.
            num: of processes.

        Raises:
            OSError: there is not enough shared memory.
        """
        self._epochs = epochs
        largest = max(epochs.largest, 1)
        self._ahead = 1 - (-num * AHEAD // largest)
        reach = epochs.epoch(0).plan.places.reach
        fields = epochs.epoch(0).maker.fields()
        self._ring = Ring(2 + self._ahead - (-reach // largest), largest, fields, num)
        self._ring.allow(-1)
        self._ring.free(epochs.start_batch - 1)
        self._told, tell = os.pipe()
        self._wakers: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._told, selectors.EVENT_READ, None)
        self._processes: list[BaseProcess] = []
        # fork: the shared memory has no name by which another process could find it.
        context: Any = multiprocessing.get_context("fork")
        try:
            for number in range(num):
                wake, waker = os.pipe()
                report, reporter = context.Pipe(duplex=False)
                arguments = (self._ring, epochs, number, num, wake, tell, reporter)
                process = context.Process(target=_work, args=arguments, daemon=True, name=f"cigpose-loader-{number}")
                process.start()
                self._processes.append(process)
                self._wakers.append(waker)
                os.close(wake)
                reporter.close()
                self._selector.register(report, selectors.EVENT_READ, (process, report))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(tell)

    def batches(self) -> Iterator[tuple[dict[str, np.ndarray], list[str]]]:
        """The batches in order: rows that hold until the next one is asked for, and keys.

        Raises:
            DataError, OSError: what a process could not read or decode.
            ChildProcessError: a process was killed.
        """
        epochs, ring = self._epochs, self._ring
        for batch in range(epochs.start_batch, epochs.num_batches):
            ring.allow(epochs.last_slot(batch + self._ahead))
            self._wake()
            size = epochs.size(batch)
            while ring.num_rows(batch) < size:
                self._wait(batch, size)
            yield ring.take(batch, size)
            ring.free(batch)

    def _wake(self) -> None:
        for number in self._ring.sleepers():
            with suppress(BrokenPipeError):  # it is dead, which `_hear` will say
                os.write(self._wakers[number], b"!")

    def _wait(self, batch: int, size: int) -> None:
        self._ring.wait_for(batch, size)
        events = [] if self._ring.is_waited_for else self._selector.select(_PATIENCE_S)
        self._ring.wait_for(batch, 0)
        for key, _ in events:
            if key.data is None:
                os.read(self._told, 1 << 16)
            else:
                self._hear(*key.data)

    def _hear(self, process: BaseProcess, report: Connection) -> None:
        """What a process has to say: an error, or with its end nothing."""
        try:
            error = report.recv()
        except EOFError:
            self._selector.unregister(report)
            report.close()
            process.join()
            if process.exitcode:
                raise ChildProcessError(
                    f"train.loader.processes: a loader process ended with {_ending(process.exitcode)}. Run again; fewer"
                    " processes or a smaller train.loader.shuffle_buffer need less memory."
                ) from None
        else:
            raise error

    def close(self) -> None:
        """End the processes; what they shared is gone with them."""
        self._ring.end()
        for waker in self._wakers:
            with suppress(OSError):
                os.write(waker, b"!")
        for process in self._processes:
            process.join(_FAREWELL_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                key.data[1].close()
        self._selector.close()
        for descriptor in (self._told, *self._wakers):
            os.close(descriptor)


def _ending(code: int) -> str:
    reason = "out of memory?" if code == -signal.SIGKILL else signal.strsignal(-code)
    return f"status {code}" if code > 0 else f"signal {-code} ({reason})"


def _work(ring: Ring, epochs: Epochs, process: int, processes: int, wake: int, tell: int, reporter: Connection) -> None:
    """What a loader process does."""
    leave_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)  # processes are the parallelism; OpenCV's own threads would only get in their way
    torch.set_num_threads(1)
    writer = _Writer(ring, epochs, process, wake, tell)
    try:
        for number in range(epochs.num):
            writer.make(number, epochs.epoch(number), processes)
        writer.finish()
    except _OverError:
        pass
    except (ValueError, OSError) as err:
        with suppress(BrokenPipeError):
            reporter.send(err)
    except BaseException:
        reporter.send(RuntimeError(f"in a loader process:\n{traceback.format_exc()}"))


class _Writer:
    """A loader process's side of the ring."""

    def __init__(self, ring: Ring, epochs: Epochs, process: int, wake: int, tell: int) -> None:
        self._ring = ring
        self._epochs = epochs
        self._process = process
        self._wake = wake
        self._tell = tell
        self._waiting: dict[int, list[tuple[int, str, dict[str, np.ndarray]]]] = {}
        """Batch -> (row, key, values) of crops for which there is no place yet."""

    def make(self, number: int, epoch: Epoch, processes: int) -> None:
        """Make this process's part of an epoch."""
        first = number * self._epochs.num_persons
        for picture in epoch.feed.pictures(self._process, processes):
            while first + picture.slots[0] > (seen := self._ring.progress)[1]:
                self._sleep(seen)
            self._put_waiting()
            crops = epoch.make(picture)
            where = self._epochs.where(number, crops.places)
            for i, ((batch, row), key) in enumerate(zip(where, crops.keys, strict=True)):
                values = {name: array[i] for name, array in crops.arrays.items()}
                if self._ring.has_place(batch):
                    self._ring.put(self._process, batch, row, key, values)
                else:
                    self._waiting.setdefault(batch, []).append((row, key, values))
            self._tell_reader()

    def finish(self) -> None:
        """Wait until everything is written."""
        while self._waiting:
            self._sleep(self._ring.progress)
        self._tell_reader()

    def _sleep(self, seen: tuple[int, int]) -> None:
        """Write what has a place by now, then wait until the reader is further than it was seen to be."""
        self._put_waiting()
        self._tell_reader()
        self._ring.set_asleep(self._process, True)
        if self._ring.progress == seen and select.select([self._wake], [], [], _PATIENCE_S)[0]:
            os.read(self._wake, 1 << 16)
        self._ring.set_asleep(self._process, False)

    def _put_waiting(self) -> None:
        if self._ring.is_over:
            raise _OverError
        for batch in [batch for batch in self._waiting if self._ring.has_place(batch)]:
            for row, key, values in self._waiting.pop(batch):
                self._ring.put(self._process, batch, row, key, values)

    def _tell_reader(self) -> None:
        if self._ring.is_waited_for:
            os.write(self._tell, b"!")
