"""Rebuilds everything in `assets/` from licensed packages: `python -m assets.build --work DIR`."""
