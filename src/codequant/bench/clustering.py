"""`codequant bench clustering`: exact weighted k-means on the GPU against the unweighted Lloyd iteration.

Rows are of a weight matrix's length; the loss is the weighted one in both cases, since it is what the layer's output
error follows. Values are Gaussian, or heavy-tailed as real weight rows are after no rotation.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codequant.errors import InputError
from codequant.kernels.triton.clustering import kmeans

CLUSTERS = 16
ROWS = {2048: 65536, 768: 131072}
LLOYD_ITERATIONS = 20
# Rows of the experts of Qwen3-30B-A3B by their length: 48 layers of 128 experts.
QWEN3_30B = {2048: 48 * 128 * 2 * 768, 768: 48 * 128 * 2048}


def lloyd(values: Tensor, weights: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Unweighted k-means from the quantiles of each row, on its sorted values and prefix sums."""
    R, S = values.shape
    ordered = values.sort(dim=1).values
    prefix = torch.nn.functional.pad(ordered.double().cumsum(1), (1, 0))
    centroids = ordered[:, ((torch.arange(K, device=values.device) + 0.5) / K * S).long()].contiguous()
    edge = torch.zeros(R, 1, dtype=torch.int64, device=values.device)
    for _ in range(LLOYD_ITERATIONS):
        middle = (0.5 * (centroids[:, 1:] + centroids[:, :-1])).contiguous()
        position = torch.cat([edge, torch.searchsorted(ordered, middle), edge + S], dim=1)
        count, total = position.diff(dim=1), prefix.gather(1, position).diff(dim=1)
        centroids = torch.where(count > 0, (total / count).float(), centroids)
    middle = (0.5 * (centroids[:, 1:] + centroids[:, :-1])).contiguous()
    return centroids, torch.searchsorted(middle, values).to(torch.uint8)


def loss(values: Tensor, weights: Tensor, centroids: Tensor, indices: Tensor) -> Tensor:
    """Weighted squared error of each row."""
    return (weights * (values - centroids.gather(1, indices.long())) ** 2).sum(1)


def _seconds(function: Callable[[], object], repeats: int = 5) -> list[float]:
    function()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)


def run() -> list[dict[str, Any]]:
    """One row per implementation, row length and distribution, and one of the whole of Qwen3-30B-A3B's experts."""
    rows: list[dict[str, Any]] = []
    common = {
        "benchmark": "clustering",
        "threads": "",
        "device": torch.cuda.get_device_name(),
        "isa": "sm{}{}".format(*torch.cuda.get_device_capability()),
        "torch": torch.__version__,
    }
    whole = 0.0
    for S, R in ROWS.items():
        weights = torch.rand(S, device="cuda") ** 2
        for kind in ("gaussian", "heavy-tailed"):
            values = torch.randn(R, S, device="cuda")
            if kind == "heavy-tailed":
                values *= torch.randn(R, S, device="cuda").exp()
            losses = {}
            for name, function in (("codequant-exact", kmeans), ("lloyd-unweighted", lloyd)):
                times = _seconds(partial(function, values, weights, CLUSTERS))
                losses[name] = loss(values, weights, *function(values, weights, CLUSTERS))
                median = statistics.median(times)
                ratio = losses[name] / losses["codequant-exact"]
                rows.append({
                    **common, "implementation": name, "shape": f"{R}x{S} {kind}", "tokens": "",
                    "median_us": median * 1e6, "p10_us": times[0] * 1e6, "p90_us": times[-1] * 1e6,
                    "rows_per_s": R / median, "ratio_to": "loss of codequant-exact", "ratio": float(ratio.mean()),
                    "worst_ratio": float(ratio.max()),
                })  # fmt: skip
                print(
                    f"{name:17} {R}x{S} {kind:13} {R / median / 1e6:6.3f} M rows/s, "
                    f"loss {ratio.mean():.3f} of exact (worst {ratio.max():.2f})",
                    flush=True,
                )
                if name == "codequant-exact" and kind == "gaussian":
                    whole += QWEN3_30B[S] * median / R
    print(f"all expert rows of Qwen3-30B-A3B at the gaussian rates: {whole:.1f} s")
    rows.append({
        **common, "implementation": "codequant-exact", "shape": "Qwen3-30B-A3B experts, by rows/s", "tokens": "",
        "median_us": whole * 1e6,
    })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="codequant bench clustering", description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise InputError("bench clustering: no CUDA device, expected one")
    rows = run()
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
