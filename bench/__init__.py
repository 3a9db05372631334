"""What pruning really saves on this machine: ``pytest bench/ --benchmark-only``, then ``python -m bench.harness.report``.

A test times one *case* (`measure.Case`): every *provider* of the same work, checked first, in rounds that take turns.
``bench_X.py`` says who takes part, `grid` at which sizes, `measure` how it is done, `results` what is written down.
"""
