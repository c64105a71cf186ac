"""Runs that are interrupted, moved, damaged or starved: nothing is lost, and the output is the same to the byte."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scale_runs
import torch
from helpers import random_model, write_source
from scale_runs import fingerprint, kill_after, recorded, run, start, wait_for_units


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(random_model("qwen3_moe", dtype=torch.bfloat16), tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scale_runs.write_text(tmp_path_factory.mktemp("text") / "calibration.txt")


@pytest.fixture(scope="module")
def expected(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float, int]:
    """Fingerprint of an uninterrupted run, its seconds, and the length of its manifest."""
    out = tmp_path_factory.mktemp("expected") / "out"
    begin = time.monotonic()
    assert run(source, out, text, keep_work=True) == ""
    return fingerprint(out), time.monotonic() - begin, len(recorded(work_of(out)))


def work_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.codequant-work")


def interrupted(source: Path, out: Path, text: Path, events: int, **options: object) -> Path:
    """The work folder of a run that was killed once its manifest listed so many events."""
    process = start(source, out, text, **options)
    wait_for_units(work_of(out), events)
    assert kill_after(process, 0), "the run ended before it was killed"
    return work_of(out)


def check_killed_everywhere(source: Path, out: Path, text: Path, expected: tuple, points: int, seed: int) -> None:
    """Kill at random moments, start again with one or two workers until it ends; the output is the expected one."""
    choose = random.Random(seed)
    wanted, seconds, _ = expected
    for point in range(points):
        shutil.rmtree(work_of(out), ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        if not kill_after(start(source, out, text, workers=choose.choice((1, 2))), choose.uniform(0, seconds)):
            assert out.is_dir(), f"point {point}: ended without an output"
        if not out.exists():
            assert run(source, out, text, workers=choose.choice((1, 2))) == "", f"point {point}"
        assert fingerprint(out) == wanted, f"point {point}: the output differs"


def test_killed_at_random_points(source: Path, text: Path, expected: tuple, tmp_path: Path) -> None:
    check_killed_everywhere(source, tmp_path / "out", text, expected, points=3, seed=0)


@pytest.mark.slow
def test_killed_at_twenty_random_points(source: Path, text: Path, expected: tuple, tmp_path: Path) -> None:
    check_killed_everywhere(source, tmp_path / "out", text, expected, points=20, seed=1)


def test_two_workers_give_the_same_bytes_and_leave_nothing_behind(
    source: Path, text: Path, expected: tuple, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(source, out, text, workers=2) == ""
    assert fingerprint(out) == expected[0]
    assert not work_of(out).exists()


def test_a_restart_skips_what_is_done_and_heals_what_is_damaged(
    source: Path, text: Path, expected: tuple, tmp_path: Path
) -> None:
    """Another folder, another number of workers, one flipped byte in a result, one in the manifest, leftovers."""
    work = interrupted(source, tmp_path / "first", text, events=expected[2] * 3 // 4, workers=2)
    out = tmp_path / "moved"
    work = work.rename(work_of(out))
    kept = sorted(path for path in (work / "units").glob("layer.*"))
    flip(kept[0], kept[0].stat().st_size // 2)
    manifest = work / "manifest.jsonl"
    flip(manifest, len(manifest.read_bytes().splitlines(keepends=True)[0]) + 60)
    (work / "units" / ".embed.w000.1.aa.tmp").write_bytes(b"half a result")
    before = set(recorded(work)[3:])
    lines = len(manifest.read_bytes().splitlines())
    assert run(source, out, text, workers=1, keep_work=True) == ""
    assert fingerprint(out) == expected[0]
    after = recorded(work)[lines:]
    assert kept[0].stem in after, "the damaged result was taken for a valid one"
    if len(kept) > 1:
        assert not {path.stem for path in kept[1:]} & set(after), "a valid result was computed again"
    assert "rotation" in before and "rotation" not in after
    assert not list(work.rglob("*.tmp"))


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_another_recipe_or_source_is_refused_by_name(source: Path, text: Path, expected: tuple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = interrupted(source, out, text, events=8)
    listed = recorded(work)
    error = run(source, out, text, overrides=[*scale_runs.OVERRIDES, "weights.bits=3"])
    assert "recipe.weights.bits: 4 there, 3 now" in error
    error = run(source, out, scale_runs.write_text(tmp_path / "longer.txt", words=50))
    assert "calibration: " in error
    changed = Path(shutil.copytree(source, tmp_path / "changed"))
    shard = sorted(changed.glob("*.safetensors"))[0]
    flip(shard, shard.stat().st_size - 2)  # the low byte of a bfloat16: still a finite weight
    assert f"source.{shard.name}" in run(changed, out, text)
    assert recorded(work) == listed
    assert run(source, out, text) == ""
    assert fingerprint(out) == expected[0]


def test_two_runs_on_one_work_folder(source: Path, text: Path, expected: tuple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(source, out, text)
    wait_for_units(work_of(out), 1)
    os.kill(first.pid, signal.SIGSTOP)  # else it may be done before the second has read its arguments
    try:
        assert "is in use by another run" in run(source, out, text)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode == 0
    assert fingerprint(out) == expected[0]


def small_disk(folder: Path, size: str, command: str) -> str:
    """Run a command with a file system of its own mounted on `folder`; returns its output."""
    mount = f"mount -t tmpfs -o size={size} tmpfs {folder} && {command}"
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True, text=True, timeout=120)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr.strip()[:80]}")
    return done.stdout + done.stderr


def test_a_full_disk_and_a_read_only_one_lose_nothing(
    source: Path, text: Path, expected: tuple, tmp_path: Path
) -> None:
    """On a disk that fills up in the middle, then on one that is read-only, then on one with room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "script.py"
    script.write_text(f"""
import json, os, shutil, subprocess, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import scale_runs
from codequant.errors import InputError
from codequant.pipeline import quantize
disk = Path({str(disk)!r})
def attempt(listen=lambda progress: None):
    try:
        quantize({str(source)!r}, disk / "out", calibration={str(text)!r}, overrides=scale_runs.OVERRIDES, workers=2,
                 listen=listen)
        return ""
    except InputError as error:
        return str(error)
def fill(progress):
    if progress.done == 14:
        with (disk / "filler").open("wb") as file:
            try:
                while True:
                    file.write(bytes(65536)); file.flush()
            except OSError:
                pass
work = disk / "out.codequant-work"
full = attempt(fill)
listed = scale_runs.recorded(work)
(disk / "filler").unlink(missing_ok=True)
subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
read_only = attempt()
subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
last = attempt()
print(json.dumps(dict(full=full, listed=len(listed), read_only=read_only, last=last,
                      files=scale_runs.fingerprint(disk / "out") if not last else {{}})))
""")
    output = small_disk(disk, "24m", f"{sys.executable} {script}")
    result = json.loads(output.splitlines()[-1])
    assert "No space left on device" in result["full"], result
    assert "goes on from there" in result["full"]
    assert result["listed"] >= 14
    assert "not writable" in result["read_only"]
    assert result["last"] == ""
    assert result["files"] == expected[0]
