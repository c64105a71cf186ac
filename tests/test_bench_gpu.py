"""What needs no GPU of `codequant bench gpu`; its measurements check their own results."""

import csv
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install triton==3.6.0 (Linux)")

from codequant.bench import gpu
from codequant.errors import InputError


def test_a_run_that_is_cut_off_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(shapes, tokens):
        (shape,) = shapes
        for T in tokens:
            if T == 32:
                raise KeyboardInterrupt
            yield [{"implementation": "codequant-a8", "shape": shape, "tokens": T, "median_us": 1.5, "isa": "sm90"}]

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    rows, table = tmp_path / "rows.json", tmp_path / "results.csv"
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--shape", "mixtral", "--tokens", "1,8,32", "--json", str(rows), "--results", str(table)])
    assert [row["tokens"] for row in json.loads(rows.read_text())["rows"]] == [1, 8]
    found = list(csv.DictReader(table.open()))
    assert [(row["benchmark"], row["tokens"], row["device"], row["isa"]) for row in found] == [
        ("gpu", "1", "a GPU", "sm90"), ("gpu", "8", "a GPU", "sm90"),
    ]  # fmt: skip


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device, expected one"):
        gpu.main([])


def test_the_first_part_of_a_turn_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:  # slows down after 150 ms, as a GPU that reaches its power limit
        now = 0.0  # milliseconds

        def replay(self) -> None:
            Graph.now += 1.0 if Graph.now < 150 else 2.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = Graph.now

        def synchronize(self) -> None: ...

        def elapsed_time(self, stop: "Event") -> float:
            return stop.at - self.at

    monkeypatch.setattr("torch.cuda.Event", Event)
    times = gpu.replay_times(Graph(), 4)  # type: ignore[arg-type]
    assert set(times) == {500.0}
    assert sum(times) * 4 / 1e6 == pytest.approx(gpu.TURN, abs=0.002)


def test_results_are_checked_token_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(20, 1000, generator=generator)
    noise = torch.randn(20, 1000, generator=generator)
    quantized = exact + 0.05 * noise

    def other(tokens: list[int], size: float) -> torch.Tensor:
        """The quantized results, and others for some tokens."""
        result = quantized.clone()
        result[tokens] += size * noise[tokens].roll(1, dims=1)
        return result

    assert gpu.relative_error("a8", other([3, 4], 0.1), quantized, exact) == pytest.approx(0.1 * 0.1**0.5, rel=0.1)
    wrong = [
        ("1 of 20 tokens", other([3], 0.3), quantized),  # more than other levels make
        ("2 of 20 tokens", other([3, 7], float("nan")), quantized),
        ("median relative error of a token 0.019", other(list(range(11)), 0.02), quantized),
        ("1 of 20 tokens", other([5], 0.1) - quantized + exact, exact),  # without quantization none may be another one
    ]
    for message, got, expected in wrong:
        with pytest.raises(RuntimeError, match=f"a8.*{message}"):
            gpu.relative_error("a8", got, expected, exact)
