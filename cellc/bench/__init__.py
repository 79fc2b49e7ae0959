"""Benchmarks: cellc against what a user would pick instead, on the same weights and requests."""
