"""Measurements that back what the README says. Each is a command: `python -m benchmarks.NAME`."""
