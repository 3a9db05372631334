"""Batches of clips in an order that depends only on the seed, the epoch and the position in the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import UserError
from .clips import ClipDataset

_SPARES = 32  # clips that are tried if no clip of a batch can be decoded


class Batch(NamedTuple):
    """Clips of different lengths, padded to the longest."""

    waves: Tensor  # float32 [B, Lmax], zero after each clip's end
    lengths: Tensor  # int64 [B], in samples
    targets: Tensor  # float32 [B, K]
    index: Tensor  # type: ignore[assignment]  # int64 [B], number of each clip in the dataset; hides tuple.index
    failed: list[tuple[str, str]]  # (path, message) of every clip that could not be decoded


def collate(
    items: list[dict[str, Any]],
    *,
    paths: Sequence[Path] | None = None,
    replace: bool = False,
    dataset: ClipDataset | None = None,
) -> Batch:
    """Collate items of a ``ClipDataset`` into a ``Batch``.

    Args:
        items: items of a ``ClipDataset``.
        paths: path of each clip by item index, for ``failed``; without it ``failed`` has the item index.
        replace: replace failed clips by good clips of the same batch, in order, so that the batch keeps its size
            (training). Otherwise failed clips are left out (evaluation). A batch without a good clip is empty:
            ``waves`` is ``[0, 0]``.
        dataset: with ``replace``, the ``ClipDataset`` that replaces a batch without a good clip.
    """
    size = len(items)
    if replace and dataset is not None and all(item["error"] is not None for item in items):
        items = [*items, *_spares(dataset, items)]
    good = [item for item in items if item["error"] is None]
    bad = [item for item in items if item["error"] is not None]
    failed = [(str(paths[item["index"]] if paths else item["index"]), item["error"]) for item in bad]
    if replace and good:
        spare = iter(good * len(items))
        good = [item if item["error"] is None else next(spare) for item in items[:size]]
    lengths = torch.tensor([len(item["wave"]) for item in good], dtype=torch.int64)
    waves = torch.zeros(len(good), int(lengths.max()) if good else 0)
    for row, item in zip(waves, good):
        row[: len(item["wave"])] = item["wave"]
    targets = torch.stack([item["target"] for item in good or items])[: len(good)]
    index = torch.tensor([item["index"] for item in good], dtype=torch.int64)
    return Batch(waves, lengths, targets, index, failed)


def _spares(dataset: ClipDataset, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Further clips, up to the first that can be decoded, in an order that depends on the batch only."""
    taken = [item["index"] for item in items]
    tried: list[dict[str, Any]] = []
    tries = min(_SPARES, len(dataset))
    for step in range(1, tries):  # spread over the dataset, because damaged clips are often adjacent
        index = (taken[0] + step * len(dataset) // tries) % len(dataset)
        if index not in taken:
            tried.append(dataset[index])
            if tried[-1]["error"] is None:
                break
    return tried


def train_batches(
    count: int, batch_size: int, *, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """The clip numbers of each batch that process ``rank`` of ``world`` trains on in an epoch.

    All processes split the same shuffled list into global batches of ``world * batch_size`` clips, and each takes its
    own part of every batch. An incomplete last batch is dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    # Two draws, so that (seed, epoch) and (seed + 1, epoch - 1) are independent.
    epoch_seed = int(torch.randint(2**62, (epoch + 1,), generator=generator)[epoch])
    order = torch.randperm(count, generator=generator.manual_seed(epoch_seed)).tolist()
    step = world * batch_size
    starts = range(rank * batch_size, count // step * step, step)
    return [order[start : start + batch_size] for start in starts]


def eval_batches(
    count: int, batch_size: int, *, rank: int = 0, world: int = 1, limit: int | None = None
) -> list[list[int]]:
    """The clip numbers of each batch that process ``rank`` evaluates: every clip once over all processes, no padding.

    With ``limit``, only that many clips, evenly spaced.
    """
    taken = count if limit is None else min(limit, count)
    mine = [number * count // taken for number in range(rank, taken, world)]
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


class ClipLoader(DataLoader):
    """A ``DataLoader`` of ``Batch`` that can raise a clear error if no clip of a batch can be decoded."""

    reject_empty = False

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # of a private torch type
        # Raised here, not in a worker, because torch adds the traceback of the worker to the message.
        try:
            for batch in super().__iter__():
                if self.reject_empty and len(batch.index) == 0:
                    _, message = batch.failed[0]
                    count = len(batch.failed)
                    raise UserError(
                        f"none of the {count} clips that were tried for a batch can be decoded: replace or remove the "
                        f"damaged clips; the first: {message}"
                    )
                yield batch
        except (ConnectionError, EOFError) as error:
            # A worker died while it was sending a batch: the connection ends before torch notices the death.
            raise RuntimeError(f"DataLoader worker (pid unknown) exited unexpectedly: {error}") from error


def make_loader(
    dataset: ClipDataset,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    start_batch: int = 0,
    limit: int | None = None,
) -> ClipLoader:
    """Make a loader of one pass over a dataset.

    It is stateless and does not change the global random state: the same arguments give the same batches for any
    number of workers, and ``start_batch=n`` gives the batches of the full pass from number ``n`` on.

    Args:
        dataset: a ``ClipDataset``.
        batch_size: clips per batch and process.
        train: if True, shuffled by ``(seed, epoch)``, without an incomplete last batch, and with failed clips replaced
            by good clips of the same batch, else of the dataset. If False, in order, with clips ``rank::world`` for
            process ``rank``, and without failed clips.
        workers: processes that decode; 0 decodes in this process.
        start_batch: number of batches of this process to skip.
        limit: evaluation only: at most this many clips, evenly spaced over the dataset.

    Returns:
        DataLoader of ``Batch``; its length is the number of remaining batches.
    """
    if train:
        batches = train_batches(len(dataset), batch_size, seed=seed, epoch=epoch, rank=rank, world=world)
        if not batches:
            processes = f" on each of {world} processes" if world > 1 else ""
            raise UserError(
                f"{dataset.name}: {len(dataset)} training clips do not fill one batch of {batch_size}{processes}; "
                "use a smaller batch size or more clips"
            )
    else:
        batches = eval_batches(len(dataset), batch_size, rank=rank, world=world, limit=limit)
    loader = ClipLoader(
        dataset,
        batch_sampler=batches[start_batch:],
        collate_fn=partial(collate, paths=[clip.path for clip in dataset.clips], replace=train, dataset=dataset),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # Without this generator, a DataLoader draws from the global generator each time it is iterated.
        generator=torch.Generator().manual_seed(seed),
    )
    loader.reject_empty = train
    return loader
