"""Section ``adapters`` of a CPU run: models of others as they are, and what ``pruneattn.prune`` saves of their time."""

import copy
import importlib.util
from functools import partial
from typing import NamedTuple

import peers
import torch
from cpu_models import make_model
from machine import ROOT
from report import dtype_name, label_text, measure, progress, saving_rows
from torch import nn

import pruneattn
from pruneattn.models.blocks import MLP_RATIO, PATCH, kept_patches

PRUNE_BLOCKS = (3, 6, 9)
CHECKED_RATE = 0.5


class Subject(NamedTuple):
    """A float32 model of others with random weights, and what must be known of it."""

    adapter: peers.Adapter  # around the model; takes the inputs and gives logits
    blocks: nn.Module  # of the model
    dim: int
    heads: int
    extra_tokens: int
    inputs: torch.Tensor  # of 128 mel bins by frames, or images: patches of 16 x 16 cells

    def macs(self, keep_rate):
        """Multiply-accumulates of one input as the paper counts them."""
        total = self.inputs[0].numel() * self.dim  # the patches' embedding
        left = self.inputs.shape[-2] * self.inputs.shape[-1] // PATCH**2
        for i in range(len(self.blocks)):
            tokens = left + self.extra_tokens
            if i in PRUNE_BLOCKS:
                left = kept_patches(left, keep_rate)
            mlp = 2 * MLP_RATIO * (left + self.extra_tokens) * self.dim**2
            total += 4 * tokens * self.dim**2 + 2 * tokens**2 * self.dim + mlp
        return total


def huggingface_ast(settings):
    ours = make_model(settings, "ast")
    adapter = peers.huggingface_ast(ours)
    fbank = torch.randn(settings.batch, settings.frames, 128)
    return Subject(adapter, adapter.model.base_model.layers, ours.embed_dim, ours.num_heads, 2, fbank)


def timm_model(name, settings):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name.format(settings.size)).eval()
    adapter = peers.Adapter(model, lambda model, images: model(images))
    heads, extra_tokens = model.blocks[0].attn.num_heads, model.num_prefix_tokens
    images = torch.randn(settings.batch, 3, 224, 224)
    return Subject(adapter, model.blocks, model.embed_dim, heads, extra_tokens, images)


#: By name: the peer of `peers.missing` without which it is left out, and what makes it.
SUBJECTS = {
    "Hugging Face AST": ("Hugging Face AST", huggingface_ast),
    "timm ViT": ("timm ViT", partial(timm_model, "vit_{}_patch16_224")),
    "timm DeiT, distilled": ("timm ViT", partial(timm_model, "deit_{}_distilled_patch16_224")),
}


def has_bfloat16():
    """Whether PyTorch multiplies matrices in bfloat16 by instructions of this CPU; else it takes ten times as long."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def run_adapters(settings):
    dtypes = [dtype for dtype in settings.dtypes if dtype != torch.bfloat16 or has_bfloat16()]
    for name, (peer, make) in SUBJECTS.items():
        if peer in peers.missing():
            continue
        subject = make(settings)
        progress(f"checking {name}")
        check(name, subject)
        for dtype in dtypes:
            label = {"model": f"{name}, {settings.size}", "dtype": dtype_name(dtype), "batch": settings.batch}
            variants = make_variants(label, subject, dtype, settings.peer_keep_rates)
            times = measure(label_text(label), variants, settings.rounds)
            yield f"Pruned where they are: {label_text(label)}", saving_rows(label, times, subject.macs)


@torch.inference_mode()
def check(name, subject):
    """Raise unless a pruned model does what the model of the tests, written straight down, does in float64."""
    pruned = copy.deepcopy(subject)
    pruneattn.prune(pruned.adapter.model, CHECKED_RATE, PRUNE_BLOCKS)
    ends = {}
    pruned.blocks[0].register_forward_pre_hook(lambda block, args: ends.update(first=args[0]))
    pruned.blocks[-1].register_forward_hook(lambda block, args, out: ends.update(last=out))
    pruned.adapter(subject.inputs[:1])
    eager = _load_eager()
    tokens, _ = eager.run(
        ends["first"].double(), eager.blocks_of(copy.deepcopy(subject.adapter).double()), heads=subject.heads,
        extra=subject.extra_tokens, score="cls", rates=dict.fromkeys(PRUNE_BLOCKS, CHECKED_RATE), eps=1e-6,
    )  # fmt: skip
    expected = tokens[-1]
    if ends["last"].shape != expected.shape:
        raise peers.WrongResult(f"{name}, pruned: {list(ends['last'].shape)} instead of {list(expected.shape)}")
    peers.check_logits(f"{name}, pruned, tokens of the last block", ends["last"], expected, torch.float32)


def _load_eager():
    spec = importlib.util.spec_from_file_location("eager", ROOT / "tests" / "adapters" / "eager.py")
    eager = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(eager)
    return eager


@torch.inference_mode()
def make_variants(label, subject, dtype, keep_rates):
    """dict of (what, keep-rate) -> call, where the model at keep-rate 1 is one that pruning has never touched."""
    inputs, untouched = subject.inputs.to(dtype), copy.deepcopy(subject.adapter).to(dtype)
    pruned = copy.deepcopy(untouched)
    pruneattn.prune(pruned.model, 1.0, PRUNE_BLOCKS)
    name = label_text(label)
    if not torch.equal(pruned(inputs), untouched(inputs)):
        raise peers.WrongResult(f"{name}: at keep-rate 1 it does not give the bits that it gave before")
    torch.compiler.reset()  # each keep-rate is a program of its own, and those of other models only fill the cache
    variants = {}
    for rate in keep_rates:
        model = untouched
        if rate < 1:
            model = copy.deepcopy(pruned)
            pruneattn.set_keep_rate(model, rate)
        variants["eager", rate] = partial(model, inputs)
        progress(f"compiling {name}, keep-rate {rate}")
        compiled = peers.compiled(model, inputs)
        # In half precision near scores change places, and other patches stay.
        if rate == 1 or dtype == torch.float32:
            peers.check_logits(f"{name}, compiled, keep-rate {rate}", compiled(inputs), model(inputs).double(), dtype)
        variants["compiled", rate] = partial(compiled, inputs)
    return variants
