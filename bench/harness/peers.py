"""What people run instead of a model of ours, with its weights."""

import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor

from bench.harness.machine import version
from pruneattn.constants import PATCH
from pruneattn.models.blocks import MLP_RATIO, kept_patches
from pruneattn.models.macs import block_macs


class PapersAttention(nn.Module):
    """Attention of published code: packed projection, then the whole softmax matrix, which is the score's source too."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, scored_queries):
        """The output ``[B, N, C]`` and the rows ``scored_queries`` (a slice) of the softmax matrix ``[B, H, .., N]``."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        out, weights = self.attend(q, k, v, scored_queries)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim)), weights

    def attend(self, q, k, v, scored_queries):
        weights = softmax_matrix(q, k)
        return weights @ v, weights[:, :, scored_queries]


class SeparateScoreAttention(PapersAttention):
    """The nearest way out: PyTorch's attention, and the queries that are scored times the keys once more."""

    def attend(self, q, k, v, scored_queries):
        return F.scaled_dot_product_attention(q, k, v), softmax_matrix(q[:, :, scored_queries], k)


def softmax_matrix(q, k):
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)


class PapersBlock(nn.Module):
    """A block that drops patches after the attention's residual add, so that dropped rows are finished first."""

    def __init__(self, dim, heads, extra, score, keep_rate, attention):
        super().__init__()
        self.extra, self.score, self.keep_rate = extra, score, keep_rate
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, MLP_RATIO * dim), "fc2": nn.Linear(MLP_RATIO * dim, dim)})

    def forward(self, x):
        """The tokens left, and the places ``[B, keep]`` of the patches that stay (best first), None if all do."""
        attended, weights = self.attn(self.norm1(x), self.scored_queries())
        x = x + attended
        index = None
        if self.keep_rate < 1:
            x, index = self.prune(x, weights)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))), index

    def scored_queries(self):
        if self.keep_rate == 1:
            return slice(0, 0)
        return slice(0, 1) if self.score == "cls" else slice(self.extra, None)

    def macs(self, patches):
        """Multiply-accumulates of one clip, a separate score included; and how many patches are left."""
        dim, tokens, left = self.norm1.weight.numel(), self.extra + patches, kept_patches(patches, self.keep_rate)
        macs = block_macs(tokens, self.extra + left, dim)
        if isinstance(self.attn, SeparateScoreAttention):
            macs += len(range(tokens)[self.scored_queries()]) * tokens * dim
        return macs, left

    def prune(self, x, weights):
        scores = weights.mean(1)[:, :, self.extra :].mean(1)  # [B, P]; five times as fast as mean((1, 2))
        index = scores.topk(kept_patches(scores.shape[1], self.keep_rate)).indices  # [B, keep]
        rows = index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return torch.cat([x[:, : self.extra], x[:, self.extra :].gather(1, rows)], 1), index


class PapersViT(nn.Module):
    """A model of ours the paper's way, with the same weights: the whole softmax matrix in every block, in the dtype of
    the model, and its means rank the patches. ``attention``: `PapersAttention`, or `SeparateScoreAttention`.
    """

    def __init__(self, model, keep_rate=1.0, attention=PapersAttention):
        super().__init__()
        dim, extra = model.embed_dim, model.num_extra_tokens
        self.extra, self.time_major = extra, model.time_major
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty_like(model.pos_embed))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, dim, PATCH, PATCH)})
        self.blocks = nn.ModuleList(
            PapersBlock(
                dim, model.num_heads, extra, model.score, keep_rate if i in model.prune_blocks else 1.0, attention
            )
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
        self.to(model.pos_embed).eval()

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

    def macs(self):
        """Multiply-accumulates of one clip, head and separate scores included."""
        dim, patches = self.pos_embed.shape[2], self.pos_embed.shape[1] - self.extra
        total = patches * PATCH**2 * dim + self.head.weight.numel()
        for block in self.blocks:
            macs, patches = block.macs(patches)
            total += macs
        return total

    def kept(self, fbank):
        """Numbers of the input patches that each pruning block keeps, ascending, as ``pruneattn.trace`` gives them."""
        numbers = torch.arange(self.pos_embed.shape[1] - self.extra, device=fbank.device).expand(len(fbank), -1)
        kept = []
        for index in self.run(fbank)[1]:
            numbers = numbers.gather(1, index)
            kept.append(numbers.sort(1).values)
        return kept


TIMM, HUGGINGFACE = "timm ViT", "Hugging Face AST"


def library_model(model):
    """Name of the library model that is a model of ours, and the function that makes it with the same weights."""
    return (TIMM, timm_vit) if model.num_extra_tokens == 1 else (HUGGINGFACE, huggingface_ast)


def huggingface_ast(model):
    """Hugging Face's AST with the weights of an AST of ours."""
    import transformers

    theirs = transformers.ASTForAudioClassification(
        transformers.ASTConfig(
            hidden_size=model.embed_dim,
            num_hidden_layers=len(model.blocks),
            num_attention_heads=model.num_heads,
            intermediate_size=MLP_RATIO * model.embed_dim,
            max_length=model.frames,
            num_labels=model.num_classes,
            frequency_stride=PATCH,
            time_stride=PATCH,
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",
        )
    )
    theirs.classifier.layernorm.eps = 1e-5
    theirs.load_state_dict(huggingface_state(model.state_dict()))
    return Adapter(theirs.to(model.pos_embed).eval(), lambda theirs, fbank: theirs(fbank).logits)


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
        img_size=(model.frames, 128),
        in_chans=1,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=model.num_heads,
        num_classes=model.num_classes,
        global_pool="avg",
        drop_path_rate=model.drop_path,
    )
    theirs.load_state_dict(model.state_dict())
    return Adapter(theirs.to(model.pos_embed).eval(), lambda theirs, fbank: theirs(fbank.unsqueeze(1)))


class Adapter(nn.Module):
    """Another library's model that takes ``[B, frames, 128]`` and gives logits."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, fbank):
        return self.call(self.model, fbank)


def why_not(name):
    """Why a peer cannot be had on this machine; empty if it can."""
    if name == TIMM and version("timm") is None:
        return "timm is not installed"
    if name == HUGGINGFACE and int((version("transformers") or "0").split(".")[0]) < 5:
        return f"needs transformers 5, installed: {version('transformers')}"
    return ""


def compiled(model, fbank):
    """The model by ``torch.compile``, its weights frozen into the code, for inputs like ``fbank``.

    Compiled here, without gradients; to be called in ``torch.inference_mode()``.
    """
    model = torch.compile(model, dynamic=False)
    # Each of our models and rates is a program of its own, and all count against the limit of one forward function.
    with torch.inference_mode(), inductor.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=64):
        model(fbank)
    return model
