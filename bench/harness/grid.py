"""Sizes at which each level is measured: the small grid takes less than ten minutes on two cores."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.harness.case import TRAINING, Case
from pruneattn.constants import MEL_BINS, PATCH
from pruneattn.errors import UserError

MODELS = ("audiomae_base", "ast_base")
SMALL_MODELS = ("audiomae_small", "ast_small")
WHISPER = ("whisper-tiny.en",)
IMAGE_MODELS = ("vit_base_patch16_224", "deit_base_distilled_patch16_224")  # of timm
ALL_RATES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
FEW_RATES = (1.0, 0.7, 0.5)


class Sizes(NamedTuple):
    """Sizes of one level.

    Attributes:
        dtypes: names of dtypes.
        batches: clips per call.
        lengths: tokens of an op, patches of everything else.
        rounds: rounds of timing in each visit.
        models: names of models.
        keep_rates: keep-rates of our models and of the paper's method.
        peer_rates: keep-rates of all other providers.
        all_ways: also compile pruned models, and run the slower variants of our models.
        compiled_batches: batches at which models are compiled, which takes half a minute for each model on two cores.
            None: all batches.
        compiled_rates: keep-rates at which our model is compiled. With `all_ways` it is compiled at all of them.
    """

    dtypes: tuple[str, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    rounds: int
    models: tuple[str, ...] = ()
    keep_rates: tuple[float, ...] = FEW_RATES
    peer_rates: tuple[float, ...] = FEW_RATES[-1:]
    all_ways: bool = False
    compiled_batches: tuple[int, ...] | None = None
    compiled_rates: tuple[float, ...] = ()

    def compiles(self, batch: int) -> bool:
        """Whether dense models are compiled at this batch."""
        return self.compiled_batches is None or batch in self.compiled_batches

    def compiles_ours(self, batch: int, rate: float) -> bool:
        """Whether our model is compiled at this batch and keep-rate."""
        return self.all_ways or (rate in self.compiled_rates and self.compiles(batch))


# On a CPU without bfloat16 instructions, a product in bfloat16 takes about a hundred times as long as in float32.
_FLOATS = ("float32", "bfloat16") if torch.cpu._is_avx512_bf16_supported() else ("float32",)
_HALVES = ("bfloat16", "float16", "float32")
_LENGTHS = (64, 256, 512)
PUBLISHED = 1212  # patches of the published AST, at stride 10
#: Levels whose number of patches ``--bench-patches`` sets.
OF_PATCHES = ("block", "model", "precision", TRAINING, "wav to label", "exported")
_POWERS = (64, 128, 256, 512, 1024, 2048, 4096)
_SCALED = ("column_mean_attention", *MODELS)

#: ``GRIDS[device, full][level]``; levels without an entry are not measured.
GRIDS: dict[tuple[str, bool], dict[str, Sizes]] = {
    ("cpu", False): {
        "op": Sizes(("float32",), (1, 4), (65, 513), 5),
        "block": Sizes(("float32",), (1,), (512,), 9, MODELS),
        "model": Sizes(("float32",), (1,), (512,), 5, MODELS),
        "adapters": Sizes(("float32",), (1,), (196,), 5, IMAGE_MODELS[:1], (1.0, 0.5)),
        "precision": Sizes(("int8",), (1,), (512,), 5, MODELS[1:]),
        "whisper": Sizes(("float32",), (1,), (1500,), 5, WHISPER, (1.0, 0.5)),
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
        "model": Sizes(_FLOATS, (1, 4, 16), (*_LENGTHS, PUBLISHED), 9, MODELS, ALL_RATES, ALL_RATES[1:], True),
        "adapters": Sizes(_FLOATS, (1, 4), (196,), 9, IMAGE_MODELS, ALL_RATES),
        "precision": Sizes(("int8",), (1, 4), (512, PUBLISHED), 9, MODELS, ALL_RATES),
        "whisper": Sizes(_FLOATS, (1, 4), (1500,), 9, WHISPER, ALL_RATES),
        TRAINING: Sizes(_FLOATS, (4,), _LENGTHS, 5, MODELS),
        "wav to label": Sizes(_FLOATS, (1, 16), _LENGTHS, 9, MODELS, ALL_RATES, ALL_RATES[1:]),
        "exported": Sizes(("float32",), (1, 4), (512,), 5, MODELS),
        "scaling by tokens": Sizes(_FLOATS, (1,), _POWERS, 9, _SCALED),
        "scaling by batch": Sizes(_FLOATS, (1, 2, 4, 8, 16, 32), (64, 512), 9, _SCALED),
    },
    ("cuda", False): {
        "op": Sizes(("bfloat16",), (1, 64), (257, 513, 514), 9),
        "block": Sizes(("bfloat16",), (1, 64), (512,), 9, MODELS),
        # The time of a single clip is the time of its launches. There the baseline is a CUDA graph, not compiled code.
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
        "model": Sizes(_HALVES, (1, 16, 64, 256), (*_LENGTHS, PUBLISHED), 15, MODELS, ALL_RATES, ALL_RATES[1:], True),
        "adapters": Sizes(_HALVES, (1, 16, 64, 256), (196,), 15, IMAGE_MODELS, ALL_RATES),
        TRAINING: Sizes(_HALVES[:2], (16, 64), _LENGTHS, 9, MODELS),
        "wav to label": Sizes(("bfloat16",), (1, 64), _LENGTHS, 9, MODELS, ALL_RATES, ALL_RATES[1:]),
        "exported": Sizes(("bfloat16",), (1, 64), (512,), 9, MODELS),
        "scaling by tokens": Sizes(("bfloat16",), (1, 4), _POWERS, 9, _SCALED),
        "scaling by batch": Sizes(("bfloat16",), (1, 4, 16, 64, 256), _LENGTHS, 9, _SCALED),
    },
}


def cases(level: str, device: str, sizes: Sizes, op: str | None = None) -> list[Case]:
    """List the cases of a level. AudioMAE has no case at a number of patches that needs another stride than 16.

    Args:
        level: name of the level.
        device: ``"cpu"`` or ``"cuda"``.
        sizes: sizes of the level.
        op: name of the op, if the level is about an op.
    """
    return [
        Case(level, subject, device, dtype, batch, length if op else length + extra_tokens(subject))
        for dtype in sizes.dtypes
        for subject in ([op] if op else sizes.models)
        for batch in sizes.batches
        for length in sizes.lengths
        if op or not subject.startswith("audiomae") or input_of(length)[1] == PATCH
    ]


def input_of(patches: int) -> tuple[int, int]:
    """Frames and stride of the input of our models with this number of patches.

    A multiple of 8 has the 8 mel rows of stride 16, as in the paper. Another multiple of 12 has the 12 mel rows of
    stride 10, as in the published AST, which has 1212 patches for 1024 frames.

    Raises:
        UserError: it is neither.
    """
    for stride, uncovered in ((PATCH, 0), (10, 8)):  # the published AST has 8 frames after the last patch
        columns, rest = divmod(patches, (MEL_BINS - PATCH) // stride + 1)
        if not rest:
            return PATCH + (columns - 1) * stride + uncovered, stride
    raise UserError(f"{patches} patches: must be a multiple of 8 (stride 16) or of 12 (stride 10)")


def extra_tokens(model: str) -> int:
    """Number of tokens of a model that are not patches, by its name."""
    if model in WHISPER:
        return 0
    return 2 if model.startswith("ast") or "distilled" in model else 1
