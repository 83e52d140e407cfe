"""A command of the studio in a process of its own: heavy libraries and damaged files stay out of the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

from studio.errors import ConfigError

PATIENCE_S = 300


def answer(*arguments: str | Path) -> dict[str, Any]:
    """What `studio ARGUMENTS --json` says. Raises ConfigError with its message where it says none."""
    command = [sys.executable, "-m", "studio", *map(str, arguments), "--json"]
    environment = {**os.environ, "COLUMNS": "10000"}  # a message is not to be wrapped
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, stdin=subprocess.DEVNULL, env=environment
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"`studio {arguments[0]}` took more than {PATIENCE_S} s and was ended") from None
    try:
        return json.loads(done.stdout)
    except ValueError:
        message = done.stderr.strip().removeprefix("Error: ") or f"it ended with {done.returncode} and no word"
        raise ConfigError(message) from None


def check_html(found: dict[str, Any]) -> str:
    """The answer of `studio check` as a table: which tools use the file, and how far each is off."""
    reports = found["consumers"]
    rows = "".join(_row(report) for report in reports.values())
    problem = next((report["problem"] for report in reports.values() if report["problem"]), "")
    builtin = found.get("base") == "builtin"
    note = "Checked on the built-in base, which other tools do not have." if builtin else ""
    head = "<tr><th>Tool</th><th>Keys used</th><th>Weights</th><th>Notes</th></tr>"
    return f'<table class="check">{head}{rows}</table><p>{escape(problem or note)}</p>'


def _row(report: dict[str, Any]) -> str:
    whole = not report["unused"] and report["error"] is not None and report["error"] <= 1e-3
    mark = "✓ loads" if whole else "✗ ignores it" if not report["used"] else "△ partly"
    notes = [*report["notes"], *(f"not used: {key}" for key in report["unused"][:2] if report["used"])]
    cells = (
        f"{mark}: {report['consumer']}",
        f"{report['used']} of {report['total']}",
        _weights(report),
        "; ".join(notes),
    )
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _weights(report: dict[str, Any]) -> str:
    if not report["used"]:
        return "unchanged"
    if report["error"] is None:
        return "not known"
    return "exact" if report["error"] == 0 else f"off by {100 * report['error']:.2g}%"
