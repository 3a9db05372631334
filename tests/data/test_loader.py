import functools
import operator
from pathlib import Path

import pytest
import torch

from pruneattn.data import Clip, ClipDataset, collate, make_loader
from pruneattn.errors import UserError


class Counting(ClipDataset):
    """Clip i is 500 + i samples of the value i + 1; the clips in `bad` fail."""

    def __init__(self, count, bad=()):
        super().__init__("counting", [Clip(Path(f"{i}.wav"), (i % 4,)) for i in range(count)], "abcd", multilabel=False)
        self.bad = set(bad)

    def read(self, index):
        if index in self.bad:
            raise UserError(f"{index}.wav is broken")
        return torch.full((500 + index,), index + 1.0)


def indices(loader):
    return [batch.index.tolist() for batch in loader]


def test_batch_content():
    (batch,) = make_loader(Counting(3), 8, train=False)
    assert batch.waves.shape == (3, 502) and batch.waves.dtype == torch.float32
    assert batch.lengths.tolist() == [500, 501, 502] and batch.lengths.dtype == torch.int64
    for row, length, index in zip(batch.waves, batch.lengths, batch.index):
        assert (row[:length] == index + 1).all() and (row[length:] == 0).all()
    assert batch.targets.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    assert batch.failed == []


def test_train_order():
    dataset = Counting(50)
    first = indices(make_loader(dataset, 8, train=True, seed=3, epoch=2))
    seen = functools.reduce(operator.iadd, first, [])
    assert [len(batch) for batch in first] == [8] * 6 and len(set(seen)) == 48 and seen != sorted(seen)
    assert indices(make_loader(dataset, 8, train=True, seed=3, epoch=2)) == first
    for seed, epoch in ((3, 3), (4, 2), (4, 1), (2, 3)):
        assert indices(make_loader(dataset, 8, train=True, seed=seed, epoch=epoch)) != first


@pytest.mark.parametrize("train", [True, False])
def test_start_in_the_middle(train):
    dataset = Counting(50)
    whole = make_loader(dataset, 8, train=train, seed=1, epoch=5)
    for start in (0, 1, 4, len(whole)):
        rest = make_loader(dataset, 8, train=train, seed=1, epoch=5, start_batch=start)
        assert indices(rest) == indices(whole)[start:] and len(rest) == len(whole) - start


@pytest.mark.parametrize("train", [True, False])
def test_batches_do_not_depend_on_workers(train):
    dataset = Counting(30, bad=(3, 17))
    runs = [list(make_loader(dataset, 4, train=train, seed=1, workers=workers)) for workers in (0, 1, 2)]
    for other in runs[1:]:
        assert len(other) == len(runs[0])
        for a, b in zip(runs[0], other):
            assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4])) and a.failed == b.failed


def test_the_global_random_state_does_not_change():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for train in (True, False):
        indices(make_loader(Counting(20), 4, train=train))
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_share_the_global_batches_of_training():
    dataset = Counting(50)
    one = indices(make_loader(dataset, 8, train=True, seed=1, epoch=1))
    two = [indices(make_loader(dataset, 4, train=True, seed=1, epoch=1, rank=rank, world=2)) for rank in range(2)]
    assert [a + b for a, b in zip(*two)] == one


def test_processes_evaluate_each_clip_once():
    ranks = [
        functools.reduce(operator.iadd, indices(make_loader(Counting(11), 3, train=False, rank=rank, world=4)), [])
        for rank in range(4)
    ]
    assert ranks == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7]]
    assert indices(make_loader(Counting(2), 3, train=False, rank=3, world=4)) == []


def test_evaluation_leaves_failed_clips_out():
    batches = list(make_loader(Counting(6, bad=(1, 3, 4, 5)), 3, train=False))
    assert [batch.index.tolist() for batch in batches] == [[0, 2], []]
    assert batches[0].failed == [("1.wav", "1.wav is broken")]
    assert batches[1].waves.shape == (0, 0) and batches[1].targets.shape == (0, 4) and len(batches[1].failed) == 3


def test_training_replaces_failed_clips():
    dataset = Counting(8, bad=(0, 5))
    items = [dataset[i] for i in (4, 5, 6, 0, 7)]
    batch = collate(items, paths=[clip.path for clip in dataset.clips], replace=True)
    assert batch.index.tolist() == [4, 4, 6, 6, 7]
    assert batch.lengths.tolist() == [504, 504, 506, 506, 507] and batch.waves[3, 0] == 7
    assert batch.targets.argmax(1).tolist() == [0, 0, 2, 2, 3]
    assert [path for path, _ in batch.failed] == ["5.wav", "0.wav"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_a_good_clip_uses_another_clip(workers):
    """This includes batches of one clip, in which no other clip can replace it."""
    dataset = Counting(100, bad=range(90))
    for size in (1, 5):
        batches = list(make_loader(dataset, size, train=True, workers=workers))
        assert all(len(batch.index) == size and (batch.index >= 90).all() for batch in batches)
        assert {path for batch in batches for path, _ in batch.failed} == {f"{i}.wav" for i in range(90)}


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops_if_no_clip_of_a_batch_can_be_decoded(workers):
    loader = make_loader(Counting(4, bad=range(4)), 4, train=True, workers=workers)
    with pytest.raises(UserError, match=r"none of the 4 clips .* is broken$"):
        list(loader)


def test_too_few_clips_for_a_batch():
    with pytest.raises(UserError, match="counting: 7 training clips do not fill one batch of 4 on each of 2 processes"):
        make_loader(Counting(7), 4, train=True, world=2)
