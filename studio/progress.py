"""Progress on standard error: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from studio.runs import Run, Status
from studio.terminal import console

PLAIN_EVERY_S = 5.0


@contextmanager
def show_run(run: Run, pictures_per_step: int) -> Iterator[None]:
    """Follows a run's status while it trains: loss, steps and pictures a second, ETA."""
    with _meter() as show:

        def follow(status: Status) -> None:
            if status.state != "failed":  # the error message follows anyway
                show(status.step, status.total, _describe(status, pictures_per_step))

        run.on_status.append(follow)
        yield


@contextmanager
def show_steps(label: str) -> Iterator[Callable[[int, int], None]]:
    """A callable that takes (steps done, steps in all)."""
    with _meter() as show:
        yield lambda done, total: show(done, total, label)


def _describe(status: Status, pictures_per_step: int) -> str:
    parts = [status.message or status.state]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.rate:
        parts.append(f"{_rate(status.rate, 'it')}, {_rate(status.rate * pictures_per_step, 'pictures')}")
    if status.eta_s:
        minutes, seconds = divmod(round(status.eta_s), 60)
        parts.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
    return "  ".join(parts)


def _rate(per_second: float, unit: str) -> str:
    return f"{per_second:.1f} {unit}/s" if per_second >= 1 else f"{1 / per_second:.1f} s/{unit}"


@contextmanager
def _meter() -> Iterator[Callable[[int, int, str], None]]:
    """A callable that shows (done, total, description)."""
    if not console().is_terminal:
        yield _plain()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console(), expand=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, description: str) -> None:
            bar.update(task, completed=done, total=total or None, description=description)

        yield show


def _plain() -> Callable[[int, int, str], None]:
    """Prints a line when the first word changes, at the end, and every few seconds."""
    printed_at, printed = 0.0, ("", -1)

    def show(done: int, total: int, description: str) -> None:
        nonlocal printed_at, printed
        phase, now = description.partition(" ")[0], time.monotonic()
        due = now - printed_at >= PLAIN_EVERY_S or phase != printed[0] or done == total
        if due and (phase, done) != printed:
            console().print(f"{done}/{total}  {description}" if total else description, markup=False)
            printed_at, printed = now, (phase, done)

    return show
