"""Tiles, tile sizes and launches. tests/ops tests the results of the kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from pruneattn.kernels import launch, tiles
from pruneattn.kernels.launch import Config, config_for, fit
from pruneattn.ops._layout import near


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_tiles_cover_every_count_once(block):
    for count in range(1, 600):
        apart, masked = tiles.split(count, block)
        whole = (count - apart) // block * block
        assert apart + whole == count or (masked and 0 < count - apart - whole < block)
        last = tiles.last_rows(count, block)
        assert (last == 0) == (count % block == 0) and last >= count % block and last & (last - 1) == 0
        assert tiles.tiled(count, block) >= count


def test_rows_beyond_32_bit_offsets_are_copied():
    storage = torch.empty(2**32, dtype=torch.float16, device="meta")
    for row in (512, 2**31 // 3, 2**31 // 3 + 1, 2**30):
        x = storage.as_strided((1, 1, 3, 8), (8, 8, row, 1))
        assert (near(x) is x) == (3 * row < 2**31) and near(x).shape == x.shape
    clips_and_heads = storage.as_strided((2, 2, 3, 8), (2**31, 2**30, 8, 1))
    assert near(clips_and_heads) is clips_and_heads  # these have 64-bit offsets
    assert near(storage.as_strided((1, 1, 3, 8), (0, 0, 1, 3))).stride(3) == 1


def test_hip_kernels_are_specialized_for_tensors_of_2_gib(monkeypatch):
    """On HIP, Triton compiles 32-bit offsets for smaller tensors."""
    small, large = (torch.empty(size, dtype=torch.int8, device="meta") for size in (2**31 - 16, 2**31))
    assert launch._kind(small) == launch._kind(large)
    monkeypatch.setattr(launch, "_HIP", True)
    assert launch._kind(small) != launch._kind(large)


@pytest.mark.parametrize("tokens", [65, 257, 513, 514])
def test_extra_tokens_need_no_tile_of_keys(tokens):
    for block in (32, 64):
        assert tiles.split(tokens, block) == (tokens % 64, False)
        assert tiles.tiled(tokens, block) == tokens - tokens % 64 + 16


def test_tiles_are_small_if_large_tiles_would_be_empty_or_few():
    large, small = Config(128, 32, 8, 2), Config(64, 32, 4, 2)
    assert fit(large, "BLOCK_M", 768, 513, 132) == large
    assert fit(large, "BLOCK_M", 12, 513, 132) == small  # 60 programs for 132 multiprocessors
    assert fit(large, "BLOCK_M", 768, 65, 132) == small  # 128 rows for 65
    assert fit(large, "BLOCK_N", 12, 513, 132) == large  # divides by 32 already


def test_measured_tile_sizes_come_first(monkeypatch):
    table = {"sm_90": {"attention": {"bfloat16, 64": [64, 128, 8, 4]}}}
    monkeypatch.setattr(launch, "_table", lambda: table)
    assert config_for("attention", "sm_90", torch.bfloat16, 64) == Config(64, 128, 8, 4)
    for kernel, architecture, dtype, channels in (
        ("attention", "sm_80", torch.bfloat16, 64),
        ("attention", "sm_90", torch.float16, 64),
        ("attention", "sm_90", torch.bfloat16, 128),
        ("column_sums", "sm_90", torch.bfloat16, 64),
    ):
        assert config_for(kernel, architecture, dtype, channels) == launch.fallback(kernel, dtype, channels)


def test_the_shipped_table_is_used():
    for architecture, kernels in launch._table().items():
        assert architecture[:3] in ("sm_", "gfx")
        for kernel, sizes in kernels.items():
            assert kernel in launch.SHARED_OUT
            for size, config in sizes.items():
                dtype, channels = size.split(", ")
                assert config_for(kernel, architecture, getattr(torch, dtype), int(channels)) == Config(*config)


@pytest.mark.harness
def test_arguments_are_in_the_kernels_order():
    from tools.triton_resources import kernels

    for name, (launch_of, _) in kernels(torch.float32, 16, 18, heads=2).items():
        made = launch_of(config=Config(16, 16, 4, 1))
        assert list(made.arguments) == made.kernel.arg_names, name


class Kernel:
    """Count compilations and launches of compiled kernels."""

    fn, compiled, launched = object(), 0, 0

    def __getitem__(self, grid):
        def compile_and_launch(*values, num_warps, num_stages):
            self.compiled += 1
            return {(*grid, 1, 1): self.launch}

        return compile_and_launch

    def launch(self, *values):
        self.launched += 1


def test_a_kernel_is_compiled_once_per_specialization():
    kernel, x, config = Kernel(), torch.zeros(64), Config(16, 16, 4, 1)

    def run(x=x, config=config, **changes):
        arguments = {"x": x, "rows": 3, "scale": 0.5, "NEGATIVE": False, "lse": None, **changes}
        launch.Launch(kernel, (2,), arguments, config).run(x)
        return kernel.compiled, kernel.launched

    assert run() == (1, 0)
    assert run() == (1, 1) and run(torch.ones(8), scale=2.0) == (1, 2)  # values that change between calls
    assert run(rows=16) == (2, 2) and run(x.half()) == (3, 2) and run(x[1:]) == (4, 2) and run(lse=x) == (5, 2)
    assert run(NEGATIVE=True) == (6, 2) and run(config=Config(16, 16, 8, 1)) == (7, 2)
    launch.Launch(kernel, (0,), {}, config).run(x)
    assert run(x[4:], lse=x) == (7, 3)


# Triton's own compiler and lookup, with a driver for a GPU that does not exist.
DRIVER = """
import types
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from pruneattn.kernels import cls_scores, launch

launched = []
driver.set_active(types.SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 7,
    launcher_cls=lambda source, metadata: lambda *values: launched.append(values),
    utils=types.SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10}, load_binary=lambda *_: (1, 2, 3, 0, 1024)
    ),
))
q, k, weights = torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 9, 64), torch.zeros(1, 2, 9)
"""
LAUNCH_TWICE = (
    DRIVER
    + """
for _ in range(2):
    cls_scores.cls_weights(q, k, weights, 0.5)
assert len(launch._compiled) == 1
first, second = (values[:6] + values[9:] for values in launched)  # without the arguments for profilers
assert first[:4] == (2, 1, 1, 7) and len(first) == 6 + 16, len(first)
assert all(one is other or one == other for one, other in zip(first, second, strict=True))
"""
)
# The launch has another batch size than the compilation, as in `python -m tools.tune`.
COMPILE_FIRST = (
    DRIVER
    + """
import os
from pathlib import Path
from tools import tune

def compiled():
    return sorted(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))

if __name__ == "__main__":
    tune.SHARED_OUT = ("cls_weights",)
    tune.compile_first(torch.float32, 64, "sm_90", 9, 2, lambda kernel, dtype: [launch.Config(1, 32, 4, 1)])
    before = compiled()
    launch_of, _ = tune.kernels(torch.float32, 64, 9, 3, 2)["cls_weights"]
    launch_of(config=launch.Config(1, 32, 4, 1)).run(q)
    launch_of(config=launch.fallback("cls_weights", torch.float32, 64)).run(q)
    assert len(before) == 2 and len(launched) == 2 and compiled() == before, (before, compiled())
"""
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [LAUNCH_TWICE, pytest.param(COMPILE_FIRST, marks=pytest.mark.harness)],
    ids=["second launch as the first", "compiled before"],
)
def test_launch_on_a_simulated_gpu(script, tmp_path):
    path, root = tmp_path / "script.py", Path(__file__).parents[2]
    path.write_text(script)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, path], cwd=root, env=environment, check=True)


def test_unsupported_inputs():
    q = torch.zeros(1, 1, 2, 128)
    assert launch.takes(q) and launch.takes(q.half()) and launch.takes(q.bfloat16())
    assert not launch.takes(q.double()) and not launch.takes(torch.zeros(1, 1, 2, 129))


@pytest.mark.harness
@pytest.mark.interpreted
def test_tuning_writes_the_fastest_correct_config(tmp_path, monkeypatch, capsys):
    from tools import tune

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

    # A config with other results is not timed.
    launches, written = tune.kernels(torch.float32, 16, 18, heads=2)["attention"]

    def wrong_for_fast(config):
        made = launches(config=config)
        return made._replace(arguments={**made.arguments, "scale": 2.0}) if config == fast else made

    monkeypatch.setattr(tune, "tqdm", lambda items, **_: items)
    monkeypatch.setattr(tune.tqdm, "write", print, raising=False)
    seconds = tune.measure("attention", wrong_for_fast, written, [fast], Config(32, 32, 4, 1), lambda calls: calls)
    assert list(seconds) == [Config(32, 32, 4, 1)]
    assert "left out: the values differ" in capsys.readouterr().out


@pytest.mark.harness
def test_candidates_vary_the_tile_that_divides_the_rows():
    from tools.tune import candidates

    for kernel, block in launch.SHARED_OUT.items():
        for dtype in launch.DTYPES:
            tried = list(candidates(kernel, dtype))
            assert len(tried) == len(set(tried)) >= 18
            if dtype != torch.float32 and kernel != "cls_weights":
                assert {getattr(config, block) for config in tried} == {64, 128}
