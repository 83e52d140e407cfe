"""The adapter engine beside peft: one module for each kind of measurement, run by `benchmarks.adapters`."""
