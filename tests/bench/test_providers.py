"""Every benchmark at a small size: all providers run, and the checks find wrong results."""

import importlib
from functools import partial

import pytest
import torch

from bench.cases import (
    bench_block,
    bench_exported,
    bench_model,
    bench_scaling,
    bench_training_step,
    bench_wav_to_label,
)
from bench.harness import engines, grid, peers
from bench.harness.block_parts import PARTS, part_rows
from bench.harness.case import TRAINING, Case
from bench.harness.guards import WrongResult
from bench.harness.measure import measure_case
from bench.harness.rows import key_of
from bench.harness.subject import Subject
from pruneattn.ops.backend import _C

pytestmark = pytest.mark.harness

SIZES = grid.Sizes(("float32",), (2,), (32,), 1, keep_rates=(1.0, 0.5))
MODELS = {"audiomae_tiny": 33, "ast_tiny": 34}
LIBRARY = {"audiomae_tiny": "timm ViT", "ast_tiny": "Hugging Face AST"}
OPS = (
    "attention",
    "attention_backward",
    "cls_prune_tokens",
    "cls_scores",
    "column_mean_attention",
    "gather_tokens",
    "int8_linear",
    "prune_epilogue",
    "prune_tokens",
    "pruned_attention",
    "select_tokens",
)

each_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture
def model_providers(monkeypatch, not_compiled, tmp_path):
    """``bench_model.providers`` without the engines that need an exported file, which takes half a minute."""
    monkeypatch.setattr(engines, "ENGINES", ())
    return partial(bench_model.providers, folder=tmp_path)


def model_case(level, model):
    return Case(level, model, "cpu", "float32", 2, MODELS[model])


def right(case, providers, peaks):
    """Measure the providers, all of which must be correct or not installed.

    Returns:
        dict of (provider, backend, keep-rate) -> row, without the rows of parts.
    """
    rows = measure_case(case, providers, peaks, 1)
    assert all(row["status"] == "ok" or "left out" in row["status"] for row in rows), [row["status"] for row in rows]
    assert all(row["floor_ms"] > 0 for row in rows if row["status"] == "ok")
    assert len({key_of(row) for row in rows}) == len(rows)
    return {(row["provider"], row["backend"], row["keep_rate"]): row for row in rows if row["part"] is None}


def statuses(case, providers, peaks):
    rows = measure_case(case, providers, peaks, 1)
    return {(row["provider"], row["keep_rate"]): row["status"] for row in rows}


@pytest.mark.parametrize("tokens,dtype", [(9, "float32"), (10, "bfloat16")])
@pytest.mark.parametrize("op", OPS)
def test_ops(op, tokens, dtype, peaks):
    module = importlib.import_module(f"bench.cases.bench_{op}")
    assert op == module.OP and hasattr(module, f"test_{op}")
    case = Case("op", op, "cpu", dtype, 2, tokens)
    # Compiling takes seconds. One compiled provider shows that the harness measures compiled functions.
    compiled = op == "prune_epilogue" and dtype == "float32"
    with torch.compiler.set_stance("default" if compiled else "force_eager"):
        rows = right(case, module.providers(case), peaks)
    assert ("ours", "reference", None) in rows and any(name != "ours" for name, _, _ in rows)
    if _C is not None:
        assert next(iter(rows)) == ("ours", "cpu", None)
        assert _C.cpu_isa() == _C.cpu_isas()[0]


def test_a_wrong_op_is_found(peaks, monkeypatch):
    from bench.cases import bench_column_mean_attention as attention
    from bench.cases import bench_gather_tokens as gathering

    monkeypatch.setitem(attention.ALTERNATIVES, "eager", lambda q, k, v, extra: (v, torch.zeros(2, 8)))
    case = Case("op", "column_mean_attention", "cpu", "float32", 2, 9)
    assert statuses(case, attention.providers(case), peaks)["eager", None].startswith(
        "wrong: the values of result 0 differ"
    )
    indexing = gathering.advanced_indexing
    monkeypatch.setattr(gathering, "advanced_indexing", lambda x, index, extra: indexing(x, index.flip(1), extra))
    case = case._replace(subject="gather_tokens")
    assert statuses(case, gathering.providers(case), peaks)["indexing", None].startswith(
        "wrong: the values of result 0 differ"
    )


def test_bytes_are_those_of_the_kept_rows(peaks):
    from bench.cases import bench_gather_tokens as module

    case = Case("op", "gather_tokens", "cpu", "float32", 2, 9)
    rows = right(case, module.providers(case), peaks)
    # 2 clips: 1 + 4 rows of 768 floats are read and written, 4 numbers of 8 bytes are read.
    assert {row["bytes"] for row in rows.values()} == {2 * (2 * 5 * 768 * 4 + 4 * 8)}


@each_model
def test_model(model, peaks, model_providers):
    case = model_case("model", model)
    rows = right(case, model_providers(case, SIZES), peaks)
    assert {name for name, _, _ in rows} == {
        "ours",
        "SDPA",
        "the paper's way",
        "SDPA, separate score",
        LIBRARY[model],
        "token merging",
        "random drop",
        "stride drop",
    }
    paper, ours = rows["the paper's way", "eager", 0.5], rows["ours", "optimized", 0.5]
    assert paper["theory"] == ours["theory"] == 1 - paper["macs_paper"] / rows["SDPA", "eager", 1.0]["macs_paper"]
    assert ours["macs_computed"] < paper["macs_computed"]
    assert ours["bytes"] > 4 * sum(p.numel() for p in Subject(case).model.parameters())


def test_the_whole_grid_has_all_variants(model_providers):
    providers = model_providers(model_case("model", "audiomae_tiny"), SIZES._replace(all_ways=True))
    ways = {(provider.name, provider.backend, provider.keep_rate) for provider in providers}
    assert {("ours", way, rate) for way in ("optimized", "eager", "compiled") for rate in (1.0, 0.5)} <= ways
    assert ("SDPA", "compiled", 1.0) in ways


@pytest.mark.parametrize("batches, expected", [(None, [("ours", 0.5), ("SDPA", 1.0), ("timm ViT", 1.0)]), ((), [])])
def test_our_model_is_compiled_at_some_rates_where_the_dense_model_is(model_providers, batches, expected):
    sizes = SIZES._replace(compiled_batches=batches, compiled_rates=(0.5,))
    providers = model_providers(model_case("model", "audiomae_tiny"), sizes)
    assert [(p.name, p.keep_rate) for p in providers if p.backend == "compiled" and p.call] == expected


def test_missing_libraries_are_left_out(monkeypatch, model_providers, peaks):
    monkeypatch.setattr(peers, "version", lambda package: None)
    for level, providers in (("model", model_providers), (TRAINING, bench_training_step.providers)):
        case = model_case(level, "audiomae_tiny")
        rows = measure_case(case, providers(case, SIZES), peaks, 1)
        assert [row["status"] for row in rows if row["provider"] == "timm ViT"] == ["left out: timm is not installed"]
    assert peers.why_not(peers.HUGGINGFACE) == "needs transformers 5, installed: None"


def test_wrong_models_are_found(monkeypatch, model_providers, peaks):
    """Slightly different logits, other patches, token merging that returns NaN, token drop that drops nothing."""

    def unpruned(model, keep_rate, fbank):
        model.set_keep_rate(1.0)
        return model(fbank)

    run, prune = peers.PapersViT.run, peers.PapersBlock.prune
    monkeypatch.setattr(peers.PapersViT, "forward", lambda self, fbank: 1.001 * run(self, fbank)[0])
    monkeypatch.setattr(peers.PapersBlock, "prune", lambda self, x, weights: prune(self, x, -weights))
    monkeypatch.setattr(bench_model.MergingViT, "forward", lambda self, fbank: self.model(fbank) * float("nan"))
    monkeypatch.setattr(bench_model, "call_at_keep_rate", unpruned)
    case = model_case("model", "audiomae_tiny")
    status = statuses(case, model_providers(case, SIZES), peaks)
    assert "logits differ" in status["the paper's way", 1.0] and status["ours", 1.0] == "ok"
    assert "logits differ" in status["SDPA, separate score", 0.5]
    assert "finite numbers" in status["token merging", 0.5]
    assert status["random drop", 0.5] == "wrong: nothing was pruned"
    assert "logits differ" in status["ours", 0.5]


@each_model
def test_another_choice_of_patches_changes_the_logits(model):
    """This is the only check of providers that do not return the patches kept."""
    subject = Subject(model_case("model", model))
    other = subject.with_score("random")
    other.set_keep_rate(0.5)
    with torch.inference_mode(), pytest.raises(WrongResult, match="logits differ"):
        subject.check(0.5)(other(subject.fbank))


@each_model
def test_block(model, peaks):
    case = model_case("block", model)
    rows = right(case, bench_block.providers(case, SIZES), peaks)
    assert {name for name, _, _ in rows} == {
        "ours",
        "SDPA",
        "the paper's way",
        "SDPA, separate score",
        "token merging",
        "random drop",
        "stride drop",
    }
    paper = rows["the paper's way", "eager", 0.5]
    assert paper["macs_computed"] == paper["macs_paper"] > rows["ours", "eager", 0.5]["macs_computed"]
    # Half of the MLP, which is two thirds of the block.
    assert rows["ours", "eager", 0.5]["theory"] == paper["theory"] == pytest.approx(0.32, abs=0.02)


def test_a_wrong_block_is_found(monkeypatch, peaks):
    prune = peers.PapersBlock.prune
    monkeypatch.setattr(peers.PapersBlock, "prune", lambda self, x, weights: prune(self, x, -weights))
    case = model_case("block", "audiomae_tiny")
    status = statuses(case, bench_block.providers(case, SIZES), peaks)
    assert status["the paper's way", 0.5] == "wrong: the patches kept are not the reference's"
    assert status["the paper's way", 1.0] == "ok"


@each_model
def test_parts(model):
    subject, x = bench_block.make_subject(model_case("block", model))
    rows = part_rows(subject, x, 0.5, 1)
    assert [(row["keep_rate"], row["part"]) for row in rows] == [(rate, part) for rate in (1.0, 0.5) for part in PARTS]
    dense, pruned = ({row["part"]: row for row in rows if row["keep_rate"] == rate} for rate in (1.0, 0.5))
    for part in ("norm", "qkv", "attention", "proj", "mlp"):
        assert dense[part]["p50_ms"] > 0 and pruned[part]["p50_ms"] > 0
    fused = model == "audiomae_tiny"  # the selection is part of the attention op
    assert dense["select+gather"]["p50_ms"] == 0 and (pruned["select+gather"]["p50_ms"] == 0) == fused
    assert 0 < pruned["whole"]["theory"] < pruned["mlp"]["theory"] < 0.51
    for parts in (dense, pruned):
        assert sum(parts[part]["macs_computed"] or 0 for part in PARTS[:-1]) == parts["whole"]["macs_computed"]


@each_model
def test_training_step(model, peaks):
    case = model_case(TRAINING, model)
    providers = bench_training_step.providers(case, SIZES)
    rows = right(case, providers, peaks)
    who = ["ours", "the paper's way"]
    if peers.why_not(LIBRARY[model]):
        del rows[LIBRARY[model], None, None]
    else:
        who.append(LIBRARY[model])
    assert {(name, rate) for name, _, rate in rows} == {(name, rate) for name in who for rate in (1.0, 0.5)}
    step = next(provider.call for provider in providers if provider.name == "ours")
    before = step.embedding.weight.clone()
    step()
    assert torch.equal(before, step.embedding.weight) and step.optimizer.state[step.embedding.weight]["step"] > 1


def test_a_wrong_gradient_is_found(peaks, monkeypatch):
    norm = peers.PapersBlock.forward
    monkeypatch.setattr(peers.PapersBlock, "forward", lambda self, x: norm(self, x.detach() + 0.5 * (x - x.detach())))
    case = model_case(TRAINING, "audiomae_tiny")
    status = statuses(case, bench_training_step.providers(case, SIZES), peaks)
    assert status["the paper's way", 1.0].startswith("wrong: gradients of the patch embedding differ")
    assert status["ours", 1.0] == "ok"


def test_models_and_blocks_at_stride_10(peaks, not_compiled, monkeypatch):
    """36 patches, 12 x 3; see `grid.input_of`."""
    case = model_case("model", "ast_tiny")._replace(tokens=38)
    subject = Subject(case)
    assert subject.model.stride == (10, 10) and subject.fbank.shape == (2, 44, 128)
    parts = (bench_model.ours, bench_model.dense, bench_model.token_merging, bench_model.token_drops)
    rows = right(case, [provider for part in parts for provider in part(subject, SIZES)], peaks)
    assert {name for name, _, _ in rows} == {"ours", "SDPA", "token merging", "random drop", "stride drop"}
    dim, tokens = 192, 38
    blocks = 12 * (12 * tokens * dim**2 + 2 * tokens**2 * dim)
    assert rows["SDPA", "eager", 1.0]["macs_paper"] == 2 * (36 * 256 * dim + blocks)
    merged = rows["token merging", subject.fast_backend, 0.5]
    assert merged["macs_paper"] == pytest.approx(rows["ours", subject.fast_backend, 0.5]["macs_paper"], rel=0.1)
    case = case._replace(level="block")
    rows = right(case, bench_block.providers(case, SIZES), peaks)
    assert ("token merging", subject.fast_backend, 0.5) in rows and ("the paper's way", "eager", 0.5) in rows


@each_model
def test_wav_to_label(model, peaks, tmp_path):
    pytest.importorskip("torchaudio")
    case = model_case("wav to label", model)
    rows = measure_case(case, list(bench_wav_to_label.providers(case, SIZES, tmp_path)), peaks, 1)
    assert all(row["status"] == "ok" or "not installed" in row["status"] for row in rows), rows
    assert [row["part"] for row in rows][:3] == ["decoding", "filterbank", None]
    assert {(row["provider"], row["keep_rate"]) for row in rows} >= {
        ("ours", 1.0),
        ("ours", 0.5),
        ("torchaudio + the paper's way", 0.5),
        (f"torchaudio + {LIBRARY[model]}", 1.0),
    }
    assert all(row["saving"] is None for row in rows if row["part"])


def test_another_filterbank_is_found(peaks, tmp_path, monkeypatch):
    pytest.importorskip("torchaudio")
    fbank = bench_wav_to_label.Files.torchaudio_fbank
    monkeypatch.setattr(bench_wav_to_label.Files, "torchaudio_fbank", lambda self: fbank(self) * 1.01)
    case = model_case("wav to label", "ast_tiny")
    rows = measure_case(case, list(bench_wav_to_label.providers(case, SIZES, tmp_path)), peaks, 1)
    assert all(
        "logits differ" in row["status"] for row in rows if "torchaudio" in row["provider"] and row["keep_rate"] == 1
    )
    assert rows[2]["status"] == "ok"


@pytest.mark.parametrize("subject", ["column_mean_attention", "audiomae_tiny"])
def test_scaling(subject, peaks, monkeypatch):
    case = Case("scaling by tokens", subject, "cpu", "float32", 2, 33)
    rows = right(case, bench_scaling.providers(case, SIZES), peaks)
    eager = "eager" if subject == "column_mean_attention" else "the paper's way"
    assert {name for name, _, _ in rows} == {"ours", eager}
    assert {rate for _, _, rate in rows} == ({None} if eager == "eager" else {1.0, 0.5})
    monkeypatch.setattr(bench_scaling, "available", lambda device: bench_scaling.softmax_bytes(case))
    status = statuses(case, bench_scaling.providers(case, SIZES), peaks)
    assert {"left out" in value for (name, _), value in status.items() if name == eager} == {True}
    assert {value for (name, _), value in status.items() if name == "ours"} == {"ok"}


def test_exported(peaks, monkeypatch, tmp_path):
    files = {"torch.export": ("torch", False)}  # the other formats take a minute each
    monkeypatch.setattr(bench_exported, "FILES", files)
    small = partial(Subject, depth=3, prune_blocks=(1,))  # 12 blocks take five times as long
    monkeypatch.setattr(bench_exported, "Subject", small)
    case = model_case("exported", "ast_tiny")
    rows = measure_case(case, list(bench_exported.providers(case, SIZES, tmp_path)), peaks, 1)
    assert all(row["status"] == "ok" for row in rows), rows
    assert [(row["provider"], row["keep_rate"]) for row in rows] == [
        (name, rate) for rate in (1.0, 0.5) for name in ("ours", *files)
    ]
