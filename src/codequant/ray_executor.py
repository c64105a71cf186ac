"""Units of work on a Ray cluster: one single-threaded worker per CPU core or GPU, results through the work folder.

Only keys and records travel through Ray; tensors go to files that every node can see. A unit whose worker or node dies
is run again elsewhere: units are pure and files appear whole, so a half-dead worker that finishes too does no harm.
What a restart skips is decided by the manifest alone, never by Ray's own lineage.
"""

import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

import torch

from codequant.errors import InputError
from codequant.executor import Unit
from codequant.recipe import Recipe
from codequant.source import SourceModel
from codequant.store import Record, Store, versions
from codequant.units import Context, run_unit

CONNECT_SECONDS = 10
MAX_RETRIES = 5  # of a unit whose worker or node dies; a unit that raises is not tried again


class RayExecutor:
    """See `executor.Executor`. Starts a local cluster of `workers` processes where no address is given."""

    def __init__(self, context: Context, workers: int, address: str | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray  # an extra of the package

        self.ray = ray
        self.owns_cluster = not ray.is_initialized()
        if self.owns_cluster:
            check_reachable(address)
            size: dict[str, Any] = {"num_cpus": workers} if address is None and "RAY_ADDRESS" not in os.environ else {}
            try:
                ray.init(address, log_to_driver=False, include_dashboard=False, **size)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:160]
                raise InputError(f"ray address: {address!r} cannot be reached ({reason})") from error
        device = context.device.type
        slots = int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 0))
        if not slots:
            raise InputError(f"device: {device!r}, the Ray cluster has no such resource")
        self.capacity = 2 * slots  # a free worker finds its next unit waiting
        remote = ray.remote(num_cpus=1, num_gpus=int(device == "cuda"), max_retries=MAX_RETRIES)(run_on_worker)
        where = (str(context.source.folder.resolve()), str(context.store.folder.resolve()))
        self.run = lambda unit: remote.remote(*where, context.recipe.model_dump_json(), device, versions(), unit)
        self.running: dict[Any, Unit] = {}

    def submit(self, unit: Unit) -> None:
        self.running[self.run(unit)] = unit

    def next_done(self) -> tuple[Unit, Record]:
        (done, *_), _ = self.ray.wait(list(self.running), num_returns=1)
        unit = self.running.pop(done)
        try:
            return unit, self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:160]
            raise RuntimeError(f"{unit.key}: given up after {MAX_RETRIES} tries ({reason})") from error

    def close(self) -> None:
        for task in self.running:
            self.ray.cancel(task, force=True)
        if self.owns_cluster:
            self.ray.shutdown()


def check_reachable(address: str | None) -> None:
    """Raise InputError where nothing listens at HOST:PORT; Ray itself would try again for many minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # none, "auto" or "local": Ray finds out at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(f"ray address: {address!r} cannot be reached ({error.strerror or error})") from error


def run_on_worker(
    source: str, work: str, recipe: str, device: str, driver_versions: dict[str, str], unit: Unit
) -> Record:
    """One unit in a worker process."""
    torch.set_num_threads(1)
    return run_unit(worker_context(source, work, recipe, device, tuple(driver_versions.items())), unit)


@cache
def worker_context(
    source: str, work: str, recipe: str, device: str, driver_versions: tuple[tuple[str, str], ...]
) -> Context:
    """The same context as the driver's, once per process. Raises InputError where this node cannot have it."""
    if (here := versions()) != dict(driver_versions):
        raise InputError(f"versions: {here} on a worker, expected those of the driver, {dict(driver_versions)}")
    for folder in (Path(source), Path(work)):
        if not folder.is_dir():
            raise InputError(f"{folder}: not found on a worker's node, expected storage that all nodes share")
    return Context(SourceModel(Path(source)), Recipe.model_validate_json(recipe), Store(Path(work)), device)
