"""What people run instead of a model of ours, with its weights: to compare results first, and then times."""

import math

import torch
import torch.nn.functional as F
from machine import version
from torch import nn
from torch._inductor import config as inductor

from pruneattn.models.blocks import MLP_RATIO, PATCH, kept_patches

#: Largest difference of the logits from the reference, as a share of the largest logit.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}
#: Scores of one block nearer than this share of the highest are the same to rounding: either patch may stay.
SAME_SCORE = 1e-4


class PapersAttention(nn.Module):
    """Attention of published code: packed projection, then the whole softmax matrix."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        """The output ``[B, N, C]`` and the softmax matrix ``[B, H, N, N]``."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        out = weights @ v  # [B, H, N, D]
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim)), weights


class PapersBlock(nn.Module):
    """A block that drops patches after the attention's residual add, so that dropped rows are finished first."""

    def __init__(self, dim, heads, extra, score, keep_rate):
        super().__init__()
        self.extra, self.score, self.keep_rate = extra, score, keep_rate
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PapersAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, MLP_RATIO * dim), "fc2": nn.Linear(MLP_RATIO * dim, dim)})

    def forward(self, x):
        """The tokens left, and the places ``[B, keep]`` of the patches that stay (best first), None if all do."""
        attended, weights = self.attn(self.norm1(x))
        x = x + attended
        index = None
        if self.keep_rate < 1:
            x, index = self.prune(x, weights)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))), index

    def prune(self, x, weights):
        if self.score == "cls":
            scores = weights[:, :, 0, self.extra :].mean(1)  # [B, P]
        else:
            scores = weights.mean(1)[:, self.extra :, self.extra :].mean(1)  # five times as fast as mean((1, 2))
        index = scores.topk(kept_patches(scores.shape[1], self.keep_rate)).indices  # [B, keep]
        rows = index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return torch.cat([x[:, : self.extra], x[:, self.extra :].gather(1, rows)], 1), index


class PapersViT(nn.Module):
    """A model of ours the paper's way, with the same weights: the whole softmax matrix in every block, in the dtype of
    the model, and its means rank the patches.
    """

    def __init__(self, model, keep_rate=1.0):
        super().__init__()
        dim, extra = model.embed_dim, model.num_extra_tokens
        self.extra, self.time_major = extra, model.time_major
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty_like(model.pos_embed))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, dim, PATCH, PATCH)})
        self.blocks = nn.ModuleList(
            PapersBlock(dim, model.num_heads, extra, model.score, keep_rate if i in model.prune_blocks else 1.0)
            for i in range(len(model.blocks))
        )
        if extra == 2:
            self.dist_token = nn.Parameter(torch.empty(1, 1, dim))
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.head_norm = nn.LayerNorm(dim, eps=1e-5)
        else:
            self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, model.num_classes)
        self.load_state_dict(model.state_dict())
        self.to(model.pos_embed.dtype).eval()

    def forward(self, fbank):
        return self.run(fbank)[0]

    def run(self, fbank):
        """Logits, and of each pruning block the places of the patches that stay among those that came."""
        image = (fbank if self.time_major else fbank.transpose(1, 2)).unsqueeze(1)
        x = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)  # [B, P, C]
        front = self.cls_token if self.extra == 1 else torch.cat([self.cls_token, self.dist_token], 1)
        x = torch.cat([front.expand(len(x), -1, -1), x], 1) + self.pos_embed  # [B, N, C]
        places = []
        for block in self.blocks:
            x, index = block(x)
            if index is not None:
                places.append(index)
        if self.extra == 1:
            return self.head(self.fc_norm(x[:, 1:].mean(1))), places
        x = self.norm(x)
        return self.head(self.head_norm((x[:, 0] + x[:, 1]) / 2)), places

    def kept(self, fbank):
        """Numbers of the input patches that each pruning block keeps, ascending, as ``pruneattn.trace`` gives them."""
        numbers, kept = torch.arange(self.pos_embed.shape[1] - self.extra).expand(len(fbank), -1), []
        for index in self.run(fbank)[1]:
            numbers = numbers.gather(1, index)
            kept.append(numbers.sort(1).values)
        return kept


def huggingface_ast(model):
    """Hugging Face's AST with the weights of an AST of ours."""
    import transformers

    theirs = transformers.ASTForAudioClassification(
        transformers.ASTConfig(
            hidden_size=model.embed_dim, num_hidden_layers=len(model.blocks), num_attention_heads=model.num_heads,
            intermediate_size=MLP_RATIO * model.embed_dim, max_length=model.frames, num_labels=model.num_classes,
            frequency_stride=PATCH, time_stride=PATCH, layer_norm_eps=1e-6, attn_implementation="sdpa",
        )  # fmt: skip
    )
    theirs.classifier.layernorm.eps = 1e-5
    theirs.load_state_dict(huggingface_state(model.state_dict()))
    return Adapter(theirs.to(model.pos_embed.dtype).eval(), lambda theirs, fbank: theirs(fbank).logits)


def huggingface_state(state):
    """Names of transformers 5 for a state dict of ours."""
    renamed = {
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "blocks.": "layers.",
        "norm.": "layernorm.",
    }
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    out = {}
    for name, tensor in state.items():
        if name.startswith("head"):
            out[name.replace("head_norm", "classifier.layernorm").replace("head.", "classifier.dense.")] = tensor
            continue
        for ours, theirs in renamed.items():
            if name.startswith(ours):
                name = theirs + name[len(ours) :]
                break
        for ours, theirs in parts.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        name = f"audio_spectrogram_transformer.{name}"
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3)):
                out[name.replace("attn.qkv", f"attention.{part}_proj")] = rows
        else:
            out[name] = tensor
    return out


def timm_vit(model):
    """timm's vision transformer with the weights of an AudioMAE of ours."""
    from timm.models.vision_transformer import VisionTransformer

    theirs = VisionTransformer(
        img_size=(model.frames, 128), in_chans=1, embed_dim=model.embed_dim, depth=len(model.blocks),
        num_heads=model.num_heads, num_classes=model.num_classes, global_pool="avg", drop_path_rate=model.drop_path,
    )  # fmt: skip
    theirs.load_state_dict(model.state_dict())
    return Adapter(theirs.to(model.pos_embed.dtype).eval(), lambda theirs, fbank: theirs(fbank.unsqueeze(1)))


class Adapter(nn.Module):
    """Another library's model that takes ``[B, frames, 128]`` and gives logits."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, fbank):
        return self.call(self.model, fbank)


def missing():
    """dict of peer -> why it is left out on this machine."""
    reasons = {}
    if version("timm") is None:
        reasons["timm ViT"] = "timm is not installed"
    if int((version("transformers") or "0").split(".")[0]) < 5:
        reasons["Hugging Face AST"] = f"needs transformers 5, installed: {version('transformers')}"
    return reasons


def compiled(model, fbank):
    """The model by ``torch.compile``, its weights frozen into the code, for inputs like ``fbank``.

    Compiled here; to be called in the same kind of context (``torch.inference_mode()``).
    """
    model = torch.compile(model, dynamic=False)
    with inductor.patch(freezing=True):
        model(fbank)
    return model


class WrongResult(Exception):
    """A peer does not compute what it is compared with."""


def check_logits(name, logits, expected, dtype):
    """Raise unless the logits of a model in ``dtype`` are those of the reference to rounding."""
    difference = ((logits.double() - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCE[dtype]:
        raise WrongResult(f"{name}: logits differ by {difference:.2g} of the largest, allowed are {TOLERANCE[dtype]}")


def check_kept(name, kept, trace):
    """Raise unless these are the patches of a ``pruneattn.trace``, but for scores that are the same to rounding."""
    for clip in range(len(trace.logits)):
        numbers = torch.arange(trace.scores[0].shape[1])
        for block, (theirs, ours, scores) in enumerate(zip(kept, trace.kept, trace.scores, strict=True)):
            score_of = dict(zip(numbers.tolist(), scores[clip].tolist()))
            disputed = set(theirs[clip].tolist()) ^ set(ours[clip].tolist())
            if disputed:
                values = [score_of.get(number, math.inf) for number in disputed]
                if not max(values) - min(values) <= SAME_SCORE * scores[clip].max().item():
                    raise WrongResult(f"{name}: keeps other patches in pruning block {block} of clip {clip}")
                break  # what follows has another input
            numbers = ours[clip]
