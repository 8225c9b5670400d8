"""Engines of the `cuda` backend: networks traced, fused, and written as tapes with their weights."""
