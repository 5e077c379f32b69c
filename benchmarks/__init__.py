"""Benchmarks: scripts that print tables; run from a checkout."""
