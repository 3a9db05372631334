"""The training loop."""

import math
import time
from contextlib import nullcontext
from itertools import islice

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ..data import make_loader
from ..errors import UserError
from ..files import TEXT, json_values, write_json, write_lines
from ..metrics import evaluate_predictions
from ..runtime import distributed
from ..runtime.inference import autocast, predict_dataset
from . import state
from .log import progress_bar, say
from .optim import set_learning_rate
from .schedule import keep_rate_at, learning_rate, pruning_started

LOSSES = {"bce": F.binary_cross_entropy_with_logits, "ce": F.cross_entropy}


class Stopped(Exception):
    """A signal asked to stop, and the state is saved; the message says where."""

    def __init__(self, signum, place):
        super().__init__(place)
        self.signum = signum


def seed_step(*numbers):
    """Seed torch's generators from the place in the run, so that randomness has no state that could get lost."""
    seed = 0
    for number in numbers:  # splitmix64 over the parts: neighbouring places get unrelated seeds
        seed = (seed + number + 0x9E3779B97F4A7C15) % 2**64
        seed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        seed = (seed ^ (seed >> 27)) * 0x94D049BB133111EB % 2**64
        seed ^= seed >> 31
    torch.manual_seed(seed)


class Trainer:
    """Everything that one run needs, put together by `build.build_trainer`.

    Attributes:
        model: the `PrunedViT`; ``running`` is the same, compiled and wrapped for several processes.
        progress: `state.Progress`; ``epoch`` and ``step`` are where the next optimiser step happens.
    """

    def __init__(
        self,
        *,
        options,
        recipe,
        config,
        folder,
        device,
        model,
        running,
        features,
        augment,
        optimizer,
        scaler,
        train_set,
        val_set,
        test_set,
        progress,
        log,
        stop,
    ):
        self.options, self.recipe, self.config = options, recipe, config
        self.folder, self.device = folder, device
        self.model, self.running, self.features, self.augment = model, running, features, augment
        self.optimizer, self.scaler = optimizer, scaler
        self.train_set, self.val_set, self.test_set = train_set, val_set, test_set
        self.progress, self.log, self.stop = progress, log, stop
        self.micro_batch = recipe.batch_size // (distributed.world_size() * recipe.accumulate)
        self.steps_per_epoch = len(train_set) // recipe.batch_size
        self.failed = set()
        self._stop_signum = 0
        self._saved_at = time.monotonic()

    @property
    def global_step(self):
        """Optimiser steps done since the run began."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step

    def run(self):
        """Train to the last epoch. Raises `Stopped` after saving when a signal asks to stop."""
        while self.progress.epoch < self.recipe.epochs:
            epoch = self.progress.epoch
            self.enter_epoch(epoch)
            self.train_epoch(epoch)
            self.finish_epoch(epoch)

    def enter_epoch(self, epoch):
        """Set the epoch's keep-rate; before the first epoch with pruning, save the trunk."""
        recipe = self.recipe
        if epoch == recipe.shrink_start and self.progress.step == 0:
            self.save(state.TRUNK)
        rates = [keep_rate_at(epoch, rate, recipe.shrink_start, recipe.shrink_epochs) for rate in recipe.keep_rates]
        if self.options.compile and tuple(rates) != self.model.keep_rates:
            torch.compiler.reset()  # each keep-rate is another program; the old ones would only fill the cache
        self.model.set_keep_rate(rates)
        self.pruning = pruning_started(epoch, recipe.keep_rate, recipe.shrink_start)

    def train_epoch(self, epoch):
        """The optimiser steps of an epoch that are not done yet."""
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

    def train_step(self, batches):
        """One optimiser step over the parts of a batch; returns its loss over all processes, and the lr."""
        lr = learning_rate(self.global_step, self.recipe, self.steps_per_epoch)
        set_learning_rate(self.optimizer, lr)
        losses = []
        for part, batch in enumerate(batches):
            seed_step(self.options.seed, self.global_step, part, distributed.rank())
            self.failed.update(batch.failed)
            last = part == len(batches) - 1
            alone = nullcontext() if last or distributed.world_size() == 1 else self.running.no_sync()
            with alone:
                loss = self.loss(batch)
                self.scaler.scale(loss / len(batches)).backward()
            losses.append(loss.detach())
        losses = torch.stack(losses).tolist()
        loss = self.agree(sum(losses) / len(losses))
        if not math.isfinite(loss):
            raise UserError(self.explain_loss(losses, batches, lr))
        if self.recipe.clip_grad > 0:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, lr

    def agree(self, loss=0.0):
        """Mean of ``loss`` over all processes; a signal that one process got is known to all after this."""
        everyone = distributed.gather_numbers([loss, self.stop.signum])
        self._stop_signum = int(max(signum for _, signum in everyone))
        return sum(loss for loss, _ in everyone) / len(everyone)

    def loss(self, batch):
        """Loss of a batch of waves, with augmentation."""
        targets = batch.targets.to(self.device, non_blocking=True)  # [B, K]
        waves = batch.waves.to(self.device, non_blocking=True)
        waves, lengths, targets = self.augment.waves(waves, batch.lengths, targets)
        fbank = self.features(waves, lengths)  # [B, frames, 128]
        fbank = self.augment.features(fbank, self.pruning)
        patches = self.augment.patches(self.model, len(fbank), self.pruning)  # [B, P'] or None
        with autocast(self.device, self.options.amp):
            logits = self.running(fbank, patches)  # [B, K]
        return LOSSES[self.recipe.loss](logits.float(), targets)

    def explain_loss(self, losses, batches, lr):
        """What to look at when the loss is not finite."""
        bad = [batch for batch, loss in zip(batches, losses) if not math.isfinite(loss)]
        clips = [str(self.train_set.clips[i].path) for batch in bad for i in batch.index.tolist()]
        shown = ", ".join(clips[:8]) + (f" and {len(clips) - 8} more" if len(clips) > 8 else "")
        options = self.options
        scale = f", loss scale {self.scaler.get_scale():g}" if options.amp == "fp16" else ""
        saved = (
            f"The checkpoint from before is kept: {self.folder / state.LAST}."
            if (self.folder / state.LAST).exists()
            else "No checkpoint had been saved yet."
        )
        where = f"clips {shown}" if clips else "clips of another process"
        return (
            f"the loss is not finite in step {self.global_step} (epoch {self.progress.epoch}, "
            f"step {self.progress.step} of {self.steps_per_epoch}): losses {losses}, lr {lr:.3g}, "
            f"keep-rate {list(self.model.keep_rates)}, {options.amp}{scale}; {where}. {saved} "
            "Look at: a lower --lr or a longer warm-up, --clip-grad 1, --amp fp32 (or bf16 instead of fp16), "
            "--mean and --std, and these clips"
        )

    def save_if_due(self, now):
        """Between two steps: save when it is time to or when a signal came, which all processes see in one step."""
        if self._stop_signum or now - self._saved_at > 60 * self.options.save_minutes:
            self.save(state.LAST)
        if self._stop_signum:
            self.raise_stopped()

    def raise_stopped(self):
        """End the run after a signal; the state is saved."""
        place = f"saved in epoch {self.progress.epoch} after step {self.progress.step} of {self.steps_per_epoch}"
        raise Stopped(self._stop_signum, place)

    def save(self, name):
        """Write the state to go on from, in the main process."""
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

    def finish_epoch(self, epoch):
        """Evaluate, log, keep the best, and save."""
        recipe, progress = self.recipe, self.progress
        steps = self.steps_per_epoch
        record = {
            "epoch": epoch,
            "train_loss": progress.loss_sum / steps,
            "lr": learning_rate(self.global_step - 1, recipe, steps),
            "keep_rate": list(self.model.keep_rates),
            "pruning": self.pruning,
        }
        text = f"epoch {epoch + 1}/{recipe.epochs}: train loss {record['train_loss']:.4f}, lr {record['lr']:.2e}, "
        text += f"keep-rate {min(record['keep_rate'], default=1.0):.3f}"
        if (epoch + 1) % self.options.eval_every == 0 or epoch + 1 == recipe.epochs:
            started = time.monotonic()
            metrics = self.evaluate(self.val_set)
            record |= metrics | {"eval_seconds": time.monotonic() - started}
            metric = metrics[recipe.metric]
            text += f", val loss {metrics['val_loss']:.4f}, {recipe.metric} {metric:.4f}"
            if progress.improves(metric, record["keep_rate"], self.pruning):
                progress.best = {
                    "epoch": epoch,
                    "metric": metric,
                    "keep_rate": record["keep_rate"],
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

    def report(self):
        """Evaluate the best checkpoint on the test split, where that is another one; write and print the result."""
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

    def evaluate(self, dataset):
        """Metrics of the model as it is now, without those per class; ``val_loss`` is the loss without augmentation."""
        loader = make_loader(
            dataset,
            self.micro_batch,
            train=False,
            rank=distributed.rank(),
            world=distributed.world_size(),
            workers=self.options.workers,
        )
        loader = self.until_stopped(loader)
        predictions = predict_dataset(self.running, self.features, loader, self.device, self.options.amp)
        self.failed.update(predictions.failed)
        metrics = evaluate_predictions(predictions.logits, predictions.targets, dataset.multilabel)
        metrics.pop("per_class")
        loss = LOSSES[self.recipe.loss](predictions.logits, predictions.targets)
        return {"val_loss": float(loss), **metrics}

    def until_stopped(self, loader):
        """The batches of an evaluation, ended by a signal; several processes, which wait for each other, finish it."""
        for batch in loader:
            if self.stop.signum and distributed.world_size() == 1:
                if self.progress.epoch < self.recipe.epochs:
                    self.save(state.LAST)
                self.agree()
                self.raise_stopped()
            yield batch

    def save_best(self):
        """Write the model as it is now, with all that prediction needs."""
        from ..checkpoints.card import write_card
        from ..checkpoints.pretrained import save_pretrained

        if distributed.is_main():
            best = self.progress.best
            extra = {"epoch": best["epoch"], "metric": self.recipe.metric, "value": best["metric"]}
            about = {
                "features": self.features.config,
                "labels": self.train_set.labels,
                "multilabel": self.train_set.multilabel,
                "extra": json_values(extra),
            }
            save_pretrained(self.model, self.folder / state.BEST, **about)
            write_card(self.folder, self.model, **about)

    def list_failed(self):
        """Write down the clips that could not be decoded, and say so once for each."""
        failed = {tuple(clip) for part in distributed.gather_objects(sorted(self.failed)) for clip in part}
        if distributed.is_main() and failed:
            path = self.folder / state.FAILED
            known = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
            lines = {f"{clip}: {message}".encode(**TEXT).decode() for clip, message in failed}  # as they are read back
            if lines - known:
                write_lines(path, sorted(lines | known))
                say(f"{len(lines | known)} clips could not be decoded and are left out; they are listed in {path}")
