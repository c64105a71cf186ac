import os
from collections.abc import Iterator

import pytest
import torch

# Read when triton is first imported, which importing transformers does: without a GPU its kernels run interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a Triton kernel runs: in the interpreter, and on a GPU (`pytest -m gpu`)."""
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU here; the interpreter needs TRITON_INTERPRET=1")
    return torch.device(request.param)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty is NaN (integers: their maximum), so that an entry nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned_gpu_memory() -> Iterator[None]:
    """Likewise where some operations have no deterministic form."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
