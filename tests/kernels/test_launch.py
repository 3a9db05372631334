"""Tiles, tile sizes and launches, apart from what the kernels compute (tests/ops has that)."""

import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from pruneattn.kernels import launch, tiles  # noqa: E402
from pruneattn.kernels.launch import Config, config_for, fit  # noqa: E402


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_tiles_cover_every_count_once(block):
    for count in range(1, 600):
        apart, masked = tiles.split(count, block)
        whole = (count - apart) // block * block
        assert apart + whole == count or (masked and 0 < count - apart - whole < block)
        last = tiles.last_rows(count, block)
        assert (last == 0) == (count % block == 0) and last >= count % block and last & (last - 1) == 0
        assert tiles.tiled(count, block) >= count


@pytest.mark.parametrize("tokens", [65, 257, 513, 514])
def test_extra_tokens_cost_no_tile_of_keys(tokens):
    for block in (32, 64):
        assert tiles.split(tokens, block) == (tokens % 64, False)
        assert tiles.tiled(tokens, block) == tokens - tokens % 64 + 16


def test_programs_are_smaller_where_large_ones_would_be_empty_or_few():
    large, small = Config(128, 32, 8, 2), Config(64, 32, 4, 2)
    assert fit(large, "BLOCK_M", 768, 513, 132) == large
    assert fit(large, "BLOCK_M", 12, 513, 132) == small  # 60 programs for 132 multiprocessors
    assert fit(large, "BLOCK_M", 768, 65, 132) == small  # 128 rows for 65
    assert fit(large, "BLOCK_N", 12, 513, 132) == large  # shares out by 32 already


def test_measured_tile_sizes_come_first(monkeypatch):
    table = {"sm_90": {"attention": {"bfloat16, 64": [64, 128, 8, 4]}}}
    monkeypatch.setattr(launch, "_table", lambda: table)
    assert config_for("attention", "sm_90", torch.bfloat16, 64) == Config(64, 128, 8, 4)
    for kernel, architecture, dtype, channels in (
        ("attention", "sm_80", torch.bfloat16, 64), ("attention", "sm_90", torch.float16, 64),
        ("attention", "sm_90", torch.bfloat16, 128), ("column_sums", "sm_90", torch.bfloat16, 64),
    ):  # fmt: skip
        assert config_for(kernel, architecture, dtype, channels) == launch.fallback(kernel, dtype, channels)


def test_the_table_that_is_shipped_is_read():
    for architecture, kernels in launch._table().items():
        assert architecture[:3] in ("sm_", "gfx")
        for kernel, sizes in kernels.items():
            assert kernel in launch.SHARED_OUT
            for size, config in sizes.items():
                dtype, channels = size.split(", ")
                assert config_for(kernel, architecture, getattr(torch, dtype), int(channels)) == Config(*config)


def test_what_the_kernels_do_not_take():
    q = torch.zeros(1, 1, 2, 128)
    assert launch.takes(q) and launch.takes(q.half()) and launch.takes(q.bfloat16())
    assert not launch.takes(q.double()) and not launch.takes(torch.zeros(1, 1, 2, 129))


def test_tuning_writes_the_fastest_that_is_right(tmp_path, monkeypatch, capsys):
    from bench import tune

    if tune.torch.cuda.is_available():
        pytest.skip("the clock of this test is for Triton's interpreter")
    path = tmp_path / "configs.json"
    path.write_text('{"sm_80": {"attention": {"bfloat16, 64": [1, 2, 3, 4]}}}')
    fast = Config(16, 16, 4, 1)

    def clock(calls):
        assert fast in calls and all(call() is None for call in calls.values())
        return {config: 1.0 if config == fast else 2.0 for config in calls}

    def configs(kernel, dtype):
        return [Config(32, 16, 4, 1), fast]

    tune.tune(torch.float32, 16, "cpu", "sm_90", clock, path, (18, 1, 2), configs)
    table = json.loads(path.read_text())
    assert table["sm_80"] == {"attention": {"bfloat16, 64": [1, 2, 3, 4]}}
    assert table["sm_90"] == {kernel: {"float32, 16": list(fast)} for kernel in launch.SHARED_OUT}
    assert "attention: Config(BLOCK_M=16" in capsys.readouterr().out

    # One that computes something else is not timed.
    launches, written = tune.kernels(torch.float32, 16, 18, heads=2)["attention"]

    def wrong_for_fast(config):
        made = launches(config=config)
        return made._replace(arguments={**made.arguments, "scale": 2.0}) if config == fast else made

    monkeypatch.setattr(tune, "tqdm", lambda items, **_: items)
    monkeypatch.setattr(tune.tqdm, "write", print, raising=False)
    seconds = tune.measure("attention", wrong_for_fast, written, [fast], Config(32, 32, 4, 1), lambda calls: calls)
    assert list(seconds) == [Config(32, 32, 4, 1)]
    assert "left out: the values differ" in capsys.readouterr().out


def test_candidates_share_out_by_the_right_tile():
    from bench.tune import candidates

    for kernel, block in launch.SHARED_OUT.items():
        for dtype in launch.DTYPES:
            tried = list(candidates(kernel, dtype))
            assert len(tried) == len(set(tried)) >= 18
            if dtype != torch.float32 and kernel != "cls_weights":
                assert {getattr(config, block) for config in tried} == {64, 128}
