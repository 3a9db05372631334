"""Model cards: the ``README.md`` next to the weights, for readers and for the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..constants import MEL_BINS, PATCH, SAMPLE_RATE
from ..data.fbank import LOG_FLOOR, FeatureConfig
from ..files import atomic_write
from ..models.description import Description
from ..models.macs import count_macs
from ..models.patches import stride_text
from ..models.scores import ADAPTED_SCORES
from ..models.vit import PrunedViT

CARD = "README.md"
#: Last line of a card, with a digest of the lines before it. It must not change, because cards on disk end in it.
_MARK = "<!-- written by pruneattn, which replaces this file as long as nobody edits it: {} -->\n"

#: How each library loads and calls the model.
_USE = {
    "pruneattn": """```python
model = pruneattn.load_pretrained("USER/NAME")  # or the path of this folder
fbank = pruneattn.data.FeatureExtractor(model.features)(waves)  # waves [B, samples]: float, 16 kHz, mono
scores = model(fbank).{activation}  # [B, {classes}], in the order of model.labels
```

`pruneattn predict USER/NAME clip.wav` does the same for sound files of any format and length.
""",
    "transformers": """```python
classify = transformers.pipeline("audio-classification", "USER/NAME")  # or the path of this folder
print(classify("clip.wav", function_to_apply="{function}"))
```
""",
    "timm": """```python
model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:" and the path of this folder
logits = model(fbank.unsqueeze(1))  # fbank [B, {frames}, {bins}] -> [B, {classes}]
```
""",
}
_UNPRUNED = "\n{library} does not prune tokens: the model computes every patch. "
_PRUNE = """To prune it as it was saved:

```python
pruneattn.prune(model, keep_rate={rates}, prune_blocks={blocks}, score="{score}")
```
"""
_ONLY_HERE = """It was saved with a score
that `pruneattn.prune` does not support ({score}): load the weights with `pruneattn.load_checkpoint`.
"""


def make_card(
    model: PrunedViT, description: Description, library: Literal["pruneattn", "transformers", "timm"] = "pruneattn"
) -> str:
    """Return the text of a model card: YAML for the Hub, then Markdown.

    Args:
        model: a model of :func:`~pruneattn.create_model`.
        description: features (required), labels, multilabel and extra values; the card leaves out unknown values.
        library: library that loads the weights next to the card.
    """
    features = description.features
    if features is None:
        raise ValueError("description: a card needs its features")
    score = model.score if isinstance(model.score, str) else "a custom function"
    rates = model.keep_rates
    rows = {
        "model": f"{model.name}: {len(model.blocks)} blocks, width {model.embed_dim}, {model.num_heads} heads",
        "input": _input(model, features),
        "output": f"{model.num_classes} classes" + _classes(description.labels, description.multilabel),
        "pruning": _pruning(model, score),
        "multiply-accumulates per clip": _macs(model),
    }
    if description.extra:
        rows["recorded"] = ", ".join(f"{name}: {value}" for name, value in description.extra.items())
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    use = _USE[library]
    if library != "pruneattn" and rates:
        use += _UNPRUNED + (_PRUNE if score in ADAPTED_SCORES else _ONLY_HERE)
    use = use.format(
        library=library,
        activation="sigmoid()" if description.multilabel else "softmax(-1)",
        function="sigmoid" if description.multilabel else "softmax",
        classes=model.num_classes,
        frames=features.frames,
        bins=MEL_BINS,
        rates=rates,
        blocks=model.prune_blocks,
        score=score,
    )
    text = f"""---
# license: choose one; https://huggingface.co/docs/hub/repositories-licenses
library_name: {library}
pipeline_tag: audio-classification
tags:
- {model.name.partition("_")[0]}
- token-pruning
---

# {model.name}

| | |
|---|---|
{table}

## Use

{use}"""
    return text + _MARK.format(_digest(text))


def write_card(
    folder: str | Path,
    model: PrunedViT,
    *,
    features: FeatureConfig,
    labels: Sequence[str] | None,
    multilabel: bool | None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a card as ``README.md``, atomically. A file of another origin or an edited card is kept.

    Args:
        folder: an existing folder.
        model: a model of :func:`~pruneattn.create_model`.
        features: conversion of waveforms to the model's input.
        labels: name of each class; None if unknown.
        multilabel: whether a clip can have several classes; None if unknown.
        extra: further values for the card.
    """
    path = Path(folder) / CARD
    if may_replace(path):
        description = Description(features, None if labels is None else list(labels), multilabel, extra or {})
        with atomic_write(path) as temporary:
            temporary.write_text(make_card(model, description), encoding="utf-8")


def may_replace(path: Path) -> bool:
    """Whether `path` does not exist, or is an unedited card of any version of pruneattn."""
    if not path.exists():
        return True
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError):
        return False
    return bool(lines) and lines[-1] == _MARK.format(_digest("".join(lines[:-1])))


def _input(model: PrunedViT, features: FeatureConfig) -> str:
    padding = {"zero": "0", "min": f"the smallest log-mel value ({LOG_FLOOR:.2f})"}[features.padding]
    usual = model.stride == (PATCH, PATCH)
    stride = "" if usual else f" of {PATCH} x {PATCH} with stride {stride_text(model.stride)}"
    return (
        f"{SAMPLE_RATE // 1000} kHz mono; log-mel, {MEL_BINS} bins, {features.frames} frames of 10 ms "
        f"({model.num_patches} patches{stride}); short clips padded with {padding}; "
        f"normalized as (x - mean) / (2 * std) with mean {features.mean:g} and std {features.std:g}"
    )


def _classes(labels: Sequence[str] | None, multilabel: bool | None) -> str:
    kind = {None: "", True: ", multilabel (sigmoid)", False: ", single-label (softmax)"}[multilabel]
    names = "" if labels is None else f": {', '.join(labels[:6])}{', ...' if len(labels) > 6 else ''}"
    return kind + names


def _pruning(model: PrunedViT, score: str) -> str:
    blocks = zip(model.prune_blocks, model.keep_rates, strict=True)
    rates = ", ".join(f"{rate:g} in block {block}" for block, rate in blocks)
    return f"score {score}; keep-rate {rates} (blocks counted from 0)" if rates else "none"


def _macs(model: PrunedViT) -> str:
    pruned, dense = count_macs(model), count_macs(model, 1.0)
    return (
        f"{pruned.computed / 1e9:.3g} G computed by pruneattn; by the paper's count {pruned.paper / 1e9:.3g} G, and "
        f"{dense.paper / 1e9:.3g} G without pruning"
    )


def _cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
