"""What the tables and figures of the paper are computed from; ``python/`` has the script of each.

One module per result computes it and draws it. ``command`` has what the scripts share (options, opening, saving),
``patches`` the clips of a data set as patches, ``clusters`` the grouping of patches that several results build on.
"""
