"""gemlite and hqq are installed where an NVIDIA driver is present, and nowhere else."""

from __future__ import annotations

import sys

import pytest

from lowbit import gpu_libraries


@pytest.fixture
def installs(monkeypatch):
    """Nothing is installed yet; what pip would have been asked for."""
    monkeypatch.setattr(gpu_libraries, "missing", lambda: ["gemlite", "hqq"])
    return []


def install_into(calls, code=0):
    def install(command):
        calls.append(command)
        return code

    return install


def test_without_a_driver_nothing_is_installed_and_the_reason_is_said(installs, capsys):
    assert gpu_libraries.main([], driver=lambda: None, install=install_into(installs)) == 0
    assert installs == []
    assert "no NVIDIA driver here: gemlite and hqq left out" in capsys.readouterr().out


def test_without_a_driver_what_is_installed_is_not_said_to_be_left_out(monkeypatch, installs, capsys):
    monkeypatch.setattr(gpu_libraries, "missing", lambda: ["gemlite"])
    assert gpu_libraries.main([], driver=lambda: None, install=install_into(installs)) == 0
    assert installs == []
    assert "here: gemlite left out" in capsys.readouterr().out


def test_with_a_driver_the_missing_ones_are_installed_at_their_pins(installs):
    arguments = ["--constraints", "pins.txt"]
    assert gpu_libraries.main(arguments, driver=lambda: "580.159", install=install_into(installs)) == 0
    assert installs == [[sys.executable, "-m", "pip", "install", "-c", "pins.txt", "gemlite", "hqq"]]


def test_a_failing_pip_fails_the_step(installs):
    assert gpu_libraries.main([], driver=lambda: "580", install=install_into(installs, code=1)) == 1


def test_nothing_is_done_twice(monkeypatch, installs, capsys):
    monkeypatch.setattr(gpu_libraries, "missing", lambda: [])
    assert gpu_libraries.main([], driver=lambda: "580", install=install_into(installs)) == 0
    assert installs == []
    assert "installed already" in capsys.readouterr().out


def test_missing_asks_the_environment():
    assert gpu_libraries.missing(["pytest", "no-such-package-of-ours"]) == ["no-such-package-of-ours"]


def test_the_driver_is_found_by_its_library(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_libraries, "VERSION_FILE", tmp_path / "absent")

    def absent(name):
        raise OSError(name)

    assert gpu_libraries.find_driver(absent) is None
    assert gpu_libraries.find_driver(lambda name: None) == "libnvidia-ml.so.1"
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04\nGCC version: 12\n")
    monkeypatch.setattr(gpu_libraries, "VERSION_FILE", version)
    assert "580.159.04" in gpu_libraries.find_driver(absent)
