"""``python/finetune_huggingface.py`` on a few tones. Model and data are so small that a run takes seconds."""

import copy
import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file as load_weights
from safetensors.torch import save_file as save_weights

import pruneattn
from pruneattn import evaluate, export, predict
from pruneattn.data import load_audio, load_dataset
from pruneattn.data.fbank import samples_for
from pruneattn.errors import UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

FRESH = ["--size", "tiny", "--embed-dim", "32", "--num-heads", "2", "--depth", "3"]
RECIPE = (
    "--prune-blocks 0 1 --frames 64 --epochs 7 --batch-size 12 --lr 5e-3 --warmup-steps 3 --shrink-start 1 "
    "--shrink-epochs 2"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def script(load_file):
    return load_file(Path(__file__).parents[2] / "python" / "finetune_huggingface.py")


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """A folder of tones of three pitches in noise: 36 training, 12 validation and 12 test clips."""
    root, rng = tmp_path_factory.mktemp("tones"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for kind, pitch in (("low", 300), ("middle", 1200), ("high", 4800)):
            (root / split / kind).mkdir(parents=True)
            for number in range(count):
                time = np.arange(rng.integers(6000, 12000)) / 16000
                wave = np.sin(2 * np.pi * pitch * time) + 0.01 * rng.standard_normal(len(time))
                soundfile.write(root / split / kind / f"{number:02d}.wav", 0.1 * wave, 16000)
    return root


@pytest.fixture(scope="module")
def arguments(tones):
    data = ["--dataset", "folder", "--data-dir", str(tones), "--mean", "-9", "--std", "4"]

    def arguments(output, *options, model=FRESH):
        return [*model, *RECIPE.split(), *data, "--keep-rate", "0.5", "--output", str(output), *map(str, options)]

    return arguments


@pytest.fixture(scope="module")
def finished(script, arguments, tmp_path_factory):
    """A complete run: its folder, its model in memory, and the numbers of tokens after the last pruning block.

    There is one number for each forward pass of training and of evaluation.
    """
    output, seen = tmp_path_factory.mktemp("finished"), SimpleNamespace(training=[], evaluation=[])
    make_model = script.make_model

    def watched(*args):
        model = make_model(*args)
        trunk = model.base_model
        last = (trunk.layers if hasattr(trunk, "layers") else trunk.encoder.layer)[-1]

        def note(module, inputs):
            (seen.training if module.training else seen.evaluation).append(inputs[0].shape[1])

        last.register_forward_pre_hook(note)
        seen.model = model
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_model", watched)
        script.main(arguments(output))
    return SimpleNamespace(output=output, **vars(seen))


def trainer_state(output):
    """State of the Trainer in its latest checkpoint, without times."""
    folder = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"] = [
        {key: value for key, value in line.items() if "runtime" not in key and "second" not in key}
        for line in state["log_history"]
    ]
    return state


def test_the_model_learns_while_the_keep_rate_falls(finished):
    assert finished.training == [34] * 6 + [20] * 3 + [10] * 12  # epochs 0 and 1 at 1, 2 at 0.75, 3 to 6 at 0.5
    assert finished.evaluation == [34] * 2 + [20] + [10] * 5  # the last evaluation is that of the test split
    losses = [line["loss"] for line in trainer_state(finished.output)["log_history"] if "loss" in line]
    assert len(losses) == 7 and losses[-1] < 0.5 * losses[0]
    result = json.loads((finished.output / "result.json").read_text())
    assert result["test_top1"] > 0.6  # chance: a third
    assert (result["keep_rate"], result["blocks"]) == (0.5, [0, 1]) and len(result["epoch_seconds"]) == 7


def test_the_best_epoch_at_the_final_keep_rate_is_saved(finished):
    state = trainer_state(finished.output)
    evaluated = [line["eval_top1"] for line in state["log_history"] if "eval_top1" in line]
    steps = [3 * (1 + epoch) for epoch in range(3, 7) if evaluated[epoch] == max(evaluated[3:])]
    assert state["best_metric"] == max(evaluated[3:])
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{steps[0]}"
    for folder in (finished.output, *finished.output.glob("checkpoint-*")):  # also of epochs at a higher keep-rate
        config = json.loads((folder / "config.json").read_text())
        assert config["pruneattn"] == {"keep_rate": [0.5, 0.5], "blocks": [0, 1], "score": "cls"}
    saved = load_weights(finished.output / "model.safetensors")
    best = load_weights(finished.output / f"checkpoint-{steps[0]}" / "model.safetensors")
    assert saved.keys() == best.keys() and all(torch.equal(saved[name], best[name]) for name in best)


def test_checkpoints_of_earlier_versions_have_one_keep_rate(script, finished, tmp_path):
    config = transformers.ASTConfig.from_pretrained(finished.output)
    old = copy.deepcopy(config)
    old.pruneattn["keep_rate"] = 0.5
    old.save_pretrained(tmp_path)
    script.check_same(config, tmp_path)
    old.pruneattn["keep_rate"] = 0.7
    old.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pruneattn: .*0\.7, 0\.7.* -> .*0\.5, 0\.5"):
        script.check_same(config, tmp_path)


@pytest.mark.parametrize("noise", [True, False])
def test_only_training_clips_are_augmented(script, arguments, tmp_path, monkeypatch, noise):
    given = {}

    class Enough(Exception):
        pass

    def trainer(*args, **settings):
        given.update(settings)
        raise Enough

    monkeypatch.setattr(script, "PruningTrainer", trainer)
    with pytest.raises(Enough):
        script.main(arguments(tmp_path, "--noise" if noise else "--no-noise"))
    for kind, varies in (("train", noise), ("eval", False)):
        clips = given[f"{kind}_dataset"]
        first, again = clips[3], clips[3]
        assert len(clips) == {"train": 36, "eval": 12}[kind]
        assert first["input_values"].shape == (64, 128) and first["labels"] == again["labels"]
        assert torch.equal(first["input_values"], again["input_values"]) != varies


def test_the_best_epoch_is_searched_again_at_another_keep_rate(script, finished):
    schedule = script.KeepRateSchedule(0.5, 1, 2)
    for epoch, expected in ((0, 0.9), (1, 0.9), (2, None), (2.5, None), (3, None), (4, 0.9)):
        state = SimpleNamespace(epoch=epoch, best_metric=0.9)
        schedule.on_epoch_begin(None, state, None, finished.model)
        assert state.best_metric == expected, epoch
    assert schedule.rate == 0.5


def test_a_loaded_model_is_unpruned_until_prune_is_called(finished, tones):
    loaded = transformers.ASTForAudioClassification.from_pretrained(finished.output).eval()
    features = transformers.ASTFeatureExtractor.from_pretrained(finished.output)
    clips = [load_audio(path).numpy() for path in sorted(tones.glob("test/*/00.wav"))]
    inputs = features(clips, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        expected = finished.model.eval()(**inputs).logits
        assert not torch.allclose(loaded(**inputs).logits, expected, atol=1e-3)
        pruneattn.prune(loaded, **loaded.config.pruneattn)
        assert torch.equal(loaded(**inputs).logits, expected)
    assert [loaded.config.id2label[number] for number in range(3)] == ["high", "low", "middle"]


def test_the_input_equals_that_of_the_feature_extractor(script, arguments, tones, tmp_path):
    args = script.parse(arguments(tmp_path))
    dataset = load_dataset("folder", "test", data_dir=tones)
    failed, features = [], script.make_features(args, dataset)
    clips = script.spectrograms(dataset, features, 0, failed)
    script.save_features(features.config, tmp_path)
    theirs = transformers.ASTFeatureExtractor.from_pretrained(tmp_path)
    for number in (0, 5, 11):
        expected = theirs(dataset[number]["wave"].numpy(), sampling_rate=16000, return_tensors="pt")["input_values"][0]
        torch.testing.assert_close(clips[number]["input_values"], expected, rtol=0, atol=2e-3)
        assert clips[number]["labels"] == dataset.clips[number].labels[0]


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [True, False])
def test_every_way_to_run_a_fine_tuned_folder_gives_the_same_labels(script, arguments, tones, tmp_path, pretrained):
    """With stride 10: in transformers after `prune`, by `evaluate`, by `predict`, and as an exported file."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, output = [*FRESH, "--stride", "10"], tmp_path / "run"
    if pretrained:
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
        transformers.ASTForAudioClassification(transformers.ASTConfig(max_length=100, **sizes)).save_pretrained(
            tmp_path
        )
        model = ["--model", str(tmp_path)]
    script.main(arguments(output, model=model))
    paths = sorted((tones / "test").rglob("*.wav"))
    truth = [path.parent.name for path in paths]
    result = json.loads((output / "result.json").read_text())

    theirs = transformers.ASTForAudioClassification.from_pretrained(output).eval()
    assert (theirs.config.frequency_stride, theirs.config.time_stride, theirs.config.max_length) == (10, 10, 64)
    pruneattn.prune(theirs, **theirs.config.pruneattn)
    features = transformers.ASTFeatureExtractor.from_pretrained(output)
    waves = [load_audio(path) for path in paths]
    inputs = features([wave.numpy() for wave in waves], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        labels = [theirs.config.id2label[number] for number in theirs(**inputs).logits.argmax(1).tolist()]
    accuracy = np.mean([label == true for label, true in zip(labels, truth)])
    assert accuracy == pytest.approx(result["test_top1"]) and accuracy > 0.4

    data = ["--dataset", "folder", "--data-dir", str(tones), "--output", str(tmp_path / "table")]
    evaluate.main([str(output), *data, "--keep-rate", "0.5", "--rounds", "0"])
    (row,) = json.loads((tmp_path / "table" / "table.json").read_text())["rows"]
    assert row["top1"] == pytest.approx(accuracy)

    predict.main([str(output), *map(str, paths), "--output", str(tmp_path / "labels.jsonl")])
    rows = {row["path"]: row for row in map(json.loads, (tmp_path / "labels.jsonl").read_text().splitlines())}
    assert [rows[str(path)]["labels"][0] for path in paths] == labels

    export.main([str(output), "--format", "onnx", "--waveform", "--output", str(tmp_path / "model.onnx")])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    samples, lengths = np.zeros((len(waves), samples_for(64)), np.float32), []
    for row, wave in zip(samples, waves):
        lengths.append(min(len(wave), samples.shape[1]))
        row[: lengths[-1]] = wave[: lengths[-1]]
    (logits,) = session.run(["logits"], {"waves": samples, "lengths": np.array(lengths)})
    assert [theirs.config.id2label[number] for number in logits.argmax(1).tolist()] == labels


@pytest.mark.slow
def test_training_clips_decide_whether_the_task_is_multilabel(script, arguments, tones, tmp_path):
    """Each validation clip has one label, but every second training clip has two."""
    rows = [
        "index,mid,display_name",
        *(f"{number},{kind},{kind}" for number, kind in enumerate(("high", "low", "middle"))),
    ]
    (tmp_path / "class_labels_indices.csv").write_text("\n".join(rows))
    manifests = ["--dataset", "manifest"]
    for split in ("train", "val"):
        kinds = [(path, path.parent.name) for path in sorted((tones / split).rglob("*.wav"))]
        entries = [
            {"wav": str(path), "labels": f"{kind},low" if split == "train" and number % 2 else kind}
            for number, (path, kind) in enumerate(kinds)
        ]
        (tmp_path / f"{split}.json").write_text(json.dumps({"data": entries}))
        manifests += [f"--{split}-manifest", tmp_path / f"{split}.json"]
    script.main(arguments(tmp_path / "run", *manifests, "--epochs", 1, "--keep-rate", 1))
    assert (
        trainer_state(tmp_path / "run")["best_metric"] == trainer_state(tmp_path / "run")["log_history"][-1]["eval_map"]
    )


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_run(script, arguments, finished, tmp_path, monkeypatch):
    begin = script.KeepRateSchedule.on_epoch_begin

    def stopped(self, args, state, *rest, **more):
        if state.epoch == 4:
            raise KeyboardInterrupt
        begin(self, args, state, *rest, **more)

    monkeypatch.setattr(script.KeepRateSchedule, "on_epoch_begin", stopped)
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments(tmp_path, "--resume"))  # there is no checkpoint yet: starts from the beginning
    monkeypatch.undo()
    with pytest.raises(UserError, match="already contains a run: resume it with --resume"):
        script.main(arguments(tmp_path))
    changed = ("--keep-rate", 0.25, "--embed-dim", 16)
    with pytest.raises(UserError, match="hidden_size: 32 -> 16; pruneattn: .*0.5.* -> .*0.25"):
        script.main(arguments(tmp_path, "--resume", *changed))
    (tmp_path / "checkpoint-15").mkdir()  # incomplete, as if killed while writing it
    (tmp_path / "checkpoint-15" / "config.json").write_text("{")
    script.main(arguments(tmp_path, "--resume"))
    assert len(json.loads((tmp_path / "result.json").read_text())["epoch_seconds"]) == 3  # of 7
    assert trainer_state(tmp_path)["log_history"] == trainer_state(finished.output)["log_history"]
    ours, theirs = (load_weights(folder / "model.safetensors") for folder in (tmp_path, finished.output))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_pretrained_model_gets_a_new_head_and_the_middle_of_its_positions(script, arguments, tones, tmp_path):
    config = transformers.ASTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_length=128,
        num_labels=7,
    )
    before = transformers.ASTForAudioClassification(config)  # of stride 10: 12 rows of 12
    torch.nn.init.normal_(before.base_model.embeddings.position_embeddings)
    before.save_pretrained(tmp_path / "pretrained")
    args = script.parse(arguments(tmp_path, model=["--model", str(tmp_path / "pretrained")]))
    dataset = load_dataset("folder", "train", data_dir=tones)
    model = script.make_model(args, script.open_config(args), dataset)
    table = before.base_model.embeddings.position_embeddings
    grid = table[0, 2:].unflatten(0, (12, 12))[:, 4:9].flatten(0, 1)  # 64 frames: 1 + (64 - 16) // 10 columns
    assert torch.equal(model.base_model.embeddings.position_embeddings[0], torch.cat([table[0, :2], grid]))
    assert model.config.max_length == 64 and model(torch.zeros(1, 64, 128)).logits.shape == (1, 3)
    ours, theirs = model.state_dict(), before.state_dict()
    same = [name for name in theirs if "position" not in name and not name.startswith("classifier.dense")]
    assert all(torch.equal(ours[name], theirs[name]) for name in same)
    args.frames = 256
    with pytest.raises(UserError, match="--frames 256: --model has positions for 16 to 128"):
        script.make_model(args, config, dataset)


def test_unsupported_models_are_rejected(script, arguments, tones, tmp_path):
    def run(model):
        script.main(arguments(tmp_path / "run", model=["--model", str(model)]))

    with pytest.raises(UserError, match="--model .*nothing"):
        run(tmp_path / "nothing")
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="this is not an AST for 128 mel bins, but vit"):
        run(tmp_path / "vit")
    config = transformers.ASTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    transformers.ASTForAudioClassification(config).save_pretrained(tmp_path / "cut")
    weights = load_weights(tmp_path / "cut" / "model.safetensors")
    name = next(name for name in weights if "cls_token" in name)
    del weights[name]
    save_weights(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no weights for audio_spectrogram_transformer.embeddings.cls_token"):
        run(tmp_path / "cut")


def test_sizes_are_only_for_random_weights(script, arguments, tmp_path):
    for option, value in (("--depth", 3), ("--stride", 16)):
        with pytest.raises(UserError, match=f"{option} applies only with --size"):
            script.parse(arguments(tmp_path, option, value, model=["--model", "somewhere"]))


@pytest.mark.parametrize(("words", "strides"), [((), (16, 16)), (("--stride", "10,16"), (10, 16))])
def test_the_stride_of_a_model_with_random_weights(script, arguments, tones, tmp_path, words, strides):
    args = script.parse(arguments(tmp_path, *words))
    model = script.make_model(args, None, load_dataset("folder", "train", data_dir=tones))
    assert (model.config.frequency_stride, model.config.time_stride) == strides
    assert model(torch.zeros(1, 64, 128)).logits.shape == (1, 3)


@pytest.mark.slow
def test_several_labels_per_clip_without_a_test_split(script, tones, tmp_path, capsys):
    names = ["low", "middle", "high"]
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("index", "mid", "display_name"), *((i, n, n) for i, n in enumerate(names))])
    for split in ("train", "val"):
        entries = [
            {"wav": str(path), "labels": ",".join(dict.fromkeys((path.parent.name, names[number % 3])))}
            for number, path in enumerate(sorted((tones / split).glob("*/*.wav")))
        ]
        entries.append({"wav": str(tmp_path / "broken.wav"), "labels": "low"})
        (tmp_path / f"{split}.json").write_text(json.dumps({"data": entries}))
    (tmp_path / "broken.wav").write_text("no sound")
    manifests = [f"--train-manifest={tmp_path}/train.json", f"--val-manifest={tmp_path}/val.json"]
    options = ["--epochs", "1", "--shrink-start", "0", "--shrink-epochs", "0", "--score", "column_mean"]
    options += ["--label-csv", str(tmp_path / "labels.csv"), "--output", str(tmp_path / "run")]
    script.main([*FRESH, *RECIPE.split(), *manifests, *options])
    output = capsys.readouterr().out
    assert "measured on 36 training clips" in output and "2 of 50 clips could not be read" in output
    assert len((tmp_path / "run" / "failed_clips.txt").read_text().splitlines()) == 2
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 < result["val_map"] <= 1 and result["score"] == "column_mean"
    config = transformers.ASTConfig.from_pretrained(tmp_path / "run")
    assert config.problem_type == "multi_label_classification" and config.num_labels == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ("--shrink-epochs 6", r"reaches 0.5 only in epoch 7 .* but the run has 7 epochs"),
        ("--epochs 0", "--epochs 0: must be at least 1"),
        ("--keep-rate 1.5", "keep_rate"),
        ("--prune-blocks 0 3", "prune_blocks"),
        ("--frames 15", "frames"),
    ],
)
def test_invalid_values_are_rejected(script, arguments, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        script.main(arguments(tmp_path, *options.split()))
