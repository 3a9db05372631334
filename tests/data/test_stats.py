import pytest
import torch

from pruneattn.data.__main__ import main
from pruneattn.data.fbank import kaldi_fbank
from pruneattn.data.stats import dataset_stats
from pruneattn.errors import UserError


class Clips(torch.utils.data.Dataset):
    def __init__(self, waves):
        self.waves = waves

    def __len__(self):
        return len(self.waves)

    def __getitem__(self, index):
        wave = self.waves[index]
        error = "clip.wav: the file is empty" if wave is None else None
        return dict(index=index, wave=wave, target=torch.zeros(2), error=error)


def clips():
    torch.manual_seed(0)
    return [torch.randn(length) * scale for length, scale in [(16000, 0.1), (8123, 0.001), (48000, 1.0)]]


@pytest.mark.parametrize("workers", [0, 2])
def test_statistics_are_over_every_frame_once(workers):
    waves = clips()
    frames = torch.cat([kaldi_fbank(wave[None])[0][0] for wave in waves]).double()
    stats = dataset_stats(Clips([waves[0], None, *waves[1:]]), workers=workers, progress=False)
    assert stats.mean == pytest.approx(frames.mean().item(), rel=1e-9)
    assert stats.std == pytest.approx(frames.std(correction=0).item(), rel=1e-9)
    assert stats.clips == 3 and stats.failed == [(1, "clip.wav: the file is empty")]


def test_progress_goes_to_standard_error(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    dataset_stats(Clips(clips()), progress=True)
    out, err = capsys.readouterr()
    assert not out and "3/3" in err


def test_no_readable_clip():
    with pytest.raises(UserError, match="none of 2 clips.*the file is empty"):
        dataset_stats(Clips([None, None]), progress=False)
    with pytest.raises(UserError, match="none of 0 clips"):
        dataset_stats(Clips([]), progress=False)


@pytest.mark.parametrize("wave", [torch.zeros(16000), torch.full((16000,), float("nan"))])
def test_statistics_that_cannot_normalize(wave):
    with pytest.raises(UserError, match="log-mel of 2 clips has mean .* cannot normalize it; are the clips silent"):
        dataset_stats(Clips([wave, wave]), progress=False)


@pytest.mark.parametrize("option, least", [("--workers", 0), ("--frames", 1)])
def test_options_of_the_command(option, least):
    with pytest.raises(UserError, match=f"{option} -1: must be at least {least}"):
        main(["stats", "--dataset", "toy", option, "-1"])
