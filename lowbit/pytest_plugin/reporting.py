"""``--summary FILE``: what a bench run leaves for readers, written once its run is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit import runs
from lowbit.report import content, files, markdown

if TYPE_CHECKING:
    from lowbit.pytest_plugin.session import BenchSession


def write(bench: BenchSession) -> None:
    """Nothing in a worker, a child or a run that kept nothing. Raises LowbitError when a file can't be written."""
    settings = bench.settings
    if settings.summary is None or bench.writer is None or bench.in_worker:
        return
    kept = runs.read(bench.writer.path)  # from disk, as a later `lowbit report` will read it
    vram = settings.max_vram or bench.device.total_mib
    told = content.of_run(kept, bench.baseline, max_kld=settings.max_kld, max_vram_mib=vram)
    files.write_summary(settings.summary, markdown.summary(told))
    bench.written.append(settings.summary)
