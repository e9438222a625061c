"""lowbit's CUDA kernels on the CPU, by tests/emulator/: what they compute, with the runner that launches them."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from lowbit.kernels import nvrtc, prefill, runner, unpacking
from lowbit.kernels.geometry import Geometry

COMPILE = ("g++", "-std=c++17", "-O1", "-fPIC", "-w", "-Wno-psabi")
HEADER = Path(__file__).parent / "emulator" / "cuda_on_cpu.h"
ARGUMENTS = {"product": "Product", "attention": "Attention", "embed": "Embed", "unpack": "Unpack"}
ARGUMENTS |= {"batch": "Batch", "normalize": "Normalize", "norm": "Norm", "rope": "Rope", "silu": "Silu"}


def unmet():
    """Why nothing can be emulated here, or None."""
    if platform.machine() != "x86_64":
        return f"the emulator's fibers are written for x86-64, this is {platform.machine()}"
    return None if shutil.which("g++") else "needs g++"


def built(folder, source, target, *flags):
    """``folder / target``, which whoever asks first compiles of ``folder / source``; the others wait for it."""
    done = folder / target
    with (folder / f"{target}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            made = folder / f"{target}.new"
            ran = subprocess.run(
                [*COMPILE, *flags, str(folder / source), "-o", str(made)], capture_output=True, text=True, check=False
            )
            assert ran.returncode == 0, ran.stderr[-4000:]
            made.replace(done)
    return done


def library(folder, text):
    """The shared library of ``text``, which includes the header first: that one is compiled ahead (0.4 s less each)."""
    header = HEADER.read_text()
    name = hashlib.sha256("\0".join((*COMPILE, header, text)).encode()).hexdigest()[:16]
    put(folder / HEADER.name, header)
    built(folder, HEADER.name, f"{HEADER.name}.gch", "-x", "c++-header")
    put(folder / f"{name}.cpp", text)
    return built(folder, f"{name}.cpp", f"{name}.so", "-shared")


def put(path, text):
    """Written whole, or there already: another worker may be reading it."""
    if not path.exists():
        mine = path.with_name(f"{path.name}.{os.getpid()}")
        mine.write_text(text)
        mine.replace(path)


class EmulatedModule:
    """In the place of lowbit.kernels.launch.Module: the same kernels, compiled for the CPU."""

    def __init__(self, folder, sources, kernels, macros):
        self.kernels = list(kernels)
        cases = "\n".join(
            f"    case {i}: emulator::launch([](const void* a) {{ {name}(*(const {self._argument(name)}*)a); }}, "
            "argument, x, y, cluster, threads, shared); return;"
            for i, name in enumerate(self.kernels)
        )
        defines = "\n".join(f"#define {name} {value}" for name, value in macros.items())
        text = (
            f'#include "{HEADER.name}"\n{defines}\n{nvrtc.read_sources(*sources)}\n'
            'extern "C" void run(int which, const void* argument, int x, int y, int cluster, int threads, '
            "size_t shared) {\n"
            f"  switch (which) {{\n{cases}\n  }}\n}}\n"
        )
        self._run = ctypes.CDLL(str(library(folder, text))).run

    @staticmethod
    def _argument(name):
        return ARGUMENTS[name.split("_")[0]]

    def function(self, kernel):
        assert kernel in self.kernels

    def launch(self, kernel, grid, threads, argument, *, shared_bytes=0, overlap=False, cluster=1):
        x, y = grid
        which = self.kernels.index(kernel)
        self._run(which, ctypes.byref(argument), x, y, cluster, threads, ctypes.c_size_t(shared_bytes))


def emulate_runner(monkeypatch, folder):
    """The runner's kernels, the prefill's and those that unpack, by the emulator, compiled into ``folder``."""

    def load(shape, device, progress=None):
        return EmulatedModule(folder, runner.sources(shape), runner.kernels(shape), shape.macros())

    def unpacker(name, ku, device):
        macros = Geometry(name, **unpacking._ANY_SHAPE).macros()
        return EmulatedModule(folder, ("common", "decode", "unpack"), (f"unpack_kernel<{ku}>",), macros)

    def load_prefill(shape, device, progress=None):
        return EmulatedModule(folder, ("common", "prefill"), prefill.KERNELS, shape.macros())

    monkeypatch.setattr(runner, "load", load)
    monkeypatch.setattr(prefill, "load", load_prefill)
    monkeypatch.setattr(unpacking, "_unpacker", unpacker)
