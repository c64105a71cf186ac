"""Real runs of the pipeline in processes of their own, quick enough to be killed dozens of times."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from codequant.errors import InputError

OVERRIDES = [
    "calibration.windows=4",
    "calibration.length=16",
    "calibration.windows_per_unit=2",
    "rotation.steps=3",
]
# A clean process that has everything imported and has computed nothing: each run is a fork of it.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["codequant.pipeline", "scale_runs"])


def write_text(path: Path, vocabulary: int = 67, documents: int = 4, words: int = 40) -> Path:
    """Random words of the helpers' toy tokenizer, as documents."""
    choose = random.Random(0)
    text = (" ".join(f"w{choose.randrange(3, vocabulary)}" for _ in range(words)) for _ in range(documents))
    path.write_text("\n\n\n".join(text))
    return path


def _run(source: Path, out: Path, text: Path, options: dict[str, Any], status: Path) -> None:
    from codequant.pipeline import quantize

    os.setsid()
    try:
        quantize(source, out, calibration=text, **{"overrides": OVERRIDES, "workers": 1, **options})
    except InputError as error:
        status.write_text(str(error))
        raise SystemExit(error.exit_code) from None
    except BaseException as error:
        status.write_text(f"{type(error).__name__}: {error}")
        raise


def start(source: Path, out: Path, text: Path, **options: Any) -> multiprocessing.Process:
    status = out.with_name(f"{out.name}.status")
    status.unlink(missing_ok=True)
    process = processes.Process(target=_run, args=(source, out, text, options, status))
    process.start()
    return process


def run(source: Path, out: Path, text: Path, **options: Any) -> str:
    """Run to the end; returns the error, or an empty string."""
    process = start(source, out, text, **options)
    process.join(120)
    status = out.with_name(f"{out.name}.status")
    assert process.exitcode in (0, 2), status.read_text() if status.exists() else process.exitcode
    return status.read_text() if process.exitcode == 2 else ""


def kill_after(process: multiprocessing.Process, seconds: float) -> bool:
    """SIGKILL after a while; whether the process was still alive."""
    process.join(seconds)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


def fingerprint(folder: Path) -> dict[str, str]:
    """Hashes of an output's files, timings apart."""
    measured = ("timings.json", "report.html")  # differ between identical runs
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name not in measured}


def recorded(work: Path) -> list[str]:
    """Keys in the manifest, one per line that is whole."""
    path = work / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line)["key"] for line in lines if line.endswith(b"\n")]


def wait_for_units(work: Path, count: int) -> None:
    """Until the manifest lists this many events."""
    deadline = time.monotonic() + 60
    while len(recorded(work)) < count:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)
