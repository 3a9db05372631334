import math
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import pruneattn
from pruneattn import UserError, create_model, list_models
from pruneattn.data import FeatureConfig
from pruneattn.models.audiomae import sincos_positions
from pruneattn.models.blocks import Block, DropPath, PruningBlock, kept_patches

FAMILIES = ("audiomae", "ast")
SCORES = ("column_mean", "cls", "intensity", "variation", "random")


def test_names_and_sizes():
    assert list_models() == [
        "audiomae_tiny",
        "audiomae_small",
        "audiomae_base",
        "audiomae_large",
        "ast_tiny",
        "ast_small",
        "ast_base",
    ]
    millions = {"audiomae_tiny": 5.5, "audiomae_base": 85.5, "audiomae_large": 302.8, "ast_small": 21.6}
    for name, expected in millions.items():
        with torch.device("meta"):
            model = create_model(name, num_classes=10)
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - expected) < 0.4
    with torch.device("meta"):
        model = create_model("audiomae_large", embed_dim=48, depth=10, num_heads=2)
    assert (model.embed_dim, len(model.blocks), model.num_heads) == (48, 10, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_base"}, "model: 'vit_base' is not one of audiomae_tiny"),
        ({"name": "ast_large"}, "model: 'ast_large'"),
        ({"frames": 15}, "frames: must be at least 16, the width of a patch, got 15"),
        ({"stride": 17}, r"stride: expected a whole number from 1 to 16, or two of them \(frequency, time\), got 17"),
        ({"stride": 0}, "stride: expected a whole number from 1 to 16"),
        ({"stride": (10, 10, 10)}, "stride: expected"),
        ({"stride": 2.0}, "stride: expected"),
        ({"stride": "10"}, "stride: expected"),
        ({"stride": True}, "stride: expected"),
        ({"stride": 10}, "stride: audiomae_tiny has a patch every 16 mel bins and frames, got 10"),
        ({"frames": 0}, "frames: must be a whole number above 0"),
        ({"num_classes": 0}, "num_classes"),
        ({"num_heads": 5}, "num_heads: 5 does not divide embed_dim 192"),
        ({"depth": 8}, r"prune_blocks: \(3, 6, 9\) must be within depth 8"),
        ({"prune_blocks": (6, 3)}, "prune_blocks: must ascend"),
        ({"prune_blocks": (3, 3)}, "prune_blocks: must ascend"),
        ({"prune_blocks": (-1,)}, "prune_blocks"),
        ({"prune_blocks": 3}, r"prune_blocks: expected numbers of blocks, such as \(3, 6, 9\), got 3"),
        ({"keep_rate": None}, "keep_rate: expected a number or one per pruning block, got None"),
        ({"drop_path": "a"}, "drop_path: must be at least 0 and below 1, got 'a'"),
        ({"keep_rate": 0}, "keep_rate: must be above 0 and at most 1, got 0"),
        ({"keep_rate": 1.5}, "keep_rate"),
        ({"keep_rate": float("nan")}, "keep_rate"),
        ({"keep_rate": (0.5, 0.5)}, "keep_rate: 2 values for 3 pruning blocks"),
        ({"keep_rate": 0.5, "prune_blocks": ()}, "keep_rate: 0.5 needs pruning blocks"),
        ({"score": "sum"}, "score: expected a function, a Pruning or one of column_mean"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"embed_dim": 6, "num_heads": 3}, "embed_dim: .*multiple of 4, got 6"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        create_model(**{"name": "audiomae_tiny", "frames": 32} | arguments)


def test_bad_input_is_named(make_model):
    model = make_model("ast")
    with pytest.raises(ValueError, match=r"fbank: expected \[B, 128, 128\], got \[2, 1024, 128\]"):
        model(torch.randn(2, 1024, 128))
    with pytest.raises(ValueError, match=r"fbank: expected"):
        model(torch.randn(128, 128))
    with pytest.raises(ValueError, match=r"patches: expected int64 \[2, P'\], got torch.int32"):
        model(torch.randn(2, 128, 128), torch.zeros(2, 3, dtype=torch.int32))


def test_kept_counts():
    assert [kept_patches(n, 0.5) for n in (512, 256, 128, 1)] == [256, 128, 64, 1]
    assert kept_patches(10, 0.3) == 3 and kept_patches(100, 0.07) == 7  # 7.000000000000001
    assert kept_patches(512, 0.7) == 359 and kept_patches(512, 1.0) == 512 and kept_patches(512, 1e-9) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights(family):
    torch.manual_seed(0)
    model = create_model(f"{family}_tiny", frames=128, drop_path=0.1)
    std = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.numel() > 1000}
    xavier = {name: (2 / sum(sizes)) ** 0.5 for name, sizes in {"qkv": (192, 576), "head": (192, 527)}.items()}
    assert std["blocks.3.attn.qkv.weight"] == pytest.approx(xavier["qkv"], rel=0.02)
    assert std["head.weight"] == pytest.approx(2e-5 if family == "audiomae" else xavier["head"], rel=0.02)
    assert std["patch_embed.proj.weight"] == pytest.approx((2 / (256 + 192)) ** 0.5, rel=0.02)
    assert all(not parameter.any() for name, parameter in model.named_parameters() if name.endswith("fc1.bias"))
    rates = [block.drop_path.rate for block in model.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.1, 12))
    if family == "audiomae":
        assert not model.pos_embed.requires_grad and not model.pos_embed[0, 0].any()
        time, mel = torch.arange(8).repeat_interleave(8), torch.arange(8).repeat(8)  # column by column
        torch.testing.assert_close(model.pos_embed[0, 1:], sincos_positions(time, mel, 192).float())
    else:
        assert model.pos_embed.requires_grad and std["pos_embed"] == pytest.approx(0.02, rel=0.05)


def test_sincos_positions_are_distinct():
    time, mel = torch.meshgrid(torch.arange(64), torch.arange(8), indexing="ij")
    table = sincos_positions(time.flatten(), mel.flatten(), 48)
    assert torch.equal(table[:, :24].view(64, 8, 24)[:, 0], table[:, :24].view(64, 8, 24)[:, 7])  # time alone
    assert torch.equal(table[:, 24:].view(64, 8, 24)[0], table[:, 24:].view(64, 8, 24)[63])  # mel alone
    assert torch.cdist(table, table).fill_diagonal_(9).min() > 0.1
    turned = (table[8, 0] - table[0, 0]).item()
    assert turned == pytest.approx(math.sin(1))  # the fastest channel turns by one radian per column
    assert table.mean(0).abs().max() < 1e-12


@pytest.mark.parametrize(("family", "transposed"), [("audiomae", False), ("ast", True)])
def test_positions_and_patch_numbers(make_model, family, transposed):
    model = make_model(family, frames=256)
    assert model.grid == (16, 8) and model.num_patches == 128
    table = torch.arange(128).view(8, 16).T if transposed else torch.arange(128).view(16, 8)
    time, mel = model.patch_position(torch.arange(128))
    assert torch.equal(table[time, mel], torch.arange(128))
    assert torch.equal(model.patches_from_grid((time, mel)), torch.arange(128))
    mask = torch.zeros(2, 16, 8, dtype=torch.bool)
    mask[0, 3, :], mask[1, 8:, 2] = True, True
    assert model.patches_from_grid(mask).tolist() == [table[3].tolist(), table[8:, 2].tolist()]
    assert model.patches_from_grid(mask[1]).tolist() == table[8:, 2].tolist()
    mask[0, 0, 0] = True
    with pytest.raises(ValueError, match="same number of patches"):
        model.patches_from_grid(mask)
    with pytest.raises(ValueError, match=r"bool mask \[16, 8\]"):
        model.patches_from_grid(mask.transpose(1, 2))


def test_positions_at_other_strides(make_model):
    model = make_model("ast", stride=10)
    assert model.grid == (12, 12) and model.num_patches == model.pos_embed.shape[1] - 2 == 144
    assert [place.item() for place in model.patch_position(torch.tensor(25))] == [1, 2]  # row by row
    published = create_model("ast_tiny", stride=10)
    assert published.grid == (101, 12)
    coarse = create_model("ast_tiny")
    assert pruneattn.count_macs(published).paper > 2 * pruneattn.count_macs(coarse).paper


def test_configuration_creates_the_same_model(make_model):
    model = make_model("ast", keep_rate=(0.5, 1.0, 0.7), score="variation", drop_path=0.1)
    again = create_model(**model.config)
    assert again.config == model.config and again.keep_rates == (0.5, 1.0, 0.7)
    again.load_state_dict(model.state_dict())
    fbank = torch.randn(2, 128, 128)
    assert torch.equal(again.eval()(fbank), model(fbank))
    assert "stride" not in model.config  # earlier versions read this configuration
    strided = create_model(**create_model("ast_tiny", stride=(10, 16)).config)
    assert strided.stride == (10, 16) and strided.grid == (64, 12)
    assert create_model("audiomae_tiny", keep_rate=0.7).config["keep_rate"] == 0.7
    assert create_model("audiomae_tiny", prune_blocks=()).config["keep_rate"] == 1.0
    with pytest.raises(UserError, match="score"):
        _ = make_model("ast", score=lambda q, k, v, extra: k).config


def test_groups_of_parameters(make_model):
    model = make_model("ast")
    assert model.no_weight_decay() == {"cls_token", "dist_token", "pos_embed"}
    assert make_model("audiomae").no_weight_decay() == {"cls_token", "pos_embed"}
    layers = {name: model.layer_id(name) for name, _ in model.named_parameters()}
    assert {name for name, layer in layers.items() if layer == 0} == {
        "cls_token",
        "dist_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    assert layers["blocks.0.norm1.weight"] == 1 and layers["blocks.9.mlp.fc2.bias"] == 10
    assert {layers[f"{name}.weight"] for name in ("norm", "head_norm", "head")} == {11}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("score", SCORES)
def test_extra_tokens_are_never_pruned(make_model, monkeypatch, family, score):
    model = make_model(family, score=score, keep_rate=0.2)  # 64 patches to 13, 3 and 1
    extra = model.num_extra_tokens
    calls = []

    def spy(prune):
        def run(*args):
            result = prune(*args)
            calls.append((*args[-4:-2], *result[-2:]))  # x, y, and their kept rows
            return result

        return run

    def spy_on_attention(prune):
        def run(q, k, v, x, keep, extra):
            result = prune(q, k, v, x, keep, extra)
            out, _ = pruneattn.ops.column_mean_attention(q, k, v, extra)
            calls.append((x, out.transpose(1, 2).flatten(2), *result[-2:]))
            return result

        return run

    for name, spying in (("prune_tokens", spy), ("cls_prune_tokens", spy), ("pruned_attention", spy_on_attention)):
        monkeypatch.setattr(pruneattn.ops, name, spying(getattr(pruneattn.ops, name)))
    with torch.no_grad():
        x = model.forward_features(torch.randn(2, 128, 128))
    assert x.shape == (2, extra + 1, 24) and len(calls) == 3
    for x, y, x_kept, y_kept in calls:
        assert torch.equal(x_kept[:, :extra], x[:, :extra]) and torch.equal(y_kept[:, :extra], y[:, :extra])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_dropped_row_is_projected(make_model, family):
    """The layers of a pruning block after its attention see the kept rows only."""
    model = make_model(family, keep_rate=0.5, prune_blocks=(3,))
    rows = []
    block = model.blocks[3]
    assert isinstance(block, PruningBlock)
    for module in (block.attn.proj, block.mlp.fc1):
        module.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[1]))
    model(torch.randn(2, 128, 128))
    assert rows == [32 + model.num_extra_tokens] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_rate_1_runs_unpruned(make_model, monkeypatch, family):
    model, fbank = make_model(family, keep_rate=0.5), torch.randn(2, 128, 128)
    plain = make_model(family, prune_blocks=())
    plain.load_state_dict(model.state_dict())
    for name in ("prune_tokens", "cls_prune_tokens", "pruned_attention"):
        monkeypatch.setattr(pruneattn.ops, name, None)
    model.set_keep_rate(1.0)
    assert torch.equal(model(fbank), plain(fbank))


def test_keep_rate_changes_at_any_time(make_model):
    model, fbank = make_model("audiomae", keep_rate=0.5), torch.randn(2, 128, 128)
    first = model(fbank)
    for rates in (0.7, [1.0, 0.5, 0.25], 0.5):
        model.train().set_keep_rate(rates)
        model(fbank).sum().backward()
    assert model.keep_rates == (0.5, 0.5, 0.5)
    assert torch.equal(model.eval()(fbank), first)


def test_drop_path_drops_whole_clips():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 2, 3))
    assert ((out == 0) | ((out - 4 / 3).abs() < 1e-6)).all() and (out == out[:, :1, :1]).all()
    assert (out[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(drop.eval()(out), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(make_model, family, score, dtype):
    model = make_model(family, score=score, keep_rate=0.5)
    fbank = torch.randn(4, 128, 128)
    expected = pruneattn.trace(model, fbank)
    with torch.autocast("cpu", dtype):
        trace = pruneattn.trace(model, fbank)
    assert trace.logits.dtype == dtype and all(scores.dtype == torch.float32 for scores in trace.scores)
    if score in ("intensity", "variation", "random"):  # the input is not rounded
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(trace.kept, expected.kept, strict=True))
    same = (trace.kept[0].unsqueeze(2) == expected.kept[0].unsqueeze(1)).any(2).float().mean()
    assert same > 0.9
    trace.logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_in_one_graph_for_any_batch(make_model, family):
    torch._dynamo.reset()
    model = make_model(family, keep_rate=0.6, depth=2, prune_blocks=(0,))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 5, 3):
        fbank = torch.randn(batch, 128, 128)
        torch._dynamo.mark_dynamic(fbank, 0)
        fbank.requires_grad_()
        out, expected = compiled(fbank), model(fbank)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        grads = [torch.autograd.grad(logits.sum(), fbank)[0] for logits in (out, expected)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("score", ["column_mean", pytest.param("intensity", marks=pytest.mark.slow)])
def test_a_compiled_model_follows_its_keep_rate(make_model, score):
    torch._dynamo.reset()
    model, fbank = make_model("ast", score=score, depth=2, prune_blocks=(0,)), torch.randn(2, 128, 128)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs = []
    with torch.no_grad():
        for keep_rate in (1.0, 0.6, 0.3):
            model.set_keep_rate(keep_rate)
            outputs.append(compiled(fbank))
            torch.testing.assert_close(outputs[-1], model(fbank), rtol=1e-4, atol=1e-4)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2 < (outputs[1] - outputs[2]).abs().max()


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as checkpoint

    checkpoint.apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))


def compiled_one_by_one(model):
    torch._dynamo.reset()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("wrap", [checkpointed, pytest.param(compiled_one_by_one, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_may_be_wrapped(make_model, family, wrap):
    """Wrapped blocks, for example by gradient checkpointing, prune at the current keep-rate."""
    arguments = {"depth": 3, "prune_blocks": (0, 2), "keep_rate": 0.6}
    model, wrapped = make_model(family, **arguments), make_model(family, **arguments)
    wrap(wrapped)
    assert not any(type(block) in (Block, PruningBlock) for block in wrapped.blocks)
    for keep_rate in (0.6, 0.3, 1.0):
        outputs = []
        for each in (model, wrapped):
            each.set_keep_rate(keep_rate)
            fbank = torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
            logits = each(fbank)
            outputs.append((logits, torch.autograd.grad(logits.sum(), fbank)[0]))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_is_accepted_as_the_model(make_model, tmp_path):
    """These functions run the model uncompiled, and its weights keep their names."""
    model, fbank = make_model("ast", keep_rate=0.6), torch.randn(2, 128, 128)
    compiled = torch.compile(model, backend="eager")
    assert pruneattn.count_macs(compiled) == pruneattn.count_macs(model)
    about = {"features": FeatureConfig(frames=128, mean=0.0, std=1.0), "labels": "abcde", "multilabel": False}
    pruneattn.save_pretrained(compiled, tmp_path / "own.safetensors", **about)
    pruneattn.save_checkpoint(compiled, tmp_path / "official.pth", format="ast")
    for name in ("own.safetensors", "official.pth"):
        again = torch.compile(make_model("ast", seed=1, keep_rate=0.6), backend="eager")
        assert not pruneattn.load_checkpoint(again, tmp_path / name).missing
        assert torch.equal(pruneattn.trace(again, fbank).logits, pruneattn.trace(compiled, fbank).logits)
    pruneattn.set_keep_rate(compiled, 0.3)
    assert model.keep_rates == (0.3,) * 3


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (pruneattn.trace, (torch.zeros(1, 128, 128),)),
        (pruneattn.count_macs, ()),
        (pruneattn.load_checkpoint, ("model.pth",)),
        (partial(pruneattn.save_checkpoint, format="ast"), ("model.pth",)),
        (partial(pruneattn.save_pretrained, features=None, labels="", multilabel=False), ("model.safetensors",)),
    ],
)
def test_other_models_are_rejected_by_name(make_model, tmp_path, monkeypatch, function, arguments):
    monkeypatch.chdir(tmp_path)
    for model, given in ((torch.nn.Linear(2, 2), "Linear"), (torch.nn.DataParallel(make_model("ast")), "DataParallel")):
        with pytest.raises(UserError, match=f"expected a model created by pruneattn.create_model, got {given}"):
            function(model, *arguments)
    assert not list(tmp_path.iterdir())


# The families' own scores, and the two that read the spectrogram, each in the token order of another family.
@pytest.mark.parametrize(
    "family, score",
    [
        ("ast", "cls"),
        pytest.param("audiomae", "column_mean", marks=pytest.mark.slow),
        pytest.param("audiomae", "variation", marks=pytest.mark.slow),
        pytest.param("ast", "random", marks=pytest.mark.slow),
    ],
)
def test_exports_with_any_batch(make_model, family, score):
    model = make_model(family, keep_rate=0.6, depth=3, prune_blocks=(0, 2), score=score)
    shapes = {"fbank": {0: torch.export.Dim("batch", min=1)}, "patches": None}
    program = torch.export.export(model, (torch.randn(2, 128, 128),), {"patches": None}, dynamic_shapes=shapes)
    for batch in (1, 4):
        fbank = torch.randn(batch, 128, 128)
        torch.testing.assert_close(program.module()(fbank, patches=None), model(fbank), rtol=1e-4, atol=1e-4)


def test_batch_rows_are_independent(make_model):
    model, fbank = make_model("audiomae", keep_rate=0.5).double(), torch.randn(3, 128, 128, dtype=torch.float64)
    torch.testing.assert_close(model(fbank)[1:2], model(fbank[1:2]), rtol=1e-10, atol=1e-10)
