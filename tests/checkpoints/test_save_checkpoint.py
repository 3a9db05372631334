"""Round trips between files of other projects and our models, bit for bit, and code of other projects on our files."""

import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import pruneattn
from pruneattn.data.fbank import FeatureConfig
from pruneattn.errors import UserError
from pruneattn.models import create_model

DIM, DEPTH, HEADS, CLASSES, FRAMES = 48, 5, 3, 7, 256
LABELS = [f"näme {number}" for number in range(CLASSES)]
FEATURES = FeatureConfig(frames=FRAMES, mean=-4.25, std=4.5, padding="zero")
FORMATS = {"ast": ("ast", "huggingface"), "audiomae": ("audiomae", "timm")}
CASES = [(family, format_) for family, formats in FORMATS.items() for format_ in formats]


def make(family, **arguments):
    defaults = {"embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": CLASSES, "frames": FRAMES}
    model = create_model(f"{family}_tiny", **defaults | {"prune_blocks": (1, 3)} | arguments).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + 0.1)
    return model


def save(model, path, format_, **changes):
    options = {} if format_ in ("ast", "audiomae") else {"features": FEATURES, "labels": LABELS, "multilabel": False}
    pruneattn.save_checkpoint(model, path, format=format_, **options | changes)


def read(path, format_):
    if format_ == "ast":
        return torch.load(path, weights_only=True)
    if format_ == "audiomae":
        return torch.load(path, weights_only=True)["model"]
    return load_file(path / "model.safetensors")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


# Round trips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "format_"), CASES)
def test_round_trip_from_our_model(tmp_path, family, format_):
    source, model = make(family), make(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save(source, tmp_path / "out", format_)
    report = pruneattn.load_checkpoint(model, tmp_path / "out")
    assert_same(model.state_dict(), source.state_dict())
    assert report.missing == report.notes == []
    heads = {"v.head.weight", "v.head.bias", "v.head_dist.weight", "v.head_dist.bias"}
    assert set(report.unused) == (heads if format_ == "ast" else set())


@pytest.mark.parametrize("format_", ["ast", "huggingface"])
@pytest.mark.parametrize("stride", [10, (10, 16), (16, 7)])
def test_round_trip_with_another_stride(tmp_path, format_, stride):
    source, model = make("ast", stride=stride), make("ast", stride=stride)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save(source, tmp_path / "out", format_)
    given = {"stride": stride} if format_ == "ast" else {}
    report = pruneattn.load_checkpoint(model, tmp_path / "out", **given)
    assert_same(model.state_dict(), source.state_dict())
    assert report.missing == report.notes == []
    if format_ == "huggingface":
        opened = pruneattn.load_pretrained(tmp_path / "out")
        assert (opened.stride, opened.frames) == (source.stride, FRAMES)
        assert_same(opened.state_dict(), source.state_dict())


def official_ast():
    deit = pytest.importorskip("timm.models.deit")
    module = torch.nn.Module()
    module.v = deit.VisionTransformerDistilled(
        img_size=(128, FRAMES), patch_size=16, in_chans=1, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, num_classes=1000
    )
    module.mlp_head = torch.nn.Sequential(torch.nn.LayerNorm(DIM), torch.nn.Linear(DIM, CLASSES))
    return torch.nn.DataParallel(module)  # as the official code loads its checkpoints


def hugging_face():
    transformers = pytest.importorskip("transformers")
    return transformers.ASTForAudioClassification(
        transformers.ASTConfig(
            hidden_size=DIM,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            intermediate_size=4 * DIM,
            frequency_stride=16,
            time_stride=16,
            max_length=FRAMES,
            num_labels=CLASSES,
        )
    )


def timm_vit():
    vit = pytest.importorskip("timm.models.vision_transformer")
    return vit.VisionTransformer(
        img_size=(FRAMES, 128),
        patch_size=16,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        global_pool="avg",
    )


def test_official_ast_round_trip(tmp_path):
    source = official_ast()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    torch.save(source.state_dict(), tmp_path / "theirs.pth")
    model = make("ast")
    pruneattn.load_checkpoint(model, tmp_path / "theirs.pth")
    save(model, tmp_path / "ours.pth", "ast")
    again = official_ast()
    again.load_state_dict(torch.load(tmp_path / "ours.pth", weights_only=True))  # strict
    expected = source.state_dict()
    for key in [key for key in expected if ".v.head" in key]:  # never used, so our model does not keep them
        expected[key] = torch.zeros_like(expected[key])
    assert_same(again.state_dict(), expected)
    assert list(torch.load(tmp_path / "ours.pth", weights_only=True).keys() ^ expected.keys()) == []


def test_hugging_face_round_trip(tmp_path):
    source = hugging_face()
    source.save_pretrained(tmp_path / "theirs")
    model = make("ast")
    pruneattn.load_checkpoint(model, tmp_path / "theirs")
    save(model, tmp_path / "ours", "huggingface")
    assert_same(read(tmp_path / "ours", "huggingface"), load_file(tmp_path / "theirs" / "model.safetensors"))


def test_timm_round_trip(tmp_path):
    source = timm_vit()
    save_file(source.state_dict(), tmp_path / "theirs.safetensors")
    model = make("audiomae")
    pruneattn.load_checkpoint(model, tmp_path / "theirs.safetensors")
    save(model, tmp_path / "ours", "timm")
    assert_same(read(tmp_path / "ours", "timm"), source.state_dict())


def test_audiomae_round_trip(tmp_path):
    state = make("audiomae").state_dict()  # the keys of AudioMAE's own files
    torch.save({"model": state, "epoch": 59}, tmp_path / "theirs.pth")
    model = make("audiomae")
    pruneattn.load_checkpoint(model, tmp_path / "theirs.pth")
    save(model, tmp_path / "ours.pth", "audiomae")
    assert_same(torch.load(tmp_path / "ours.pth", weights_only=True)["model"], state)


# Code of other projects on our files ---------------------------------------------------------------------------------


def fbank():
    return torch.randn(2, FRAMES, 128, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("stride", [16, 10, (10, 16)])
def test_transformers_opens_the_folder(tmp_path, stride):
    transformers = pytest.importorskip("transformers")
    model = make("ast", stride=stride)
    save(model, tmp_path, "huggingface", multilabel=True)
    theirs, info = transformers.ASTForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(theirs.eval()(fbank()).logits, model(fbank()), rtol=1e-4, atol=1e-4)
    config = theirs.config
    assert (config.frequency_stride, config.time_stride) == model.stride
    assert [config.id2label[number] for number in range(CLASSES)] == LABELS
    assert config.label2id == {label: number for number, label in enumerate(LABELS)}
    assert (config.problem_type, config.max_length, config.layer_norm_eps) == (
        "multi_label_classification",
        FRAMES,
        1e-6,
    )
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(extractor) is transformers.ASTFeatureExtractor
    assert FeatureConfig.from_hugging_face(extractor.to_dict()) == FEATURES
    save(model, tmp_path, "huggingface")  # over the older files
    assert json.loads((tmp_path / "config.json").read_text())["problem_type"] == "single_label_classification"


@torch.no_grad()
@pytest.mark.parametrize("multilabel", [True, False])
def test_pipeline_returns_our_scores(tmp_path, multilabel):
    transformers = pytest.importorskip("transformers")
    model = make("ast")
    model.head.weight *= 0.02  # different scores, none of them 0 or 1
    save(model, tmp_path, "huggingface", multilabel=multilabel)
    wave = torch.randn(20000, generator=torch.Generator().manual_seed(2)) * 0.1  # short: padded
    logits = model(pruneattn.data.FeatureExtractor(FEATURES)(wave[None]))[0]
    expected = logits.sigmoid() if multilabel else logits.softmax(0)
    classify = transformers.pipeline("audio-classification", str(tmp_path), device="cpu")
    # The pipeline of transformers 4 ignores problem_type.
    old = {"function_to_apply": "sigmoid"} if multilabel and int(transformers.__version__.split(".")[0]) < 5 else {}
    scores = {row["label"]: row["score"] for row in classify(wave.numpy(), top_k=CLASSES, **old)}
    assert [scores[label] for label in LABELS] == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.max() - expected.min() > 1e-3


@torch.no_grad()
def test_timm_opens_the_folder(tmp_path):
    timm = pytest.importorskip("timm")
    model = make("audiomae")
    save(model, tmp_path, "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(theirs(fbank().unsqueeze(1)), model(fbank()), rtol=1e-4, atol=1e-4)
    assert tuple(theirs.pretrained_cfg["mean"]) == (-4.25,) and tuple(theirs.pretrained_cfg["std"]) == (9.0,)
    assert list(theirs.pretrained_cfg["label_names"]) == LABELS


# Further properties of the files, and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("family", "format_"), CASES)
def test_half_precision_is_kept(tmp_path, family, format_, dtype):
    model = make(family).to(dtype)
    save(model, tmp_path / "out", format_)
    assert {tensor.dtype for tensor in read(tmp_path / "out", format_).values()} == {dtype}
    if format_ == "huggingface":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
        transformers = pytest.importorskip("transformers")
        loaded = transformers.ASTForAudioClassification.from_pretrained(tmp_path / "out", torch_dtype="auto")
        assert loaded.dtype == dtype


def test_an_opened_model_needs_no_arguments(tmp_path):
    save(make("ast"), tmp_path / "first", "huggingface", multilabel=True)
    model = pruneattn.load_pretrained(tmp_path / "first")
    pruneattn.save_checkpoint(model, tmp_path / "second", format="huggingface")
    for name in ("model.safetensors", "preprocessor_config.json", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_classes_without_labels_are_numbered(tmp_path):
    save(make("ast"), tmp_path, "huggingface", labels=None, multilabel=None)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"]["6"] == "LABEL_6" and "problem_type" not in config
    assert pruneattn.load_pretrained(tmp_path).multilabel is False


def test_an_optimized_model(tmp_path):
    model = make("ast")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(pruneattn.optimize_for_inference(model), tmp_path / "x.pth", "ast")
    again = make("ast")
    pruneattn.load_checkpoint(again, tmp_path / "x.pth")
    assert_same(again.state_dict(), expected)


def test_padding_that_hugging_face_does_not_support(tmp_path):
    other = FeatureConfig(frames=FRAMES, mean=-4.25, std=4.5, padding="min")
    with pytest.warns(UserWarning, match="pads short clips with 0.*fewer than 256 frames") as caught:
        save(make("ast"), tmp_path, "huggingface", features=other)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(make("audiomae"), tmp_path / "timm", "timm", features=other)


@pytest.mark.parametrize(
    ("family", "format_"), [("ast", "audiomae"), ("ast", "timm"), ("audiomae", "ast"), ("audiomae", "huggingface")]
)
def test_formats_of_the_other_family(tmp_path, family, format_):
    fitting = "' or '".join(FORMATS[family])
    with pytest.raises(UserError, match=f"'{format_}' cannot hold the weights of {family}_tiny; use '{fitting}'"):
        save(make(family), tmp_path / "out", format_)
    with pytest.raises(UserError, match="'onnx' is not one of ast, audiomae, huggingface, timm"):
        save(make(family), tmp_path / "out", "onnx")
    assert os.listdir(tmp_path) == []


def test_errors_write_nothing(tmp_path):
    with pytest.raises(UserError, match="'huggingface': pass features"):
        save(make("ast"), tmp_path / "out", "huggingface", features=None)
    with pytest.raises(ValueError, match="labels: expected 7 names"):
        save(make("ast"), tmp_path / "out", "huggingface", labels=["a"])
    with pytest.raises(ValueError, match="features: expected 256 frames"):
        save(make("audiomae"), tmp_path / "out", "timm", features=FeatureConfig(512, 0.0, 1.0))
    with pytest.raises(UserError, match="it is a folder; use the name of a file"):
        save(make("ast"), tmp_path, "ast")
    with pytest.raises(UserError, match="cannot write"):
        save(make("ast"), tmp_path / "absent" / "x.pth", "ast")
    assert os.listdir(tmp_path) == []
    (tmp_path / "config.json").write_text('{"epochs": 3}')
    with pytest.raises(UserError, match="contains another kind of config.json, for example of a training run"):
        save(make("ast"), tmp_path, "huggingface")
    for _ in range(2):  # over its own files
        save(make("audiomae"), tmp_path / "timm", "timm")
    with pytest.raises(UserError, match="another kind of config.json"):
        save(make("ast"), tmp_path / "timm", "huggingface")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "timm"]
