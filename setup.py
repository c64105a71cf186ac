"""Builds the native extension; everything declarative is in pyproject.toml.

The extension is a plain shared object with a stable-ABI module header: its functions are `extern "C"`, take raw
pointers and are called through ctypes (which releases the GIL), so it links neither Python's unstable ABI nor
libtorch. `optional=True`: without a compiler the package still installs and says that it runs the reference.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("src/codequant/native")


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "unix":
            ext.extra_compile_args += [
                "-std=c++17",
                "-O3",
                "-fno-math-errno",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-pthread",
            ]
            ext.extra_link_args += ["-pthread"]
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "codequant._native",
            sources=sorted(str(p) for p in NATIVE.glob("*.cpp")),
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
