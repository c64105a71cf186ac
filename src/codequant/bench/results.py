"""`benchmarks/results.csv`: one row per measured number, with where it comes from."""

import csv
import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path("benchmarks/results.csv")
COLUMNS = (
    *("date", "benchmark", "implementation", "shape", "tokens", "threads", "median_us", "p10_us", "p90_us"),
    *("gb_per_s", "ratio_to", "ratio", "device", "isa", "torch", "commit"),
)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median and spread, in microseconds."""
    q = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64))
    return dict(zip(("median_us", "p10_us", "p90_us"), (round(1e6 * v, 1) for v in q.tolist()), strict=True))


def cpu_name() -> str:
    """Model name of the processor as the kernel gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """Of the code that ran: a source tree's short hash, with + for changes not committed; empty where there is none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def append(benchmark: str, rows: list[dict[str, Any]], device: str, isa: str = "", path: Path = RESULTS) -> None:
    """Add rows (keys among COLUMNS; others are left out) with their provenance, where they do not bring their own, to a
    new file if there is none."""
    provenance = {
        "date": date.today().isoformat(),
        "benchmark": benchmark,
        "device": device,
        "isa": isa,
        "torch": torch.__version__,
        "commit": _commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**provenance, **row} for row in rows)
