"""At which sizes each level is measured: few by default, so that two CPU cores need no ten minutes, or the whole grid."""

from typing import NamedTuple

import torch

from bench.harness.measure import TRAINING, Case

MODELS = ("audiomae_base", "ast_base")
SMALL_MODELS = ("audiomae_small", "ast_small")
IMAGE_MODELS = ("vit_base_patch16_224", "deit_base_distilled_patch16_224")  # of timm
ALL_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
FEW_RATES = (1.0, 0.7, 0.5)


class Sizes(NamedTuple):
    """Sizes of one level. ``lengths`` are the tokens of an op, and the patches of everything else."""

    dtypes: tuple
    batches: tuple
    lengths: tuple
    rounds: int
    models: tuple = ()
    keep_rates: tuple = FEW_RATES  # of ours and the paper's way
    peer_rates: tuple = FEW_RATES[-1:]  # at which all others prune
    all_ways: bool = (
        False  # compile pruned models too (half a minute each on two cores), run the slower ways of ours too
    )
    compiled_batches: tuple | None = None  # at which models are compiled, half a minute each; None: at all of them
    compiled_rates: tuple = ()  # of ours, beside the dense model; with `all_ways` all of them

    def compiles(self, batch):
        return self.compiled_batches is None or batch in self.compiled_batches

    def compiles_ours(self, batch, rate):
        return self.all_ways or (rate in self.compiled_rates and self.compiles(batch))


# Without instructions for it, a product in bfloat16 takes some hundred times as long as in float32.
_FLOATS = ("float32", "bfloat16") if torch.cpu._is_avx512_bf16_supported() else ("float32",)
_HALVES = ("bfloat16", "float16", "float32")
_LENGTHS = (64, 256, 512)
_POWERS = (64, 128, 256, 512, 1024, 2048, 4096)
_SCALED = ("column_mean_attention", *MODELS)

#: ``GRIDS[device, full][level]``; a level that is not there is not measured.
GRIDS = {
    ("cpu", False): {
        "op": Sizes(("float32",), (1, 4), (65, 513), 5),
        "block": Sizes(("float32",), (1,), (512,), 9, MODELS),
        "model": Sizes(("float32",), (1,), (512,), 5, MODELS),
        "adapters": Sizes(("float32",), (1,), (196,), 5, IMAGE_MODELS[:1], (1.0, 0.5)),
        TRAINING: Sizes(("float32",), (1,), (128,), 7, SMALL_MODELS[:1]),
        "wav to label": Sizes(("float32",), (1,), (512,), 7, SMALL_MODELS[:1]),
        "scaling by tokens": Sizes(("float32",), (1,), _POWERS, 3, ("column_mean_attention", "audiomae_small")),
        "scaling by batch": Sizes(
            ("float32",), (1, 2, 4, 8, 16), (64,), 3, ("column_mean_attention", "audiomae_small")
        ),
    },
    ("cpu", True): {
        "op": Sizes(_FLOATS, (1, 4, 16), (65, 257, 513, 514), 15),
        "block": Sizes(_FLOATS, (1, 4), _LENGTHS, 15, MODELS, ALL_RATES, ALL_RATES[1:]),
        "model": Sizes(_FLOATS, (1, 4, 16), _LENGTHS, 9, MODELS, ALL_RATES, ALL_RATES[1:], True),
        "adapters": Sizes(_FLOATS, (1, 4), (196,), 9, IMAGE_MODELS, ALL_RATES),
        TRAINING: Sizes(_FLOATS, (4,), _LENGTHS, 5, MODELS),
        "wav to label": Sizes(_FLOATS, (1, 16), _LENGTHS, 9, MODELS, ALL_RATES, ALL_RATES[1:]),
        "exported": Sizes(("float32",), (1, 4), (512,), 5, MODELS),
        "scaling by tokens": Sizes(_FLOATS, (1,), _POWERS, 9, _SCALED),
        "scaling by batch": Sizes(_FLOATS, (1, 2, 4, 8, 16, 32), (64, 512), 9, _SCALED),
    },
    ("cuda", False): {
        "op": Sizes(("bfloat16",), (1, 64), (257, 513, 514), 9),
        "block": Sizes(("bfloat16",), (1, 64), (512,), 9, MODELS),
        # A single clip is bound by launches, and a CUDA graph of the model is what to beat.
        "model": Sizes(("bfloat16",), (1, 64), (512,), 9, MODELS, compiled_batches=(64,), compiled_rates=(1.0, 0.5)),
        "adapters": Sizes(("bfloat16",), (64,), (196,), 9, IMAGE_MODELS[:1], compiled_batches=()),
        TRAINING: Sizes(("bfloat16",), (32,), (512,), 5, MODELS),
        "wav to label": Sizes(("bfloat16",), (64,), (512,), 5, MODELS),
        "scaling by tokens": Sizes(("bfloat16",), (4,), _POWERS, 5, _SCALED[:2]),
        "scaling by batch": Sizes(("bfloat16",), (1, 4, 16, 64, 256), (512,), 5, _SCALED[:2]),
    },
    ("cuda", True): {
        "op": Sizes(_HALVES, (1, 16, 64, 256), (65, 257, 513, 514), 15),
        "block": Sizes(_HALVES, (1, 16, 64, 256), _LENGTHS, 15, MODELS, ALL_RATES, ALL_RATES[1:]),
        "model": Sizes(_HALVES, (1, 16, 64, 256), _LENGTHS, 15, MODELS, ALL_RATES, ALL_RATES[1:], True),
        "adapters": Sizes(_HALVES, (1, 16, 64, 256), (196,), 15, IMAGE_MODELS, ALL_RATES),
        TRAINING: Sizes(_HALVES[:2], (16, 64), _LENGTHS, 9, MODELS),
        "wav to label": Sizes(("bfloat16",), (1, 64), _LENGTHS, 9, MODELS, ALL_RATES, ALL_RATES[1:]),
        "exported": Sizes(("bfloat16",), (1, 64), (512,), 9, MODELS),
        "scaling by tokens": Sizes(("bfloat16",), (1, 4), _POWERS, 9, _SCALED),
        "scaling by batch": Sizes(("bfloat16",), (1, 4, 16, 64, 256), _LENGTHS, 9, _SCALED),
    },
}


def cases(level, device, sizes, op=None):
    """The cases of a level's `Sizes`; of an op by its name."""
    return [
        Case(level, subject, device, dtype, batch, length if op else length + extra_tokens(subject))
        for dtype in sizes.dtypes
        for subject in ([op] if op else sizes.models)
        for batch in sizes.batches
        for length in sizes.lengths
    ]


def extra_tokens(model):
    return 2 if model.startswith("ast") or "distilled" in model else 1
