import pytest
import torch

import pruneattn
from pruneattn.checkpoints.card import make_card, may_replace, write_card
from pruneattn.data.fbank import FeatureConfig
from pruneattn.models import create_model

FEATURES = FeatureConfig(frames=1024, mean=-4.25, std=4.5, padding="min")
LABELS = ["Speech", "a | b", "<script>", "näher", "e", "f", "g"]


def make(name="audiomae_tiny", **arguments):
    return create_model(name, **{"num_classes": 7, "keep_rate": (0.7, 0.5, 1.0)} | arguments)


def card(model, multilabel=True, library="pruneattn", **options):
    return make_card(model, FEATURES, LABELS, multilabel, library=library, **options)


def front_matter(text):
    """The YAML between the first two lines of dashes, of which only lists of words and plain values are used."""
    yaml = pytest.importorskip("yaml")
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def row(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return line


@pytest.mark.parametrize("library", ["pruneattn", "transformers", "timm"])
def test_what_the_hub_reads(library):
    assert front_matter(card(make(), library=library)) == {
        "library_name": library,
        "pipeline_tag": "audio-classification",
        "tags": ["audiomae", "token-pruning"],
    }


def test_what_people_read():
    model = make()
    text = card(model, extra={"epoch": 12, "metric": "map", "value": 0.375})
    assert row(text, "model") == "| model | audiomae_tiny: 12 blocks, 192 wide, 3 heads |"
    assert "1024 frames of 10 ms (512 patches)" in text and "floor, -15.94, minus -4.25, over twice 4.5" in text
    names = r"Speech, a \| b, &lt;script>, näher, e, f, ..."
    assert row(text, "output") == f"| output | 7 classes, several at once (sigmoid): {names} |"
    assert "by column_mean, share kept: 0.7 after block 3, 0.5 after block 6, 1 after block 9" in row(text, "pruning")
    assert row(text, "recorded") == "| recorded | epoch: 12, metric: map, value: 0.375 |"
    macs = pruneattn.count_macs(model)
    dense = pruneattn.count_macs(make(keep_rate=1.0))
    for count in (macs.computed, macs.paper, dense.paper):
        assert f"{count / 1e9:.3g} G" in row(text, "multiply-accumulates a clip")
    assert model.keep_rates == (0.7, 0.5, 1.0)
    assert "(softmax)" in card(model, multilabel=False) and "recorded" not in card(model)
    assert "none" in row(card(make(prune_blocks=(), keep_rate=1.0)), "pruning")


def code_of(text):
    return [part.partition("```")[0] for part in text.split("```python\n")[1:]]


def test_its_code_runs(tmp_path):
    """The lines of the card, on the model beside it."""
    model = make("ast_tiny", embed_dim=24, depth=4, num_heads=3, prune_blocks=(1,), keep_rate=0.5, frames=128)
    features = FeatureConfig(frames=128, mean=-4.25, std=4.5)
    pruneattn.save_pretrained(model, tmp_path, features=features, labels=LABELS, multilabel=True)
    (code,) = code_of((tmp_path / "README.md").read_text(encoding="utf-8"))
    names = {"pruneattn": pruneattn, "waves": torch.randn(2, 16000)}
    exec(code.replace("USER/NAME", tmp_path.as_posix()), names)
    assert names["scores"].shape == (2, 7) and 0 < names["scores"].min() and names["scores"].max() < 1


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_its_code_prunes(tmp_path, library):
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


def test_scores_that_prune_has_not():
    for score, name in (("intensity", "intensity"), (lambda q, k, v, extra_tokens: k, "a function of its author's")):
        text = card(make(score=score), library="timm")
        assert f"by {name}" in text and "pruneattn.prune(" not in text and "use `pruneattn.load_checkpoint`" in text
    assert "pruneattn.prune" not in card(make(prune_blocks=(), keep_rate=1.0), library="timm")


def test_an_edited_card_stays(tmp_path):
    path = tmp_path / "README.md"
    arguments = (FEATURES, LABELS, True)
    write_card(tmp_path, make(), *arguments)
    assert path.read_text(encoding="utf-8") == make_card(make(), *arguments)
    write_card(tmp_path, make(keep_rate=0.25), *arguments)  # a later one of ours
    assert "0.25 after block 3" in path.read_text(encoding="utf-8")
    for edit in (
        lambda text: text.replace("# license: yours to choose", "license: mit"),
        lambda text: text + "And more.\n",
        lambda text: "# Mine\n",
        lambda text: "",
    ):
        edited = edit(make_card(make(), *arguments))
        path.write_text(edited, encoding="utf-8")
        assert not may_replace(path)
        write_card(tmp_path, make(), *arguments)
        assert path.read_text(encoding="utf-8") == edited
    path.write_bytes(b"\xff\xfe")
    assert not may_replace(path)
