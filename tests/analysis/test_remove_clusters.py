import csv

import pytest
import torch

from pruneattn.analysis.clusters import Clusters
from pruneattn.analysis.remove_clusters import check_depths, default_depths, finish_without, logits_without
from pruneattn.errors import UserError
from pruneattn.models import create_model


def make_model(family, frames=128, **options):
    torch.manual_seed(3)
    model = create_model(
        f"{family}_tiny",
        embed_dim=32,
        depth=4,
        num_heads=2,
        frames=frames,
        num_classes=6,
        keep_rate=0.5,
        prune_blocks=(1, 2),
        **options,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def one_by_one(model, fbank, removed, after):
    """Logits of clips whose patches are removed, one clip at a time, without masks."""
    logits = []
    for clip, dropped in zip(fbank, removed):
        x = model.prepend_extra_tokens(model.embed(clip[None]))
        for number, block in enumerate(model.blocks):
            if number == after:
                left = torch.cat([torch.ones(model.num_extra_tokens, dtype=torch.bool), ~dropped])
                x = x[:, left]
            q, k, v = block.attn.project(block.norm1(x), "qkv")
            weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
            x = block.finish(x, block.attn.merge_heads(weights @ v))
        if x.shape[1] == model.num_extra_tokens and model.name.startswith("audiomae"):
            logits.append(model.head(model.fc_norm(torch.zeros(1, 32))))
        else:
            logits.append(model.forward_head(x))
    return torch.cat(logits)


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("family", ["audiomae", "ast"])
@torch.inference_mode()
def test_masked_batches_equal_removal_clip_by_clip(family, after):
    model, fbank = make_model(family), torch.randn(6, 128, 128)
    removed = torch.rand(6, 64) < torch.tensor([0.0, 0.1, 0.5, 0.9, 0.98, 1.0])[:, None]
    assert removed[5].all() and not removed[0].any()
    x = model.prepend_extra_tokens(model.embed(fbank))
    for block in model.blocks[:after]:
        x = block.finish(x, block.attn(block.norm1(x)))
    found = finish_without(model, x, removed, after)
    assert found.isfinite().all()
    torch.testing.assert_close(found, one_by_one(model, fbank, removed, after), rtol=1e-4, atol=1e-5)
    assert (found[1:5] - one_by_one(model, fbank, removed.roll(1, 0), after)[1:5]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["audiomae", "ast"])
@torch.inference_mode()
def test_every_clip_can_lose_all_patches(family):
    model, fbank = make_model(family), torch.randn(2, 128, 128)
    everything = torch.ones(2, 64, dtype=torch.bool)
    x = model.prepend_extra_tokens(model.embed(fbank))
    torch.testing.assert_close(finish_without(model, x, everything, 0), one_by_one(model, fbank, everything, 0))


@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_low_and_high_clusters_are_removed_at_every_depth(family):
    model, fbank = make_model(family), torch.randn(3, 128, 128) + torch.randn(3, 128, 128).cumsum(1) / 20
    clusters = Clusters("intensity", (-0.4, -0.1, 0.1, 0.4), (0.0,) * 5, (0.2,) * 5, 0.0, 0.5, 3, 192, "")
    unpruned, logits, shares = logits_without(model, fbank, clusters, [0, 2])
    model.set_keep_rate(1.0)
    columns, rows = 8, 8
    cells = fbank.view(3, columns, 16, rows, 16).mean((2, 4))  # [B, columns, rows]
    values = (cells if family == "audiomae" else cells.transpose(1, 2)).flatten(1)
    with torch.inference_mode():
        torch.testing.assert_close(unpruned, model(fbank))
        assert set(logits) == {(0, "low"), (0, "high"), (2, "low"), (2, "high")}
        for name, removed in (("low", values <= -0.1), ("high", values > 0.1)):
            torch.testing.assert_close(shares[name], removed.float().mean(1))
            assert removed.any() and not removed.all()
            for after in (0, 2):
                expected = one_by_one(model, fbank, removed, after)
                torch.testing.assert_close(logits[after, name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames, stride", [(121, (10, 10)), (100, (10, 16)), (100, 16)])
def test_overlapping_patches_are_removed_by_their_own_cells(frames, stride):
    model = make_model("ast", frames, stride=stride)
    fbank = torch.randn(3, frames, 128) + torch.randn(3, frames, 128).cumsum(1) / 20
    clusters = Clusters("intensity", (-0.4, -0.1, 0.1, 0.4), (0.0,) * 5, (0.2,) * 5, 0.0, 0.5, 3, 192, "")
    _, logits, shares = logits_without(model, fbank, clusters, [2])
    of_frequency, of_time = model.stride
    corners = [(time, mel) for mel in range(0, 113, of_frequency) for time in range(0, frames - 15, of_time)]
    removed = torch.stack([fbank[:, time : time + 16, mel : mel + 16].mean((1, 2)) > 0.1 for time, mel in corners], 1)
    torch.testing.assert_close(shares["high"], removed.float().mean(1))
    with torch.inference_mode():
        expected = one_by_one(model, fbank, removed, 2)
    torch.testing.assert_close(logits[2, "high"], expected, rtol=1e-4, atol=1e-5)


def test_depths_are_spread_and_checked():
    assert default_depths(12) == [0, 2, 4, 6, 8, 10] and default_depths(3) == [0, 1, 2]
    check_depths([0, 11], 12)
    for wrong in (-1, 12):
        with pytest.raises(UserError, match=f"--after-block {wrong}: must be from 0 .* to 11"):
            check_depths([3, wrong], 12)


@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_the_command_compares_with_the_unpruned_model(analysis_run, analyze, tmp_path, family):
    """Metric, difference and counts against predictions clip by clip; a clip that loses all patches is counted."""
    pytest.importorskip("sklearn")
    run = analysis_run(family)
    features = run.model.features
    values = torch.stack(
        [run.model.patch_values(fbank[None], lambda cells: cells.mean(-1))[0] for fbank in run.fbanks()]
    )
    edge = values.max(1).values.sort().values[0].item() + 1e-4  # all patches of the quietest clip are below
    clusters = Clusters(
        "intensity",
        (-9.0, edge, edge + 1e-3, edge + 2e-3),
        (0.0,) * 5,
        (0.2,) * 5,
        features.mean,
        features.std,
        7,
        7 * 64,
        "",
    )
    clusters.save(tmp_path / "clusters.json")
    command = [*run.options(tmp_path / "out"), "--clusters", str(tmp_path / "clusters.json"), "--after-block", "2", "0"]
    analyze("remove_clusters", *command)
    with open(tmp_path / "out" / "remove_clusters.csv", newline="") as file:
        rows = {(int(row["after_block"]), row["removed"]): row for row in csv.DictReader(file)}
    assert set(rows) == {(0, "low"), (0, "high"), (2, "low"), (2, "high")}
    row, removed = rows[2, "low"], values <= edge
    assert int(row["clips_without_tokens"]) == removed.all(1).sum() >= 1 and int(row["clips"]) == 7
    assert float(row["tokens_removed"]) == pytest.approx(removed.float().mean().item())
    targets = torch.tensor(
        [sorted({path.parent.name for path in run.paths}).index(path.parent.name) for path in run.paths]
    )
    fbanks = torch.stack(run.fbanks())
    run.model.set_keep_rate(1.0)
    with torch.inference_mode():
        right = (one_by_one(run.model, fbanks, removed, 2).argmax(1) == targets).double()
        dense = (run.model(fbanks).argmax(1) == targets).double()
    assert float(row["metric"]) == pytest.approx(right.mean().item())
    assert float(row["unpruned"]) == pytest.approx(dense.mean().item())
    assert float(row["difference_se"]) == pytest.approx(((right - dense).std() / 7**0.5).item(), abs=1e-9)
    assert (tmp_path / "out" / "remove_clusters.png").stat().st_size > 10000
