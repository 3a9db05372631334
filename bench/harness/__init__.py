"""Measurement, results, reports, and code that several benchmarks share. The harness does not import benchmarks."""
