"""Programmatic dependent launch: how a kernel follows the one before it, on compute capability 9.0 and newer.

A kernel launched in this way starts when every program of the one before it has allowed it or ended, and itself waits,
where it needs that one's results, for all of them to be there. Programs that start early and wait hide their way to
memory, but hold multiprocessors: which pays while there are few of them. Where there are many nothing is allowed ahead
of time, and the launch alone is hidden.
"""

from enum import IntEnum

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class Launch(IntEnum):
    PLAIN = 0
    CHAINED = 1  # the next kernel's programs start when this one's have ended
    EARLY = 2  # they start at once, and wait

    @property
    def options(self) -> dict[str, int | bool]:
        """Of the launch of a kernel that has a parameter PDL."""
        return {"PDL": self.value, "launch_pdl": self > Launch.PLAIN}


_EARLY = tl.constexpr(Launch.EARLY.value)


@triton.jit
def allow_next(PDL: tl.constexpr):
    """From here on what the next kernel does before it waits may happen."""
    if PDL == _EARLY:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """From here on the results of the kernel before this one may be read, and what it reads be overwritten."""
    if PDL:
        gdc_wait()


@triton.jit
def follow(PDL: tl.constexpr):
    """Waits, and lets the next kernel start."""
    wait(PDL)
    allow_next(PDL)
