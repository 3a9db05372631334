"""The paper's tables and figures by name: ``pruneattn analyze NAME``.

One module per result computes and draws it. ``clips.py`` iterates over the clips of a dataset. ``commands/`` contains
the command line of each result.
"""
