"""Diffusion: training objectives, prompts, sampling, and pictures with their metadata."""
