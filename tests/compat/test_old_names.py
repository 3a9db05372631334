"""The names that the documentation of version 0.1.0 gives resolve, and take the same arguments."""

import importlib
import inspect
import subprocess
import sys

import pytest

import pruneattn

#: Documented names, with the arguments of functions.
NAMES = {
    "pruneattn.create_model": (
        "name num_classes frames keep_rate prune_blocks score drop_path embed_dim depth num_heads"
    ),
    "pruneattn.list_models": "",
    "pruneattn.set_keep_rate": "model keep_rate",
    "pruneattn.trace": "model fbank patches",
    "pruneattn.models.trace.Trace": "logits kept scores",
    "pruneattn.count_macs": "model",
    "pruneattn.models.macs.Macs": "paper computed blocks",
    "pruneattn.optimize_for_inference": "model dtype",
    "pruneattn.prune": "model keep_rate blocks score",
    "pruneattn.unprune": "model",
    "pruneattn.load_checkpoint": "model path stride",
    "pruneattn.save_pretrained": "model path features labels multilabel extra",
    "pruneattn.load_pretrained": "path",
    "pruneattn.save_checkpoint": "model path format features labels multilabel",
    "pruneattn.export_model": "model path format example waveform dtype kernels",
    "pruneattn.backends": "",
    "pruneattn.use_backend": "name",
    "pruneattn.UserError": None,
    "pruneattn.__version__": None,
    "pruneattn.Pruning": "",
    "pruneattn.models.PrunedViT": None,
    "pruneattn.models.AST": None,
    "pruneattn.models.AudioMAE": None,
    "pruneattn.models.create_model": "name num_classes frames keep_rate",
    "pruneattn.models.list_models": "",
    "pruneattn.adapters.prune": "model keep_rate blocks score",
    "pruneattn.adapters.unprune": "model",
    "pruneattn.adapters.set_keep_rate": "model keep_rate",
    "pruneattn.adapters.register_family": "find",
    "pruneattn.adapters.Trunk": "blocks path view extra_tokens class_token guard unguard",
    "pruneattn.adapters.BlockView": "block",
    "pruneattn.data.load_dataset": "name split data_dir fold manifest label_csv multilabel frames cache seed",
    "pruneattn.data.DatasetInfo": (
        "num_classes frames mean std multilabel metric splits layout how_to_get markers folders"
    ),
    "pruneattn.data.DATASETS": None,
    "pruneattn.data.ClipDataset": "name clips labels multilabel missing max_samples cache",
    "pruneattn.data.Clip": "path labels",
    "pruneattn.data.load_audio": "path sample_rate seconds",
    "pruneattn.data.find_audio": "folder onerror",
    "pruneattn.data.FeatureConfig": "frames mean std padding",
    "pruneattn.data.FeatureExtractor": "config",
    "pruneattn.data.make_loader": "dataset batch_size train seed epoch rank world workers start_batch limit",
    "pruneattn.data.Batch": "waves lengths targets index failed",
    "pruneattn.data.collate": "items paths replace dataset",
    "pruneattn.data.fbank.samples_for": "frames",
    "pruneattn.ops.attention": "q k v scale",
    "pruneattn.ops.column_mean_attention": "q k v extra_tokens scale",
    "pruneattn.ops.cls_scores": "q_cls k extra_tokens scale",
    "pruneattn.ops.select_tokens": "scores keep",
    "pruneattn.ops.gather_tokens": "x index extra_tokens",
    "pruneattn.ops.prune_tokens": "scores x y keep extra_tokens",
    "pruneattn.ops.prune_epilogue": "partial_scores x y keep extra_tokens",
    "pruneattn.ops.cls_prune_tokens": "q_cls k x y keep extra_tokens scale",
    "pruneattn.ops.pruned_attention": "q k v x keep extra_tokens scale",
    "pruneattn.training.recipes.RECIPES": None,
    "pruneattn.training.schedule.keep_rate_at": None,
}
MEMBERS = {
    "pruneattn.Pruning": "__call__ attention_macs select_then_query parts statistic",
    "pruneattn.adapters.BlockView": "check dim num_heads head_dim dropout norm project finish",
    "pruneattn.data.FeatureConfig": "from_dict to_dict from_hugging_face to_hugging_face",
    "pruneattn.data.ClipDataset": "read",
}
MODEL_MEMBERS = (
    "forward forward_features forward_head set_keep_rate keep_rates config grid num_patches patch_position kept_grid "
    "patches_from_grid patch_values name num_classes frames prune_blocks score embed_dim num_heads features labels "
    "multilabel extra"
)


def resolve(name):
    """The object of a dotted name, as an import of its longest module, then attributes."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[count:]:
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_name_resolves_and_takes_its_arguments(name):
    found = resolve(name)
    if NAMES[name] is not None:
        inspect.signature(found).bind_partial(**dict.fromkeys(NAMES[name].split()))


@pytest.mark.parametrize("name", MEMBERS)
def test_class_has_its_members(name):
    missing = [member for member in MEMBERS[name].split() if not hasattr(resolve(name), member)]
    assert missing == []


def test_model_has_its_members(files):
    model = pruneattn.load_pretrained(files / "ast.safetensors")
    assert [name for name in MODEL_MEMBERS.split() if not hasattr(model, name)] == []
    assert isinstance(model, pruneattn.models.PrunedViT)


def test_names_that_have_two_places_are_the_same_object():
    for name in ("prune", "unprune", "set_keep_rate"):
        assert getattr(pruneattn, name) is getattr(pruneattn.adapters, name)
    assert pruneattn.create_model is pruneattn.models.create_model
    assert issubclass(pruneattn.UserError, ValueError)


def test_listed_names_exist():
    assert set(pruneattn.list_models()) >= {
        "audiomae_tiny",
        "audiomae_small",
        "audiomae_base",
        "audiomae_large",
        "ast_tiny",
        "ast_small",
        "ast_base",
    }
    assert set(pruneattn.data.DATASETS) >= {"as20k", "spc2", "esc50", "voxceleb1", "toy", "manifest", "folder"}
    assert set(pruneattn.backends()) >= set(pruneattn.ops.__all__)
    assert all(set(row) == {"reference", "cpu", "cuda", "triton"} for row in pruneattn.backends().values())
    names = {name.split(".")[1] for name in NAMES if name.count(".") == 1 and not name.endswith("__")}
    assert names | {"ops", "models", "data", "adapters"} <= set(dir(pruneattn))


@pytest.mark.slow
def test_submodules_come_with_the_package(environment, tmp_path):
    """No further import is needed for a documented name of a subpackage, in a new process."""
    code = "import pruneattn as p; p.data.FeatureConfig, p.ops.attention, p.models.PrunedViT, p.adapters.BlockView"
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)
