"""Builds the kernels and puts conf/ and sweeps/ into the package; the rest is pyproject.toml.

`quest_dist._cpu` is built always; `quest_dist._cuda` where nvcc is found (CUDA_HOME, then PATH,
then /usr/local/cuda), never with QUEST_CUDA=0; with QUEST_CUDA=1 its absence is an error.
QUEST_CUDA_ARCHS names the architectures that get machine code, as in "80 90a 120+PTX"; +PTX adds
what GPUs that are newer than all of them compile for themselves.

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
# Of single files; those that only hand arguments on take seconds to optimise, for 0.1 us a call.
HANDS_ON = ["-O1", "-g0"]
FILE_FLAGS = {**ISA_FLAGS, "bind.cpp": HANDS_ON, "bind_cuda.cpp": HANDS_ON}
X86 = platform.machine().lower() in {"x86_64", "amd64"}
# Files that take seconds, the longest first, so that the last ones to be compiled are short.
SLOWEST = [
    "decode_attend.cu",
    "attend_packed.cu",
    "attend.cu",
    "scores.cu",
    "decode_scores.cu",
    "isa_avx512bf16.cpp",
    "bind.cpp",
    "bind_cuda.cpp",
    "pack.cu",
    "int4.cu",
    "append.cu",
]
INSTALL_A_COMPILER = {
    "Darwin": "xcode-select --install",
    "Linux": "apt install g++ (or dnf install gcc-c++)",
}
# What runs everywhere from Ampere on: machine code for these, PTX for what comes after.
CUDA_ARCHS = "80 86 89 90a 100 120+PTX"
OLDEST_CUDA = (12, 8)  # the first that knows all of them
# nvcc makes PTX of a file once for all architectures between which its text does not distinguish,
# and once more from 9.0 on where it does: where it includes this header.
OLDEST_ARCH, CHAINING_ARCH, CHAINING = 80, 90, '#include "chain.cuh"'
# Kept between builds, which pip's own temporary folder is not. Holds each file's object, what it
# was made from (.made) and the registers and spills that ptxas reports (.ptxas).
CUDA_BUILD = Path("build") / "cuda"
CUDA_FLAGS = [
    "-std=c++17",
    "-O1",  # of the host's code, which launches; nvcc optimises kernels fully in any case
    "-lineinfo",
    "--fmad=false",  # products are fused where the source says so: see kernels/cuda/rows.cuh
    "--compress-mode=balance",  # "size" takes longer by a third of all compiling
    "-Xfatbin=-compress-all",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
]
# Repository folder -> its name inside an installed package.
CONFIGURATION = {"conf": "_conf", "sweeps": "_sweeps"}


def sources(*patterns: str) -> list[str]:
    """Every file of the kernels that this machine's architecture can compile."""
    files = sorted(path for pattern in patterns for path in KERNELS.glob(pattern))
    return [path.as_posix() for path in files if X86 or path.name not in ISA_FLAGS]


def turn(path: Path) -> int:
    """Where a file stands among those to compile."""
    return SLOWEST.index(path.name) if path.name in SLOWEST else len(SLOWEST)


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


def cuda_archs(text: str) -> list[str]:
    """nvcc's options for the architectures asked for, of a file with this text."""
    front_ends = [OLDEST_ARCH, *[CHAINING_ARCH] * (CHAINING in text)]
    codes: dict[int, list[str]] = {}
    for arch in re.split(r"[ ,;]+", os.environ.get("QUEST_CUDA_ARCHS", CUDA_ARCHS).strip()):
        number = arch.removesuffix("+PTX")
        if not re.fullmatch(r"[0-9]{2,3}[af]?", number):
            raise BaseError(f"QUEST_CUDA_ARCHS: {arch!r} is no architecture; try {CUDA_ARCHS!r}")
        if int(number.rstrip("af")) < OLDEST_ARCH:
            raise BaseError(
                f"QUEST_CUDA_ARCHS: {arch!r} is below {OLDEST_ARCH}; try {CUDA_ARCHS!r}"
            )
        front_end = max(x for x in front_ends if x <= int(number.rstrip("af")))
        ptx = [f"compute_{front_end}"] * (arch != number)
        codes.setdefault(front_end, []).extend([f"sm_{number}", *ptx])
    return [
        f"-gencode=arch=compute_{front_end},code=[{','.join(dict.fromkeys(code))}]"
        for front_end, code in codes.items()
    ]


def cuda_flags() -> Path:
    """A file that is as old as the flags of the CUDA files are."""
    told = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True)
    flags = "\n".join([told.stdout, *CUDA_FLAGS, *cuda_archs(CHAINING)])
    path = CUDA_BUILD / "flags"
    if not path.is_file() or path.read_text() != flags:
        CUDA_BUILD.mkdir(parents=True, exist_ok=True)
        path.write_text(flags)
    return path


def compile_cuda(source: Path) -> str:
    """The object of a .cu file, which is kept while its text, headers and flags are unchanged."""
    target = CUDA_BUILD / f"{source.stem}.o"
    options = [*CUDA_FLAGS, *cuda_archs(source.read_text())]
    command = [str(NVCC), *options, "-c", str(source), "-o", str(target)]
    inputs = [CUDA_BUILD / "flags", source, *headers()]
    texts = [" ".join(command).encode(), *(Path(path).read_bytes() for path in inputs)]
    digest = hashlib.sha256(b"\0".join(texts)).hexdigest()
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


class BuildKernels(build_ext):
    """Compile all files of both modules side by side, each with flags of its own."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = True  # a module may compile while the other links

    def run(self) -> None:
        if NVCC is None:
            if os.environ.get("QUEST_CUDA") == "1":
                raise BaseError(f"QUEST_CUDA=1, but {WITHOUT_NVCC}")
            print(f"quest_dist._cuda is not built: {WITHOUT_NVCC}")
        super().run()

    def build_extensions(self) -> None:
        plain = self.compiler.compile
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

            def compile_all(files: list[str], **options: object) -> list[str]:
                def compile_one(path: Path) -> list[str]:
                    if path.suffix == ".cu":
                        return [compile_cuda(path)]
                    flags = [*options["extra_postargs"], *FILE_FLAGS.get(path.name, [])]
                    return plain([path.as_posix()], **{**options, "extra_postargs": flags})

                longest_first = sorted(map(Path, files), key=turn)
                built = pool.map(compile_one, longest_first)
                return [path for group in built for path in group]

            self.compiler.compile = compile_all
            super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "quest_dist._cuda":
            assert NVCC is not None
            ext.extra_objects = [cuda_runtime(NVCC)]
            ext.depends = [*ext.depends, cuda_flags().as_posix()]
        try:
            super().build_extension(ext)
        except CompileError as error:
            command = os.environ.get("CXX") or "c++"
            if any(shutil.which(name) for name in (command.split()[0], "g++", "clang++", "cl")):
                raise
            advice = INSTALL_A_COMPILER.get(platform.system(), "install a C++17 compiler")
            raise BaseError(f"quest_dist needs a C++ compiler and found none: {advice}") from error


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


# -g1: lines of functions, for profilers; Python's own -g makes half as many seconds more.
FLAGS = ["-std=c++17", "-O3", "-g1", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
NVCC, WITHOUT_NVCC = find_nvcc()
MODULES = [
    Extension(
        "quest_dist._cpu",
        sources=sources("bind.cpp", "cpu/*.cpp"),
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
            sources=sources("bind_cuda.cpp", "cuda/*.cu"),
            depends=headers(),
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
