"""Fine-tune a Hugging Face AST with token pruning, with the Trainer of transformers, on any dataset of pruneattn.

    python python/finetune_huggingface.py --model MIT/ast-finetuned-audioset-10-10-0.4593 --dataset esc50 \
        --keep-rate 0.7 --output runs/hf-ast-0.7

The keep-rate falls from 1 along a cosine, epoch by epoch, as in the paper. --output receives the best epoch at the
final keep-rate in the layout of `save_pretrained`, its feature extractor, the Trainer's checkpoints for --resume, and
result.json. The model loads without pruneattn. Its configuration holds the arguments of `prune`:

    model = transformers.ASTForAudioClassification.from_pretrained("runs/hf-ast-0.7")
    pruneattn.prune(model, **model.config.pruneattn)

All spectrograms are computed once and stay in memory: 51 KB for each second of sound.
"""

import math
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import pruneattn
from pruneattn.cli import (
    add_data_dir_option,
    add_dataset_option,
    add_frames_option,
    add_label_csv_option,
    add_output_option,
    add_stride_option,
    add_workers_option,
    check_least,
    run_command,
)
from pruneattn.data import DATASETS, FeatureConfig, FeatureExtractor, make_loader
from pruneattn.data.augment import noise_and_shift
from pruneattn.errors import UserError
from pruneattn.files import make_folder, write_json
from pruneattn.metrics import evaluate_predictions
from pruneattn.report import save_failed, say_failed
from pruneattn.training.build import measure, open_splits
from pruneattn.training.schedule import keep_rate_at

try:
    import accelerate  # noqa: F401  (the Trainer needs it)
    from transformers import (
        ASTConfig,
        ASTFeatureExtractor,
        ASTForAudioClassification,
        AutoConfig,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )
except ImportError as error:
    raise SystemExit(f"error: {error.name} is not installed: pip install 'pruneattn[huggingface]'") from None


class KeepRateSchedule(TrainerCallback):
    """Set the keep-rate at the start of every epoch, and print it with the duration at the end of the epoch."""

    def __init__(self, target, start, shrink_epochs):
        self.at = lambda epoch: keep_rate_at(epoch, target, start, shrink_epochs)
        self.seconds = []  # training time of each epoch

    def on_epoch_begin(self, args, state, control, model, **_):
        epoch = math.floor(state.epoch)
        self.rate = self.at(epoch)
        pruneattn.set_keep_rate(model, self.rate)
        if self.rate != self.at(epoch - 1):
            state.best_metric = None  # results at another keep-rate are not comparable
        self.started = time.perf_counter()

    def on_epoch_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self.started)
        if state.is_world_process_zero:
            print(f"epoch {math.ceil(state.epoch)}: keep-rate {self.rate:.3f}, {self.seconds[-1]:.1f} s", flush=True)


class NoisyClips(torch.utils.data.Dataset):
    """Training clips with new random noise and a new shift in time at each access, as in the paper's speech recipes."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        clip = self.clips[index]
        return {**clip, "input_values": noise_and_shift(clip["input_values"].unsqueeze(0)).squeeze(0)}


class PruningTrainer(Trainer):
    """Trainer that saves the final keep-rate, and loads checkpoints with `from_pretrained`.

    `prune` and `set_keep_rate` record the keep-rate in the configuration, which is that of the epoch in training. The
    Trainer's own loading expects the parameter names of the model in memory, but `save_pretrained` of transformers
    5 writes the names of the Hub. All blocks would keep their current weights, with a warning (transformers issues
    43701 and 48805).
    """

    def __init__(self, *args, keep_rate, **kwargs):
        super().__init__(*args, **kwargs)
        self.keep_rate = keep_rate

    def _save(self, *args, **kwargs):
        with pruneattn.at_keep_rate(self.model, self.keep_rate):
            super()._save(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        loaded = ASTForAudioClassification.from_pretrained(resume_from_checkpoint)
        self.model.load_state_dict(loaded.state_dict())

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def main(argv=None):
    args = parse(argv)
    output = make_folder(args.output)
    last = last_checkpoint(output)
    if last and not args.resume:
        raise UserError(f"--output {output} already contains a run: resume it with --resume, or use another folder")
    set_seed(args.seed)

    config = open_config(args)
    args.frames = args.frames or min(DATASETS[args.dataset].frames, config.max_length if config else math.inf)
    splits = open_splits(args, args)
    train_set = splits["train"]
    model = make_model(args, config, train_set)
    pruneattn.prune(model, keep_rate=args.keep_rate, prune_blocks=args.prune_blocks, score=args.score)
    if last:
        check_same(model.config, last)

    features = make_features(args, train_set)
    failed, clips = [], {}
    for split, dataset in splits.items():
        if dataset is not None:
            clips[split] = spectrograms(dataset, features, args.workers, failed)
    say_failed(failed, sum(len(dataset) for dataset in splits.values() if dataset), save_failed(output, failed))

    schedule = KeepRateSchedule(args.keep_rate, args.shrink_start, args.shrink_epochs)
    trainer = PruningTrainer(
        model,
        training_arguments(args, output, train_set),
        compute_metrics=make_metrics(train_set),
        train_dataset=NoisyClips(clips["train"]) if args.noise else clips["train"],
        eval_dataset=clips["val"],
        callbacks=[schedule],
        keep_rate=args.keep_rate,
    )
    trainer.train(resume_from_checkpoint=last)
    result = trainer.evaluate(clips.get("test", clips["val"]), metric_key_prefix="test" if "test" in clips else "val")
    trainer.save_model()
    save_features(features.config, output)
    if trainer.is_world_process_zero():
        pruning = {"keep_rate": args.keep_rate, "blocks": args.prune_blocks, "score": args.score}
        write_json(output / "result.json", {**result, **pruning, "epoch_seconds": schedule.seconds})
        print("\n".join(f"{name}: {value:.4f}" for name, value in result.items()))


def last_checkpoint(output):
    """The latest complete checkpoint in a folder; None if there is none.

    The Trainer writes its state last, so a checkpoint without it is incomplete.
    """
    folders = [path.parent for path in output.glob("checkpoint-*/trainer_state.json")]
    return str(max(folders, key=lambda folder: int(folder.name.rpartition("-")[2]))) if folders else None


def open_config(args):
    """Configuration of the checkpoint ``--model``, a Hugging Face AST; None for a model with random weights."""
    if args.model is None:
        return None
    try:
        config = AutoConfig.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {args.model}: {str(error).splitlines()[0]}") from None
    if config.model_type != "audio-spectrogram-transformer" or config.num_mel_bins != 128:
        raise UserError(f"--model {args.model}: this is not an AST for 128 mel bins, but {config.model_type}")
    return config


def make_model(args, config, dataset):
    """An AST for ``args.frames`` frames, with a head for the classes of the dataset."""
    task = {
        "id2label": dict(enumerate(dataset.labels)),
        "label2id": {label: number for number, label in enumerate(dataset.labels)},
        "problem_type": "multi_label_classification" if dataset.multilabel else "single_label_classification",
    }
    if config is None:
        return fresh_model(args, task)
    model, report = ASTForAudioClassification.from_pretrained(
        args.model, **task, ignore_mismatched_sizes=True, output_loading_info=True
    )
    missing = [name for name in report["missing_keys"] if not name.startswith("classifier.")]
    if missing:
        names = ", ".join(sorted(missing)[:4])
        raise UserError(f"--model {args.model} has no weights for {names}: this is not a complete AST")
    return shortened(model, args.frames)


def fresh_model(args, task):
    """A model with random weights in a size of ``create_model``, which also checks the options."""
    ours = pruneattn.create_model(
        f"ast_{args.size}",
        frames=args.frames,
        stride=args.stride or 16,
        embed_dim=args.embed_dim,
        depth=args.depth,
        num_heads=args.num_heads,
        prune_blocks=args.prune_blocks,
    )
    config = ASTConfig(
        hidden_size=ours.embed_dim,
        num_hidden_layers=len(ours.blocks),
        num_attention_heads=ours.num_heads,
        intermediate_size=4 * ours.embed_dim,
        layer_norm_eps=1e-6,  # of create_model
        max_length=args.frames,
        frequency_stride=ours.stride[0],
        time_stride=ours.stride[1],
        **task,
    )
    model = ASTForAudioClassification(config)
    # transformers' standard deviation of 0.02 is for a width of 768; a model with width 64 hardly learns with it.
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))
    for name in ("cls_token", "distillation_token", "position_embeddings"):
        nn.init.trunc_normal_(getattr(model.base_model.embeddings, name), std=0.02)
    return model


def shortened(model, frames):
    """The model for clips with fewer frames. It keeps the middle of its positions in time, like the official AST."""
    config, embeddings = model.config, model.base_model.embeddings
    had, columns = (1 + (length - config.patch_size) // config.time_stride for length in (config.max_length, frames))
    if not 1 <= columns <= had:
        raise UserError(f"--frames {frames}: --model has positions for {config.patch_size} to {config.max_length}")
    table = embeddings.position_embeddings.detach()  # [1, 2 + rows * columns, C], row by row
    start = had // 2 - columns // 2
    grid = table[:, 2:].unflatten(1, (-1, had))[:, :, start : start + columns]
    embeddings.position_embeddings = nn.Parameter(torch.cat([table[:, :2], grid.flatten(1, 2)], 1))
    config.max_length = frames
    return model


def check_same(config, checkpoint):
    """Raise a UserError unless a checkpoint of the Trainer has this model and this pruning."""
    saved, given = ASTConfig.from_pretrained(checkpoint).to_dict(), config.to_dict()
    pruning = saved.get("pruneattn", {})
    if isinstance(pruning.get("keep_rate"), float):  # as earlier versions of this script wrote it
        pruning["keep_rate"] = [pruning["keep_rate"]] * len(pruning["blocks"])
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_length", "frequency_stride", "time_stride")
    names += ("pruneattn", "id2label")
    found = [f"{name}: {saved.get(name)} -> {given[name]}" for name in names if saved.get(name) != given[name]]
    if found:
        raise UserError(f"{checkpoint} comes from another run. Saved -> given: {'; '.join(found)}")


def make_features(args, dataset):
    """The features of pruneattn, which equal those of ASTFeatureExtractor but are computed in batches."""
    info = DATASETS[args.dataset]
    mean, std = info.mean, info.std
    if args.dataset in ("manifest", "folder") and None in (args.mean, args.std):
        mean, std = measure(dataset)
    mean, std = mean if args.mean is None else args.mean, std if args.std is None else args.std
    return FeatureExtractor(FeatureConfig(args.frames, mean, std, padding="zero"))


def save_features(config, output):
    ASTFeatureExtractor(max_length=config.frames, mean=config.mean, std=config.std).save_pretrained(output)


def spectrograms(dataset, features, workers, failed):
    """The clips in the Trainer's format. Clips that cannot be decoded are omitted and added to ``failed``."""
    items = []
    for batch in tqdm(make_loader(dataset, 64, train=False, workers=workers), desc="spectrograms", disable=None):
        failed.extend(batch.failed)
        if len(batch.index):
            labels = batch.targets if dataset.multilabel else batch.targets.argmax(1)
            pairs = zip(features(batch.waves, batch.lengths), labels)
            items += [{"input_values": fbank, "labels": label} for fbank, label in pairs]  # [frames, 128]; [] or [K]
    if not items:
        raise UserError(f"none of the {len(dataset)} clips can be decoded; the last error is: {failed[-1][1]}")
    return items


def make_metrics(dataset):
    def compute(prediction):
        targets = prediction.label_ids if dataset.multilabel else np.eye(dataset.num_classes)[prediction.label_ids]
        metrics = evaluate_predictions(prediction.predictions, targets, dataset.multilabel)
        return {name: value for name, value in metrics.items() if name != "per_class"}

    return compute


def training_arguments(args, output, dataset):
    return TrainingArguments(
        output_dir=str(output),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup_steps,
        seed=args.seed,
        bf16=args.amp == "bf16",
        fp16=args.amp == "fp16",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="map" if dataset.multilabel else "top1",
        save_total_limit=2,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
    )


def parse(argv):
    parser = ArgumentParser(
        prog="python python/finetune_huggingface.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )

    def option(group, name, text, default=None, **settings):
        text += "" if default is None else " (default: %(default)s)"
        group.add_argument(f"--{name}", help=text, default=default, **settings)

    model = parser.add_argument_group("model")
    start = model.add_mutually_exclusive_group(required=True)
    option(start, "model", "pretrained Hugging Face AST: name on the Hub, or folder", metavar="NAME")
    option(start, "size", "random weights, in this size", choices=("tiny", "small", "base"))
    for name, text in (("embed-dim", "width"), ("depth", "blocks"), ("num-heads", "attention heads")):
        option(model, name, f"with --size: {text} (default: that of the size)", type=int, metavar="N")
    add_stride_option(model, "that of --model, or 16 with --size")

    pruning = parser.add_argument_group("pruning")
    option(pruning, "keep-rate", "final fraction of the patches that each pruning block keeps", 0.7, type=float)
    pruning.add_argument(
        "--prune-blocks",
        type=int,
        nargs="+",
        default=[3, 6, 9],
        metavar="N",
        help="numbers of the pruning blocks, from 0 (default: 3 6 9)",
    )
    option(pruning, "score", "score that ranks the patches", "cls", choices=("cls", "column_mean"))
    option(pruning, "shrink-start", "epoch (from 0) in which pruning starts", 4, type=int, metavar="N")
    option(pruning, "shrink-epochs", "epochs over which the keep-rate falls from 1", 8, type=int, metavar="N")

    data = parser.add_argument_group("data")
    add_dataset_option(data, f"{', '.join(DATASETS)} (default: manifest)", default="manifest", choices=tuple(DATASETS))
    add_data_dir_option(data, "folder of the data (default: the variable PRUNEATTN_DATA)")
    option(data, "fold", "esc50: held-out fold", 1, type=int)
    for split in ("train", "val", "test"):
        option(data, f"{split}-manifest", f"manifest: JSON file of the {split} clips", metavar="FILE")
    add_label_csv_option(data, "manifest: CSV of the labels")
    add_frames_option(data, "10 ms frames of a clip (default: the dataset's, or the model's if fewer)")
    option(data, "mean", "mean of the log-mel (default: the dataset's; measured for manifest and folder)", type=float)
    option(data, "std", "standard deviation of the log-mel (default: like --mean)", type=float)
    add_workers_option(data)

    run = parser.add_argument_group("run")
    add_output_option(run, "DIR", "folder of the run", required=True)
    run.add_argument("--resume", action="store_true", help="resume from the last checkpoint in --output, if any")
    option(run, "epochs", "passes over the training clips", 20, type=int, metavar="N")
    option(run, "batch-size", "clips per step and device", 32, type=int, metavar="N")
    option(run, "lr", "peak of the cosine learning rate; use about 1e-3 for random weights", 1e-4, type=float)
    option(run, "warmup-steps", "steps over which the learning rate rises", 100, type=int, metavar="N")
    option(run, "weight-decay", "weight decay of matrices", 0.01, type=float)
    option(run, "noise", "noise and a shift of up to 10 frames in training", True, action=BooleanOptionalAction)
    option(run, "amp", "precision of the model", "fp32", choices=("fp32", "bf16", "fp16"))
    option(run, "seed", "seed of all random numbers", 0, type=int)
    args = parser.parse_args(argv)
    check_least(args, shrink_start=0, shrink_epochs=0, epochs=1, batch_size=1, warmup_steps=0, workers=0)
    for name, what in (("embed_dim", "size"), ("depth", "size"), ("num_heads", "size"), ("stride", "stride")):
        if args.model and getattr(args, name) is not None:
            given = f"--{name.replace('_', '-')}"
            raise UserError(f"{given} applies only with --size: a pretrained model has its own {what}")
    if args.keep_rate < 1 and args.shrink_start + args.shrink_epochs >= args.epochs:
        raise UserError(
            f"the keep-rate reaches {args.keep_rate} only in epoch {args.shrink_start + args.shrink_epochs} (from 0; "
            f"--shrink-start plus --shrink-epochs), but the run has {args.epochs} epochs: use more --epochs, or shrink "
            "earlier"
        )
    return args


if __name__ == "__main__":
    run_command(main)
