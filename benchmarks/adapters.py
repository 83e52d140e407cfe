"""The adapter engine beside peft: `python -m benchmarks.adapters [--only NAME] [--json FILE] [--quick]`.

Everything is measured in one process and one thread: each round runs the bare model twice, peft's
and ours in a random order, and a figure is the median over the rounds (`benchmarks.engine.timing`).
Only imports need a process each. Prints a table; ends with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.figures import Figure, table
from benchmarks.engine.workloads import FULL, QUICK, Size

GROUPS = {
    "import": "imports.imports",
    "inject": "managing.injecting",
    "switch": "managing.choosing",
    "train-llama": "training.train_llama",
    "train-unet": "training.train_unet",
    "saved": "memory.saved",
    "forward": "inference.forward",
    "mixed": "inference.mixed",
    "svd": "combining.svd",
}
"""Name of a group of rows -> the function that measures it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=GROUPS, help="measure this group of rows; may be repeated")
    parser.add_argument("--json", type=Path, help="write figures, times, versions and the machine to this file")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small models, few rounds: does it all run? Ends with 0, whatever the verdicts",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = []
    for group in options.only or GROUPS:
        for figure in _measure(group)(QUICK if options.quick else FULL):
            print(f"{figure.name}: peft {figure.peft:.4g}, ours {figure.ours:.4g}", file=sys.stderr)
            figures.append(figure)
    print(table(figures), "\n\n", ", ".join(f"{name} {fact}" for name, fact in machine().items()), sep="")
    if options.json:
        facts = {"quick": options.quick, "machine": machine(), "figures": [figure.as_json() for figure in figures]}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    missed = any(figure.verdict == "not met" for figure in figures)
    sys.exit(1 if missed and not options.quick else 0)


def _measure(group: str) -> Callable[[Size], Iterator[Figure]]:
    module, function = GROUPS[group].split(".")
    return getattr(import_module(f"benchmarks.engine.{module}"), function)


def machine() -> Mapping[str, Any]:
    """Processor, cores, load and versions: what a reader needs to judge the figures."""
    packages = ("torch", "peft", "transformers", "diffusers", "numpy")
    return {
        "processor": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[2], 1),  # of the last 15 minutes
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _processor() -> str:
    """The processor's name where the system tells it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
