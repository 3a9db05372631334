"""Models and checkpoints that version 0.1.0 saved give the results that it computed."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import pruneattn
from pruneattn.data import FeatureConfig, FeatureExtractor

PATHS = {"audiomae": "audiomae", "ast": "ast.safetensors"}
CONVERTED = [
    ("ast", "converted/ast.pth"),
    ("ast", "converted/huggingface"),
    ("ast", "ast.safetensors"),
    ("audiomae", "converted/audiomae.pth"),
    ("audiomae", "converted/timm"),
    ("audiomae", "audiomae"),
]


@pytest.fixture(params=PATHS)
def name(request):
    return request.param


@pytest.fixture
def model(name, files):
    return pruneattn.load_pretrained(files / PATHS[name])


def fresh(expected, **changes):
    """A model of the saved configuration with random weights."""
    return pruneattn.create_model(**(expected["config"] | changes)).eval()


def logits_of(model, fbank, **arguments):
    with torch.no_grad():
        logits = model(fbank, **arguments)
    return getattr(logits, "logits", logits)


def description_of(path):
    """The JSON in the metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["pruneattn"])


def test_a_saved_model_has_its_configuration_and_description(model, name, expected):
    wanted = expected["models"][name]
    assert model.config == wanted["config"]
    assert list(model.keep_rates) == wanted["keep_rates"] and not model.training
    assert model.features.to_dict() == wanted["features"] and model.features == FeatureConfig(**wanted["features"])
    assert (model.labels, model.multilabel, model.extra) == (wanted["labels"], wanted["multilabel"], wanted["extra"])


def test_a_saved_model_computes_the_same(model, name, expected, fbank, close):
    wanted = expected["models"][name]
    trace = pruneattn.trace(model, fbank)
    assert [one.tolist() for one in trace.kept] == wanted["kept"]
    close([[row[:4] for row in one.tolist()] for one in trace.scores], wanted["scores"])
    close(trace.logits.detach(), wanted["logits"])
    close(logits_of(model, fbank), wanted["logits"])
    for rate, logits in wanted["logits_at"].items():
        model.set_keep_rate(float(rate))
        close(logits_of(model, fbank), logits)


def test_a_saved_model_counts_the_same_macs(model, name, expected):
    macs = pruneattn.count_macs(model)
    wanted = expected["models"][name]["macs"]
    assert (macs.paper, macs.computed, [list(pair) for pair in macs.blocks]) == tuple(wanted.values())


def test_optimization_for_inference_keeps_the_logits(model, name, expected, fbank, close):
    close(logits_of(pruneattn.optimize_for_inference(model), fbank), expected["models"][name]["logits"])


def test_the_reference_backend_computes_the_same(model, name, expected, fbank, close):
    with pruneattn.use_backend("reference"):
        close(logits_of(model, fbank), expected["models"][name]["logits"])


def test_the_description_of_a_model_can_be_read_and_assigned(model, tmp_path):
    values = {
        "features": replace(model.features, mean=-1.5),
        "labels": [f"class {number}" for number in range(model.num_classes)],
        "multilabel": not model.multilabel,
        "extra": {"from": "a test"},
    }
    for name, value in values.items():
        setattr(model, name, value)
    assert {name: getattr(model, name) for name in values} == values
    again = copy.deepcopy(model)
    assert {name: getattr(again, name) for name in values} == values
    pruneattn.save_pretrained(model, tmp_path / "model.safetensors", **values)
    loaded = pruneattn.load_pretrained(tmp_path / "model.safetensors")
    assert {name: getattr(loaded, name) for name in values} == values


@pytest.mark.parametrize(("family", "format"), [("audiomae", "timm"), ("ast", "huggingface")])
def test_a_created_model_is_saved_with_the_assigned_description(expected, tmp_path, family, format):
    wanted = expected["models"][family]
    model = fresh(wanted)
    model.features, model.labels = FeatureConfig.from_dict(wanted["features"] | {"padding": "zero"}), wanted["labels"]
    model.multilabel = wanted["multilabel"]
    pruneattn.save_checkpoint(model, tmp_path / format, format=format)
    config = json.loads((tmp_path / format / "config.json").read_text())
    labels = config["label_names"] if format == "timm" else list(config["id2label"].values())
    assert labels == wanted["labels"]


def test_features_of_a_saved_model_are_extracted(model):
    wave = torch.sin(torch.arange(16000) / 5.0)
    fbank = FeatureExtractor(model.features)(wave[None])
    assert fbank.shape == (1, 128, 128) and model(fbank).shape == (1, model.num_classes)


def test_a_model_is_saved_in_the_same_format(name, model, files, expected, tmp_path):
    wanted = expected["models"][name]
    arguments = {"features": model.features, "labels": model.labels, "multilabel": model.multilabel}
    pruneattn.save_pretrained(model, tmp_path / PATHS[name], **arguments, extra=model.extra)
    old, new = files / PATHS[name], tmp_path / PATHS[name]
    if old.is_dir():
        assert {path.name for path in old.iterdir()} <= {path.name for path in new.iterdir()}
        configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (old, new)]
        assert configs[0].keys() <= configs[1].keys()
        old, new = old / "model.safetensors", new / "model.safetensors"
    before, after = description_of(old), description_of(new)
    for description in (before, after):
        description.pop("pruneattn_version")
    assert before == {key: after[key] for key in before} and before["model"] == wanted["config"]
    assert_same_tensors(load_file(old), load_file(new))


def assert_same_tensors(old, new):
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) and old[key].dtype == new[key].dtype for key in old)


@pytest.mark.parametrize(
    ("family", "path"),
    [("audiomae", "audiomae"), ("audiomae", "converted/timm"), ("ast", "converted/huggingface")],
)
@pytest.mark.filterwarnings("ignore:Hugging Face's ASTFeatureExtractor:UserWarning")
def test_an_old_folder_is_replaced_with_its_card(old, expected, family, path):
    """The package still recognizes its own config.json and its own unedited README.md."""
    wanted = expected["models"][family]
    source = PATHS[family]
    old(*{source, path.partition("/")[0]})
    model = pruneattn.load_pretrained(source)
    labels = [f"new {number}" for number in range(model.num_classes)]
    arguments = {"features": model.features, "labels": labels, "multilabel": wanted["multilabel"]}
    if path == source:
        pruneattn.save_pretrained(model, path, **arguments)
    else:
        pruneattn.save_checkpoint(model, path, format=path.partition("/")[2], **arguments)
    assert "new 0, new 1" in Path(path, "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("family", "path"), CONVERTED, ids=[path for _, path in CONVERTED])
def test_a_checkpoint_of_each_format_is_loaded(family, path, files, expected, fbank, close):
    wanted = expected["models"][family]
    model = fresh(wanted)
    report = pruneattn.load_checkpoint(model, files / path)
    assert report.missing == [] and path.rpartition("/")[2] in report.path
    assert {ours for _, ours in report.converted} == set(model.state_dict())
    assert all(key.startswith(("v.head.", "v.head_dist.", "module.v.head")) for key in report.unused)
    assert bool(report.unused) == (path == "converted/ast.pth")
    assert report.format in str(report) and isinstance(report.notes, list)
    close(logits_of(model, fbank), wanted["logits"])


def test_a_head_of_other_classes_keeps_its_initial_values(files, expected):
    model = fresh(expected["models"]["ast"], num_classes=7)
    report = pruneattn.load_checkpoint(model, files / "converted/ast.pth", stride=16)
    assert {"head.weight", "head.bias"} <= set(report.missing)


def test_hugging_face_folder_is_opened_with_its_pruning(files, expected, fbank, close):
    wanted = expected["models"]["ast"]
    model = pruneattn.load_pretrained(files / "converted/huggingface")
    assert list(model.keep_rates) == wanted["keep_rates"] and list(model.prune_blocks) == [1, 2]
    assert model.labels == wanted["labels"] and model.multilabel is False and model.extra == {}
    assert (model.features.mean, model.features.std) == (wanted["features"]["mean"], wanted["features"]["std"])
    close(logits_of(model, fbank), wanted["logits"])


def test_hugging_face_model_is_pruned_as_its_config_says(files, expected, fbank, close):
    pytest.importorskip("transformers")
    from transformers import ASTForAudioClassification

    wanted = expected["models"]["ast"]
    theirs = ASTForAudioClassification.from_pretrained(files / "converted/huggingface").eval()
    close(logits_of(theirs, fbank), wanted["logits_at"]["1.0"])
    assert pruneattn.prune(theirs, **theirs.config.pruneattn) is theirs
    close(logits_of(theirs, fbank), wanted["logits"])
    assert pruneattn.prune(theirs, keep_rate=0.5, blocks=(1, 2)) is theirs
    close(logits_of(theirs, fbank), wanted["logits_at"]["0.5"])
    pruneattn.set_keep_rate(theirs, 0.7)
    close(logits_of(theirs, fbank), wanted["logits_at"]["0.7"])
    close(logits_of(pruneattn.unprune(theirs), fbank), wanted["logits_at"]["1.0"])


def test_timm_model_is_pruned_by_positional_arguments(files, expected, fbank, close):
    timm = pytest.importorskip("timm")
    wanted = expected["models"]["audiomae"]
    theirs = timm.create_model(f"local-dir:{files / 'converted/timm'}", pretrained=True).eval()
    close(logits_of(theirs, fbank.unsqueeze(1)), wanted["logits_at"]["1.0"])
    ours = fresh(wanted, score="column_mean", keep_rate=(0.75, 0.5))
    pruneattn.load_checkpoint(ours, files / "converted/audiomae.pth")
    pruneattn.prune(theirs, (0.75, 0.5), (1, 2), "column_mean")
    close(logits_of(theirs, fbank.unsqueeze(1)), logits_of(ours, fbank))


@pytest.mark.parametrize("name", ["run", "toy-run", "table1/unpruned-seed0", "table1/attention-0.5-seed0"])
def test_the_best_checkpoint_of_a_run_is_opened(name, files):
    model = pruneattn.load_pretrained(files / name)
    config = json.loads((files / name / "config.json").read_text())
    assert (model.embed_dim, len(model.blocks), model.num_heads) == tuple(
        config[key] for key in ("embed_dim", "depth", "num_heads")
    )
    assert model.labels == config["labels"] and list(model.prune_blocks) == config["prune_blocks"]
    assert isinstance(model.extra, dict) and model.extra == description_of(files / name / "best.safetensors")["extra"]
    report = pruneattn.load_checkpoint(fresh({"config": model.config}), files / name / "best.safetensors")
    assert report.missing == report.unused == []
