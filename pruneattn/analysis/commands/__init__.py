"""Command line of each analysis: ``pruneattn analyze NAME``."""

from __future__ import annotations

#: Name of each analysis, and its line in ``pruneattn analyze --help``.
ANALYSES = {
    "table1": "Table I: accuracy by keep-rate and ranking of the patches, with the same training recipe for every cell",
    "table2": "Table II: MACs by number of patches and keep-rate, next to the paper's numbers and the measured time",
    "clusters": "Table III and Fig. 5: the patches of a dataset in five clusters by intensity or variation",
    "kept_patches": "Fig. 1 and 3: spectrograms next to the patches that each pruning stage keeps",
    "kendall": "Fig. 4: Kendall's coefficient between attention score and cluster, for each block",
    "remove_clusters": "Table IV: accuracy when quiet or loud patches are removed after a block",
    "kept_histogram": "Fig. 6: patches by mean and standard deviation, at the input and after pruning",
    "precision": "Accuracy and kept patches in float32, in bfloat16 and with 8-bit weights, on a CPU",
}
