"""How a benchmark ends: its figures, and whether they are within their bounds."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, NoReturn


def end(result: Mapping[str, Any], at_least: Mapping[str, float], at_most: Mapping[str, float]) -> NoReturn:
    """Prints `result` as JSON on standard output and exits: 0, or 1 with every missed bound on standard error."""
    print(json.dumps(result))
    short = [(name, f"{bound} or more") for name, bound in at_least.items() if result[name] < bound]
    short += [(name, f"{bound} or less") for name, bound in at_most.items() if result[name] > bound]
    missed = [f"{name} is {result[name]}, wanted {wanted}" for name, wanted in short]
    print("\n".join(missed), file=sys.stderr)
    sys.exit(1 if missed else 0)
