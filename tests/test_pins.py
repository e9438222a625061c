"""Pins: what a freeze or constraints file says, what differs, and what lies between two versions."""

from __future__ import annotations

import pytest

from lowbit import pins
from lowbit.errors import LowbitError
from lowbit.pins import Change

FREEZE = """\
# a comment
--extra-index-url https://download.pytorch.org/whl/cu128
torch==2.11.0+cu128
PyTorch_Triton==3.5.0 ; sys_platform == "linux"
torchao @ git+https://github.com/pytorch/ao@0a1b2c
-e git+https://example.com/lowbit.git@deadbeef#egg=lowbit
hqq[all]==0.2.8.post1  # why
numpy>=2,<3
bitsandbytes==0.50.2 \\
    --hash=sha256:aaaa \\
    --hash=sha256:bbbb
"""


def test_a_freeze_is_read(tmp_path):
    (tmp_path / "old.txt").write_text(FREEZE)
    assert pins.read(tmp_path / "old.txt") == {
        "torch": "2.11.0+cu128",
        "pytorch-triton": "3.5.0",
        "torchao": "git+https://github.com/pytorch/ao@0a1b2c",
        "lowbit": "git+https://example.com/lowbit.git@deadbeef",
        "hqq": "0.2.8.post1",
        "numpy": ">=2,<3",
        "bitsandbytes": "0.50.2",
    }


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff\xfe\x00", b"no pins at all here\n"])
def test_what_holds_no_pin_is_refused(tmp_path, content):
    (tmp_path / "pins.txt").write_bytes(content)
    with pytest.raises(LowbitError, match=r"pins.txt: "):
        pins.read(tmp_path / "pins.txt")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LowbitError, match=r"none.txt: can't read these pins \(No such file"):
        pins.read(tmp_path / "none.txt")


def test_changes_are_those_of_both_or_of_what_both_name():
    old, new = (
        {"torch": "2.11.0", "hqq": "1", "numpy": "2"},
        {"torch": "2.13.0", "gemlite": "not installed", "numpy": "2"},
    )
    assert pins.changes(old, new) == [Change("hqq", "1", ""), Change("torch", "2.11.0", "2.13.0")]
    assert pins.changes(old, new, common=True) == [Change("torch", "2.11.0", "2.13.0")]
    assert str(Change("hqq", "1", "")) == "hqq 1 -> none"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("2.11.0", "2.13.0", ["2.12.0"]),
        ("2.11.0", "2.13.1", ["2.12.0", "2.13.0"]),
        ("2.13.1", "2.11.0", ["2.13.0", "2.12.0"]),
        ("2.11.0+cu128", "2.12.0+cu130", []),
        ("0.50.0", "0.50.3", ["0.50.1", "0.50.2"]),
        ("4.57.1", "6.0", ["5.0.0"]),
        ("4.57.1", "6.1", ["5.0.0", "6.0.0"]),
        ("0.2.8.post1", "0.2.10", ["0.2.9"]),
        ("2.12.0.dev20260101", "2.13.0", []),
        ("", "2.13.0", []),
        ("580.159.04", "git+https://x", []),
        ("2.11", "2.11.0", []),
    ],
)
def test_versions_between_by_their_numbers(old, new, expected):
    assert pins.between(old, new) == expected


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.13.0", []),
        ("2.13.0+cu130", ["--extra-index-url", "https://download.pytorch.org/whl/cu130"]),
        ("2.13.0+cpu", ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]),
        (
            "2.14.0.dev20261101+cu130",
            ["--pre", "--extra-index-url", "https://download.pytorch.org/whl/nightly/cu130"],
        ),
        ("1.0+my.build", []),
    ],
)
def test_local_versions_name_their_index(version, expected):
    assert pins.index_options(version) == expected


def test_a_requirement_is_what_pip_takes():
    assert pins.requirement("torch", "2.13.0") == "torch==2.13.0"
    assert pins.requirement("torchao", "git+https://x@y") == "torchao @ git+https://x@y"
    assert pins.requirement("numpy", ">=2,<3") == "numpy>=2,<3"
