"""Execution of models: devices and processes, signals, passes over a dataset, timing."""
