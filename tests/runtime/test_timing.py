import os
import time
from statistics import median

import pytest
import torch

from pruneattn.runtime import timing
from pruneattn.runtime.timing import Speed, describe_device, interleaved_rounds


def medians(variants, device, rounds):
    return {name: median(values) for name, values in interleaved_rounds(variants, device, rounds).items()}


def test_attention_kernels():
    q = torch.randn(1, 2, 5, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    kernels = {name: (forced, why_not) for name, forced, why_not in timing.attention_kernels(attend, q, q, q)}
    assert list(kernels) == ["flash_attention", "cudnn_attention", "efficient_attention"]
    forced, why_not = kernels["flash_attention"]  # the kernel for CPUs
    assert why_not == ""
    torch.testing.assert_close(forced(q, q, q), attend(q, q, q))
    assert "kernel" in kernels["cudnn_attention"][1]


def test_rounds_are_interleaved(monkeypatch):
    """With a clock that only the variants move: a continuous slowdown affects both variants equally."""
    clock, order = [0.0], []

    def variant(name, cost):
        def call():
            order.append(name)
            clock[0] += cost * (1 + len(order))  # slower with every call

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    seconds = medians({"slow": variant("slow", 2.0), "fast": variant("fast", 1.0)}, "cpu", rounds=4)
    assert order == ["slow", "fast"] + ["slow", "fast", "fast", "slow"] * 2
    assert seconds["slow"] / seconds["fast"] == pytest.approx(2.0, rel=0.02)


def test_short_calls_are_repeated_to_fill_a_round(monkeypatch):
    clock, calls = [0.0], [0]

    def tick():
        calls[0] += 1
        clock[0] += 0.001 if calls[0] > 1 else 5.0  # the first call compiles

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert medians({"it": tick}, "cpu", rounds=3)["it"] == pytest.approx(0.001)
    assert calls[0] == pytest.approx(2 + 3 * timing._SHORTEST_ROUND / 0.001, abs=4)


def test_real_times():
    seconds = medians({"a": lambda: time.sleep(0.02), "b": lambda: time.sleep(0.06)}, "cpu", rounds=2)
    assert 0.019 < seconds["a"] < seconds["b"]


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_waits_for_the_device():
    x = torch.randn(4096, 4096, device="cuda")
    seconds = medians({"one": lambda: x @ x, "four": lambda: [x @ x for _ in range(4)]}, "cuda", rounds=5)
    assert seconds["four"] / seconds["one"] == pytest.approx(4, rel=0.3)


def test_speed_is_that_of_the_median_round_of_the_fastest_variant():
    """It is not that of the best round or of the mean: one slow round of the fastest variant changes nothing."""
    sdpa = [0.012, 0.001, 0.012, 0.012, 0.02, 0.012]
    dense = {"eager": [0.010, 0.008, 0.5, 0.010, 0.010, 0.010], "eager, SDPA": sdpa}
    half = {"eager": [0.006, 0.001, 0.002, 0.005, 0.004, 0.003]}
    speed = Speed({1.0: dense, 0.5: half})
    assert speed.dense == "eager" and speed.dense_clips_per_second == pytest.approx(100)
    assert speed.clips_per_second[0.5] == {"eager": pytest.approx(1 / 0.0035)}
    assert speed.spread(0.5) == pytest.approx({"ms_per_clip": 3.5, "ms_per_clip_p20": 2.0, "ms_per_clip_p80": 5.0})
    assert speed.spread(1.0)["ms_per_clip"] == pytest.approx(10)
    assert speed.row(0.5, theory=0.5)["saving"] == pytest.approx(0.65)
    assert speed.row(0.5, theory=0.5)["realised"] == pytest.approx(1.3)


def test_description_of_the_device():
    words = describe_device("cpu")
    assert words.endswith(f", {torch.get_num_threads()} of {os.cpu_count()} threads") and not words.startswith(",")


def test_every_keep_rate_is_timed_against_the_unpruned_model(make_model, monkeypatch):
    """With a clock that each forward pass moves by its number of tokens."""
    model = make_model("audiomae", depth=2, prune_blocks=(0,), frames=64)
    clock = [0.0]

    def count(module, args):
        clock[0] += args[0].shape[1]

    model.blocks[1].register_forward_pre_hook(count)
    monkeypatch.setattr(timing, "optimized", lambda model, device, amp: (model, amp))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    speed = timing.measure_speed(model, [0.5, 0.25], "cpu", batch_size=2, rounds=2)
    assert list(speed.seconds) == [1.0, 0.5, 0.25]
    assert speed.seconds[0.5]["optimized"] == [17 / 2] * 2 and speed.seconds[0.25]["optimized"] == [9 / 2] * 2
    assert speed.seconds[1.0].keys() == {"optimized", "eager, SDPA"}
    assert speed.row(0.5, theory=0.5)["saving"] == pytest.approx(1 - 17 / 33)
    assert (
        model.keep_rates == (1.0,)
        and model.blocks[1].attn.kernel is not torch.nn.functional.scaled_dot_product_attention
    )


def test_copies_at_a_keep_rate_share_the_weights(make_model):
    model = make_model("audiomae", depth=2, prune_blocks=(0,), frames=64)
    half = timing._at_keep_rate(model, 0.5)
    assert half.keep_rates == (0.5,) and model.keep_rates == (1.0,)
    assert half.head.weight is model.head.weight and half.pos_embed is model.pos_embed
    fbank = torch.randn(2, 64, 128)
    model.set_keep_rate(0.5)
    with torch.no_grad():
        assert torch.equal(half(fbank), model(fbank))
