"""lowbit's CUDA kernels on the CPU, by tests/emulator/: what they compute, with the runner that launches them."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

from lowbit.kernels import nvrtc

HEADER = Path(__file__).parent / "emulator" / "cuda_on_cpu.h"
ARGUMENTS = {"product": "Product", "attention": "Attention", "embed": "Embed", "unpack": "Unpack"}
ARGUMENTS |= {"norm": "Norm", "rope": "Rope", "silu": "Silu"}


def unmet():
    """Why nothing can be emulated here, or None."""
    if platform.machine() != "x86_64":
        return f"the emulator's fibers are written for x86-64, this is {platform.machine()}"
    return None if shutil.which("g++") else "needs g++"


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
            f'{defines}\n#include "{HEADER}"\n{nvrtc.read_sources(*sources)}\n'
            'extern "C" void run(int which, const void* argument, int x, int y, int cluster, int threads, '
            "size_t shared) {\n"
            f"  switch (which) {{\n{cases}\n  }}\n}}\n"
        )
        source, library = folder / "kernels.cpp", folder / "kernels.so"
        source.write_text(text)
        command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-Wno-psabi", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        self._run = ctypes.CDLL(str(library)).run

    @staticmethod
    def _argument(name):
        return ARGUMENTS[name.split("_")[0]]

    def function(self, kernel):
        assert kernel in self.kernels

    def launch(self, kernel, grid, threads, argument, *, shared_bytes=0, overlap=False, cluster=1):
        x, y = grid
        which = self.kernels.index(kernel)
        self._run(which, ctypes.byref(argument), x, y, cluster, threads, ctypes.c_size_t(shared_bytes))
