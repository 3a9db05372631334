"""The stride of a run: of its initial weights, as given, or of the run that it continues."""

import json

import pytest
import torch

import pruneattn
from pruneattn.errors import UserError


@pytest.fixture
def published(tmp_path):
    """Weights of an official AST with stride 10 for the model of `Runs.arguments`."""
    torch.manual_seed(0)
    model = pruneattn.create_model(
        "ast_tiny", embed_dim=48, depth=4, num_heads=3, prune_blocks=(), frames=70, stride=10
    )
    pruneattn.save_checkpoint(model, tmp_path / "published.pth", format="ast")
    return tmp_path / "published.pth"


SHORT = ("--model", "ast", "--frames", 70, "--epochs", 1, "--keep-rate", 1)


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_initial_weights_keep_their_stride(train, published, recwarn):
    run = train("run", *SHORT, "--init", published)
    assert not [warning for warning in recwarn if "positions" in str(warning.message)]
    assert config(run)["stride"] == train.state(run)["config"]["stride"] == [10, 10]
    model = pruneattn.load_pretrained(run)
    assert (model.stride, model.frames, model.num_patches) == ((10, 10), 70, 72)
    published.unlink()  # a resumed run does not read it again
    (run / "result.json").unlink()
    train("run", *SHORT, "--init", published, "--resume")
    assert config(run)["stride"] == [10, 10] and (run / "result.json").exists()
    train("run", *SHORT, "--stride", 10, "--resume")
    with pytest.raises(UserError, match=r"another configuration.*stride: \[10, 10\] -> \[16, 16\]"):
        train("run", *SHORT, "--stride", 16, "--resume")


def test_positions_are_resampled_on_request(train, published):
    with pytest.warns(UserWarning, match="12 x 6 positions resampled to 8 x 4 of stride 16"):
        run = train("run", *SHORT, "--init", published, "--stride", 16)
    assert config(run)["stride"] == [16, 16] and pruneattn.load_pretrained(run).num_patches == 32


def test_random_weights_have_stride_16_or_the_given_one(train):
    assert config(train("16", *SHORT))["stride"] == [16, 16]
    assert pruneattn.load_pretrained(train("10", *SHORT, "--stride", "10,16")).stride == (10, 16)
    with pytest.raises(UserError, match="stride: audiomae_tiny has a patch every 16 mel bins"):
        train("audiomae", "--stride", 10)
    assert not (train.root / "audiomae" / "config.json").exists()


def test_a_run_of_a_version_without_strides_resumes(train, short):
    first = train.copy(short, "first")
    for name in ("last.pt", "trunk.pt"):
        checkpoint = train.state(first, name)
        assert checkpoint["config"].pop("stride") == [16, 16]
        torch.save(checkpoint, first / name)
    train("first", *train.short, "--resume")
    branch = train("branch", *train.short, "--keep-rate", 0.25, "--branch-from", first / "trunk.pt")
    assert config(branch)["stride"] == [16, 16]


def test_a_branch_has_the_stride_of_its_trunk(train):
    options = ["--model", "ast", "--frames", 70, "--epochs", 2, "--shrink-epochs", 0]
    first = train("first", *options, "--stride", 10)
    branch = train("branch", *options, "--keep-rate", 0.25, "--branch-from", first / "trunk.pt")
    assert config(branch)["stride"] == [10, 10] and pruneattn.load_pretrained(branch).stride == (10, 10)
