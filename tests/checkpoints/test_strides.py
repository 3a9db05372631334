"""The stride of a checkpoint's positions: as the file records it, by the size of the table, or as given."""

import pytest
import torch

from pruneattn.checkpoints.converters import AST_OFFICIAL
from pruneattn.checkpoints.load_checkpoint import load_checkpoint
from pruneattn.errors import UserError
from pruneattn.models import create_model


def make(family, frames=1024, stride=16):
    """A small model with random positions."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3, "prune_blocks": (1,)}
    return create_model(f"{family}_tiny", frames=frames, stride=stride, **sizes)


def official_state(frames, stride):
    """An official checkpoint with unequal positions, and our model that it was made from."""
    model = make("ast", frames=frames, stride=stride)
    return AST_OFFICIAL.from_ours(model.state_dict()), model


@pytest.mark.parametrize(("frames", "stride"), [(1024, 10), (512, 10), (128, 10), (1024, 12), (1024, 14), (200, 10)])
def test_the_stride_of_a_file_without_configuration(tmp_path, frames, stride):
    """The size of the table determines it, and the model of another stride gets resampled positions."""
    state, source = official_state(frames, stride)
    torch.save(state, tmp_path / "x.pth")
    same = make("ast", frames=frames, stride=stride)
    assert load_checkpoint(same, tmp_path / "x.pth").notes == []
    assert torch.equal(same.pos_embed, source.pos_embed)
    with pytest.warns(UserWarning, match=f"an AST with stride {stride}"):
        load_checkpoint(make("ast", frames=frames), tmp_path / "x.pth")


def test_a_file_of_ambiguous_size_needs_its_stride(tmp_path):
    """12 x 30 patches of stride 10, or 8 x 45 of stride 16."""
    torch.save(official_state(306, 10)[0], tmp_path / "x.pth")
    model = make("ast")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"x.pth: position table: 360 patches are 12 x 30 .* 8 x 45 .*\(--stride\)"):
        load_checkpoint(model, tmp_path / "x.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.warns(UserWarning, match="30 time columns interpolated to 101"):
        load_checkpoint(make("ast", stride=10), tmp_path / "x.pth")  # the model asks for its stride
    with pytest.warns(UserWarning, match="12 x 30 positions resampled to 8 x 19"):
        load_checkpoint(make("ast", frames=306), tmp_path / "x.pth", stride=10)
    assert load_checkpoint(make("ast", frames=720), tmp_path / "x.pth", stride=(16, 16)).notes == []
    assert load_checkpoint(make("ast", frames=720), tmp_path / "x.pth").notes == []  # the model's size
    with pytest.raises(UserError, match="stride: expected a whole number from 1 to 16"):
        load_checkpoint(make("ast"), tmp_path / "x.pth", stride=0)


def test_our_own_files_record_their_stride(tmp_path):
    """144 patches are 12 x 12 with stride 10, but 8 x 18 in a training state without a stride."""
    model, target = make("ast", frames=288), make("ast", frames=128)
    for config in ({}, {"stride": [16, 16]}):
        torch.save({"model": model.state_dict(), "config": {"prune_blocks": [1], **config}}, tmp_path / "last.pt")
        assert "center crop of 18" in load_checkpoint(target, tmp_path / "last.pt").notes[0]
    with pytest.warns(UserWarning, match="12 x 12 positions resampled to 8 x 8"):
        load_checkpoint(target, tmp_path / "last.pt", stride=10)
    torch.save({"model": model.state_dict(), "config": {"prune_blocks": [1], "stride": [10, 10]}}, tmp_path / "last.pt")
    with pytest.warns(UserWarning, match="12 x 12 positions resampled to 8 x 8"):
        load_checkpoint(target, tmp_path / "last.pt")


def test_audiomae_has_one_stride(tmp_path):
    torch.save(make("audiomae").state_dict(), tmp_path / "x.pth")
    load_checkpoint(make("audiomae"), tmp_path / "x.pth", stride=16)
    with pytest.raises(UserError, match="AudioMAE.*, whose patches have a stride of 16, but stride is 10,16"):
        load_checkpoint(make("audiomae"), tmp_path / "x.pth", stride=(10, 16))
