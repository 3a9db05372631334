"""Where and how a model runs: devices and processes, signals, passes over a dataset, timing."""
