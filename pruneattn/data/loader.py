"""Batches of clips in an order that depends on nothing but the seed, the epoch and the place in the epoch."""

from functools import partial
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from ..errors import UserError

_SPARES = 32  # clips that are tried in place of a batch that cannot be decoded


class Batch(NamedTuple):
    """Clips of different lengths side by side."""

    waves: torch.Tensor  # float32 [B, Lmax], zero after each clip's end
    lengths: torch.Tensor  # int64 [B], in samples
    targets: torch.Tensor  # float32 [B, K]
    index: torch.Tensor  # int64 [B], each clip's number in its data set
    failed: list  # (path, message) of every clip that could not be decoded


def collate(items, *, paths=None, replace=False, dataset=None):
    """Put the items of a ``ClipDataset`` into one ``Batch``.

    Args:
        items: Items as ``ClipDataset`` gives them.
        paths: Path of each clip by item index, for the list of failures; without it the item index stands there.
        replace: Fill the places of failed clips with the good clips of the same batch, in turn, so that the batch
            keeps its size (training). Otherwise failed clips are left out (evaluation). A batch without a single good
            clip is empty: ``waves`` is ``[0, 0]``.
        dataset: With ``replace``, the ``ClipDataset`` that a clip is taken from where the batch has no good one.
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


def _spares(dataset, items):
    """Further clips, up to the first that can be decoded, in an order that depends on nothing but the batch."""
    taken, tried = [item["index"] for item in items], []
    tries = min(_SPARES, len(dataset))
    for step in range(1, tries):  # spread over the data set: neighbours are often damaged together
        index = (taken[0] + step * len(dataset) // tries) % len(dataset)
        if index not in taken:
            tried.append(dataset[index])
            if tried[-1]["error"] is None:
                break
    return tried


def train_batches(count, batch_size, *, seed, epoch, rank=0, world=1):
    """The clip numbers of each batch that process ``rank`` of ``world`` trains on in an epoch.

    All processes cut the same shuffled list into global batches of ``world * batch_size`` clips, and each takes its own
    stretch of every one; what is left over at the end is dropped.
    """
    generator = torch.Generator().manual_seed(seed)
    # Two draws deep, so that (seed, epoch) and (seed + 1, epoch - 1) have nothing in common.
    epoch_seed = int(torch.randint(2**62, (epoch + 1,), generator=generator)[epoch])
    order = torch.randperm(count, generator=generator.manual_seed(epoch_seed)).tolist()
    step = world * batch_size
    starts = range(rank * batch_size, count // step * step, step)
    return [order[start : start + batch_size] for start in starts]


def eval_batches(count, batch_size, *, rank=0, world=1, limit=None):
    """The clip numbers of each batch that process ``rank`` evaluates: every clip once over all of them, no padding.

    With ``limit`` only that many clips, spread evenly.
    """
    taken = count if limit is None else min(limit, count)
    mine = [number * count // taken for number in range(rank, taken, world)]
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


class ClipLoader(DataLoader):
    """A ``DataLoader`` of ``Batch`` that can stop with a clear message when a whole batch cannot be decoded."""

    refuse_empty = False

    def __iter__(self):
        # Raised here, not in a worker: torch wraps what workers raise in their traceback.
        for batch in super().__iter__():
            if self.refuse_empty and len(batch.index) == 0:
                _, message = batch.failed[0]
                count = len(batch.failed)
                raise UserError(
                    f"none of the {count} clips that were tried for a batch can be decoded: replace or remove the "
                    f"damaged ones; the first: {message}"
                )
            yield batch


def make_loader(dataset, batch_size, *, train, seed=0, epoch=0, rank=0, world=1, workers=0, start_batch=0, limit=None):
    """Loader of one pass over a data set.

    It keeps no state and leaves the global random state alone: the same arguments give the same batches, with any
    number of workers, and ``start_batch=n`` gives what the full pass gives from its batch ``n`` on.

    Args:
        dataset: A ``ClipDataset``.
        batch_size: Clips per batch and process.
        train: Shuffled by ``(seed, epoch)``, incomplete last batch dropped, failed clips replaced by good ones of the
            same batch, else of the data set. Otherwise in order, process ``rank`` taking clips ``rank::world``, failed
            clips left out.
        workers: Processes that decode; 0 decodes in this one.
        start_batch: Number of batches of this process to skip.
        limit: Evaluation only: take no more than this many clips, spread evenly over the data set.

    Returns:
        DataLoader of ``Batch``; its length is the number of batches left.
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
        # Without its own generator a DataLoader draws from the global one each time it is iterated.
        generator=torch.Generator().manual_seed(seed),
    )
    loader.refuse_empty = train
    return loader
