"""What `import studio.adapters` costs over `import torch`, in fresh processes."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.engine.figures import Figure, timed
from benchmarks.engine.timing import AGAIN, Variant, interleave
from benchmarks.engine.workloads import Size


def imports(size: Size) -> Iterator[Figure]:
    statements = {"torch": "torch", AGAIN: "torch", "peft": "peft", "ours": "torch, studio.adapters"}
    variants = {name: Variant(lambda what=what: _python(f"import {what}")) for name, what in statements.items()}
    samples = interleave(variants, min(size.rounds, 7), resolution=0.03, clock=_children)
    note = "peft imports the quantisation libraries that are installed"
    yield timed("import, over `import torch`", samples, 1.1, "at most 1.1x", note=note)


def _python(statement: str) -> None:
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


def _children() -> float:
    """CPU seconds of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
