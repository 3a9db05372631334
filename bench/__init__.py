"""Benchmarks: ``pytest bench/ --benchmark-only`` measures; ``python -m bench.harness.report`` makes tables and figures.

A test of ``cases/`` times one *case* (`harness.measure.Case`). All *providers* of a case do the same work. The harness
compares each result with the reference, and times the correct providers in interleaved rounds. ``cases/bench_X.py``
chooses the providers. `harness.grid` defines the sizes. `harness.rows` defines the columns of the results in
``results/``.
"""
