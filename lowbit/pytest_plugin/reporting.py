"""``--report FILE`` and ``--summary FILE``: what a bench run leaves for readers, written once its run is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit import runs
from lowbit.report import content, files, markdown, page, since

if TYPE_CHECKING:
    from lowbit.pytest_plugin.session import BenchSession


def write(bench: BenchSession) -> None:
    """Nothing in a worker, a child or a run that kept nothing. Raises LowbitError when a file can't be written."""
    settings = bench.settings
    if bench.writer is None or bench.in_worker or (settings.report is None and settings.summary is None):
        return
    kept = runs.read(bench.writer.path)  # from disk, as a later `lowbit report` will read it
    vram = settings.max_vram or bench.device.total_mib
    told = content.of_run(kept, bench.baseline, max_kld=settings.max_kld, max_vram_mib=vram)
    folders = [folder for folder in (settings.runs_dir, settings.history) if folder is not None]
    history, unreadable = since.read_history(folders, kept)
    told = since.with_history(told, history)
    bench.told += [f"left out of the history: {reason}" for reason in unreadable]
    if settings.report is not None:
        files.write_page(settings.report, page.render(told))
        bench.told.append(f"written: {settings.report}")
    if settings.summary is not None:
        files.write_summary(settings.summary, markdown.summary(told))
        bench.told.append(f"written: {settings.summary}")
