"""The model card: ``README.md`` beside the weights, as people and the Hugging Face Hub read it."""

import hashlib
from pathlib import Path

from ..files import atomic_write
from ..models.macs import count_macs
from ..models.scores import ADAPTED_SCORES

CARD = "README.md"
_MARK = "<!-- written by pruneattn, which replaces this file as long as nobody edits it: {} -->\n"

# How each library reads the weights, and what it makes of them.
_USE = {
    "pruneattn": """```python
model = pruneattn.load_pretrained("USER/NAME")  # or the path of this folder
fbank = pruneattn.data.FeatureExtractor(model.features)(waves)  # waves [B, samples]: float, 16 kHz, mono
scores = model(fbank).{activation}  # [B, {classes}], in the order of model.labels
```

`python -m pruneattn.predict USER/NAME clip.wav` does the same for sound files of any format and length.
""",
    "transformers": """```python
classify = transformers.pipeline("audio-classification", "USER/NAME")  # or the path of this folder
print(classify("clip.wav", function_to_apply="{function}"))
```
""",
    "timm": """```python
model = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:" and the path of this folder
logits = model(fbank.unsqueeze(1))  # fbank [B, {frames}, 128] -> [B, {classes}]
```
""",
}
_UNPRUNED = "\nThese files say nothing of token pruning: as they are, every patch is computed. "
_PRUNE = """To prune as the model was saved:

```python
pruneattn.prune(model, keep_rate={rates}, blocks={blocks}, score="{score}")
```
"""
_ONLY_HERE = """The model was saved with a ranking of the patches by {score},
which `pruneattn.prune` does not offer: use `pruneattn.load_checkpoint`.
"""


def make_card(model, features, labels, multilabel, extra=None, library="pruneattn"):
    """The card's text: Markdown behind the Hub's YAML.

    Args:
        model, features, labels, multilabel, extra: as of :func:`~pruneattn.save_pretrained`; labels and multilabel
            may be None where nobody knows them.
        library: that the weights beside the card are for: ``"pruneattn"``, ``"transformers"`` or ``"timm"``.
    """
    family = model.name.partition("_")[0]
    padding = {"zero": "0", "min": "the log-mel's floor, -15.94"}[features.padding]
    score = model.score if isinstance(model.score, str) else "a function of its author's"
    rates = model.keep_rates
    rows = {
        "model": f"{model.name}: {len(model.blocks)} blocks, {model.embed_dim} wide, {model.num_heads} heads",
        "input": f"16 kHz mono, log-mel of 128 bins, {features.frames} frames of 10 ms "
        f"({model.num_patches} patches), short clips padded with {padding}, minus {features.mean:g}, over twice "
        f"{features.std:g}",
        "output": f"{model.num_classes} classes" + _classes(labels, multilabel),
        "pruning": _pruning(model, score),
        "multiply-accumulates a clip": _macs(model),
    }
    if extra:
        rows["recorded"] = ", ".join(f"{name}: {value}" for name, value in extra.items())
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    use = _USE[library]
    if library != "pruneattn" and rates:
        use += _UNPRUNED + (_PRUNE if score in ADAPTED_SCORES else _ONLY_HERE)
    use = use.format(
        activation="sigmoid()" if multilabel else "softmax(-1)",
        function="sigmoid" if multilabel else "softmax",
        classes=model.num_classes,
        frames=features.frames,
        rates=rates,
        blocks=model.prune_blocks,
        score=score,
    )
    text = f"""---
# license: yours to choose; https://huggingface.co/docs/hub/repositories-licenses
library_name: {library}
pipeline_tag: audio-classification
tags:
- {family}
- token-pruning
---

# {model.name}

| | |
|---|---|
{table}

## Use

{use}"""
    return text + _MARK.format(_digest(text))


def write_card(folder, *arguments, **options):
    """Write :func:`make_card` of the arguments as ``README.md``, atomically, over nothing that anybody else wrote."""
    path = Path(folder) / CARD
    if may_replace(path):
        with atomic_write(path) as temporary:
            temporary.write_text(make_card(*arguments, **options), encoding="utf-8")


def may_replace(path):
    """Whether there is no file at `path`, or a card of ours that nobody has edited."""
    if not path.exists():
        return True
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError):
        return False
    return bool(lines) and lines[-1] == _MARK.format(_digest("".join(lines[:-1])))


def _classes(labels, multilabel):
    kind = {None: "", True: ", several at once (sigmoid)", False: ", one of them (softmax)"}[multilabel]
    names = "" if labels is None else f": {', '.join(labels[:6])}{', ...' if len(labels) > 6 else ''}"
    return kind + names


def _pruning(model, score):
    blocks = ", ".join(f"{rate:g} after block {block}" for block, rate in zip(model.prune_blocks, model.keep_rates))
    return f"ranked by {score}, share kept: {blocks} (blocks from 0)" if blocks else "none"


def _macs(model):
    """At the model's keep-rates, beside what they save."""
    pruned, rates = count_macs(model), model.keep_rates
    try:
        model.set_keep_rate(1.0)
        dense = count_macs(model)
    finally:
        model.set_keep_rate(rates)
    return (
        f"{pruned.computed / 1e9:.3g} G as computed by pruneattn, {pruned.paper / 1e9:.3g} G as the paper counts, "
        f"of {dense.paper / 1e9:.3g} G without pruning"
    )


def _cell(text):
    """Text that a Markdown table's cell shows as it is."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]
