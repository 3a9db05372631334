import itertools

import pytest
import torch
import torch.nn.functional as F

from pruneattn import UserError, use_backend
from pruneattn.ops import int8_linear
from pruneattn.ops.int8_linear import MAX_IN, pack_int8_weight, quantize_rows, reference, unpack_int8_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows, input and output channels: below, at and above multiples of a tile's rows (4, 6, 12), of a group of input
# channels (16), of a chunk (256), and of a panel of output channels (32).
SIZES = (
    (1, 1, 1),
    (2, 3, 5),
    (3, 16, 32),
    (4, 15, 33),
    (5, 17, 31),
    (6, 4, 64),
    (12, 256, 7),
    (13, 257, 40),
    (25, 300, 16),
    (100, 40, 65),
)
#: Largest difference from the exact result, relative to the largest value.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.fixture
def place(place_without_triton):
    return place_without_triton


@pytest.fixture
def set_threads():
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


def layer(channels, out, device="cpu"):
    """A packed weight, its scales and a bias."""
    q, scale = quantize_rows(torch.randn(out, channels) / channels**0.5)
    return tuple(t.to(device) for t in (pack_int8_weight(q), scale, torch.randn(out)))


def exact(x, weight, scale, bias=None, residual=None, gelu=False):
    """The op without a layer norm in float64. Only the quantization is that of the reference."""
    q, row_scale = quantize_rows(x)
    y = q.double() @ unpack_int8_weight(weight, scale.shape[0], x.shape[-1]).double().T
    y = y * row_scale.double().unsqueeze(-1) * scale.double()
    y = y if bias is None else y + bias.double()
    y = F.gelu(y) if gelu else y
    return y if residual is None else y + residual.double()


def assert_close(ours, expected, dtype):
    assert ours.dtype == dtype
    limit = TOLERANCE[dtype] * (1 + expected.abs().max())
    assert (ours.double() - expected.double()).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_values(place, dtype):
    for rows, channels, out in SIZES:
        weight, scale, bias = layer(channels, out, place)
        x = torch.randn(rows, channels, device=place).mul(10).to(dtype)
        residual = torch.randn(rows, out, device=place).to(dtype)
        for steps in itertools.product((None, bias), (None, residual), (False, True)):
            assert_close(int8_linear(x, weight, scale, *steps), exact(x, weight, scale, *steps), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sums_of_a_vision_transformer_are_exact(place, dtype):
    for rows, channels, out in ((65, 768, 96), (7, 3072, 33)):
        weight, *_ = layer(channels, out, place)
        x = torch.randint(-127, 128, (rows, channels), device=place).to(dtype)
        x[:, 5] = 127  # so that the scale of each row is 1
        x[0], x[1, ::2] = 127, -127
        sums = x.double() @ unpack_int8_weight(weight, out, channels).double().T
        assert torch.equal(int8_linear(x, weight, torch.ones(out, device=place)), sums.to(dtype))


def test_the_largest_sums_do_not_saturate(place):
    for channels in (16, 3072, MAX_IN):
        for sign in (1, -1):
            weight = pack_int8_weight(torch.full((33, channels), sign * 127, dtype=torch.int8)).to(place)
            x = torch.full((2, channels), 3.0, device=place)
            x[1] *= -1
            y = int8_linear(x, weight, torch.full((33,), 1 / 127, device=place))
            assert_close(y, torch.tensor([[3.0], [-3.0]], device=place) * sign * channels, torch.float32)


def test_each_row_has_its_own_scale(place):
    weight, scale, bias = layer(40, 20, place)
    x = torch.randn(5, 40, device=place)
    x[2] *= 1e20
    x[3] *= 1e-20
    x[4, 7] = 1e4  # an outlier
    y = int8_linear(x, weight, scale, bias)
    assert_close(y[:2], exact(x[:2], weight, scale, bias), torch.float32)
    assert_close(y[2] / 1e20, exact(x[2:3], weight, scale, bias)[0] / 1e20, torch.float32)
    assert torch.equal(y[3], bias)
    assert_close(y[4], exact(x[4:], weight, scale, bias)[0], torch.float32)


def test_ties_round_to_the_even_number():
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    q, scale = quantize_rows(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]] and scale.tolist() == [1]


def test_kernels_round_as_the_reference(place):
    """Products with the unit matrix are the quantized numbers."""
    identity = pack_int8_weight(torch.eye(64, dtype=torch.int8)).to(place)
    x = torch.randn(300, 64, device=place)
    x[:, 0] = 127
    x[:100] = (x[:100] * 20).round() / 2  # ties
    x[200:] *= torch.logspace(-29, 35, 100, device=place).unsqueeze(1)
    q, scale = quantize_rows(x)
    for dtype in (torch.float32, torch.bfloat16):
        q, scale = quantize_rows(x.to(dtype))
        y = int8_linear(x.to(dtype), identity, torch.ones(64, device=place))
        assert torch.equal(y, (q * scale.unsqueeze(-1)).to(dtype))


def test_rows_of_zeros_give_the_bias(place):
    weight, scale, bias = layer(37, 50, place)
    x = torch.zeros(4, 37, device=place)
    x[1], x[2, 3], x[3, 36] = -0.0, 1e-45, 2.0**-101
    assert torch.equal(int8_linear(x, weight, scale, bias), bias.expand(4, -1))
    assert torch.equal(int8_linear(x, weight, scale), torch.zeros(4, 50, device=place))
    x[3, 36] = 2.0**-100
    assert not torch.equal(int8_linear(x[3:], weight, scale * 2.0**100, bias), bias.expand(1, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_change_their_row_only(place, dtype):
    weight, scale, bias = layer(37, 50, place)
    x = torch.randn(30, 37, device=place).to(dtype)
    residual = torch.randn(30, 50, device=place).to(dtype)
    expected = int8_linear(x, weight, scale, bias, residual, True)
    bad = {0: torch.nan, 5: torch.inf, 13: -torch.inf, 14: torch.nan, 29: -torch.nan}
    for row, value in bad.items():
        x[row, (7 * row) % 37] = value
    x[14, 3] = torch.inf
    y = int8_linear(x, weight, scale, bias, residual, True)
    assert y[list(bad)].isnan().all()
    good = [row for row in range(30) if row not in bad]
    assert torch.equal(y[good], expected[good])


def test_gelu_is_the_exact_form(place):
    values = torch.cat([torch.linspace(-8, 8, 4001), torch.tensor([-1e30, 1e30, 0.0, -50.0, 50.0])]).to(place)
    weight = pack_int8_weight(torch.zeros(len(values), 1, dtype=torch.int8)).to(place)
    y = int8_linear(torch.ones(1, 1, device=place), weight, torch.ones_like(values), values, gelu=True)[0]
    error = (y.double() - F.gelu(values.double())).abs()
    assert (error <= 6e-7 * values.abs()).all()
    assert y[-5:].tolist() == [0, values[-4], 0, 0, 50]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm(place, dtype):
    """Rounding can move a value across a tie, which changes its quantized number by one."""
    for rows, channels, out in ((1, 1, 3), (3, 5, 7), (14, 33, 40), (5, 768, 64)):
        weight, scale, bias = layer(channels, out, place)
        norm_weight, norm_bias = torch.randn(channels, device=place), torch.randn(channels, device=place)
        x = (torch.randn(rows, channels, device=place) * 3 + 20).to(dtype)
        y = int8_linear(x, weight, scale, bias, None, False, norm_weight, norm_bias, 1e-6)
        normed = F.layer_norm(x.double(), (channels,), norm_weight.double(), norm_bias.double(), 1e-6)
        expected = exact(normed.float(), weight, scale, bias)
        step = normed.abs().amax(-1, keepdim=True) / 127 * scale * 127
        limit = TOLERANCE[dtype] * (1 + expected.abs()) + 2 * step
        assert ((y.double() - expected).abs() <= limit).all()
        off = ((y.double() - expected).abs() > TOLERANCE[dtype] * (1 + expected.abs().max())).any(-1)
        assert off.sum() <= rows // 4
    x[2, 5] = torch.nan
    y = int8_linear(x, weight, scale, bias, None, False, norm_weight, norm_bias)
    assert y[2].isnan().all() and not y[[0, 1, 3, 4]].isnan().any()


def test_any_dimensions_and_strides(place):
    weight, scale, bias = layer(20, 12, place)
    x = torch.randn(3, 9, 60, device=place)
    residual = torch.randn(9, 3, 24, device=place).transpose(0, 1)
    views = [
        (x[..., 20:40], residual[..., 12:]),
        (x[:, 1::2, :20], residual[:, ::2][:, :4, :12]),
        (x[:, :1, 40:], residual[:, 3:4, 5:17]),
        (x[1, :, 3:43:2], residual[1, :, ::2]),
        (x[2, 4, :20], residual[0, 1, :12]),
        (x[:1, :, :20].expand(3, -1, -1), residual[..., :12]),
        (x.view(3, 3, 3, 60)[..., :20].transpose(1, 2), residual.reshape(3, 3, 3, 24)[..., :12]),
    ]
    for a, r in views:
        y = int8_linear(a, weight, scale, bias, r)
        assert y.shape == r.shape and y.is_contiguous()
        assert torch.equal(y, int8_linear(a.clone().contiguous(), weight, scale, bias, r.clone().contiguous()))
        assert_close(y, exact(a, weight, scale, bias, r), torch.float32)


def test_no_rows(place):
    weight, scale, bias = layer(20, 12, place)
    for shape in ((0, 20), (0, 7, 20), (3, 0, 20)):
        assert int8_linear(torch.empty(shape, device=place), weight, scale, bias).shape == (*shape[:-1], 12)


def test_results_do_not_depend_on_threads_or_other_rows(cpu_kernels, set_threads):
    # One row (threads share the output channels), two tiles, more rows than a block.
    for rows, channels, out in ((1, 768, 768), (25, 300, 200), (150, 768, 130)):
        weight, scale, bias = layer(channels, out)
        norm = torch.randn(channels), torch.randn(channels)
        x, residual = torch.randn(rows, channels), torch.randn(rows, out)
        set_threads(1)
        expected = int8_linear(x, weight, scale, bias, residual, True, *norm)
        for threads in (2, 3, 5):
            set_threads(threads)
            assert torch.equal(int8_linear(x, weight, scale, bias, residual, True, *norm), expected)
        for row in {0, rows // 2, rows - 1}:
            part = slice(row, row + 1)
            alone = int8_linear(x[part], weight, scale, bias, residual[part], True, *norm)
            assert torch.equal(alone, expected[part])


def test_pack_and_unpack():
    for out, channels in ((1, 1), (31, 15), (32, 16), (33, 17), (64, 100)):
        weight = torch.randint(-128, 128, (out, channels), dtype=torch.int8)
        packed = pack_int8_weight(weight)
        assert torch.equal(unpack_int8_weight(packed, out, channels), weight)
    assert pack_int8_weight(torch.zeros(3072, 768, dtype=torch.int8)).numel() == 3072 * 768  # no padding
    with pytest.raises(TypeError, match="weight: expected dtype torch.int8, got torch.float32"):
        pack_int8_weight(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"packed: expected shape .* = \[3, 8, 32, 4\], got \[2, 28, 32, 4\]"):
        unpack_int8_weight(packed, 70, 32)


def test_kernel_equals_the_reference_under_compile(any_device):
    torch.compiler.reset()
    weight, scale, bias = layer(20, 12, any_device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, residual):
        return int8_linear(x, weight, scale, bias, residual, True)

    for batch in (2, 3, 5):
        x = torch.randn(batch, 7, 20, device=any_device)
        residual = torch.randn(batch, 7, 12, device=any_device)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(residual, 0)
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            y = run(x, residual)
        with use_backend("reference"):
            assert_close(y, int8_linear(x, weight, scale, bias, residual, True), torch.float32)
            assert torch.equal(run(x, residual), reference(x, weight, scale, bias, residual, True))


def test_autocast_keeps_the_dtype(any_device):
    weight, scale, bias = layer(20, 12, any_device)
    x = torch.randn(2, 20, device=any_device)
    with torch.autocast(any_device.type, torch.bfloat16):
        assert torch.equal(int8_linear(x, weight, scale, bias), int8_linear(x, weight, scale, bias))
        assert int8_linear(x, weight, scale, bias).dtype == torch.float32


def test_gradients_are_rejected(any_device):
    weight, scale, bias = layer(20, 12, any_device)
    x = torch.randn(2, 20, device=any_device, requires_grad=True)
    with pytest.raises(UserError, match=r"int8_linear has no gradients: call it inside torch.no_grad\(\)"):
        int8_linear(x, weight, scale, bias)
    with torch.no_grad():
        assert not int8_linear(x, weight, scale, bias).requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(2, 20, dtype=torch.float64)}, TypeError, "x: expected dtype torch.float32 or .*float64"),
        ({"x": torch.zeros(2, 33)}, ValueError, r"weight: expected shape .* = \[1, 12, 32, 4\], got \[1, 8, 32, 4\]"),
        ({"x": torch.zeros(2, 0)}, ValueError, r"x: expected shape \[..., K\] with K from 1 to 131072, got \[2, 0\]"),
        ({"x": torch.zeros(())}, ValueError, r"x: expected shape \[..., K\] with K from 1 to 131072, got \[\]"),
        ({"x": torch.zeros(1, MAX_IN + 1)}, ValueError, "x: expected shape .* got .*131073"),
        ({"weight": torch.zeros(12, 20)}, ValueError, r"weight: expected shape .* got \[12, 20\]"),
        ({"weight": torch.zeros(1, 8, 32, 4)}, TypeError, "weight: expected dtype torch.uint8, got torch.float32"),
        ({"scale": torch.ones(0)}, ValueError, "scale: expected at least one output channel"),
        ({"scale": torch.ones(1, 12)}, ValueError, r"scale: expected shape \[N\], got \[1, 12\]"),
        ({"scale": torch.ones(12).double()}, TypeError, "scale: expected dtype torch.float32, got torch.float64"),
        ({"bias": torch.ones(13)}, ValueError, r"bias: expected shape \[N\] = \[12\], got \[13\]"),
        ({"bias": torch.ones(12).bfloat16()}, TypeError, "bias: expected dtype torch.float32, got torch.bfloat16"),
        ({"residual": torch.zeros(12)}, ValueError, r"residual: expected shape .* = \[2, 12\], got \[12\]"),
        ({"residual": torch.zeros(2, 12).half()}, TypeError, "residual: expected dtype torch.float32, the dtype of x"),
        ({"norm_weight": torch.ones(20)}, ValueError, "norm_weight and norm_bias: expected both or neither"),
        ({"norm_weight": torch.ones(20), "norm_bias": torch.ones(1)}, ValueError, "norm_bias: expected shape"),
        ({"bias": torch.ones(12, device="meta")}, ValueError, "bias: expected device cpu, the device of x, got meta"),
    ],
)
def test_rejects_bad_arguments(change, error, message):
    weight, scale, bias = layer(20, 12)
    arguments = {"x": torch.zeros(2, 20), "weight": weight, "scale": scale, "bias": bias} | change
    with pytest.raises(error, match=message):
        int8_linear(**arguments)
