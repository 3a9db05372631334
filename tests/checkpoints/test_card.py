import pytest
import torch

import pruneattn
from pruneattn.checkpoints.card import make_card, may_replace, write_card
from pruneattn.data.fbank import FeatureConfig
from pruneattn.models import create_model
from pruneattn.models.description import Description

FEATURES = FeatureConfig(frames=1024, mean=-4.25, std=4.5, padding="min")
LABELS = ["Speech", "a | b", "<script>", "näher", "e", "f", "g"]


def make(name="audiomae_tiny", **arguments):
    return create_model(name, **{"num_classes": 7, "keep_rate": (0.7, 0.5, 1.0)} | arguments)


def card(model, multilabel=True, library="pruneattn", **options):
    return make_card(model, Description(FEATURES, LABELS, multilabel, **options), library)


def front_matter(text):
    """The YAML between the first two lines of dashes, of which only lists of words and plain values are used."""
    yaml = pytest.importorskip("yaml")
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def row(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return line


@pytest.mark.parametrize("library", ["pruneattn", "transformers", "timm"])
def test_front_matter(library):
    assert front_matter(card(make(), library=library)) == {
        "library_name": library,
        "pipeline_tag": "audio-classification",
        "tags": ["audiomae", "token-pruning"],
    }


def test_table():
    model = make()
    text = card(model, extra={"epoch": 12, "metric": "map", "value": 0.375})
    assert row(text, "model") == "| model | audiomae_tiny: 12 blocks, width 192, 3 heads |"
    assert row(text, "input") == (
        "| input | 16 kHz mono; log-mel, 128 bins, 1024 frames of 10 ms (512 patches); short clips padded with the "
        "smallest log-mel value (-15.94); normalized as (x - mean) / (2 * std) with mean -4.25 and std 4.5 |"
    )
    names = r"Speech, a \| b, &lt;script>, näher, e, f, ..."
    assert row(text, "output") == f"| output | 7 classes, multilabel (sigmoid): {names} |"
    rates = "keep-rate 0.7 in block 3, 0.5 in block 6, 1 in block 9 (blocks counted from 0)"
    assert row(text, "pruning") == f"| pruning | score column_mean; {rates} |"
    assert row(text, "recorded") == "| recorded | epoch: 12, metric: map, value: 0.375 |"
    macs = pruneattn.count_macs(model)
    dense = pruneattn.count_macs(make(keep_rate=1.0))
    computed, paper, unpruned = (f"{count / 1e9:.3g} G" for count in (macs.computed, macs.paper, dense.paper))
    assert len({computed, paper, unpruned}) == 3
    assert row(text, "multiply-accumulates per clip") == (
        f"| multiply-accumulates per clip | {computed} computed by pruneattn; by the paper's count {paper}, and "
        f"{unpruned} without pruning |"
    )
    assert model.keep_rates == (0.7, 0.5, 1.0)
    assert "7 classes, single-label (softmax): " in card(model, multilabel=False) and "recorded" not in card(model)
    assert row(make_card(model, Description(FEATURES)), "output") == "| output | 7 classes |"
    with pytest.raises(ValueError, match="needs its features"):
        make_card(model, Description(labels=LABELS))
    assert "none" in row(card(make(prune_blocks=(), keep_rate=1.0)), "pruning")


@pytest.mark.parametrize(
    "frames, stride, patches",
    [
        (1024, 10, "1212 patches of 16 x 16 with stride 10"),
        (1024, (10, 16), "768 patches of 16 x 16 with stride 10,16"),
        (1000, 16, "496 patches"),
    ],
)
def test_the_input_names_the_stride(frames, stride, patches):
    model = make("ast_tiny", frames=frames, stride=stride)
    features = FeatureConfig(frames=frames, mean=-4.25, std=4.5)
    text = make_card(model, Description(features, LABELS, True), "transformers")
    assert f"{frames} frames of 10 ms ({patches}); short clips" in row(text, "input")


def code_of(text):
    return [part.partition("```")[0] for part in text.split("```python\n")[1:]]


def test_code_in_the_card_runs(tmp_path):
    """The code of the card, on the model next to it."""
    model = make("ast_tiny", embed_dim=24, depth=4, num_heads=3, prune_blocks=(1,), keep_rate=0.5, frames=128)
    features = FeatureConfig(frames=128, mean=-4.25, std=4.5)
    pruneattn.save_pretrained(model, tmp_path, features=features, labels=LABELS, multilabel=True)
    (code,) = code_of((tmp_path / "README.md").read_text(encoding="utf-8"))
    names = {"pruneattn": pruneattn, "waves": torch.randn(2, 16000)}
    exec(code.replace("USER/NAME", tmp_path.as_posix()), names)
    assert names["scores"].shape == (2, 7) and names["scores"].min() > 0 and names["scores"].max() < 1


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_code_in_the_card_prunes(tmp_path, library):
    family, format_ = {"transformers": ("ast", "huggingface"), "timm": ("audiomae", "timm")}[library]
    module = pytest.importorskip(library)
    model = make(
        f"{family}_tiny", embed_dim=24, depth=4, num_heads=3, prune_blocks=(1,), keep_rate=0.5, frames=128
    ).eval()
    features = FeatureConfig(frames=128, mean=-4.25, std=4.5, padding="zero")
    pruneattn.save_checkpoint(model, tmp_path, format=format_, features=features, labels=LABELS, multilabel=False)
    use, prune = code_of((tmp_path / "README.md").read_text(encoding="utf-8"))
    fbank = torch.randn(2, 128, 128)
    if library == "timm":
        names = {"timm": module, "fbank": fbank}
        exec(use.replace("hf-hub:USER/NAME", f"local-dir:{tmp_path}"), names)
        theirs = names["model"]
    else:
        theirs = module.ASTForAudioClassification.from_pretrained(tmp_path).eval()
    exec(prune, {"pruneattn": pruneattn, "model": theirs})
    with torch.no_grad():
        logits = theirs(fbank).logits if library == "transformers" else theirs(fbank.unsqueeze(1))
        torch.testing.assert_close(logits, model(fbank), rtol=1e-4, atol=1e-4)


def test_scores_that_prune_does_not_support():
    for score, name in (("intensity", "intensity"), (lambda q, k, v, extra_tokens: k, "a custom function")):
        text = card(make(score=score), library="timm")
        assert f"score {name};" in text and f"does not support ({name})" in text
        assert "pruneattn.prune(" not in text and "`pruneattn.load_checkpoint`" in text
    assert "pruneattn.prune" not in card(make(prune_blocks=(), keep_rate=1.0), library="timm")


def test_an_edited_card_is_kept(tmp_path):
    path = tmp_path / "README.md"
    about = {"features": FEATURES, "labels": LABELS, "multilabel": True}
    write_card(tmp_path, make(), **about)
    assert path.read_text(encoding="utf-8") == card(make())
    write_card(tmp_path, make(keep_rate=0.25), **about)  # replaces our own card
    assert "0.25 in block 3" in path.read_text(encoding="utf-8")
    for edit in (
        lambda text: text.replace("# license: choose one", "license: mit"),
        lambda text: text + "And more.\n",
        lambda text: "# Mine\n",
        lambda text: "",
    ):
        edited = edit(card(make()))
        path.write_text(edited, encoding="utf-8")
        assert not may_replace(path)
        write_card(tmp_path, make(), **about)
        assert path.read_text(encoding="utf-8") == edited
    path.write_bytes(b"\xff\xfe")
    assert not may_replace(path)


# As pruneattn 0.1 wrote it. Cards on disk are recognized by the digest in their last line.
OLD_CARD = """---
# license: yours to choose; https://huggingface.co/docs/hub/repositories-licenses
library_name: transformers
pipeline_tag: audio-classification
tags:
- ast
- token-pruning
---

# ast_tiny

| | |
|---|---|
| model | ast_tiny: 2 blocks, 8 wide, 2 heads |
| input | 16 kHz mono, log-mel of 128 bins, 32 frames of 10 ms (16 patches), short clips padded with 0, minus -4.25, over twice 4.5 |
| output | 2 classes, several at once (sigmoid): a, ä |
| pruning | ranked by cls, share kept: 0.5 after block 1 (blocks from 0) |
| multiply-accumulates a clip | 6.36e-05 G as computed by pruneattn, 6.67e-05 G as the paper counts, of 7.08e-05 G without pruning |
| recorded | top1: 0.5 |

## Use

```python
classify = transformers.pipeline("audio-classification", "USER/NAME")  # or the path of this folder
print(classify("clip.wav", function_to_apply="sigmoid"))
```

These files say nothing of token pruning: as they are, every patch is computed. To prune as the model was saved:

```python
pruneattn.prune(model, keep_rate=(0.5,), blocks=(1,), score="cls")
```
<!-- written by pruneattn, which replaces this file as long as nobody edits it: de6726ef0f823a72 -->
"""  # noqa: E501


def test_a_card_of_an_older_version_is_replaced(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(OLD_CARD, encoding="utf-8")
    assert may_replace(path)
    write_card(tmp_path, make(), features=FEATURES, labels=None, multilabel=None)
    assert "pruneattn predict USER/NAME clip.wav" in path.read_text(encoding="utf-8")
    path.write_text(OLD_CARD.replace("top1: 0.5", "top1: 0.9"), encoding="utf-8")
    assert not may_replace(path)
