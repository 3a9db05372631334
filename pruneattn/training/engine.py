"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from ..checkpoints.card import write_card
from ..checkpoints.pretrained import save_pretrained
from ..data import FeatureExtractor, make_loader
from ..data.augment import Augment
from ..data.clips import ClipDataset
from ..data.loader import Batch
from ..errors import UserError
from ..files import json_values, write_json
from ..metrics import evaluate_predictions
from ..models.vit import PrunedViT
from ..report import FAILED, add_failed
from ..runtime import distributed
from ..runtime.inference import autocast, predict_dataset
from ..runtime.signals import StopRequest
from . import state
from .log import RunLog, progress_bar, say
from .optim import set_learning_rate
from .options import Options
from .recipes import Recipe
from .schedule import keep_rate_at, learning_rate, pruning_started
from .seed import seed_step

LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "bce": F.binary_cross_entropy_with_logits,
    "ce": F.cross_entropy,
}


class Stopped(Exception):
    """A signal stopped the run, whose state is saved. The message contains the step.

    Attributes:
        signum: number of the signal.
    """

    def __init__(self, signum: int, place: str) -> None:
        super().__init__(place)
        self.signum = signum


@dataclass(kw_only=True, eq=False)
class Trainer:
    """All objects of a run. `build.build_trainer` sets them up.

    Attributes:
        options: model, data, device and output.
        recipe: settings of the training, with all values resolved.
        config: content of config.json, which checkpoints store too.
        folder: output folder.
        device: device of the model.
        model: the model itself.
        running: the same model, with the wrappers of ``torch.compile`` and DDP, if any.
        features: computes the model's input from waveforms.
        augment: augmentation of training batches.
        optimizer: optimizer of the model's parameters.
        scaler: loss scaler, enabled for float16 only.
        train_set: clips for training.
        val_set: clips for validation after each epoch.
        test_set: clips for the final result, if any.
        progress: position of the next optimizer step.
        log: log of the run.
        stop: records the signals that end the run.
        failed: ``(path, reason)`` of the clips of this process that could not be decoded.
        pruning: whether pruning has started.
    """

    options: Options
    recipe: Recipe
    config: dict[str, Any]
    folder: Path
    device: torch.device
    model: PrunedViT
    running: nn.Module
    features: FeatureExtractor
    augment: Augment
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    train_set: ClipDataset
    val_set: ClipDataset
    test_set: ClipDataset | None
    progress: state.Progress
    log: RunLog
    stop: StopRequest
    failed: set[tuple[str, str]] = field(default_factory=set)
    pruning: bool = False

    def __post_init__(self) -> None:
        self.micro_batch = self.recipe.batch_size // (distributed.world_size() * self.recipe.accumulate)
        self.steps_per_epoch = len(self.train_set) // self.recipe.batch_size
        self._stop_signum = 0
        self._saved_at = time.monotonic()

    @property
    def global_step(self) -> int:
        """Number of completed optimizer steps since the start of the run."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step

    def run(self) -> None:
        """Train to the last epoch.

        Raises:
            Stopped: a signal ended the run; its state is saved.
            UserError: the loss is not finite, or a file cannot be written.
        """
        while self.progress.epoch < self.recipe.epochs:
            epoch = self.progress.epoch
            self.enter_epoch(epoch)
            self.train_epoch(epoch)
            self.finish_epoch(epoch)

    def enter_epoch(self, epoch: int) -> None:
        """Set the keep-rate of an epoch. Before the first epoch with pruning, save the trunk."""
        recipe = self.recipe
        if epoch == recipe.shrink_start and self.progress.step == 0:
            self.save(state.TRUNK)
        rates = [keep_rate_at(epoch, rate, recipe.shrink_start, recipe.shrink_epochs) for rate in recipe.keep_rates]
        if self.options.compile and tuple(rates) != self.model.keep_rates:
            torch.compiler.reset()  # each keep-rate is a separate program; the old programs are not used again
        self.model.set_keep_rate(rates)
        self.pruning = pruning_started(epoch, recipe.keep_rate, recipe.shrink_start)

    def train_epoch(self, epoch: int) -> None:
        """Run the remaining optimizer steps of an epoch."""
        progress, parts = self.progress, self.recipe.accumulate
        loader = make_loader(
            self.train_set,
            self.micro_batch,
            train=True,
            seed=self.options.seed,
            epoch=epoch,
            rank=distributed.rank(),
            world=distributed.world_size(),
            workers=self.options.workers,
            start_batch=progress.step * parts,
        )
        batches = iter(loader)
        self.running.train()
        with progress_bar(self.steps_per_epoch, progress.step, f"epoch {epoch}") as bar:
            started = time.monotonic()
            while progress.step < self.steps_per_epoch:
                loss, lr = self.train_step(list(islice(batches, parts)))
                progress.loss_sum += loss
                progress.step += 1
                now = time.monotonic()
                progress.train_seconds, started = progress.train_seconds + now - started, now
                bar.update()
                bar.set_postfix(loss=f"{progress.loss_sum / progress.step:.4f}", refresh=False)
                if self.global_step % self.options.log_every == 0:
                    rates = list(self.model.keep_rates)
                    self.log.write("step", self.global_step, epoch=epoch, loss=loss, lr=lr, keep_rate=rates)
                self.save_if_due(now)

    def train_step(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Run an optimizer step.

        Args:
            batches: the parts of this process's share of the batch.

        Returns:
            The mean loss over all processes, and the learning rate.
        """
        lr = learning_rate(self.global_step, self.recipe, self.steps_per_epoch)
        set_learning_rate(self.optimizer, lr)
        parts = []
        for part, batch in enumerate(batches):
            seed_step(self.options.seed, self.global_step, part, distributed.rank())
            self.failed.update(batch.failed)
            last = part == len(batches) - 1
            synchronized: AbstractContextManager = nullcontext()
            if isinstance(self.running, DistributedDataParallel) and not last:
                synchronized = self.running.no_sync()
            with synchronized:
                loss = self.loss(batch)
                self.scaler.scale(loss / len(batches)).backward()
            parts.append(loss.detach())
        losses: list[float] = torch.stack(parts).tolist()
        mean_loss = self.agree(sum(losses) / len(losses))
        if not math.isfinite(mean_loss):
            raise UserError(self.explain_loss(losses, batches, lr))
        if self.recipe.clip_grad > 0:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return mean_loss, lr

    def agree(self, loss: float = 0.0) -> float:
        """Mean of a loss over all processes. Also tells every process about a signal that one of them received."""
        everyone = distributed.gather_numbers([loss, self.stop.signum])
        self._stop_signum = int(max(signum for _, signum in everyone))
        return sum(loss for loss, _ in everyone) / len(everyone)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Loss of a batch of waveforms, with augmentation: a scalar tensor."""
        targets = batch.targets.to(self.device, non_blocking=True)  # [B, K]
        waves = batch.waves.to(self.device, non_blocking=True)
        waves, lengths, targets = self.augment.waves(waves, batch.lengths, targets)
        fbank = self.features(waves, lengths)  # [B, frames, 128]
        fbank = self.augment.features(fbank, self.pruning)
        patches = self.augment.patches(self.model, len(fbank), self.pruning)  # [B, P'] or None
        with autocast(self.device, self.options.amp):
            logits = self.running(fbank, patches)  # [B, K]
        return LOSSES[self.recipe.loss](logits.float(), targets)

    def explain_loss(self, losses: Sequence[float], batches: Sequence[Batch], lr: float) -> str:
        """Error message for a loss that is not finite: position, values, clips and remedies."""
        bad = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
        clips = [str(self.train_set.clips[i].path) for batch in bad for i in batch.index.tolist()]
        shown = ", ".join(clips[:8]) + (f" and {len(clips) - 8} more" if len(clips) > 8 else "")
        options = self.options
        scale = f", loss scale {self.scaler.get_scale():g}" if options.amp == "fp16" else ""
        saved = (
            f"The previous checkpoint is kept: {self.folder / state.LAST}."
            if (self.folder / state.LAST).exists()
            else "No checkpoint has been saved yet."
        )
        where = f"clips {shown}" if clips else "clips of another process"
        return (
            f"the loss is not finite in step {self.global_step} (epoch {self.progress.epoch}, "
            f"step {self.progress.step} of {self.steps_per_epoch}): losses {list(losses)}, lr {lr:.3g}, "
            f"keep-rate {list(self.model.keep_rates)}, {options.amp}{scale}; {where}. {saved} "
            "Try a lower --lr, a longer warm-up, --clip-grad 1 or --amp fp32 (or bf16 instead of fp16), and check "
            "--mean, --std and these clips"
        )

    def save_if_due(self, now: float) -> None:
        """Save between two steps, after --save-minutes or a signal. All processes see a signal in the same step."""
        if self._stop_signum or now - self._saved_at > 60 * self.options.save_minutes:
            self.save(state.LAST)
        if self._stop_signum:
            self.raise_stopped()

    def raise_stopped(self) -> NoReturn:
        """End the run after a signal, once the state is saved."""
        place = f"saved in epoch {self.progress.epoch} after step {self.progress.step} of {self.steps_per_epoch}"
        raise Stopped(self._stop_signum, place)

    def save(self, name: str) -> None:
        """Write a checkpoint into the output folder, in the main process: `state.LAST` or `state.TRUNK`."""
        if distributed.is_main():
            files = None
            if name == state.TRUNK:
                best = self.folder / state.BEST
                files = {state.LOG: (self.folder / state.LOG).read_bytes()}
                files[state.BEST] = best.read_bytes() if best.exists() else b""
            state.save_state(
                self.folder / name,
                config=self.config,
                progress=self.progress,
                model=self.model,
                optimizer=self.optimizer,
                scaler=self.scaler,
                log_bytes=self.log.bytes,
                files=files,
            )
        self._saved_at = time.monotonic()

    def finish_epoch(self, epoch: int) -> None:
        """Evaluate, log, save the model if it is the best so far, and save a checkpoint."""
        recipe, progress = self.recipe, self.progress
        steps = self.steps_per_epoch
        rates = list(self.model.keep_rates)
        train_loss = progress.loss_sum / steps
        lr = learning_rate(self.global_step - 1, recipe, steps)
        record: dict[str, Any] = {
            "epoch": epoch,
            "train_loss": train_loss,
            "lr": lr,
            "keep_rate": rates,
            "pruning": self.pruning,
        }
        text = f"epoch {epoch + 1}/{recipe.epochs}: train loss {train_loss:.4f}, lr {lr:.2e}, "
        text += f"keep-rate {min(rates, default=1.0):.3f}"
        if (epoch + 1) % self.options.eval_every == 0 or epoch + 1 == recipe.epochs:
            started = time.monotonic()
            metrics = self.evaluate(self.val_set)
            record |= metrics | {"eval_seconds": time.monotonic() - started}
            metric = metrics[recipe.metric]
            text += f", val loss {metrics['val_loss']:.4f}, {recipe.metric} {metric:.4f}"
            if progress.improves(metric, rates, self.pruning):
                progress.best = {
                    "epoch": epoch,
                    "metric": metric,
                    "keep_rate": rates,
                    "pruning": self.pruning,
                    "val": metrics,
                }
                text += " (best)"
                self.save_best()
        speed = steps * recipe.batch_size / progress.train_seconds
        record |= {"train_seconds": progress.train_seconds, "clips_per_second": speed}
        self.log.write("epoch", self.global_step, **record)
        say(f"{text}; {progress.train_seconds:.1f} s, {speed:.0f} clips/s")
        self.list_failed()
        self.progress = state.Progress(epoch=epoch + 1, best=progress.best)
        self.save(state.LAST)
        self.agree()
        if self._stop_signum and epoch + 1 < recipe.epochs:
            self.raise_stopped()

    def report(self) -> None:
        """Evaluate the best checkpoint on the test split, if its clips are not those of val, and save the result."""
        best = self.progress.best
        if best is None:
            return
        metric = self.recipe.metric
        result = {"metric": metric, "best_epoch": best["epoch"], "keep_rate": best["keep_rate"], "val": best["val"]}
        if self.test_set is not None and self.test_set.clips != self.val_set.clips:
            self.model.load_state_dict(load_file(self.folder / state.BEST))
            self.model.set_keep_rate(best["keep_rate"])
            result["test"] = self.evaluate(self.test_set)
            self.list_failed()
        split = "test" if "test" in result else "val"
        say(f"best epoch {best['epoch'] + 1}: {metric} {result[split][metric]:.4f} on {split}; {self.folder}")
        if distributed.is_main():
            write_json(self.folder / state.RESULT, result)

    def evaluate(self, dataset: ClipDataset) -> dict[str, Any]:
        """Metrics of the current model, without those per class.

        Returns:
            The metrics of ``evaluate_predictions``, and ``val_loss``, the loss without augmentation.
        """
        loader = make_loader(
            dataset,
            self.micro_batch,
            train=False,
            rank=distributed.rank(),
            world=distributed.world_size(),
            workers=self.options.workers,
        )
        batches = self.until_stopped(loader)
        predictions = predict_dataset(self.running, self.features, batches, self.device, self.options.amp)
        self.failed.update(predictions.failed)
        metrics = evaluate_predictions(predictions.logits, predictions.targets, dataset.multilabel)
        metrics.pop("per_class")
        loss = LOSSES[self.recipe.loss](predictions.logits, predictions.targets)
        return {"val_loss": float(loss), **metrics}

    def until_stopped(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of an evaluation. A signal ends it, unless there are several processes.

        Several processes finish the evaluation, because they wait for each other at its end.
        """
        for batch in loader:
            if self.stop.signum and distributed.world_size() == 1:
                if self.progress.epoch < self.recipe.epochs:
                    self.save(state.LAST)
                self.agree()
                self.raise_stopped()
            yield batch

    def save_best(self) -> None:
        """Write the current model with everything that prediction needs."""
        best = self.progress.best
        if best is not None and distributed.is_main():
            extra = {"epoch": best["epoch"], "metric": self.recipe.metric, "value": best["metric"]}
            about = {
                "features": self.features.config,
                "labels": self.train_set.labels,
                "multilabel": self.train_set.multilabel,
                "extra": json_values(extra),
            }
            save_pretrained(self.model, self.folder / state.BEST, **about)
            write_card(self.folder, self.model, **about)

    def list_failed(self) -> None:
        """Add the clips that could not be decoded to the list of the run, and print their number if it has grown."""
        failed = {clip for part in distributed.gather_objects(sorted(self.failed)) for clip in part}
        if distributed.is_main() and failed and (count := add_failed(self.folder, failed)):
            say(f"{count} clips could not be decoded and are skipped; they are listed in {self.folder / FAILED}")
