"""Run units of work: a unit starts when what it needs is valid; results that nothing needs any more are released.

The graph is static, so which units are left to do follows from the manifest alone: a restart, with any number of
workers, walks back from the wanted results and skips every valid one on the way.
"""

import ctypes
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from codequant.store import Ledger, Record

TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's


@dataclass(frozen=True)
class Unit:
    """One piece of work: `function(**arguments)` of the unit table, given the results it needs."""

    key: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    keep: bool = False  # part of the output: never released


@dataclass(frozen=True)
class Progress:
    """What a listener is told after every unit."""

    unit: Unit
    done: int
    total: int
    seconds: float  # of this unit


RunUnit = Callable[[Unit], Record]


class Executor(Protocol):
    """Something that runs units and hands back their records, in any order."""

    capacity: int  # units that it is worth submitting at a time

    def submit(self, unit: Unit) -> None: ...

    def next_done(self) -> tuple[Unit, Record]:
        """Wait for one submitted unit. Raises what the unit raised."""
        ...

    def close(self) -> None: ...


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch's own threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class LocalExecutor:
    """Units on threads of this process. Each runs single-threaded kernels: results never depend on `workers`."""

    def __init__(self, run_unit: RunUnit, workers: int) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.run_unit = run_unit
        self.capacity = workers
        self.pool = ThreadPoolExecutor(workers, "unit", initializer=torch.set_num_threads, initargs=(1,))
        self.running: dict[Future[Record], Unit] = {}

    def submit(self, unit: Unit) -> None:
        self.running[self.pool.submit(self.run_unit, unit)] = unit

    def next_done(self) -> tuple[Unit, Record]:
        done, _ = wait(self.running, return_when=FIRST_COMPLETED)
        future = next(iter(done))
        return self.running.pop(future), future.result()

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self.threads)


def missing_units(units: Sequence[Unit], ledger: Ledger) -> list[Unit]:
    """The units that must run, in order: kept ones that are not valid, and what those need, recursively.

    Also those that the manifest has lost (its lines can be damaged): the report is made of every unit's record.
    """
    by_key = {unit.key: unit for unit in units}
    missing: set[str] = set()
    for unit in reversed(units):
        wanted = unit.keep or unit.key in missing
        if unit.key not in ledger.records or (wanted and not ledger.valid(unit.key)):
            missing.add(unit.key)
            missing.update(need for need in unit.needs if need in by_key)
        else:
            missing.discard(unit.key)
    return [unit for unit in units if unit.key in missing]


def run_units(
    units: Sequence[Unit],
    ledger: Ledger,
    executor: Executor,
    listen: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Run everything that is missing. `units` is in topological order. Raises the first error of a unit."""
    todo = missing_units(units, ledger)
    waiting: dict[str, Unit] = {unit.key: unit for unit in todo}
    consumers: dict[str, set[str]] = {}
    for unit in todo:
        for need in unit.needs:
            consumers.setdefault(need, set()).add(unit.key)
    released = {unit.key for unit in units if not unit.keep}
    for unit in units:  # leftovers of an interrupted run whose consumers are all done
        if not unit.keep and unit.key not in consumers and unit.key not in waiting:
            ledger.release(unit.key)
    pending, running, total = dict(waiting), 0, len(todo)
    try:
        while pending or running:
            for key, unit in list(pending.items()):
                if running >= executor.capacity:
                    break
                if not any(need in waiting for need in unit.needs):
                    del pending[key]
                    executor.submit(unit)
                    running += 1
            running -= 1
            unit, record = executor.next_done()
            ledger.record(record)
            del waiting[unit.key]
            for need in unit.needs:
                consumers[need].discard(unit.key)
                if not consumers[need] and need in released:
                    ledger.release(need)
            listen(Progress(unit, total - len(waiting), total, record.measured["seconds"]))
    except Exception:
        for _ in range(running):  # one unit has failed; what the others have done is kept
            with suppress(Exception):
                ledger.record(executor.next_done()[1])
        raise


def return_free_memory() -> None:
    """Hand freed memory back to the system. The C library keeps what large tensors have left in every thread's arena,
    so that the process would grow to the sum of what different units need."""
    if TRIM is not None:
        TRIM(0)


def measure(unit: Unit, function: Callable[[], tuple[dict[str, torch.Tensor], dict]], write: Callable) -> Record:
    """Run a unit's function, write its tensors and make its record."""
    start, cpu_start = time.perf_counter(), time.thread_time()
    tensors, info = function()
    digest, size = write(unit.key, tensors)
    del tensors
    return_free_memory()
    measured = {
        "seconds": round(time.perf_counter() - start, 4),
        "cpu_seconds": round(time.thread_time() - cpu_start, 4),  # what the unit costs on a machine that is not shared
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    return Record(unit.key, digest, size, info, measured)
