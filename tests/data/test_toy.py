import numpy as np
import torch

from pruneattn.data import DATASETS, load_dataset, make_loader
from pruneattn.data.fbank import kaldi_fbank
from pruneattn.data.toy import KINDS, make_sound


def test_sizes_and_labels():
    sizes = {split: len(load_dataset("toy", split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 2000, "val": 400, "test": 400}
    dataset = load_dataset("toy", "val")
    counts = sum(dataset[i]["target"] for i in range(len(dataset)))
    assert counts.tolist() == [40.0] * 10 and len(dataset.labels) == DATASETS["toy"].num_classes
    assert not dataset.multilabel and dataset.missing == []


def test_the_same_seed_gives_the_same_clips():
    a, b = load_dataset("toy", seed=1), load_dataset("toy", seed=1)
    assert torch.equal(a[7]["wave"], b[7]["wave"])
    others = [load_dataset("toy", seed=2)[7], load_dataset("toy", "val", seed=1)[7], a[17]]
    assert not any(len(a[7]["wave"]) == len(o["wave"]) and torch.equal(a[7]["wave"], o["wave"]) for o in others)


def test_cut_and_cache():
    plain, cut = load_dataset("toy", "val"), load_dataset("toy", "val", frames=64, cache=True)
    assert len(cut[3]["wave"]) == 63 * 160 + 400 or len(cut[3]["wave"]) == len(plain[3]["wave"])
    assert torch.equal(cut[3]["wave"], plain[3]["wave"][: 63 * 160 + 400])


def test_every_kind_is_an_event_within_faint_noise():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for _ in range(5):
            wave = make_sound(kind, rng)
            assert wave.dtype == np.float32 and 8000 <= len(wave) <= 16000 and np.abs(wave).max() <= 1
            # Loud and quiet tenths of a clip: the event is much louder, and the clip also has background.
            power = np.sort([np.mean(part**2) for part in np.array_split(wave, 20)])
            assert 0 < power[0] < power[-1] / 20, kind


def test_statistics_are_those_of_the_catalog():
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in make_loader(load_dataset("toy", "val"), 50, train=False):
        log_mel, frames = kaldi_fbank(batch.waves, batch.lengths)
        x = torch.cat([clip[:count].flatten() for clip, count in zip(log_mel, frames)]).double()
        sums += torch.stack([torch.tensor(float(len(x))), x.sum(), x.square().sum()])
    mean = sums[1] / sums[0]
    assert abs(mean - DATASETS["toy"].mean) < 0.2
    assert abs((sums[2] / sums[0] - mean**2).sqrt() - DATASETS["toy"].std) < 0.1


def test_loudness_does_not_distinguish_the_kinds():
    rng = np.random.default_rng(0)
    level = {kind: [np.log(np.mean(make_sound(kind, rng) ** 2)) for _ in range(60)] for kind in KINDS}
    means = [np.mean(values) for values in level.values()]
    assert np.ptp(means) < np.std(np.concatenate(list(level.values())))
