"""Builds the native extension; everything declarative is in pyproject.toml.

The extension is a plain shared object with a stable-ABI module header: its functions are `extern "C"`, take raw
pointers and are called through ctypes (which releases the GIL), so it links neither Python's unstable ABI nor
libtorch. `optional=True`: without a compiler the package still installs and says that it runs the reference.
"""

import platform
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/codequant/native")
COMMON = (
    *("dispatch", "experts", "module", "portable", "repack", "threads", "yardsticks"),  # kernels
    *("clustering", "error_feedback"),  # quantization
)
# One source per instruction set, with the flags of that source alone; the best is chosen at run time.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"]
ISA = {
    "x86_64": {
        "avx2": ["-mavx2"],
        "avx_vnni": ["-mavx2", "-mavxvnni"],
        "avx512_vnni": AVX512,
        "amx": [*AVX512, "-mamx-tile", "-mamx-int8"],
    },
    "aarch64": {"neon": ["-march=armv8.2-a+dotprod"]},
}.get(platform.machine(), {})


# These run once per matrix, on one machine: fused multiply-adds are worth more there than equal bits everywhere.
CONTRACTED = ("clustering", "error_feedback")


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "unix":
            # No contraction: a product and a sum that became one instruction would round otherwise than elsewhere.
            flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-pthread"]
            ext.extra_compile_args += [*flags, "-Wall", "-Wextra", "-Werror"]
            ext.extra_link_args += ["-pthread"]
            compile_one = self.compiler._compile

            def compile_with_isa(obj: str, source: str, ext: str, cc: Any, extra: list[str], pp: Any) -> None:
                stem = Path(source).stem
                contract = ["-ffp-contract=fast"] if stem in CONTRACTED else []
                compile_one(obj, source, ext, cc, [*extra, *ISA.get(stem, []), *contract], pp)

            self.compiler._compile = compile_with_isa
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "codequant._native",
            sources=[str(NATIVE / f"{name}.cpp") for name in (*COMMON, *ISA)],
            depends=sorted(str(p) for p in NATIVE.glob("*.h")),
            include_dirs=[str(NATIVE)],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
