"""Adapter studio: parameter-efficient adapters for image models, from pictures to a file that loads elsewhere."""

__version__ = "0.1.0"
