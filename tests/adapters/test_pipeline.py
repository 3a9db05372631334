"""pipeline("audio-classification") of transformers with pruned and optimized models, from folders."""

import pytest
import torch

import pruneattn
from pruneattn.models.optimize import can_pack

transformers = pytest.importorskip("transformers")

needs_onednn = pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="this PyTorch has no oneDNN")


@pytest.fixture(params=["ast", "whisper_classifier"])
def folder(request, make_subject, tmp_path):
    """Folder of a pruned model and its feature extractor."""
    subject = make_subject(request.param)
    pruneattn.prune(subject.model, 0.5, (1, 2)).save_pretrained(tmp_path)
    if request.param == "ast":
        extractor = transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=96)
    else:
        extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=400, hop_length=666)
    extractor.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def wave():
    return torch.randn(16000, generator=torch.Generator().manual_seed(0)).numpy()


def open_pipeline(folder, **arguments):
    return transformers.pipeline("audio-classification", model=str(folder), device="cpu", **arguments)


def probabilities(answers):
    """Probability of each label."""
    assert len(answers) == 5 and sum(answer["score"] for answer in answers) == pytest.approx(1, abs=2e-2)
    return torch.tensor([answer["score"] for answer in sorted(answers, key=lambda answer: answer["label"])])


def test_a_pruned_model_in_a_pipeline(folder, wave):
    pipe = open_pipeline(folder)
    dense = probabilities(pipe(wave))
    pruneattn.prune(pipe.model, **pipe.model.config.pruneattn)
    pruned = probabilities(pipe(wave))
    assert not torch.equal(pruned, dense)
    model, inputs = pipe.model, pipe.feature_extractor(wave, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(pruned, model(**inputs).logits[0].softmax(-1))
    pruneattn.set_keep_rate(pipe.model, 1.0)
    assert torch.equal(probabilities(pipe(wave)), dense)


@needs_onednn
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_optimized_model_in_a_pipeline(folder, wave, dtype):
    if dtype is not None and not can_pack(torch.zeros(1, 1, dtype=dtype)):
        pytest.skip("oneDNN has no bfloat16 on this machine")
    pipe = open_pipeline(folder)
    expected = []
    for pruned in (False, True):
        if pruned:
            pruneattn.prune(pipe.model, **pipe.model.config.pruneattn)
        expected.append(probabilities(pipe(wave)))
    again = open_pipeline(folder)
    pruneattn.optimize_for_inference(again.model, dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is None else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(probabilities(again(wave)), expected[0], **tolerance)
    pruneattn.prune(again.model, **again.model.config.pruneattn)
    if dtype is None:  # bfloat16 can rank patches of a model with random weights differently
        torch.testing.assert_close(probabilities(again(wave)), expected[1], **tolerance)
    assert [len(answers) for answers in again([wave, wave[:8000]], batch_size=2)] == [5, 5]
    pipe = transformers.pipeline(  # a model in memory, as from_pretrained and optimize_for_inference return it
        "audio-classification", model=again.model, feature_extractor=again.feature_extractor, device="cpu"
    )
    assert pipe(wave) == again(wave)
