"""The benchmarks: one for each op, and for blocks, models, training steps, exported files and whole pipelines."""
