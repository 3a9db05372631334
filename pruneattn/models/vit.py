"""The pruned vision transformer on spectrograms. AudioMAE and AST (the two files beside) are small variations of it."""

from numbers import Real

import torch
from torch import nn

from .. import ops
from ..constants import MEL_BINS, PATCH
from ..errors import UserError
from .blocks import Block, PatchEmbed, PruningBlock, check_prune_blocks, spread_keep_rate
from .description import Description
from .scores import make_pruning


def own_model(model, caller):
    """The :class:`PrunedViT` that was given, also as ``torch.compile`` wraps it; ``caller`` names the function.

    Raises:
        UserError: it is none.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PrunedViT):
        given = type(model).__name__
        raise UserError(f"{caller}: expected a model of pruneattn.create_model itself, got {given}")
    return model


class PrunedViT(nn.Module):
    """ViT/16 over a log-mel spectrogram with token pruning in some of its blocks.

    Made by :func:`pruneattn.create_model`, which describes the arguments. A variation states its token order, extra
    tokens and default score, makes its position table and owns its head.
    """

    time_major: bool  # order of the patch tokens: time column by time column, or mel row by mel row
    num_extra_tokens: int
    default_score: str
    optimized = False  # whether optimize_for_inference packed the weights

    def __init__(
        self,
        name,
        *,
        embed_dim,
        depth,
        num_heads,
        num_classes,
        frames,
        keep_rate,
        prune_blocks,
        score,
        drop_path,
    ):
        super().__init__()
        _check_arguments(embed_dim, depth, num_heads, num_classes, frames, drop_path)
        prune_blocks = check_prune_blocks("prune_blocks", prune_blocks, depth)
        self.name = name
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_classes, self.frames = num_classes, frames
        self.prune_blocks = prune_blocks
        self.score = self.default_score if score is None else score
        self.drop_path = drop_path
        self.pruning = make_pruning(self.score)
        #: Features, labels and further values that belong to the weights.
        self.description = Description()

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_extra_tokens + self.num_patches, embed_dim))
        self.patch_embed = PatchEmbed(embed_dim)
        blocks = []
        for i in range(depth):
            rate = drop_path * i / max(1, depth - 1)
            if i in prune_blocks:
                blocks.append(PruningBlock(embed_dim, num_heads, rate, self.pruning, self.num_extra_tokens))
            else:
                blocks.append(Block(embed_dim, num_heads, rate))
        self.blocks = nn.ModuleList(blocks)
        self.set_keep_rate(keep_rate)

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a linear layer on the cells of a patch
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    # The description's values, also under the model itself ---------------------------------------------------------

    @property
    def features(self):
        """How waveforms become the input (``FeatureConfig``); None if unknown."""
        return self.description.features

    @features.setter
    def features(self, value):
        self.description.features = value

    @property
    def labels(self):
        """Name of each class, in the order of the logits; None if unknown."""
        return self.description.labels

    @labels.setter
    def labels(self, value):
        self.description.labels = value

    @property
    def multilabel(self):
        """Whether several classes can hold at once (sigmoid) or exactly one holds (softmax); None if unknown."""
        return self.description.multilabel

    @multilabel.setter
    def multilabel(self, value):
        self.description.multilabel = value

    @property
    def extra(self):
        """Further plain values that were saved with the weights."""
        return self.description.extra

    @extra.setter
    def extra(self, value):
        self.description.extra = value

    # Where a patch lies -----------------------------------------------------------------------------------------

    @property
    def grid(self):
        """Patches along time and along mel: ``(frames // 16, 8)``."""
        return self.frames // PATCH, MEL_BINS // PATCH

    @property
    def num_patches(self):
        columns, rows = self.grid
        return columns * rows

    def patch_position(self, index):
        """Place in the spectrogram of patch numbers (int64, any shape): ``(time column, mel row)``, same shape."""
        columns, rows = self.grid
        if self.time_major:
            return index // rows, index % rows
        return index % columns, index // columns

    def kept_grid(self, index):
        """Where patch numbers (int64 ``[k]``) lie: bool ``[mel rows, time columns]``, row 0 the lowest."""
        time, mel = self.patch_position(index)
        grid = torch.zeros(self.grid[::-1], dtype=torch.bool, device=index.device)
        grid[mel, time] = True
        return grid

    def patches_from_grid(self, grid):
        """Patch numbers of places in the spectrogram, in this model's token order.

        ``grid`` is a pair ``(time column, mel row)`` of int64 tensors of one shape, giving numbers of that shape; or
        a bool mask ``[columns, rows]`` or ``[B, columns, rows]`` (True: take the patch), giving ascending numbers
        ``[k]`` or ``[B, k]``, where every clip must take the same count.
        """
        columns, rows = self.grid
        if isinstance(grid, (tuple, list)):
            time, mel = grid
            return time * rows + mel if self.time_major else mel * columns + time
        if grid.dtype != torch.bool or grid.shape[-2:] != self.grid or grid.dim() not in (2, 3):
            raise ValueError(
                f"grid: expected a bool mask [{columns}, {rows}] or [B, {columns}, {rows}], "
                f"got {grid.dtype} {list(grid.shape)}"
            )
        taken = grid if self.time_major else grid.transpose(-2, -1)
        taken = taken.flatten(-2)  # [.., P]
        counts = set(taken.sum(-1).flatten().tolist())
        if len(counts) != 1:
            raise ValueError(f"grid: every clip must take the same number of patches, got {sorted(counts)}")
        return taken.nonzero()[:, -1].reshape(*taken.shape[:-1], *counts)

    # Keep rates and configuration -------------------------------------------------------------------------------

    def set_keep_rate(self, keep_rate):
        """Share of the patches that each pruning block keeps, in (0, 1]: one number, or one per pruning block."""
        #: Keep-rate of each pruning block.
        self.keep_rates = spread_keep_rate(keep_rate, len(self.prune_blocks))

    @property
    def config(self):
        """Plain values from which ``create_model(**config)`` makes this model again, without its weights."""
        if callable(self.score):
            raise UserError("score: a model that ranks by a function of yours has no plain configuration to save")
        rates = self.keep_rates
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "frames": self.frames,
            "keep_rate": list(rates) if len(set(rates)) > 1 else (*rates, 1.0)[0],
            "prune_blocks": list(self.prune_blocks),
            "score": self.score,
            "drop_path": self.drop_path,
            "embed_dim": self.embed_dim,
            "depth": len(self.blocks),
            "num_heads": self.num_heads,
        }

    def no_weight_decay(self):
        """Names of the parameters that weight decay should leave alone, beside biases and norms."""
        return {name for name in ("cls_token", "dist_token", "pos_embed") if hasattr(self, name)}

    def layer_id(self, parameter_name):
        """Depth of a parameter for layer-wise decay: 0 the embeddings, i + 1 block i, depth + 1 the head."""
        if parameter_name.startswith("blocks."):
            return int(parameter_name.split(".")[1]) + 1
        embeddings = ("cls_token", "dist_token", "pos_embed", "patch_embed")
        return 0 if parameter_name.split(".")[0] in embeddings else len(self.blocks) + 1

    # What the packed weights of optimize_for_inference rule out, refused here before any part of the model changes ---

    def _apply(self, fn, recurse=True):
        if self.optimized:
            raise UserError("a model that was optimized for inference cannot be moved or cast: do that before")
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        if self.optimized:
            raise UserError("a model that was optimized for inference takes no new weights: load them before")
        super()._load_from_state_dict(*args, **kwargs)

    # Forward ----------------------------------------------------------------------------------------------------

    def extra_tokens(self):
        """The learned tokens in front of the patches, ``[1, extra, C]``."""
        return self.cls_token

    def forward_head(self, x):
        """Logits ``[B, num_classes]`` of the tokens that left the last block."""
        raise NotImplementedError

    def embed(self, fbank):
        """Patch tokens with their positions, ``[B, P, C]``."""
        image = fbank if self.time_major else fbank.transpose(1, 2)
        return self.patch_embed(image.unsqueeze(1)) + self.pos_embed[:, self.num_extra_tokens :]

    def prepend_extra_tokens(self, x):
        """Patch tokens ``[B, P, C]`` with the extra tokens before them, ``[B, extra + P, C]``."""
        extra = self.extra_tokens() + self.pos_embed[:, : self.num_extra_tokens]
        return torch.cat([extra.expand(x.shape[0], -1, -1), x], dim=1)

    def forward_features(self, fbank, patches=None, record=None):
        """Tokens after the last block, ``[B, extra + kept, C]``.

        ``record``, if given, is a list that gets each pruning block's ``(index, scores)``; see :func:`trace`.
        """
        self._check_input(fbank, patches)
        x = self.embed(fbank)  # [B, P, C]
        statistic = self.pruning.statistic
        values = None if statistic is None else self.patch_values(fbank, statistic)  # [B, P]
        if patches is not None:
            x = ops.gather_tokens(x, patches, 0)  # [B, P', C]
            values = values if values is None else values.gather(1, patches)
        x = self.prepend_extra_tokens(x)  # [B, N, C]
        keep_rates = dict(zip(self.prune_blocks, self.keep_rates))
        for i, block in enumerate(self.blocks):
            if i not in keep_rates:
                x = block(x)
                continue
            x, index, scores = block(x, keep_rates[i], values, scored=record is not None)
            if values is not None and index is not None:
                values = values.gather(1, index)
            if record is not None:
                record.append((index, scores))
        return x

    def forward(self, fbank, patches=None):
        """Logits ``[B, num_classes]`` of normalised log-mel spectrograms ``[B, frames, 128]``.

        ``patches`` (int64 ``[B, P']``, ascending patch numbers) leaves all other patches out from the start: patch
        masking in training, or padding known to be empty.
        """
        return self.forward_head(self.forward_features(fbank, patches))

    def patch_values(self, fbank, statistic):
        """A number for each input patch, float32 ``[B, P]`` in token order.

        ``statistic`` takes the patches' cells ``[B, P, 256]`` to ``[B, P]``, such as ``mean`` or
        ``standard_deviation`` in ``pruneattn.models.scores``.
        """
        columns, rows = self.grid
        cells = fbank.detach().unflatten(2, (rows, PATCH)).unflatten(1, (columns, PATCH))  # [B, columns, 16, rows, 16]
        cells = cells.transpose(2, 3) if self.time_major else cells.permute(0, 3, 1, 2, 4)
        return statistic(cells.reshape(fbank.shape[0], -1, PATCH**2)).float()

    def _check_input(self, fbank, patches):
        if fbank.dim() != 3 or fbank.shape[1:] != (self.frames, MEL_BINS):
            raise ValueError(f"fbank: expected [B, {self.frames}, {MEL_BINS}], got {list(fbank.shape)}")
        if self.optimized and torch.is_autocast_enabled("cpu"):
            raise UserError(
                f"autocast: the model was optimized for inference, its weights packed in {self.head.weight.dtype}; call it "
                "outside, and give optimize_for_inference the dtype"
            )
        if patches is None:
            return
        if patches.dtype != torch.int64 or patches.dim() != 2 or patches.shape[0] != fbank.shape[0]:
            raise ValueError(
                f"patches: expected int64 [{fbank.shape[0]}, P'], got {patches.dtype} {list(patches.shape)}"
            )


def _check_arguments(embed_dim, depth, num_heads, num_classes, frames, drop_path):
    counts = {
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
        "num_classes": num_classes,
        "frames": frames,
    }
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}: must be a whole number above 0, got {value!r}")
    if frames % PATCH:
        raise UserError(f"frames: must be a multiple of {PATCH}, got {frames}")
    if embed_dim % num_heads:
        raise UserError(f"num_heads: {num_heads} does not divide embed_dim {embed_dim}")
    if not isinstance(drop_path, Real) or not 0 <= drop_path < 1:
        raise UserError(f"drop_path: must be at least 0 and below 1, got {drop_path!r}")
