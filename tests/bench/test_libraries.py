"""Benchmarks of other libraries' models and of other engines, at a small size."""

import warnings
from functools import partial

import pytest
import torch

import pruneattn
from bench.cases import bench_adapters, bench_model, bench_precision, bench_whisper
from bench.harness import engines, grid, quantized
from bench.harness.case import Case
from bench.harness.guards import check_close
from bench.harness.measure import measure_case
from bench.harness.subject import Subject

pytestmark = pytest.mark.harness

SIZES = grid.Sizes(("float32",), (2,), (32,), 1, keep_rates=(1.0, 0.5))


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_adapters(model, peaks, not_compiled, monkeypatch, tmp_path):
    pytest.importorskip("timm")
    monkeypatch.setattr(engines, "ENGINES", ())
    (case,) = grid.cases("adapters", "cpu", SIZES._replace(lengths=(196,), models=(model,), batches=(1,)))
    sizes = SIZES._replace(all_ways=True)
    rows = measure_case(case, list(bench_adapters.providers(case, sizes, tmp_path)), peaks, 1)
    assert all(row["status"] == "ok" for row in rows), rows
    assert [(row["backend"], row["keep_rate"]) for row in rows] == [
        ("eager", 1.0),
        ("pruneattn.prune", 1.0),
        ("optimized", 1.0),
        ("compiled", 1.0),
        ("pruneattn.prune", 0.5),
        ("pruneattn.prune, optimized", 0.5),
        ("pruneattn.prune, compiled", 0.5),
    ]
    assert rows[-1]["theory"] == pytest.approx(0.51, abs=0.03)


def test_a_wrong_adapter_is_found(peaks, not_compiled, monkeypatch, tmp_path):
    pytest.importorskip("timm")
    monkeypatch.setattr(engines, "ENGINES", ())
    prune = pruneattn.prune
    monkeypatch.setattr(pruneattn, "prune", lambda model, rate, blocks: prune(model, min(rate, 0.9), blocks))
    (case,) = grid.cases("adapters", "cpu", SIZES._replace(models=("vit_tiny_patch16_224",), batches=(1,)))
    rows = measure_case(case, list(bench_adapters.providers(case, SIZES, tmp_path)), peaks, 1)
    status = [row["status"] for row in rows]
    assert status[0] == "ok" and status[1].startswith("wrong: logits at keep-rate 1 are not the reference's")


def test_engines(peaks, monkeypatch, tmp_path):
    """The engines that are installed compute the logits of the unpruned model, and a wrong file is found."""
    case = Case("model", "ast_tiny", "cpu", "float32", 2, 34)
    subject = Subject(case, depth=3, prune_blocks=(1,))
    rows = measure_case(case, list(bench_model.inference_engines(subject, tmp_path)), peaks, 1)
    status = {row["provider"]: row["status"] for row in rows}
    assert set(status) == set(engines.ENGINES) and status["ONNX Runtime"] == "ok"
    assert status["OpenVINO"] in ("ok", "left out: openvino is not installed")
    subject.model.head.bias.data += 1
    subject.use_input(subject.fbank)  # the expected logits are those of the changed model
    rows = measure_case(case, list(bench_model.inference_engines(subject, tmp_path)), peaks, 1)
    assert rows[0]["status"].startswith("wrong: logits differ")
    assert engines.why_not("ONNX Runtime", "cpu", torch.bfloat16) == "has no bfloat16 on a CPU"
    assert engines.why_not("OpenVINO", "cuda", torch.float32) == "measured on the CPU only"
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert engines.why_not("CTranslate2", "cpu", torch.float32) == "ctranslate2 is not installed"


@pytest.mark.parametrize("weights_exist", [True, False])
def test_whisper(peaks, monkeypatch, not_compiled, tmp_path, weights_exist):
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 48, "encoder_layers": 3, "encoder_attention_heads": 3, "encoder_ffn_dim": 96}
    sizes |= {"num_mel_bins": 8, "max_source_positions": 20, "vocab_size": 60, "pad_token_id": 0}
    sizes |= {"decoder_layers": 1, "decoder_attention_heads": 3, "decoder_ffn_dim": 48}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **ends, suppress_tokens=None, begin_suppress_tokens=None)
    name = "whisper-tiny.en"
    if weights_exist:
        transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / name)
    else:
        monkeypatch.setattr(bench_whisper, "ROOT", tmp_path / "a" / "b")
    monkeypatch.setenv("PRUNEATTN_MODELS", str(tmp_path))
    monkeypatch.setattr(engines, "find_spec", lambda package: None)
    case = Case("whisper", name, "cpu", "float32", 2, 20)
    rows = measure_case(case, list(bench_whisper.providers(case, SIZES, tmp_path)), peaks, 1)
    if not weights_exist:
        assert [row["status"] for row in rows] == ["left out: no folder whisper-tiny.en in PRUNEATTN_MODELS"]
        return
    found = {(row["provider"], row["backend"], row["keep_rate"]): row["status"] for row in rows}
    assert {status for (name, *_), status in found.items() if name in ("ours", "transformers")} == {"ok"}
    assert found["CTranslate2", None, 1.0] == "left out: ctranslate2 is not installed"
    pruned = [row for row in rows if row["keep_rate"] == 0.5]
    assert [row["backend"] for row in pruned] == ["pruneattn.prune", "optimized"]
    assert all(0.2 < row["theory"] < 0.5 for row in pruned)  # two of three blocks save at most half


def test_precision(peaks, monkeypatch, tmp_path):
    """Each precision of ours is right, and 8-bit weights are found to be worse than the limit of float32."""
    monkeypatch.setattr(engines, "ENGINES", ())
    monkeypatch.setattr(quantized, "why_not", lambda *arguments: "left out here")
    # A single other patch of 32 changes the logits by more than the limits, which are for 512 patches.
    monkeypatch.setattr(bench_precision, "PRUNED_TOLERANCE", dict.fromkeys((torch.float32, torch.bfloat16), 1.0))
    monkeypatch.setattr(bench_precision, "INT8_PRUNED_TOLERANCE", 1.0)
    case = Case("precision", "ast_tiny", "cpu", "int8", 2, 34)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a machine without instructions for 8 bits
        rows = measure_case(case, list(bench_precision.providers(case, SIZES, tmp_path)), peaks, 1)
        bad = [row["status"] for row in rows if row["status"] != "ok" and not row["status"].startswith("left out")]
        assert not bad
        assert {(row["backend"], row["keep_rate"]) for row in rows if row["provider"] == "ours" and row["p50_ms"]} >= {
            ("float32", 1.0),
            ("int8", 0.5),
        }
        monkeypatch.setattr(bench_precision, "INT8_TOLERANCE", 1e-7)
        rows = measure_case(case, list(bench_precision.providers(case, SIZES, tmp_path)), peaks, 1)
    status = {(row["provider"], row["backend"], row["keep_rate"]): row["status"] for row in rows}
    assert status["ours", "int8", 1.0].startswith("wrong: logits differ")
    assert {row["status"] for row in rows if row["provider"] == "OpenVINO"} == {"left out: left out here"}
    monkeypatch.setattr(bench_precision, "find_spec", lambda name: None)
    (row,) = bench_precision.zentorch(None)
    assert row.why_not == "zentorch is not installed"


def test_quantized_files_run(tmp_path):
    """ONNX Runtime's 8-bit form of an exported model has about its logits."""
    subject = Subject(Case("model", "ast_tiny", "cpu", "float32", 2, 34), depth=3, prune_blocks=(1,))
    path = tmp_path / "dense.onnx"
    pruneattn.export_model(subject.model, path, "onnx")
    checks = partial(check_close, "logits", expected=subject.expected(1.0).logits, tolerance=0.1)
    case = subject.case._replace(level="precision")
    make = bench_precision.inputs_like(subject.fbank)
    found = list(quantized.int8_providers(case, path, make, subject.fbank, checks, subject.work()))
    assert [(provider.name, provider.backend) for provider in found] == [
        ("ONNX Runtime", "int8, dynamic"),
        ("OpenVINO", "int8, NNCF, float32 for the rest"),
        ("OpenVINO", "int8, NNCF, bfloat16 for the rest"),
    ]
    for provider in found:
        assert provider.call is None or provider.check(provider.call()) is None
