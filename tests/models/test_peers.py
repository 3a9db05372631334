"""Models against other implementations with the same weights: Hugging Face's AST and timm's vision transformer, and the
paper's method in plain PyTorch at every keep-rate.
"""

import pytest
import torch

import pruneattn
from bench.harness import peers
from bench.harness.guards import WrongResult, check_close, check_kept


def test_ast_equals_hugging_face_ast(make_model):
    pytest.importorskip("transformers", minversion="5")
    ours = make_model("ast", frames=256).double()
    theirs = peers.huggingface_ast(ours)
    fbank = torch.randn(2, 256, 128, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(fbank), theirs(fbank), rtol=1e-9, atol=1e-9)


def test_audiomae_equals_timm_vit(make_model):
    pytest.importorskip("timm")
    ours = make_model("audiomae", frames=256, drop_path=0.2).double()
    theirs = peers.timm_vit(ours)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.model.blocks]
    assert [block.drop_path.rate for block in ours.blocks] == pytest.approx(rates)
    fbank = torch.randn(2, 256, 128, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(fbank), theirs(fbank), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("score", ["column_mean", "cls"])
@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_pruned_models_of_other_libraries_compute_the_same(make_model, family, score):
    pytest.importorskip(*{"audiomae": ("timm",), "ast": ("transformers", "5")}[family])
    ours = make_model(family, keep_rate=0.6, score=score).double()
    theirs = {"audiomae": peers.timm_vit, "ast": peers.huggingface_ast}[family](ours)
    fbank = torch.randn(2, 128, 128, dtype=torch.float64)
    pruneattn.prune(theirs.model, 0.6, score=score)
    with torch.no_grad():
        torch.testing.assert_close(theirs(fbank), ours(fbank), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", [peers.PapersAttention, peers.SeparateScoreAttention])
@pytest.mark.parametrize("keep_rate", [1.0, 0.7, 0.5])
@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_the_papers_method(make_model, family, keep_rate, attention):
    ours = make_model(family, keep_rate=keep_rate).double()
    theirs = peers.PapersViT(ours, keep_rate, attention)
    fbank = torch.randn(3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        trace = pruneattn.trace(ours, fbank)
        torch.testing.assert_close(theirs(fbank), trace.logits, rtol=1e-9, atol=1e-9)
        kept = theirs.kept(fbank)
    assert len(kept) == (3 if keep_rate < 1 else 0)
    for their_patches, our_patches in zip(kept, trace.kept, strict=keep_rate < 1):
        assert torch.equal(their_patches, our_patches)
    if kept:
        check_kept(kept, trace)


@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_macs_of_the_papers_method(make_model, family):
    """The paper's count plus the head. A separate score costs the scored queries times the keys."""
    ours = make_model(family, keep_rate=0.5)
    head = ours.head.weight.numel()
    assert peers.PapersViT(ours, 0.5).macs() == pruneattn.count_macs(ours).paper + head
    extra = peers.PapersViT(ours, 0.5, peers.SeparateScoreAttention).macs() - pruneattn.count_macs(ours).paper - head
    patches = [64, 32, 16]
    queries = [1] * 3 if family == "ast" else patches
    tokens = [ours.num_extra_tokens + count for count in patches]
    assert extra == ours.embed_dim * sum(q * n for q, n in zip(queries, tokens, strict=True))


def test_wrong_results_are_detected(make_model):
    ours = make_model("audiomae", keep_rate=0.5).double()
    fbank = torch.randn(2, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        trace = pruneattn.trace(ours, fbank)
    check_close("they", trace.logits + 1e-12, trace.logits, 1e-9)
    for wrong in (trace.logits * 1.01, trace.logits * float("nan")):
        with pytest.raises(WrongResult, match="they differ"):
            check_close("they", wrong, trace.logits, 1e-9)
    with pytest.raises(WrongResult, match="they have shape"):
        check_close("they", trace.logits[:1], trace.logits, 1e-9)

    others = torch.stack([torch.tensor([p for p in range(64) if p not in kept]) for kept in trace.kept[1].tolist()])
    kept = [trace.kept[0], others[:, : trace.kept[1].shape[1]], trace.kept[2]]
    with pytest.raises(WrongResult, match="keeps other patches in pruning block 1 of clip 0"):
        check_kept(kept, trace)


def test_either_of_two_tied_patches_may_be_kept():
    scores = [torch.tensor([[0.3, 0.1, 0.2, 0.2]])]
    ours = pruneattn.models.trace.Trace(torch.zeros(1, 5), [torch.tensor([[0, 2]])], scores)
    check_kept([torch.tensor([[0, 3]])], ours)
    with pytest.raises(WrongResult):
        check_kept([torch.tensor([[0, 1]])], ours)
