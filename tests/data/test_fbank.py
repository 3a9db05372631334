import math

import numpy as np
import pytest
import torch

from pruneattn.data import fbank as module
from pruneattn.data import find_audio, load_audio
from pruneattn.data.fbank import LOG_FLOOR, FeatureConfig, FeatureExtractor, kaldi_fbank, samples_for
from pruneattn.errors import UserError


def by_definition(wave):
    """The filterbank of one clip by its definition, step by step, in float64: ``[frames, 128]``."""
    wave = np.asarray(wave, np.float64)
    wave = wave - wave.mean()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)

    def to_mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    edges = np.linspace(to_mel(20.0), to_mel(8000.0), 130)
    bins = to_mel(np.arange(257) * 16000 / 512)
    rows = []
    for start in range(0, len(wave) - 399, 160):
        x = wave[start : start + 400] - wave[start : start + 400].mean()
        x = x - 0.97 * np.concatenate([x[:1], x[:-1]])
        power = np.abs(np.fft.rfft(x * window, 512)) ** 2
        row = []
        for left, centre, right in zip(edges, edges[1:], edges[2:]):
            weight = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clip(0)
            weight[256] = 0
            row.append(np.log(max(weight @ power, 2.0**-23)))
        rows.append(row)
    return np.array(rows)


def signals():
    torch.manual_seed(0)
    time = torch.arange(16000) / 16000
    return {
        "noise": torch.randn(16000) * 0.1,
        "chirp": 0.5 * torch.sin(2 * math.pi * (100 * time + 3000 * time**2)) + 0.01 * torch.randn(16000),
        "quiet": torch.randn(12345) * 1e-4 + 0.3,
        "silence": torch.zeros(4000),
        "offset": torch.full((4000,), 0.25),
        "shortest": torch.randn(400),
    }


def pad(clips, value=0.0):
    lengths = torch.tensor([len(clip) for clip in clips])
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=value), lengths


def real_clips(root):
    paths = find_audio(root / "esc10")[::25] + find_audio(root / "speech_commands_ar")[::250]
    return [load_audio(path) for path in paths]


@pytest.mark.parametrize("name", signals())
def test_equals_its_definition(name):
    wave = signals()[name]
    log_mel, frames = kaldi_fbank(wave[None])
    expected = by_definition(wave)
    assert log_mel.dtype == torch.float32 and log_mel.shape == (1, len(expected), 128)
    assert frames.tolist() == [1 + (len(wave) - 400) // 160]
    difference = np.abs(log_mel[0].numpy() - expected)
    # The filters' float32 rounding is part of the features: the lowest filters have one small weight each.
    assert difference.max() < 5e-3 and difference.mean() < 5e-5


def torchaudio_fbank(wave):
    kaldi = pytest.importorskip("torchaudio.compliance.kaldi")
    return kaldi.fbank(
        (wave - wave.mean())[None],
        htk_compat=True,
        sample_frequency=16000,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )


def assert_equals_torchaudio(clips):
    batch, frames = kaldi_fbank(*pad(clips))
    for log_mel, count, wave in zip(batch, frames, clips):
        expected = torchaudio_fbank(wave)
        difference = (log_mel[:count] - expected).abs()
        assert count == len(expected)
        assert difference.max() < 2e-3 and difference.mean() < 1e-5
    return batch, frames


def test_equals_torchaudio():
    assert_equals_torchaudio([*signals().values(), torch.rand(80000) * 2 - 1, torch.sin(0.3 * torch.arange(16000))])


def test_equals_torchaudio_on_real_clips(real_audio):
    clips = real_clips(real_audio)
    assert len(clips) == 16 + 48
    batch, frames = assert_equals_torchaudio(clips)
    # The paper's code pads with the minimum of the clip, which is the same constant for all clips.
    minima = torch.stack([log_mel[:count].min() for log_mel, count in zip(batch, frames)])
    assert (minima == torch.tensor(LOG_FLOOR, dtype=torch.float32)).all()


def test_one_filter_is_empty():
    filters = module._mel_filters(torch.device("cpu"))
    assert filters.shape == (257, 128)
    assert (filters.sum(0) == 0).nonzero().flatten().tolist() == [3]
    assert (filters[256] == 0).all() and (filters[0] == 0).all()
    assert pytest.approx(-15.942385, abs=1e-6) == LOG_FLOOR


@pytest.mark.parametrize("padding", [0.0, 7.0, math.nan])
def test_a_batch_equals_its_clips_one_by_one(padding):
    clips = list(signals().values())
    batch, frames = kaldi_fbank(*pad(clips, padding))
    assert frames.tolist() == [98, 98, 75, 23, 23, 1]
    for clip, log_mel, count in zip(clips, batch, frames):
        torch.testing.assert_close(log_mel[:count], kaldi_fbank(clip[None])[0][0], rtol=0, atol=2e-3)
        assert (log_mel[count:] == torch.tensor(LOG_FLOOR, dtype=torch.float32)).all()


def test_chunks_do_not_change_the_result(monkeypatch):
    waves, lengths = pad(list(signals().values()))
    expected, _ = kaldi_fbank(waves, lengths)
    for chunk in (1, 50, 10**6):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        torch.testing.assert_close(kaldi_fbank(waves, lengths)[0], expected, rtol=0, atol=2e-3)


def test_frames_and_samples():
    assert [samples_for(frames) for frames in (1, 98, 998)] == [400, 15920, 159920]
    for samples, frames in [(400, 1), (559, 1), (560, 2), (16000, 98), (80000, 498), (160000, 998)]:
        assert kaldi_fbank(torch.randn(1, samples))[0].shape[1] == frames


@pytest.mark.parametrize("padding, fill", [("min", LOG_FLOOR), ("zero", 0.0)])
@pytest.mark.parametrize("frames", [64, 128])
def test_extractor_cuts_pads_and_normalizes(padding, fill, frames):
    clips = [signals()["noise"], signals()["quiet"][:3000] * 1000]
    features = FeatureExtractor(FeatureConfig(frames, mean=-5.0, std=3.0, padding=padding))(*pad(clips))
    assert features.shape == (2, frames, 128) and features.dtype == torch.float32
    for clip, row in zip(clips, features):
        raw = torch.full((frames, 128), fill)
        # The subtracted mean is that of the whole clip, also if the clip is cut.
        log_mel = kaldi_fbank(clip[None])[0][0][:frames]
        raw[: len(log_mel)] = log_mel
        torch.testing.assert_close(row, (raw + 5.0) / 6.0, rtol=0, atol=1e-4)


def test_extractor_is_float32_under_autocast_and_low_matmul_precision():
    extractor = FeatureExtractor(FeatureConfig(128, -6.0, 4.0))
    waves = torch.stack([signals()["noise"], signals()["chirp"]])
    expected = extractor(waves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(extractor(waves), expected, rtol=0, atol=0)
    torch.testing.assert_close(extractor(waves.double()), expected, rtol=0, atol=0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.testing.assert_close(extractor(waves), expected, rtol=0, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)
    with pytest.raises(TypeError, match="float32"):
        FeatureExtractor(extractor.config).bfloat16()(waves)


def test_extractor_compiles_in_one_graph():
    extractor = FeatureExtractor(FeatureConfig(128, -6.0, 4.0))
    compiled = torch.compile(extractor, backend="eager", fullgraph=True)
    waves, lengths = pad([signals()["noise"], signals()["quiet"]])
    torch.testing.assert_close(compiled(waves, lengths), extractor(waves, lengths), rtol=0, atol=1e-3)


def test_extractor_is_not_saved_and_passes_gradients():
    extractor = FeatureExtractor(FeatureConfig(16, -6.0, 4.0))
    assert not extractor.state_dict()
    wave = torch.randn(1, 3000, requires_grad=True)
    extractor(wave).sum().backward()
    assert wave.grad.isfinite().all() and wave.grad.abs().sum() > 0


def test_tables_made_in_inference_mode_work_outside_it():
    for table in (module._hanning, module._mel_filters):
        table.cache_clear()
    with torch.inference_mode():
        kaldi_fbank(torch.randn(1, 400))
    wave = torch.randn(1, 400, requires_grad=True)
    kaldi_fbank(wave)[0].sum().backward()
    assert wave.grad.isfinite().all()


def test_config_round_trip_and_errors():
    config = FeatureConfig(1024, -4.2677393, 4.5689974, "zero")
    assert FeatureConfig.from_dict(config.to_dict()) == config
    assert config.to_dict() == dict(frames=1024, mean=-4.2677393, std=4.5689974, padding="zero")
    for bad in (dict(frames=0), dict(std=0.0), dict(std=math.nan), dict(mean=math.inf), dict(padding="edge")):
        with pytest.raises(UserError, match=next(iter(bad))):
            FeatureConfig(**{**config.to_dict(), **bad})


def test_bad_waves_are_rejected():
    with pytest.raises(UserError, match=r"10\.0 ms is too short: at least 25 ms are needed"):
        kaldi_fbank(torch.randn(2, 1000), torch.tensor([1000, 160]))
    with pytest.raises(UserError, match="too short"):
        FeatureExtractor(FeatureConfig(128, 0.0, 1.0))(torch.randn(1, 399))
    with pytest.raises(ValueError, match="waves"):
        kaldi_fbank(torch.randn(1000))
    with pytest.raises(ValueError, match="waves"):
        kaldi_fbank(torch.ones(1, 1000, dtype=torch.int16))
    with pytest.raises(ValueError, match="lengths"):
        kaldi_fbank(torch.randn(2, 1000), torch.tensor([1000]))
    with pytest.raises(ValueError, match="lengths: 1001 is more"):
        kaldi_fbank(torch.randn(1, 1000), torch.tensor([1001]))


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_equals_cpu():
    waves, lengths = pad(list(signals().values()))
    extractor = FeatureExtractor(FeatureConfig(128, -6.0, 4.0))
    expected = extractor(waves, lengths)
    extractor = extractor.cuda()
    for count in (lengths, lengths.cuda()):
        difference = (extractor(waves.cuda(), count).cpu() - expected).abs()
        assert difference.max() < 1e-3 and difference.mean() < 1e-5
