"""Hugging Face's AST, opened through the files next to its weights, and its feature extractor with our model."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pruneattn
from pruneattn.data import FeatureConfig, FeatureExtractor
from pruneattn.data.decode import load_audio
from pruneattn.errors import UserError

# From transformers' filterbank: one of the 128 filters is empty with these settings.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
LABELS = ["dog", "näher", "rain, heavy"]
SIZES = {"embed_dim": 48, "depth": 5, "num_heads": 3, "num_classes": 3, "prune_blocks": (3,), "frames": 128}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def hugging_face(transformers):
    """``hugging_face(folder, **config)``: a small model saved there by transformers, with its feature extractor."""

    def save(folder, mean=-4.25, std=4.5, extractor=True, **config):
        torch.manual_seed(0)
        defaults = {
            "hidden_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 3,
            "intermediate_size": 192,
            "frequency_stride": 16,
            "time_stride": 16,
            "max_length": 128,
            "layer_norm_eps": 1e-6,
            "initializer_range": 0.2,
            "id2label": dict(enumerate(LABELS)),
        }
        config = transformers.ASTConfig(**defaults | config)
        model = transformers.ASTForAudioClassification(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        if extractor:
            transformers.ASTFeatureExtractor(max_length=config.max_length, mean=mean, std=std).save_pretrained(folder)
        return model

    return save


def exact_eps(theirs):
    """Set the head's eps of the official AST, which transformers cannot express."""
    theirs.classifier.layernorm.eps = 1e-5
    return theirs


def difference(actual, expected):
    """Largest difference relative to the root mean square of the expected values."""
    return ((actual - expected).abs().max() / expected.square().mean().sqrt()).item()


@torch.no_grad()
@pytest.mark.parametrize(("frames", "stride"), [(128, 16), (250, 16), (250, 10), (123, (10, 16)), (100, (16, 7))])
def test_a_folder_opens_by_its_config(tmp_path, hugging_face, frames, stride):
    """The model has the stride and the frames of the folder, so its positions and its logits are the same."""
    steps = stride if isinstance(stride, tuple) else (stride, stride)
    config = {"max_length": frames, "frequency_stride": steps[0], "time_stride": steps[1]}
    theirs = exact_eps(hugging_face(tmp_path, problem_type="multi_label_classification", **config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = pruneattn.load_pretrained(tmp_path)
    assert (model.stride, model.frames) == (steps, frames)
    assert torch.equal(model.pos_embed, theirs.audio_spectrogram_transformer.embeddings.position_embeddings)
    fbank = torch.randn(2, frames, 128)
    assert difference(model(fbank), theirs(fbank).logits) < 1e-5
    assert model.features == FeatureConfig(frames, -4.25, 4.5, "zero")
    assert (model.labels, model.multilabel, model.extra) == (LABELS, True, {})
    assert model.keep_rates == (1.0,) and model.prune_blocks == (3,) and not model.training
    model.set_keep_rate(0.5)
    pruneattn.save_pretrained(
        model, tmp_path / "own", features=model.features, labels=model.labels, multilabel=model.multilabel
    )
    again = pruneattn.load_pretrained(tmp_path / "own")
    assert again.config == model.config and torch.equal(again(fbank), model(fbank))


@torch.no_grad()
@pytest.mark.parametrize("stride", [10, (10, 16)])
@pytest.mark.parametrize("keep_rate", [0.7, 0.5])
def test_a_pruned_folder_equals_the_direct_implementation(tmp_path, hugging_face, load_file, stride, keep_rate):
    steps = stride if isinstance(stride, tuple) else (stride, stride)
    pruning = {"keep_rate": keep_rate, "blocks": [1, 3], "score": "cls"}
    hugging_face(tmp_path, max_length=90, frequency_stride=steps[0], time_stride=steps[1], pruneattn=pruning)
    model = pruneattn.load_pretrained(tmp_path)
    eager = load_file(Path(__file__).parents[1] / "models" / "eager.py")
    fbank = torch.randn(2, 90, 128)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    rates = {"keep_rates": (keep_rate, keep_rate), "prune_blocks": (1, 3)}
    expected, kept, _ = eager.run(state, fbank.double(), eager.AST, heads=3, stride=steps, **rates)
    trace = pruneattn.trace(model, fbank)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(trace.kept, kept, strict=True))
    assert difference(model(fbank).double(), expected) < 1e-5


@torch.no_grad()
def test_a_folder_keeps_its_pruning(tmp_path, transformers, make_model):
    ours = make_model("ast", keep_rate=(0.7, 0.5), prune_blocks=(1, 2), score="column_mean", num_classes=len(LABELS))
    about = {"features": FeatureConfig(128, -4.25, 4.5, "zero"), "labels": LABELS, "multilabel": False}
    fbank = torch.randn(2, 128, 128)
    pruneattn.save_checkpoint(ours, tmp_path, format="huggingface", **about)
    back = pruneattn.load_pretrained(tmp_path)
    assert (back.prune_blocks, back.keep_rates, back.score) == ((1, 2), (0.7, 0.5), "column_mean")
    torch.testing.assert_close(back(fbank), ours(fbank))
    theirs = transformers.ASTForAudioClassification.from_pretrained(tmp_path).eval()
    pruneattn.prune(theirs, **theirs.config.pruneattn)
    torch.testing.assert_close(theirs(fbank).logits, ours(fbank), rtol=1e-4, atol=1e-4)


def test_an_invalid_pruning_is_rejected(tmp_path, hugging_face):
    hugging_face(tmp_path, pruneattn={"keep_rate": 2.0, "blocks": [1], "score": "cls"})
    with pytest.raises(UserError, match="config.json: .*keep_rate: must be above 0"):
        pruneattn.load_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("name", ["blocks", "prune_blocks"])
def test_both_names_of_the_pruning_blocks(tmp_path, transformers, hugging_face, name):
    """Files hold ``blocks``, which every version of pruneattn reads."""
    pruning = {"keep_rate": [0.7, 0.5], name: [1, 2], "score": "column_mean"}
    hugging_face(tmp_path, pruneattn=pruning)
    model = pruneattn.load_pretrained(tmp_path)
    assert (model.prune_blocks, model.keep_rates, model.score) == ((1, 2), (0.7, 0.5), "column_mean")
    theirs = transformers.ASTForAudioClassification.from_pretrained(tmp_path).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruneattn.prune(theirs, **theirs.config.pruneattn)
    fbank = torch.randn(2, 128, 128)
    torch.testing.assert_close(theirs(fbank).logits, model(fbank), rtol=1e-4, atol=1e-4)
    pruneattn.save_checkpoint(model, tmp_path / "again", format="huggingface")
    config = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert config["pruneattn"] == {"keep_rate": [0.7, 0.5], "blocks": [1, 2], "score": "column_mean"}


def test_two_names_with_different_pruning_blocks_are_rejected(tmp_path, hugging_face):
    hugging_face(tmp_path, pruneattn={"keep_rate": 0.5, "blocks": [1], "prune_blocks": [2]})
    with pytest.raises(UserError, match=r"prune_blocks is \[2\] and blocks, its other name, is \[1\]"):
        pruneattn.load_pretrained(tmp_path)
    hugging_face(tmp_path, pruneattn={"keep_rate": 0.5, "blocks": [1], "prune_blocks": [1]})
    assert pruneattn.load_pretrained(tmp_path).prune_blocks == (1,)


def test_sizes_get_their_names(tmp_path, hugging_face):
    hugging_face(tmp_path, hidden_size=192, num_hidden_layers=12, intermediate_size=768)
    model = pruneattn.load_pretrained(tmp_path / "model.safetensors")
    assert (model.name, model.num_heads, model.prune_blocks) == ("ast_tiny", 3, (3, 6, 9))


def test_defaults_that_a_config_leaves_out(tmp_path, hugging_face):
    """transformers writes no ``id2label`` for its two default labels, and no ``problem_type``."""
    hugging_face(tmp_path, id2label={0: "LABEL_0", 1: "LABEL_1"})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in ("id2label", "label2id")}))
    (tmp_path / "preprocessor_config.json").write_text('{"max_length": 128}')
    model = pruneattn.load_pretrained(tmp_path)
    assert model.labels == ["LABEL_0", "LABEL_1"] and model.multilabel is False
    assert model.features == FeatureConfig(128, -4.2677393, 4.5689974, "zero")


@torch.no_grad()
def test_positions_are_resampled_on_request_only(tmp_path, hugging_face):
    theirs = hugging_face(tmp_path, frequency_stride=10, time_stride=10, max_length=200)
    table = theirs.audio_spectrogram_transformer.embeddings.position_embeddings[0, 2:].reshape(12, 19, 48)
    message = r"12 x 19 positions resampled to 8 x 12 of stride 16; .* \(--stride 10\) keeps its positions"
    with pytest.warns(UserWarning, match=message) as caught:
        model = pruneattn.load_pretrained(tmp_path, stride=16)
    assert caught[0].filename == __file__
    assert (model.stride, model.frames, model.pos_embed.shape) == ((16, 16), 200, (1, 98, 48))
    torch.testing.assert_close(model.pos_embed[0, 2:].reshape(8, 12, 48)[5, 5], table[8, 8])  # 1.6 times 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pruneattn.load_pretrained(tmp_path, stride=(10, 10)).num_patches == 12 * 19
    with pytest.warns(UserWarning, match="12 x 19 positions resampled to 12 x 12 of stride 10,16"):
        assert pruneattn.load_pretrained(tmp_path, stride=(10, 16)).stride == (10, 16)


def test_the_config_determines_the_grid_of_the_positions(tmp_path, hugging_face):
    """12 x 50 positions of stride 10 are as many as 8 x 75 of stride 16."""
    hugging_face(tmp_path, max_length=1200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = pruneattn.load_pretrained(tmp_path)
        assert (model.frames, model.stride) == (1200, (16, 16))
        pruneattn.load_checkpoint(model, tmp_path)
    shorter = pruneattn.create_model("ast_tiny", **{**SIZES, "frames": 512})
    report = pruneattn.load_checkpoint(shorter, tmp_path)  # by its size, it would have stride 10
    assert report.notes == ["positions: center crop of 75 time columns to 32"]


# Mean and standard deviation -----------------------------------------------------------------------------------------


AUDIOSET = {number: {0: "Speech", 137: "Music"}.get(number, f"sound {number}") for number in range(527)}


def test_audioset_labels_get_the_statistics_of_audioset(tmp_path, hugging_face):
    hugging_face(tmp_path, extractor=False, id2label=AUDIOSET, max_length=100)
    with pytest.warns(UserWarning, match="preprocessor_config.json: no such file; the labels are AudioSet's") as caught:
        model = pruneattn.load_pretrained(tmp_path)
    assert caught[0].filename == __file__
    assert model.features == FeatureConfig(100, -4.2677393, 4.5689974, "zero")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pruneattn.load_pretrained(tmp_path, mean=-5.0, std=3.0).features == FeatureConfig(100, -5, 3, "zero")


@pytest.mark.parametrize("labels", [dict(enumerate(LABELS)), AUDIOSET | {137: "Speech, music"}, {**AUDIOSET, 527: "x"}])
def test_other_labels_need_statistics(tmp_path, hugging_face, labels):
    hugging_face(tmp_path, extractor=False, id2label=labels)
    for given in ({}, {"mean": -4.0}, {"std": 3.0}):
        with pytest.raises(UserError, match=r"preprocessor_config.json: no such file.*pass both \(--mean, --std\)"):
            pruneattn.load_pretrained(tmp_path, **given)
    model = pruneattn.load_pretrained(tmp_path, mean=-4.0, std=3.0)
    assert model.features == FeatureConfig(128, -4.0, 3.0, "zero")


@pytest.mark.parametrize("given", [{"mean": -4.25, "std": 4.5}, {"std": 4.5}])
def test_statistics_are_rejected_if_the_folder_has_its_own(tmp_path, hugging_face, given):
    hugging_face(tmp_path)
    with pytest.raises(UserError, match=r"applies only with model \(--model\).*without preprocessor_config.json"):
        pruneattn.load_pretrained(tmp_path, **given)


# Errors --------------------------------------------------------------------------------------------------------------


def change(**values):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def extractor(text):
    return lambda folder: (folder / "preprocessor_config.json").write_text(text)


REJECTED = {
    "stride": (change(time_stride=17), r"config.json: stride: expected a whole number from 1 to 16.*\(16, 17\)"),
    "grid": (change(time_stride=10), "64 patches, but config.json describes 8 x 12; use the files of one model"),
    "frames": (change(max_length=256), "config.json it is 256"),
    "short": (change(max_length=8), "frames: must be at least 16"),
    "patches": (change(patch_size=8), "patch_size is 8, not 16"),
    "activation": (change(hidden_act="gelu_new"), "hidden_act is 'gelu_new'"),
    "mlp": (change(intermediate_size=96), "intermediate_size is 96, not 192"),
    "bias": (change(qkv_bias=False), "qkv_bias is False"),
    "mel": (change(num_mel_bins=64), "num_mel_bins is 64"),
    "heads": (change(num_attention_heads=5), "num_heads: 5 does not divide"),
    "labels": (change(id2label={"1": "a", "3": "b"}), "config.json: pruneattn cannot build this AST"),
    "width": (change(hidden_size=None), "config.json: pruneattn cannot build this AST"),
    "classes": (change(id2label={"0": "a"}), "lacks head.*: 3 classes in the file and 1 in the model"),
    "depth": (change(num_hidden_layers=4), "embed_dim 48 and depth 5"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "holds a list, not a configuration"),
    "pruning": (change(pruneattn=None), "config.json: pruneattn cannot build this AST"),
    "another model": (change(model_type="wav2vec2"), "not a model that pruneattn saved.*not next to a config.json"),
    "no extractor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        "preprocessor_config.json: no such file, so mean and std of the model's input are unknown",
    ),
    "extractor": (
        extractor('{"feature_extractor_type": "Wav2Vec2FeatureExtractor"}'),
        "preprocessor_config.json: feature_extractor_type",
    ),
    "rate": (extractor('{"sampling_rate": 8000}'), "sampling_rate: expected 16000, got 8000"),
    "length": (extractor('{"max_length": 1024}'), "max_length is 1024, and in config.json it is 128"),
    "std": (extractor('{"max_length": 128, "std": 0}'), "preprocessor_config.json: .*std"),
    "mean": (extractor('{"max_length": 128, "mean": null}'), "preprocessor_config.json: "),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_folders(tmp_path, hugging_face, case):
    spoil, message = REJECTED[case]
    hugging_face(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        pruneattn.load_pretrained(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_a_trunk_without_a_head(tmp_path, hugging_face, transformers):
    hugging_face(tmp_path).audio_spectrogram_transformer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lacks head.*never fine-tuned"):
        pruneattn.load_pretrained(tmp_path)


# ASTFeatureExtractor -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["torchaudio", "numpy"])
def extract(request, transformers, monkeypatch):
    """``extract(wave, **options)`` with each of the extractor's two backends: torchaudio, or numpy without it."""
    if request.param == "torchaudio":
        pytest.importorskip("torchaudio")
    module = pytest.importorskip(
        "transformers.models.audio_spectrogram_transformer.feature_extraction_audio_spectrogram_transformer"
    )
    monkeypatch.setattr(module, "is_speech_available", lambda: request.param == "torchaudio")

    def run(wave, **options):
        extractor = transformers.ASTFeatureExtractor(**options)
        assert hasattr(extractor, "mel_filters") == (request.param == "numpy")
        values = extractor(wave.numpy(), sampling_rate=16000, return_tensors="np")["input_values"]
        return torch.from_numpy(np.asarray(values)).float(), FeatureConfig.from_hugging_face(extractor.to_dict())

    return run


@pytest.fixture
def waves(real_audio):
    """Clips of 5 s and of about 1 s."""
    esc = sorted((real_audio / "esc10" / "audio").glob("*.flac"))[::80]
    speech = sorted((real_audio / "speech_commands_ar" / "audio").rglob("*.ogg"))[::2400]
    assert len(esc) == len(speech) == 5
    return [load_audio(path) for path in esc + speech]


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 1024},  # pads
        {"max_length": 64, "mean": -6.85, "std": 5.57},  # cuts
        {"max_length": 512, "do_normalize": False},
        {"max_length": 250},  # not a multiple of a patch
    ],
)
def test_its_features_equal_ours(extract, waves, options):
    """On 150 clips, log-mels differ by at most 3.2e-3 (torchaudio) and 3.9e-3 (numpy), in bins near silence. This
    package subtracts the mean of the clip first, transformers only the mean of each frame.
    """
    for wave in waves:
        theirs, config = extract(wave, **options)
        ours = FeatureExtractor(config)(wave[None])
        assert ours.shape == theirs.shape == (1, options["max_length"], 128)
        torch.testing.assert_close(2 * config.std * ours, 2 * config.std * theirs, rtol=0, atol=5e-3)


@pytest.mark.parametrize(("frames", "stride"), [(512, 16), (500, 10)])
def test_its_features_go_into_our_model(tmp_path, hugging_face, extract, waves, frames, stride):
    theirs = hugging_face(tmp_path, max_length=frames, frequency_stride=stride, time_stride=stride)
    model = pruneattn.load_pretrained(tmp_path)
    logits = []
    for wave in waves:
        values, _ = extract(wave, max_length=frames, mean=-4.25, std=4.5)
        with torch.no_grad():
            expected = theirs(values).logits
            torch.testing.assert_close(model(values), expected, rtol=1e-4, atol=1e-4)
            ours = model(FeatureExtractor(model.features)(wave[None]))
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
        logits.append(expected)
    assert torch.cat(logits).std(0).min() > 0.01  # the logits depend on the clip, so the comparison is meaningful


def test_configs_go_both_ways():
    config = FeatureConfig(frames=256, mean=-4.25, std=4.5, padding="zero")
    assert FeatureConfig.from_hugging_face(config.to_hugging_face()) == config
    smallest = replace(config, padding="min")
    assert FeatureConfig.from_hugging_face(smallest.to_hugging_face()) == config  # Hugging Face has no other padding
    raw = FeatureConfig.from_hugging_face({"do_normalize": False, "max_length": 64})
    assert (raw.mean, 2 * raw.std) == (0.0, 1.0)
