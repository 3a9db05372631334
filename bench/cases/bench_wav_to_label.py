"""Sound files to labels: decoding, filterbank and model together, and decoding and filterbank separately."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

from bench.harness import peers
from bench.harness.case import Provider, Work, left_out
from bench.harness.guards import check_close
from bench.harness.machine import version
from bench.harness.subject import Subject, call_at_keep_rate
from pruneattn.constants import AUDIOSET_MEAN, AUDIOSET_STD, HOP, MEL_BINS, SAMPLE_RATE
from pruneattn.data import FeatureConfig, FeatureExtractor, load_audio
from pruneattn.data.fbank import samples_for

LEVELS = ("wav to label",)

#: AudioSet's normalization, and the padding of Hugging Face.
MEAN, STD, PADDING = AUDIOSET_MEAN, AUDIOSET_STD, "zero"


class Files:
    """Sound files (16 bit, 16 kHz, noise and pulsed tones) that are two frames shorter than a model's input."""

    def __init__(self, case, frames, folder):
        rng = np.random.default_rng(0)
        time = np.arange(samples_for(frames - 2)) / SAMPLE_RATE
        self.paths = [Path(folder, f"{number}.wav") for number in range(case.batch)]
        for path in self.paths:
            tone = np.sin(2 * np.pi * rng.uniform(200, 4000) * time) * (np.sin(2 * np.pi * 3 * time) > 0)
            soundfile.write(path, 0.1 * tone + 0.01 * rng.standard_normal(len(time)), SAMPLE_RATE, subtype="PCM_16")
        self.device = case.device
        self.features = FeatureExtractor(FeatureConfig(frames, MEAN, STD, PADDING)).to(case.device)

    def decode(self):
        """Waves ``[B, L]`` on the device."""
        return torch.stack([load_audio(path) for path in self.paths]).to(self.device)

    def torchaudio_fbank(self):
        """Normalized log-mel ``[B, frames, 128]`` as in the published pipelines: clip by clip on the CPU."""
        from torchaudio.compliance import kaldi

        clips = []
        for path in self.paths:
            wave = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
            log_mel = kaldi.fbank(
                (wave - wave.mean())[None],
                htk_compat=True,
                sample_frequency=SAMPLE_RATE,
                use_energy=False,
                window_type="hanning",
                num_mel_bins=MEL_BINS,
                dither=0.0,
                frame_shift=1000 * HOP / SAMPLE_RATE,
            )
            clips.append(torch.nn.functional.pad(log_mel, (0, 0, 0, self.features.config.frames - len(log_mel))))
        return ((torch.stack(clips) - MEAN) / (2 * STD)).to(self.device)


def providers(case, sizes, folder):
    subject = Subject(case)
    files = Files(case, subject.model.frames, folder)
    waves = files.decode()
    with torch.inference_mode():
        subject.use_input(files.features(waves))
    yield from _parts(subject, files, waves)
    for rate in sizes.keep_rates:
        call = partial(
            _labels, subject, lambda: files.features(files.decode()), partial(call_at_keep_rate, subject.fast, rate)
        )
        yield Provider("ours", call, subject.check(rate), subject.fast_backend, rate, subject.work(rate))
    yield from _published(subject, files, sizes)


def _labels(subject, features, model):
    return model(features().to(subject.case.torch_dtype))


def _parts(subject, files, waves):
    """Decoding and filterbank, each separately. (The rows of level "model" are the model only.)"""
    read = sum(path.stat().st_size for path in files.paths)
    decoding = partial(check_close, "samples", expected=waves, tolerance=0)
    work = Work(bytes=read + waves.numel() * waves.element_size())
    yield Provider("ours", files.decode, lambda result: decoding(result=result), part="decoding", work=work)
    filterbank = partial(check_close, "log-mels", expected=subject.fbank, tolerance=0)
    work = Work(bytes=(waves.numel() + subject.fbank.numel()) * 4)
    extract = partial(files.features, waves)
    yield Provider("ours", extract, lambda result: filterbank(result=result), part="filterbank", work=work)


def _published(subject, files, sizes):
    """torchaudio's filterbank, clip by clip, with the paper's method and with the other library's model."""
    if version("torchaudio") is None:
        yield left_out(f"torchaudio + {peers.PAPER}", "torchaudio is not installed: pip install 'pruneattn[audio]'")
        return
    for rate in (1.0, *sizes.peer_rates):
        model = peers.PapersViT(subject.plain, rate)
        call = partial(_labels, subject, files.torchaudio_fbank, model)
        yield _other(f"torchaudio + {peers.PAPER}", call, subject, rate, model.macs())
    name, make = peers.library_model(subject.model)
    if peers.why_not(name):
        yield left_out(f"torchaudio + {name}", peers.why_not(name))
    else:
        call = partial(_labels, subject, files.torchaudio_fbank, make(subject.plain))
        yield _other(f"torchaudio + {name}", call, subject, 1.0, None)


def _other(name, call, subject, rate, macs):
    # Their log-mels differ from ours by about 1e-5, so the logits can be checked against the reference.
    return Provider(name, call, subject.check(rate), "eager", rate, subject.work(rate, macs_computed=macs))


def test_wav_to_label(measure, case, sizes):
    with tempfile.TemporaryDirectory() as folder:
        measure(case, list(providers(case, sizes, folder)))
