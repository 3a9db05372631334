"""ONNX files with 8-bit weights."""

import json
import logging

import pytest
import torch
from torch import nn

from pruneattn import UserError
from pruneattn.data import FeatureConfig
from pruneattn.models import export_int8
from pruneattn.models.export import KEY, export_model

CALIBRATE = [torch.zeros(2, 128, 128)]


@pytest.fixture(autouse=True)
def onnxruntime():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


@pytest.fixture
def model(make_model):
    model = make_model("ast", depth=3, embed_dim=96, prune_blocks=(1, 2), keep_rate=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.4)  # a standard deviation of 0.12, about the inverse root of the width
    model.features = FeatureConfig(frames=128, mean=-8.7, std=4.3)
    return model


def run_onnx(onnxruntime, path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = [one.name for one in session.get_inputs()]
    (logits,) = session.run(["logits"], {name: x.numpy()})
    return torch.from_numpy(logits), session.get_modelmeta().custom_metadata_map


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.square().mean().sqrt()).item()


@pytest.mark.slow
@torch.no_grad()
def test_a_pruned_model(model, onnxruntime, tmp_path, capfd):
    import onnx

    path, exact = tmp_path / "int8.onnx", tmp_path / "exact.onnx"
    export_model(model, exact, "onnx")
    batches = torch.randn(12, 128, 128, generator=torch.Generator().manual_seed(1)).split([5, 1, 6])
    capfd.readouterr()
    difference = export_model(model, path, "onnx", dtype=torch.int8, calibrate=iter(batches))
    assert "".join(capfd.readouterr()) == "" and not logging.root.manager.disable
    assert 1e-4 < difference < 0.4
    assert sorted(one.name for one in tmp_path.iterdir()) == ["exact.onnx", "int8.onnx"]
    assert path.stat().st_size < 0.5 * exact.stat().st_size

    graph = onnx.load(path).graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    stored = {one.name: one for one in graph.initializer}
    weights = [one for one in stored.values() if one.data_type == onnx.TensorProto.INT8 and len(one.dims) == 2]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert sum(one.dims[0] * one.dims[1] for one in weights) == sum(linear.weight.numel() for linear in linears)
    # Attention (two products) and scores are not quantized. A pruning block quantizes keys and values, the CLS query,
    # projection and MLP, but not the queries of its kept tokens.
    quantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    products = [node.input for node in graph.node if node.op_type == "MatMul"]
    assert sum(not quantized & set(inputs) for inputs in products) == 2 * 3 + 2
    assert sum(quantized >= set(inputs) for inputs in products) == 4 + 2 * 5
    scales = {node.input[0]: stored[node.input[1]] for node in graph.node if node.op_type == "DequantizeLinear"}
    for weight in weights:
        assert list(scales[weight.name].dims) == [weight.dims[0 if weight.name.startswith("model.head") else 1]]

    for batch in (1, 3):
        x = torch.randn(batch, 128, 128, generator=torch.Generator().manual_seed(10 + batch))
        logits, metadata = run_onnx(onnxruntime, path, x)
        expected = model(x)
        assert logits.dtype == torch.float32 and expected.std() > 0.1
        assert relative(logits, expected) < 0.4
    about = json.loads(metadata[KEY])
    assert about["dtype"] == "int8" and about["inputs"] == ["fbank"] and about["keep_rates"] == [0.5, 0.5]
    assert FeatureConfig(**about["features"]) == model.features


@torch.no_grad()
def test_a_module_with_an_example(onnxruntime, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4)).eval()
    path, x = tmp_path / "net.onnx", torch.randn(64, 8)
    export_model(net, path, "onnx", example=x[:1], dtype=torch.int8, calibrate=[x])
    logits, metadata = run_onnx(onnxruntime, path, x)
    assert json.loads(metadata[KEY])["dtype"] == "int8"
    assert 1e-4 < relative(logits, net(x)) < 0.1
    # The ranges are those of the calibration inputs: larger values saturate.
    large, _ = run_onnx(onnxruntime, path, 100 * x)
    assert large.abs().max() < 4 * logits.abs().max() < net(100 * x).abs().max()


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("onnx", {}, r"calibrate \(--calibrate\): dtype \(--dtype\) int8 needs calibration inputs"),
        ("torch", {"calibrate": CALIBRATE}, r"dtype \(--dtype\) int8: the format torch does not support it"),
        ("aoti", {"calibrate": CALIBRATE}, r"dtype \(--dtype\) int8: the format aoti does not support it"),
        ("onnx", {"calibrate": CALIBRATE, "kernels": True}, "kernels: ONNX does not support"),
        ("onnx", {"calibrate": CALIBRATE, "waveform": True}, r"waveform \(--waveform\): not supported with dtype"),
        ("onnx", {"calibrate": CALIBRATE, "dtype": None}, r"calibrate \(--calibrate\) applies only with dtype"),
        ("onnx", {"calibrate": []}, "there is no calibration input"),
        ("onnx", {"calibrate": [torch.zeros(0, 128, 128)]}, "there is no calibration input"),
        (
            "onnx",
            {"calibrate": [torch.zeros(2, 64, 128)]},
            r"calibrate: expected .* \[B, 128, 128\], got \[2, 64, 128\]",
        ),
        ("onnx", {"calibrate": [[1.0]]}, "calibrate: expected tensors, got list"),
        ("onnx", {"calibrate": [torch.full((1, 128, 128), float("nan"))]}, "calibrate: an input is not finite"),
    ],
)
def test_rejected_arguments(model, tmp_path, format, options, message):
    path = tmp_path / ("model.onnx" if format == "onnx" else "model.pt2")
    with pytest.raises(UserError, match=message):
        export_model(model, path, format, **{"dtype": torch.int8} | options)
    assert not list(tmp_path.iterdir())


def test_a_file_with_other_logits_is_not_kept(tmp_path, monkeypatch):
    quantize = export_int8.quantize_file
    monkeypatch.setattr(export_int8, "quantize_file", lambda file, batches: quantize(file, [1e-3 * batches[0]]))
    net, x = nn.Linear(8, 4).eval(), torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="does not compute the model's logits"):
        export_model(net, tmp_path / "net.onnx", "onnx", example=x[:1], dtype=torch.int8, calibrate=[x])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sizes", [[1], [2], [1, 1, 1], [4], [3, 9]])
def test_the_file_is_checked_on_calibration_inputs(sizes):
    inputs = torch.arange(12.0)[:, None]
    ((one,), (three,)) = export_int8.check_runs(list(inputs[: sum(sizes)].split(sizes)))
    numbers = [number % sum(sizes) for number in range(4)]
    assert torch.cat([one, three]).flatten().tolist() == numbers and len(one) == 1
