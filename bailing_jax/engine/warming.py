"""Compiling ahead of time, several programs at once. XLA compiles without Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed


def compile_all(jobs: Mapping[str, Callable[[], None]], report: Callable[[str], None]) -> None:
    """Run every job in a pool of threads.

    Args:
        jobs: what compiles, by its name.
        report: called with a line before, and as each is done.

    Raises:
        Exception: what the first job to fail raised; jobs not begun are dropped then, and when
            Ctrl-C comes.
    """
    workers = min(len(jobs), os.cpu_count() or 1)
    report(f"compiling {len(jobs)} programs, {workers} at a time")
    with ThreadPoolExecutor(workers, "compile") as pool:
        try:
            futures = {pool.submit(job): name for name, job in jobs.items()}
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                report(f"compiled {done} of {len(jobs)}: {futures[future]}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
