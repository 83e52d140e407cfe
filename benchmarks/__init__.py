"""Measurements that back what the README says. Each is a command: `python -m benchmarks.NAME`.

A benchmark prints its figures as JSON and ends with 1 where one misses its bound.
"""
