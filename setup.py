"""Builds `quest_dist._cpu` and puts conf/ and sweeps/ into the package; the rest is pyproject.toml.

Invariants: needs only setuptools, pybind11 and a C++17 compiler; each instruction set is compiled
in a file of its own with that file's flags, and chosen when the module loads.
"""

from __future__ import annotations

import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11 import get_include
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CompileError

KERNELS = Path("kernels")
AVX512 = [
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mfma",
    "-mprefer-vector-width=512",
    "-Wno-maybe-uninitialized",  # gcc 12 warns of its own _mm512_undefined_ps
    "-Wno-uninitialized",
]
ISA_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma"],
    "isa_avx512.cpp": AVX512,
    "isa_avx512bf16.cpp": [*AVX512, "-mavx512bf16"],
}
X86 = platform.machine().lower() in {"x86_64", "amd64"}
INSTALL_A_COMPILER = {
    "Darwin": "xcode-select --install",
    "Linux": "apt install g++ (or dnf install gcc-c++)",
}
# Repository folder -> its name inside an installed package.
CONFIGURATION = {"conf": "_conf", "sweeps": "_sweeps"}


def sources() -> list[str]:
    """Every C++ file that this machine's architecture can compile."""
    files = [KERNELS / "bind.cpp", *sorted((KERNELS / "cpu").glob("*.cpp"))]
    return [path.as_posix() for path in files if X86 or path.name not in ISA_FLAGS]


def headers() -> list[str]:
    """Headers, so that a change in one recompiles."""
    return [path.as_posix() for path in sorted(KERNELS.rglob("*.h"))]


class BuildKernels(build_ext):
    """Compile the files side by side, each with the flags of its instruction set."""

    def build_extension(self, ext: Extension) -> None:
        plain = self.compiler.compile

        def compile_all(files: list[str], **options: object) -> list[str]:
            def compile_one(path: str) -> list[str]:
                flags = [*options["extra_postargs"], *ISA_FLAGS.get(Path(path).name, [])]
                return plain([path], **{**options, "extra_postargs": flags})

            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                return [built for group in pool.map(compile_one, files) for built in group]

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        except CompileError as error:
            command = os.environ.get("CXX") or "c++"
            if any(shutil.which(name) for name in (command.split()[0], "g++", "clang++", "cl")):
                raise
            advice = INSTALL_A_COMPILER.get(platform.system(), "install a C++17 compiler")
            raise BaseError(f"quest_dist needs a C++ compiler and found none: {advice}") from error
        finally:
            self.compiler.compile = plain


class BuildPackage(build_py):
    """Copy the configuration folders into the package, where a wheel keeps them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # an editable install reads the checkout's own folders
        for folder, name in CONFIGURATION.items():
            target = Path(self.build_lib) / "quest_dist" / name
            shutil.rmtree(target, ignore_errors=True)
            if Path(folder).is_dir():
                shutil.copytree(folder, target)


setup(
    ext_modules=[
        Extension(
            "quest_dist._cpu",
            sources=sources(),
            depends=headers(),
            include_dirs=[get_include()],
            define_macros=[("QUEST_X86", "1")] if X86 else [],
            language="c++",
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-pthread",
                "-Wall",
                "-Wextra",
            ],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage},
)
