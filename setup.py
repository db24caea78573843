"""Builds the kernels and puts conf/ and sweeps/ into the package; the rest is pyproject.toml.

`quest_dist._cpu` is built always; `quest_dist._cuda` where nvcc is found (CUDA_HOME, then PATH,
then /usr/local/cuda), never with QUEST_CUDA=0; with QUEST_CUDA=1 its absence is an error.
QUEST_CUDA_ARCHS names the architectures, as in "80 90a 120+PTX".

Invariants: needs only setuptools, pybind11 and a C++17 compiler; each instruction set is compiled
in a file of its own with that file's flags, and chosen when the module loads. CUDA's runtime is
linked statically: the module imports where there is no driver, and finds no device there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
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
# What runs everywhere from Ampere on: machine code for these, PTX for what comes after.
CUDA_ARCHS = "80 86 89 90a 100 120+PTX"
OLDEST_CUDA = (12, 8)  # the first that knows all of them
# Kept between builds, which pip's own temporary folder is not. Holds each file's object, what it
# was made from (.made) and the registers and spills that ptxas reports (.ptxas).
CUDA_BUILD = Path("build") / "cuda"
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "--fmad=false",  # products are fused where the source says so: see kernels/cuda/rows.cuh
    "--compress-mode=size",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]
# Repository folder -> its name inside an installed package.
CONFIGURATION = {"conf": "_conf", "sweeps": "_sweeps"}


def sources() -> list[str]:
    """Every C++ file that this machine's architecture can compile."""
    files = [KERNELS / "bind.cpp", *sorted((KERNELS / "cpu").glob("*.cpp"))]
    return [path.as_posix() for path in files if X86 or path.name not in ISA_FLAGS]


def headers() -> list[str]:
    """Headers, so that a change in one recompiles."""
    found = [*KERNELS.rglob("*.h"), *KERNELS.rglob("*.cuh")]
    return [path.as_posix() for path in sorted(found)]


def find_nvcc() -> tuple[Path | None, str]:
    """CUDA's compiler, if this build may use it and the machine has it; else why not, in a line."""
    if os.environ.get("QUEST_CUDA") == "0":
        return None, "QUEST_CUDA=0"
    if platform.system() != "Linux":
        return None, f"its kernels are built on Linux, and this is {platform.system()}"
    home = os.environ.get("CUDA_HOME")
    tried = [f"{home}/bin/nvcc"] * bool(home) + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = next(filter(None, map(shutil.which, tried)), None)
    if found is None:
        return None, "found no nvcc (CUDA_HOME, PATH, /usr/local/cuda)"
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None or tuple(map(int, release.groups())) < OLDEST_CUDA:
        told = release[0] if release else "of no known release"
        return None, f"{found} is {told}, older than {'.'.join(map(str, OLDEST_CUDA))}"
    return Path(found).resolve(), ""


def cuda_runtime(nvcc: Path) -> str:
    """The static CUDA runtime of a compiler, which may be a script far from its toolkit."""
    command = [nvcc, "--dryrun", str(KERNELS / "cuda" / "device.cu")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    for folder in re.findall(r'"-L([^"]+)"', told):
        path = Path(folder) / "libcudart_static.a"
        if path.is_file():
            return str(path.resolve())
    raise BaseError(f"{nvcc} knows no libcudart_static.a: install CUDA's development files")


def cuda_archs() -> list[str]:
    """nvcc's options for the architectures asked for."""
    options = []
    for arch in re.split(r"[ ,;]+", os.environ.get("QUEST_CUDA_ARCHS", CUDA_ARCHS).strip()):
        number = arch.removesuffix("+PTX")
        if not re.fullmatch(r"[0-9]{2,3}[af]?", number):
            raise BaseError(f"QUEST_CUDA_ARCHS: {arch!r} is no architecture; try {CUDA_ARCHS!r}")
        code = f"[sm_{number},compute_{number}]" if arch != number else f"sm_{number}"
        options.append(f"-gencode=arch=compute_{number},code={code}")
    return options


def compile_cuda(nvcc: Path) -> list[str]:
    """Objects of every .cu file; those whose text, headers and flags are unchanged are kept."""
    CUDA_BUILD.mkdir(parents=True, exist_ok=True)
    shared = [Path(path).read_bytes() for path in headers()]
    release = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout

    def compile_one(source: Path) -> str:
        target = CUDA_BUILD / f"{source.stem}.o"
        command = [str(nvcc), *CUDA_FLAGS, *cuda_archs(), "-c", str(source), "-o", str(target)]
        inputs = [" ".join(command).encode(), release, source.read_bytes(), *shared]
        digest = hashlib.sha256(b"\0".join(inputs)).hexdigest()
        made = target.with_suffix(".made")
        if target.is_file() and made.is_file() and made.read_text() == digest:
            return str(target)
        made.unlink(missing_ok=True)
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            report = "\n".join(x for x in run.stderr.splitlines() if "ptxas info" not in x)
            raise CompileError(f"{report}\n{source}: nvcc failed; QUEST_CUDA=0 builds without it")
        target.with_suffix(".ptxas").write_text(run.stderr)
        made.write_text(digest)
        return str(target)

    files = sorted((KERNELS / "cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, files))


class BuildKernels(build_ext):
    """Compile the files side by side, each with the flags of its instruction set."""

    def run(self) -> None:
        if NVCC is None:
            if os.environ.get("QUEST_CUDA") == "1":
                raise BaseError(f"QUEST_CUDA=1, but {WITHOUT_NVCC}")
            print(f"quest_dist._cuda is not built: {WITHOUT_NVCC}")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "quest_dist._cuda":
            assert NVCC is not None
            ext.extra_objects = [*compile_cuda(NVCC), cuda_runtime(NVCC)]
            ext.depends = [*ext.depends, *ext.extra_objects]  # other flags make other objects
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


FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
NVCC, WITHOUT_NVCC = find_nvcc()
MODULES = [
    Extension(
        "quest_dist._cpu",
        sources=sources(),
        depends=headers(),
        include_dirs=[get_include()],
        define_macros=[("QUEST_X86", "1")] if X86 else [],
        language="c++",
        extra_compile_args=[*FLAGS, "-ffp-contract=off"],
        extra_link_args=["-pthread", *["-ldl"] * (platform.system() == "Linux")],
    )
]
if NVCC is not None:
    MODULES.append(
        Extension(
            "quest_dist._cuda",
            sources=[(KERNELS / "bind_cuda.cpp").as_posix()],
            depends=[*headers(), *(path.as_posix() for path in (KERNELS / "cuda").glob("*.cu"))],
            include_dirs=[get_include()],
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread", "-ldl", "-lrt"],
        )
    )
setup(
    ext_modules=MODULES,
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage},
)
