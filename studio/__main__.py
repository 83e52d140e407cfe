"""`python -m studio`, and `accelerate launch -m studio`."""

from __future__ import annotations

from studio.cli import main

main()
