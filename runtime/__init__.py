"""Engines to frames: load, cache, denoise, decode, hand out."""
