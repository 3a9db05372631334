"""Files of `export_model` compute the model's logits without this package."""

import json
import subprocess
import sys

import pytest
import torch

import pruneattn
from pruneattn import UserError, ops
from pruneattn.constants import WINDOW
from pruneattn.data import FeatureConfig, FeatureExtractor
from pruneattn.data.fbank import samples_for
from pruneattn.models import export
from pruneattn.models.export import DESCRIPTION_FILE, KEY, _decompositions, export_model

SMALL = {"depth": 2, "prune_blocks": (0, 1), "keep_rate": 0.6}


@pytest.fixture
def onnxruntime():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime")


def make_described(make_model, **arguments):
    model = make_model("ast", **SMALL | arguments)
    model.features = FeatureConfig(frames=128, mean=-8.74, std=4.28)
    model.labels, model.multilabel = list("abcde"), False
    return model


@pytest.fixture
def model(make_model):
    return make_described(make_model)


@pytest.fixture(scope="module")
def programs(make_model, tmp_path_factory):
    """Files of one model in the format torch, for all tests that only read them: the model, its tensors before the
    export, ``{kernels: path}`` and ``{kernels: difference that export_model returned}``. With kernels in bfloat16.
    """
    model, folder = make_described(make_model), tmp_path_factory.mktemp("programs")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths = {kernels: folder / f"{kernels}.pt2" for kernels in (False, True)}
    with torch.no_grad():
        differences = {
            False: export_model(model, paths[False], "torch"),
            True: export_model(model, paths[True], "torch", kernels=True, dtype=torch.bfloat16),
        }
    return model, before, paths, differences


def run_onnx(onnxruntime, path, *inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    (logits,) = session.run(["logits"], {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return torch.from_numpy(logits), names, session.get_modelmeta().custom_metadata_map


def close(actual, expected, tolerance=1e-3):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "family, score, stride",
    [
        ("ast", "cls", 16),
        pytest.param("audiomae", "column_mean", 16, marks=pytest.mark.slow),
        pytest.param("audiomae", "variation", 16, marks=pytest.mark.slow),
        pytest.param("ast", "cls", 10, marks=pytest.mark.slow),
        pytest.param("ast", "column_mean", (10, 16), marks=pytest.mark.slow),
        pytest.param("ast", "intensity", 10, marks=pytest.mark.slow),
        pytest.param("ast", "variation", (16, 10), marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_onnx(make_model, onnxruntime, tmp_path, family, score, stride):
    model, path = make_model(family, score=score, stride=stride, **SMALL), tmp_path / "model.onnx"
    assert export_model(model, path, "onnx") < 1e-3
    for batch in (1, 5):
        fbank = torch.randn(batch, 128, 128)
        logits, names, _ = run_onnx(onnxruntime, path, fbank)
        close(logits, model(fbank))
    assert names == ["fbank"] and logits.std() > 0.1
    # Patches of equal score, for example padding: the lower numbers are kept.
    fbank[:, 20:] = 0
    close(run_onnx(onnxruntime, path, fbank)[0], model(fbank))


@pytest.mark.slow
@torch.no_grad()
def test_onnx_takes_waveforms_and_describes_itself(model, onnxruntime, tmp_path):
    path = tmp_path / "model.onnx"
    export_model(model, path, "onnx", waveform=True)
    samples = samples_for(128)
    waves, lengths = 0.1 * torch.randn(4, samples), torch.tensor([samples, WINDOW, 9000, 4242])
    logits, names, metadata = run_onnx(onnxruntime, path, waves, lengths)
    close(logits, model(FeatureExtractor(model.features)(waves, lengths)))
    about = json.loads(metadata[KEY])
    assert names == about["inputs"] == ["waves", "lengths"]
    assert about["labels"] == model.labels and about["keep_rates"] == [0.6, 0.6]
    assert FeatureConfig(**about["features"]) == model.features


@torch.no_grad()
def test_a_torch_program_does_not_need_this_package(programs):
    model, _, paths, differences = programs
    assert differences[False] < 1e-3
    files = {DESCRIPTION_FILE: ""}
    program = torch.export.load(paths[False], extra_files=files)
    about = json.loads(files[DESCRIPTION_FILE])
    assert (about["labels"], about["stride"]) == (model.labels, [16, 16])
    used = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in used if "pruneattn" in name]
    assert not [name for name in used if "logsumexp" in name]  # needed by gradients only
    fbank = torch.randn(4, 128, 128)
    close(program.module()(fbank), model(fbank))


@torch.no_grad()
def test_kernels_and_half_precision_on_request(programs):
    model, _, paths, differences = programs
    assert differences[True] == 0
    program, fbank = torch.export.load(paths[True]), torch.randn(4, 128, 128)
    assert "pruneattn.cls_prune_tokens.default" in {str(node.target) for node in program.graph.nodes}
    logits, expected = program.module()(fbank), model(fbank)
    assert logits.dtype == torch.float32 and program.state_dict["model.head.weight"].dtype == torch.bfloat16
    assert (logits - expected).norm() < 0.2 * expected.norm()


def test_the_exported_model_is_not_changed(programs):
    model, before, _, _ = programs
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True])
def test_only_a_program_with_kernels_needs_this_package(programs, kernels):
    elsewhere = "import sys; sys.modules['pruneattn'] = None; import torch; torch.export.load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", elsewhere, programs[2][kernels]], capture_output=True)
    assert bool(done.returncode) == kernels


class Pieces(torch.nn.Module):
    """Every op that fuses the selection with other work."""

    def forward(self, q, k, scores, x):
        return (
            *ops.cls_prune_tokens(q, k, x, x, 4, 1),
            *ops.pruned_attention(k, k, k.flip(1), x, 4, 1),
            *ops.prune_epilogue(scores, x, x, 4, 1),
            *ops.prune_tokens(scores[:, 0], x, x, 4, 1),
        )


@torch.no_grad()
def test_the_selection_is_kept_on_request():
    q, k, scores, x = torch.randn(2, 3, 4), torch.randn(2, 3, 9, 4), torch.randn(2, 3, 8), torch.randn(2, 9, 5)
    program = torch.export.export(Pieces(), (q, k, scores, x))
    for keep_selection, expected in ((True, ["pruneattn.select_tokens.default"] * 4), (False, [])):
        decomposed = program.run_decompositions(_decompositions(keep_selection))
        used = [str(node.target) for node in decomposed.graph.nodes if node.op == "call_function"]
        assert [name for name in used if "pruneattn" in name] == expected
        for ours, wanted in zip(decomposed.module()(q, k, scores, x), Pieces()(q, k, scores, x), strict=True):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.slow
@torch.no_grad()
def test_aoti(make_model, tmp_path):
    # One block: the C++ compiler takes most of the time, and compiles a kernel per layer.
    sizes = {"depth": 1, "prune_blocks": (0,), "keep_rate": 0.6}
    model, path = make_model("audiomae", **sizes), tmp_path / "model.pt2"
    export_model(model, path, "aoti")
    compiled = torch._inductor.aoti_load_package(path)
    assert json.loads(compiled.loader.get_metadata()[KEY])["model"] == "audiomae_tiny"
    for batch in (1, 5):
        fbank = torch.randn(batch, 128, 128)
        close(compiled(fbank), model(fbank))


@pytest.mark.slow
@pytest.mark.parametrize(
    "format, score, kernels, waveform",
    [
        ("onnx", "cls", False, True),
        ("torch", "variation", False, True),
        ("torch", "cls", True, False),
        ("aoti", "intensity", False, True),
    ],
)
@torch.no_grad()
def test_another_stride(make_model, onnxruntime, tmp_path, format, score, kernels, waveform):
    """Frames that no patch of stride 10 reads are in the input, too."""
    sizes = {"depth": 1, "prune_blocks": (0,), "keep_rate": 0.6}
    model = make_model("ast", stride=10, frames=70, score=score, **sizes)
    model.features = FeatureConfig(frames=70, mean=-8.74, std=4.28)
    path = tmp_path / ("model" + export.FORMATS[format])
    assert export_model(model, path, format, waveform=waveform, kernels=kernels) < 1e-3
    samples, lengths = 0.1 * torch.randn(3, samples_for(70)), torch.tensor([samples_for(70), 9000, 4242])
    fbank = FeatureExtractor(model.features)(samples, lengths)
    inputs = (samples, lengths) if waveform else (fbank,)
    if format == "onnx":
        logits = run_onnx(onnxruntime, path, *inputs)[0]
    elif format == "torch":
        logits = torch.export.load(path).module()(*inputs)
    else:
        logits = torch._inductor.aoti_load_package(path)(*inputs)
    close(logits, model(fbank))


@pytest.mark.slow
@torch.no_grad()
def test_float16_without_kernels(model, tmp_path):
    export_model(model, tmp_path / "model.pt2", "torch", dtype=torch.float16)
    program, fbank = torch.export.load(tmp_path / "model.pt2"), torch.randn(4, 128, 128)
    logits, expected = program.module()(fbank), model(fbank)
    assert logits.dtype == torch.float32 and program.state_dict["model.head.weight"].dtype == torch.float16
    assert (logits - expected).norm() < 0.2 * expected.norm()


def timm_model():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=24, num_classes=7), (3, 64, 64)


def transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.ASTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        max_length=128,
        frequency_stride=16,
        time_stride=16,
        num_labels=7,
    )
    return transformers.ASTForAudioClassification(config), (128, 128)


@pytest.mark.parametrize("make", [timm_model, pytest.param(transformers_model, marks=pytest.mark.slow)])
@torch.no_grad()
def test_models_of_other_libraries(onnxruntime, tmp_path, make):
    torch.manual_seed(0)
    model, shape = make()
    pruneattn.prune(model.eval(), keep_rate=0.5, prune_blocks=(1,))
    torch.nn.init.normal_(model.head.weight if hasattr(model, "head") else model.classifier.dense.weight)
    export_model(model, tmp_path / "theirs.onnx", "onnx", example=torch.zeros(1, *shape))
    x = torch.randn(5, *shape)
    logits, names, _ = run_onnx(onnxruntime, tmp_path / "theirs.onnx", x)
    expected = model(x)
    close(logits, getattr(expected, "logits", expected))
    assert names == ["input"]
    pruneattn.unprune(model)
    unpruned = model(x)
    assert (getattr(unpruned, "logits", unpruned) - logits).abs().max() > 0.01


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("model.onnx", {"format": "tflite"}, "format: expected onnx, torch, aoti, got 'tflite'"),
        ("model.bin", {"format": "onnx"}, "must end in .onnx"),
        ("model.onnx", {"format": "aoti"}, "must end in .pt2"),
        ("nowhere/model.pt2", {"format": "torch"}, "the folder .*nowhere does not exist"),
        ("model.onnx", {"format": "onnx", "kernels": True}, "ONNX does not support this package's operators"),
        (
            "model.pt2",
            {"format": "torch", "example": torch.zeros(1, 3)},
            "example: required for a model that is not of",
        ),
    ],
)
def test_invalid_arguments_are_rejected(model, tmp_path, name, arguments, message):
    with pytest.raises(UserError, match=message):
        export_model(model, tmp_path / name, **arguments)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_exported(model, tmp_path):
    with pytest.raises(UserError, match="example: required"):
        export_model(torch.nn.Linear(3, 3), tmp_path / "model.pt2", "torch")
    model.features = None
    with pytest.raises(UserError, match="waveform: the features of the model are unknown: set model.features"):
        export_model(model, tmp_path / "model.pt2", "torch", waveform=True)
    if torch.backends.mkldnn.is_available():
        pruneattn.optimize_for_inference(model)
        with pytest.raises(UserError, match="optimized for inference"):
            export_model(model, tmp_path / "model.pt2", "torch")
        with pytest.raises(UserError, match="optimized for inference"):
            inside = torch.nn.Sequential(model)
            export_model(inside, tmp_path / "model.pt2", "torch", example=torch.zeros(1, 128, 128))

    class Reads(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * float(x.sum())

    with pytest.raises(UserError, match="Reads cannot be exported as torch"):
        export_model(Reads(3, 3), tmp_path / "model.pt2", "torch", example=torch.zeros(1, 3))
    assert not list(tmp_path.iterdir())


def test_the_error_names_the_root_cause(model, tmp_path, monkeypatch):
    """The exporters wrap it in advice, in colors."""

    def write(*_):
        try:
            raise ValueError("\x1b[96mno function for aten.gcd\x1b[0m\nmore")
        except ValueError as error:
            raise RuntimeError("\x1b[31mFailed.\x1b[0m Next steps: ...") from error

    monkeypatch.setitem(export._WRITERS, "torch", write)
    (tmp_path / "model.pt2").write_text("the previous file")
    with pytest.raises(UserError, match=r"AST cannot be exported as torch: no function for aten\.gcd$"):
        export_model(model, tmp_path / "model.pt2", "torch")
    assert (tmp_path / "model.pt2").read_text() == "the previous file" and len(list(tmp_path.iterdir())) == 1


def test_a_file_with_other_logits_is_rejected(model, monkeypatch, tmp_path):
    wrapped = export._Exported(model, False, None)
    runs = [export._inputs(wrapped.model, None, False, batch) for batch in (1, 3)]
    fitting = [wrapped(*inputs) for inputs in runs]
    for outputs, accepted in (
        (fitting, True),
        ([logits * 1.1 for logits in fitting], False),
        ([logits * torch.nan for logits in fitting], False),
    ):
        monkeypatch.setattr(export, "_run_elsewhere", lambda *_, outputs=outputs: outputs)
        if accepted:
            assert export._check_file(tmp_path, "torch", False, wrapped, runs, 0.01) < 1e-6
            continue
        with pytest.raises(UserError, match="does not compute the model's logits"):
            export._check_file(tmp_path, "torch", False, wrapped, runs, 0.01)


def test_without_onnx(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", type(sys)("onnx"))
    monkeypatch.setitem(sys.modules, "onnxscript", type(sys)("onnxscript"))
    with pytest.raises(
        UserError, match=r"needs onnxruntime, which is not installed: pip install 'pruneattn\[export\]'"
    ):
        export_model(model, tmp_path / "model.onnx", "onnx")


def write_damaged(model, program, file):
    file.write_text("nothing")


def write_another(model, program, file):
    model.set_keep_rate(0.5)
    other = export._program(export._Exported(model, False, None), (torch.zeros(2, 128, 128),), "torch", False)
    torch.export.save(other, file)


@pytest.mark.slow
@pytest.mark.parametrize(
    "write, message",
    [
        (write_damaged, "does not run in a separate process"),
        (write_another, "does not compute the model's logits"),
    ],
)
def test_a_wrong_file_is_not_kept(model, tmp_path, monkeypatch, write, message):
    path = tmp_path / "model.pt2"
    path.write_text("the previous file")
    monkeypatch.setitem(export._WRITERS, "torch", lambda program, file, *_: write(model, program, file))
    with pytest.raises(UserError, match=message):
        export_model(model, path, "torch")
    assert path.read_text() == "the previous file" and len(list(tmp_path.iterdir())) == 1


def test_command(model, tmp_path, monkeypatch, capsys):
    from pruneattn.export import main

    pruneattn.save_pretrained(
        model, tmp_path / "best.safetensors", features=model.features, labels=model.labels, multilabel=False
    )
    monkeypatch.chdir(tmp_path)
    assert main([str(tmp_path), "--format", "torch", "--keep-rate", "0.3", "--waveform", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "ast_tiny.pt2: ast_tiny, 128 frames (64 patches), 5 classes, keep-rate 0.3" in printed
    assert "logits within" in printed
    model.set_keep_rate(0.3)
    waves, lengths = 0.1 * torch.randn(2, samples_for(128)), torch.tensor([7000, 8000])
    with torch.no_grad():
        close(
            torch.export.load("ast_tiny.pt2").module()(waves, lengths),
            model(FeatureExtractor(model.features)(waves, lengths)),
        )
