"""Development tools: tuning of tile sizes, tables of GPU resources, and the run on a GPU."""
