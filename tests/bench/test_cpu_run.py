"""Every section of ``bench/cpu_run.py`` on models small enough for a test. Nothing here depends on time."""

import json
import sys
from types import SimpleNamespace

import cpu_adapters
import cpu_block
import cpu_exported
import cpu_models
import cpu_run
import peers
import pytest
import torch
from report import Settings, markdown, percentiles

import pruneattn
from pruneattn.backend import _C
from pruneattn.timing import with_sdpa

TINY = Settings(
    rounds=2, size="tiny", frames=64, batch=2, keep_rates=(1.0, 0.5), peer_keep_rates=(1.0, 0.5), tokens=(9,),
    batches=(1, 2), heads=2,
)  # fmt: skip
TIMES = {"p20_ms", "p50_ms", "p80_ms"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tables(section, settings=TINY):
    """The rows of each table, whose columns are checked."""
    result = [rows for _, rows in cpu_run.SECTIONS[section](settings)]
    for rows in result:
        assert all(row.keys() == rows[0].keys() for row in rows)
        times = [row[name] for row in rows for name in TIMES if name in row]
        assert all(time > 0 for time in times)
    return result


def test_ops():
    attention, selection = tables("ops")
    per_shape = 2 + len(_C.cpu_isas())
    assert len(attention) == 2 * 2 * per_shape
    assert [row["of_sdpa"] for row in attention if row["what"] == "SDPA"] == [1.0] * 4
    assert {row["what"].partition(", ")[2] for row in attention} >= set(_C.cpu_isas())
    assert _C.cpu_isa() == _C.cpu_isas()[0]
    assert [row["what"] for row in selection][:2] == ["pruning block", "select_tokens"]


def test_threads():
    (rows,) = tables("threads")
    assert [(row["dtype"], row["threads"]) for row in rows] == [
        ("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2),
    ]  # fmt: skip
    assert torch.get_num_threads() == 1


@pytest.fixture
def not_compiled(monkeypatch):
    monkeypatch.setattr(peers, "compiled", lambda model, fbank: model)


def test_models(not_compiled):
    result = tables("models")
    assert len(result) == 4
    for rows in result:
        assert [row["keep_rate"] for row in rows] == [1.0] * 4 + [0.5]
        assert max(row["saving"] for row in rows[:4]) == 0
        assert rows[4]["realised"] == pytest.approx(rows[4]["saving"] / rows[4]["theory"])


def test_peers(not_compiled):
    result = tables("peers")
    assert len(result) == 8
    for times, speed_up in zip(result[::2], result[1::2]):
        assert {(row["what"], row["keep_rate"]) for row in times} >= {
            (what, rate) for what in ("ours", "the paper's way") for rate in (1.0, 0.5)
        }
        assert [row["keep_rate"] for row in speed_up] == [1.0, 0.5]
        assert speed_up[1]["best_peer"] == "the paper's way"


@pytest.mark.parametrize(
    "dtype, names", [(torch.float32, [*cpu_adapters.SUBJECTS]), (torch.bfloat16, ["Hugging Face AST"])]
)
def test_adapters(not_compiled, monkeypatch, dtype, names):
    monkeypatch.setattr(cpu_adapters, "has_bfloat16", lambda: True)
    monkeypatch.setattr(cpu_adapters, "SUBJECTS", {name: cpu_adapters.SUBJECTS[name] for name in names})
    result = tables("adapters", TINY._replace(dtypes=(dtype,)))
    assert [rows[0]["model"] for rows in result] == [f"{name}, tiny" for name in names]
    for rows in result:
        assert [(row["what"], row["keep_rate"]) for row in rows] == [
            (what, rate) for rate in (1.0, 0.5) for what in ("eager", "compiled")
        ]
        assert max(row["saving"] for row in rows[:2]) == 0
        assert rows[3]["realised"] == pytest.approx(rows[3]["saving"] / rows[3]["theory"])


def test_adapters_in_bfloat16_only_where_the_machine_has_it(monkeypatch):
    monkeypatch.setattr(cpu_adapters, "has_bfloat16", lambda: False)
    assert tables("adapters", TINY._replace(dtypes=(torch.bfloat16,))) == []


def test_macs_of_adapters():
    subject = cpu_adapters.huggingface_ast(TINY)
    for rate in (1.0, 0.5):
        model = cpu_models.make_model(TINY, "ast", keep_rate=rate)
        assert subject.macs(rate) == pruneattn.count_macs(model).paper
    vit = subject._replace(blocks=range(12), dim=768, extra_tokens=1, inputs=torch.empty(1, 3, 224, 224))
    assert vit.macs(1.0) == 196 * 768 * 768 + 12 * (12 * 197 * 768**2 + 2 * 197**2 * 768)


@torch.no_grad()
def spoil(model, *arguments):
    next(pruneattn.prune(model, *arguments).parameters()).mul_(1.001)


@pytest.mark.parametrize(
    "prune, message",
    [
        (lambda model, rate, blocks: pruneattn.prune(model, 0.8 * rate, blocks), r"pruned: \[1, 5, 192\] instead of"),
        (lambda model, rate, blocks: pruneattn.prune(model, rate, blocks, "column_mean"), "pruned, tokens of the last"),
        (spoil, "at keep-rate 1 it does not give the bits"),
    ],
)
def test_a_wrongly_pruned_peer_is_an_error(not_compiled, monkeypatch, prune, message):
    monkeypatch.setattr(cpu_adapters, "pruneattn", SimpleNamespace(prune=prune))
    with pytest.raises(peers.WrongResult, match=f"Hugging Face AST.*{message}"):
        tables("adapters", TINY._replace(dtypes=(torch.float32,)))


def test_missing_peers_are_left_out(not_compiled, monkeypatch):
    monkeypatch.setattr(peers, "version", lambda package: None)
    assert set(peers.missing()) == {"timm ViT", "Hugging Face AST"}
    assert tables("adapters") == []
    for times in tables("peers", TINY._replace(dtypes=(torch.float32,)))[::2]:
        assert {row["what"] for row in times} == {"ours", "the paper's way"}


def test_a_wrong_peer_is_an_error(not_compiled, monkeypatch):
    monkeypatch.setattr(peers.PapersViT, "forward", lambda self, fbank: 1.1 * self.run(fbank)[0])
    with pytest.raises(peers.WrongResult, match="the paper's way"):
        tables("peers")


def test_exported(not_compiled, monkeypatch):
    files = {what: how for what, how in cpu_exported.FILES.items() if how[0] != "aoti"}  # a minute of compiling each
    monkeypatch.setattr(cpu_exported, "FILES", files)
    monkeypatch.setattr(cpu_exported, "FAMILIES", ("ast",))
    (rows,) = tables("exported")
    names = ["eager", "compiled", "optimised", *files]
    if cpu_exported.version("onnxruntime") is None:
        names.remove("ONNX Runtime")
    assert [(row["what"], row["keep_rate"]) for row in rows] == [(name, rate) for rate in (1.0, 0.5) for name in names]
    assert [row["saving"] for row in rows[: len(names)]] == [0] * len(names)


def test_compiled_with_frozen_weights():
    model = cpu_models.make_model(TINY, "audiomae", depth=1, prune_blocks=())
    fbank = torch.randn(2, TINY.frames, 128)
    with torch.inference_mode():
        compiled = peers.compiled(with_sdpa(model), fbank)
        torch.testing.assert_close(compiled(fbank), model(fbank), rtol=1e-3, atol=1e-6)


def test_block():
    result = tables("block")
    assert len(result) == 4
    for rows in result:
        parts = {row["part"]: row for row in rows}
        assert tuple(parts) == cpu_block.PARTS
        for part in ("norm", "qkv", "attention", "proj", "mlp"):
            assert parts[part]["dense_p50_ms"] > 0 and parts[part]["pruned_p50_ms"] > 0
        assert parts["select+gather"]["dense_p50_ms"] == 0 < parts["select+gather"]["pruned_p50_ms"]
        assert 0.4 < parts["mlp"]["macs_ratio"] < parts["whole"]["macs_ratio"] < 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory(monkeypatch):
    monkeypatch.setattr(cpu_block, "FAMILIES", ("audiomae",))
    (rows,) = tables("memory", TINY._replace(dtypes=(torch.float32,)))
    assert [row["what"] for row in rows] == ["ours", "the paper's way"]
    assert all(row["growth_mib"] >= 0 for row in rows)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_growth_sees_what_is_freed_again():
    assert 63 < cpu_block.peak_growth(lambda: torch.ones(16 * 2**20).sum()) < 96


def test_result_file(tmp_path, capsys):
    path = cpu_run.run(["threads"], TINY._replace(dtypes=(torch.float32,)), tmp_path)
    result = json.loads(path.read_text())
    assert result["instruction_set"] in result["instruction_sets"]
    assert {"commit", "cpu", "cpus", "torch", "threads", "rounds", "left_out"} <= result.keys()
    (table,) = result["tables"]
    assert table["section"] == "threads" and TIMES < table["rows"][0].keys()
    assert f"### {table['title']}" in capsys.readouterr().out


def test_unknown_section(capsys):
    with pytest.raises(SystemExit):
        cpu_run.main(["opps"])
    assert "unknown section 'opps'; choose from ops, threads" in capsys.readouterr().err


def test_percentiles_and_table():
    assert percentiles([0.001, 0.002, 0.003]) == pytest.approx({"p20_ms": 1.4, "p50_ms": 2.0, "p80_ms": 2.6})
    assert markdown([{"what": "it", "p50_ms": 1234.56, "realised": None}]).splitlines() == [
        "| what | p50_ms | realised |",
        "| --- | --- | --- |",
        "| it | 1234.6 | - |",
    ]
