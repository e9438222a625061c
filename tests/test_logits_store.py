from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.logits_store import LogitsStore, choose_host_bytes


def blocks(dtype: torch.dtype) -> torch.Tensor:
    """[2 windows * 6 positions, 10]."""
    return torch.randn(12, 10, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_read_is_what_was_appended(dtype: torch.dtype, on_disk: bool) -> None:
    rows = blocks(dtype)
    store = LogitsStore((2, 6), host_bytes=rows.nbytes - on_disk)
    for block in rows.split(4):
        store.append(block)
    store.seal()
    assert store.on_disk == on_disk
    assert (len(store), store.nbytes) == (2, rows.nbytes)
    assert torch.equal(store.read(1, slice(0, 6)), rows[6:])
    assert torch.equal(store.read(0, slice(2, 5)), rows[2:5])
    assert store.read(0, slice(0, 1)).dtype is dtype
    store.close()
    store.close()


@pytest.mark.parametrize("host_bytes", [0, None])
def test_misuse_is_an_error(host_bytes: int | None) -> None:
    store = LogitsStore((2, 6), host_bytes=host_bytes)
    store.append(blocks(torch.float32)[:11])
    with pytest.raises(ValueError, match="expected 12 positions, got 11"):
        store.seal()
    store.append(blocks(torch.float32)[11:])
    store.seal()
    store.close()
    with pytest.raises(ValueError, match="closed or not sealed"):
        store.read(0, slice(0, 1))


def test_an_unwritable_directory_is_named(tmp_path: Path) -> None:
    store = LogitsStore((2, 6), directory=tmp_path / "absent", host_bytes=0)
    with pytest.raises(LowbitError, match=r"reference logits in .*absent.*No such file.*TMPDIR"):
        store.append(blocks(torch.float32))


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files of this process may not pass 64 KiB: the error of a full disk without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    store = LogitsStore((1, 64), directory=tmp_path, host_bytes=0)
    with pytest.raises(LowbitError, match="free space there"):
        store.append(torch.zeros(64, 1024))
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_dropped_store_closes_its_file() -> None:
    store = LogitsStore((1, 12), host_bytes=0)
    store.append(blocks(torch.float32))
    file = store._file
    assert file is not None
    del store
    assert file.closed


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs /proc/meminfo")
def test_the_limit_is_a_share_of_this_host() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert choose_host_bytes() == pytest.approx(int(total.split()[1]) * 1024 / 4, rel=0.01)
