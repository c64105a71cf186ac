"""The native kernels under sanitizers, and the Arm ones under an emulator: builds and runs tests/native/fuzz.cpp."""

import shutil
import subprocess
from pathlib import Path

import pytest

NEEDS = {"fuzz": ["g++"], "fuzz-thread": ["g++"], "fuzz-neon": ["aarch64-linux-gnu-g++", "qemu-aarch64-static"]}


@pytest.mark.slow
@pytest.mark.parametrize("target", NEEDS)
def test_fuzz(target: str, tmp_path: Path) -> None:
    missing = [tool for tool in ("make", *NEEDS[target]) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {missing}")
    command = ["make", "-C", str(Path(__file__).parent / "native"), target, f"BUILD={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and " cases:" in result.stdout, result.stdout + result.stderr
