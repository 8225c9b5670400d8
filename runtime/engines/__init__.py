"""Backends behind the `Engine` protocol; each module is imported only when it is chosen."""
