"""Shares of the host's processors for the workers of ``-n K``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lowbit.pytest_plugin import cores


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host of these processors: number -> (socket, core)."""

    def made(places):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(places), raising=False)
        for cpu, (socket, core) in places.items():
            folder = tmp_path / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "physical_package_id").write_text(f"{socket}\n")
            (folder / "core_id").write_text(f"{core}\n")
        return tmp_path

    return made


def test_threads_of_a_core_and_cores_of_a_socket_stay_together(host):
    root = host({cpu: (cpu % 8 // 4, cpu % 4) for cpu in range(16)})  # 8 to 15 are the second threads of 0 to 7
    assert cores.shares(2, root) == [[0, 8, 1, 9, 2, 10, 3, 11], [4, 12, 5, 13, 6, 14, 7, 15]]
    assert cores.shares(4, root)[1] == [2, 10, 3, 11]


def test_every_processor_is_in_one_share(host):
    root = host({cpu: (0, cpu) for cpu in range(10)})
    found = cores.shares(4, root)
    assert sorted(cpu for share in found for cpu in share) == list(range(10))
    assert {len(share) for share in found} == {2, 3}


def test_what_the_kernel_does_not_tell_goes_by_number(host, tmp_path):
    host({cpu: (0, 0) for cpu in range(4)})
    assert cores.shares(2, tmp_path / "nothing") == [[0, 1], [2, 3]]


def test_one_worker_or_too_few_processors_leave_all_to_all(host):
    root = host({0: (0, 0), 1: (0, 1)})
    assert cores.shares(1, root) == []
    assert cores.shares(3, root) == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no processor affinity")
def test_a_share_holds_for_what_is_started_after():
    ask = "import os; print(len(os.sched_getaffinity(0)))"
    code = f"""
import os, subprocess, sys
from lowbit.pytest_plugin import cores
cores.take([min(os.sched_getaffinity(0))])
subprocess.run([sys.executable, "-c", {ask!r}], check=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
