"""The Ray executor with real processes on one machine: workers and nodes die, the output stays the same to the byte."""

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import scale_runs
import torch
from helpers import random_model, write_source
from scale_runs import fingerprint

from codequant.errors import InputError
from codequant.executor import Progress
from codequant.pipeline import quantize

has_ray = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not has_ray, reason="ray is not installed: pip install 'codequant[ray]'")


def test_without_ray_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    with pytest.raises(InputError, match=r"pip install 'codequant\[ray\]'"):
        quantize("any", tmp_path / "out", executor="ray")
    with pytest.raises(InputError, match="executor: 'slurm', expected local or ray"):
        quantize("any", tmp_path / "out", executor="slurm")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A source, a calibration text, and the fingerprint of what the local executor makes of them."""
    folder = tmp_path_factory.mktemp("case")
    source = write_source(random_model("qwen3_moe", dtype=torch.bfloat16), folder / "source")
    text = scale_runs.write_text(folder / "calibration.txt")
    assert scale_runs.run(source, folder / "out", text) == ""
    return source, text, fingerprint(folder / "out")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs and two nodes of one worker each; this process is connected to it."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    path = os.pathsep.join((str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])))
    os.environ["PYTHONPATH"] = path
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.removable = [made.add_node(num_cpus=1) for _ in range(2)]
    ray.init(made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def quantize_on_ray(case: tuple, out: Path, disturb: Callable[[Progress], None]) -> None:
    source, text, expected = case
    quantize(source, out, calibration=text, overrides=scale_runs.OVERRIDES, executor="ray", workers=2, listen=disturb)
    assert fingerprint(out) == expected


@needs_ray
@pytest.mark.slow
def test_a_node_and_a_worker_die(case: tuple, cluster: Any, tmp_path: Path) -> None:
    """A worker at work is killed after five units or a few more, a node is removed after twelve."""

    def workers() -> list[psutil.Process]:
        return [p for p in psutil.Process().children(recursive=True) if "run_on_worker" in " ".join(p.cmdline() or [])]

    killed = []

    def disturb(progress: Progress) -> None:
        if progress.done >= 5 and not killed:  # between two units a worker has another name
            killed.extend(workers()[:1])
            for process in killed:
                process.send_signal(signal.SIGKILL)
        if progress.done == 12:
            cluster.remove_node(cluster.removable[0], allow_graceful=False)

    quantize_on_ray(case, tmp_path / "out", disturb)
    assert killed, "no worker process was found to kill"


@needs_ray
@pytest.mark.slow
def test_a_local_cluster_goes_on_where_the_local_executor_stopped(case: tuple, tmp_path: Path) -> None:
    source, text, _ = case
    out = tmp_path / "out"
    process = scale_runs.start(source, out, text)
    work = out.with_name("out.codequant-work")
    scale_runs.wait_for_units(work, 20)
    assert scale_runs.kill_after(process, 0)
    done = set(scale_runs.recorded(work))
    ran: list[str] = []
    quantize_on_ray(case, out, lambda progress: ran.append(progress.unit.key))
    assert ran and not done & {key for key in ran if key.startswith(("layer", "rotation", "ends"))}


@needs_ray
@pytest.mark.slow
def test_an_address_where_nothing_listens(case: tuple, tmp_path: Path) -> None:
    source, text, _ = case
    with pytest.raises(InputError, match=r"ray address: '127\.0\.0\.1:9' cannot be reached"):
        quantize(
            source,
            tmp_path / "out",
            calibration=text,
            overrides=scale_runs.OVERRIDES,
            executor="ray",
            ray_address="127.0.0.1:9",
        )
