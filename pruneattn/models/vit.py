"""The pruned vision transformer on spectrograms. ``audiomae.py`` and ``ast.py`` derive its two families."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..constants import MEL_BINS, PATCH, patch_grid
from ..data.fbank import FeatureConfig
from ..errors import UserError
from .blocks import Block, PatchEmbed, PruningBlock, check_prune_blocks, spread_keep_rate
from .description import Description, DescriptionField
from .patches import Stride, check_stride
from .quantize import Quantization
from .scores import Score, make_pruning


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, if ``torch.compile`` wraps it; else ``model``."""
    return getattr(model, "_orig_mod", model)


def own_model(model: nn.Module, caller: str) -> PrunedViT:
    """Return a model of :func:`pruneattn.create_model`, without the wrapper of ``torch.compile``.

    Args:
        model: the model, wrapped or not.
        caller: name of the function that needs it, for the message.

    Raises:
        UserError: it is another model.
    """
    model = unwrapped(model)
    if not isinstance(model, PrunedViT):
        given = type(model).__name__
        raise UserError(f"{caller}: expected a model created by pruneattn.create_model, got {given}")
    return model


class PrunedViT(nn.Module):
    """Vision transformer on the patches of a log-mel spectrogram, with token pruning in some of its blocks.

    :func:`pruneattn.create_model` creates one and documents the arguments. A family defines the token order, the extra
    tokens, the default score, the initial position table and the head.

    Attributes:
        name: name of the model, for example "ast_base".
        stride: mel bins and frames from one patch to the next, ``(frequency, time)``.
        keep_rates: keep-rate of each pruning block.
        description: features, labels and further values that belong to the weights. ``features``, ``labels``,
            ``multilabel`` and ``extra`` of the model read and set its fields.
        optimized: True after :func:`pruneattn.optimize_for_inference` packed the weights.
        quantization: the linear layers with 8-bit weights (:class:`~pruneattn.models.quantize.Quantization`); None if
            there are none.
    """

    time_major: bool  # token order: time column by time column (True), or mel row by mel row
    num_extra_tokens: int
    default_score: str
    head: nn.Linear
    keep_rates: tuple[float, ...]
    optimized: bool = False
    quantization: Quantization | None = None

    features = DescriptionField[FeatureConfig | None](
        "Conversion of waveforms to the input (``FeatureConfig``); None if unknown."
    )
    labels = DescriptionField[list[str] | None]("Name of each class, in the order of the logits; None if unknown.")
    multilabel = DescriptionField[bool | None](
        "True if a clip can have several classes (sigmoid), False if it has exactly one (softmax); None if unknown."
    )
    extra = DescriptionField[dict[str, Any]]("Further plain values that were saved with the weights.")

    def __init__(
        self,
        name: str,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        frames: int,
        stride: Stride,
        keep_rate: float | Sequence[float],
        prune_blocks: Iterable[int],
        score: Score | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        _check_arguments(embed_dim, depth, num_heads, num_classes, frames, drop_path)
        self.stride = check_stride(stride)
        self.name = name
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_classes, self.frames = num_classes, frames
        self.prune_blocks = check_prune_blocks(prune_blocks, depth)
        self.score = self.default_score if score is None else score
        self.drop_path = drop_path
        self.pruning = make_pruning(self.score)
        self.description = Description()

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_extra_tokens + self.num_patches, embed_dim))
        self.patch_embed = PatchEmbed(embed_dim, self.stride[::-1] if self.time_major else self.stride)
        blocks: list[Block] = []
        for i in range(depth):
            rate = drop_path * i / max(1, depth - 1)
            if i in self.prune_blocks:
                blocks.append(PruningBlock(embed_dim, num_heads, rate, self.pruning, self.num_extra_tokens))
            else:
                blocks.append(Block(embed_dim, num_heads, rate))
        self.blocks = nn.ModuleList(blocks)
        self.set_keep_rate(keep_rate)

    def init_weights(self) -> None:
        """Initialize all weights. Families call it after they have added theirs."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a linear layer on the cells of a patch
        nn.init.zeros_(self.patch_embed.proj.get_parameter("bias"))
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    # Patch positions ----------------------------------------------------------------------------------------------

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along time and along mel: ``(size - 16) // stride + 1`` for each axis."""
        return patch_grid(self.frames, self.stride)

    @property
    def num_patches(self) -> int:
        """Patches of the input."""
        columns, rows = self.grid
        return columns * rows

    def patch_position(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Convert patch numbers (int64, any shape) to positions ``(time column, mel row)``, each of the same shape."""
        columns, rows = self.grid
        if self.time_major:
            return index // rows, index % rows
        return index % columns, index // columns

    def kept_grid(self, index: Tensor) -> Tensor:
        """Mask of patch numbers (int64 ``[k]``): bool ``[mel rows, time columns]``, where row 0 is the lowest."""
        time, mel = self.patch_position(index)
        grid = torch.zeros(self.grid[::-1], dtype=torch.bool, device=index.device)
        grid[mel, time] = True
        return grid

    def patches_from_grid(self, grid: tuple[Tensor, Tensor] | list[Tensor] | Tensor) -> Tensor:
        """Convert positions in the spectrogram to patch numbers in this model's token order.

        Args:
            grid: a pair ``(time column, mel row)`` of int64 tensors of one shape; or a bool mask ``[columns, rows]`` or
                ``[B, columns, rows]`` (True: use the patch) with the same number of patches in every clip.

        Returns:
            int64 of the shape of the pair's tensors; for a mask ``[k]`` or ``[B, k]``, ascending.

        Raises:
            ValueError: the mask has another shape or dtype, or its clips have different numbers of patches.
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
            raise ValueError(f"grid: every clip must have the same number of patches, got {sorted(counts)}")
        return taken.nonzero()[:, -1].reshape(*taken.shape[:-1], *counts)

    # Keep-rates and configuration ---------------------------------------------------------------------------------

    def set_keep_rate(self, keep_rate: float | Sequence[float]) -> None:
        """Set the fraction of the patches that each pruning block keeps.

        Args:
            keep_rate: in (0, 1]: one number, or one per pruning block.

        Raises:
            UserError: not a valid keep-rate.
        """
        self.keep_rates = spread_keep_rate(keep_rate, len(self.prune_blocks))

    @property
    def config(self) -> dict[str, Any]:
        """Plain values with which ``create_model(**config)`` creates this model again, without its weights.

        Raises:
            UserError: the score is not a name.
        """
        if callable(self.score):
            raise UserError(
                "score: a model with a custom score has no plain configuration to save: use a score by name"
            )
        rates = self.keep_rates
        # The usual stride is left out: earlier versions read such a configuration, and labels name its digest.
        stride = {} if self.stride == (PATCH, PATCH) else {"stride": list(self.stride)}
        return {
            "name": self.name,
            "num_classes": self.num_classes,
            "frames": self.frames,
            **stride,
            "keep_rate": list(rates) if len(set(rates)) > 1 else (*rates, 1.0)[0],
            "prune_blocks": list(self.prune_blocks),
            "score": self.score,
            "drop_path": self.drop_path,
            "embed_dim": self.embed_dim,
            "depth": len(self.blocks),
            "num_heads": self.num_heads,
        }

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, in addition to biases and norms."""
        return {name for name in ("cls_token", "dist_token", "pos_embed") if hasattr(self, name)}

    def layer_id(self, parameter_name: str) -> int:
        """Depth of a parameter for layer-wise decay: 0 for embeddings, i + 1 for block i, depth + 1 for the head."""
        if parameter_name.startswith("blocks."):
            return int(parameter_name.split(".")[1]) + 1
        embeddings = ("cls_token", "dist_token", "pos_embed", "patch_embed")
        return 0 if parameter_name.split(".")[0] in embeddings else len(self.blocks) + 1

    # Forward pass -------------------------------------------------------------------------------------------------

    def extra_tokens(self) -> Tensor:
        """The learned tokens before the patches, ``[1, extra, C]``."""
        return self.cls_token

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of the last block's output tokens."""
        raise NotImplementedError

    def embed(self, fbank: Tensor) -> Tensor:
        """Patch tokens with their positions, ``[B, P, C]``."""
        image = fbank if self.time_major else fbank.transpose(1, 2)
        return self.patch_embed(image.unsqueeze(1)) + self.pos_embed[:, self.num_extra_tokens :]

    def prepend_extra_tokens(self, x: Tensor) -> Tensor:
        """Patch tokens ``[B, P, C]`` with the extra tokens before them, ``[B, extra + P, C]``."""
        extra = self.extra_tokens() + self.pos_embed[:, : self.num_extra_tokens]
        return torch.cat([extra.expand(x.shape[0], -1, -1), x], dim=1)

    def forward_features(
        self, fbank: Tensor, patches: Tensor | None = None, record: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        """Tokens after the last block, ``[B, extra + kept, C]``.

        Args:
            fbank, patches: see :meth:`forward`.
            record: a list to which each pruning block's ``(index, scores)`` is appended; see :func:`trace`.
        """
        self._check_input(fbank, patches)
        x = self.embed(fbank)  # [B, P, C]
        statistic = self.pruning.statistic
        values = None if statistic is None else self.patch_values(fbank, statistic)  # [B, P]
        if patches is not None:
            x = ops.gather_tokens(x, patches, 0)  # [B, P', C]
            values = values if values is None else values.gather(1, patches)
        x = self.prepend_extra_tokens(x)  # [B, N, C]
        keep_rates = dict(zip(self.prune_blocks, self.keep_rates, strict=True))
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

    def forward(self, fbank: Tensor, patches: Tensor | None = None) -> Tensor:
        """Compute the logits.

        Args:
            fbank: normalized log-mel spectrograms ``[B, frames, 128]``.
            patches: int64 ``[B, P']``: numbers of the patches to start with, ascending; for example patch masking in
                training, or padding that is known to be empty. None: all patches.

        Returns:
            ``[B, num_classes]``.

        Raises:
            ValueError: an input has another shape or dtype.
            UserError: the model was optimized for inference and is called in autocast.
        """
        return self.forward_head(self.forward_features(fbank, patches))

    def patch_values(self, fbank: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
        """A statistic of each input patch, float32 ``[B, P]`` in token order.

        Args:
            fbank: ``[B, frames, 128]``.
            statistic: function of the patches' cells, ``[B, P, 256]`` to ``[B, P]``, for example ``mean`` or
                ``standard_deviation`` of ``pruneattn.models.scores``.
        """
        of_frequency, of_time = self.stride
        cells = fbank.detach().unfold(1, PATCH, of_time).unfold(2, PATCH, of_frequency)  # [B, columns, rows, 16, 16]
        cells = cells if self.time_major else cells.transpose(1, 2)
        return statistic(cells.reshape(fbank.shape[0], -1, PATCH**2)).float()

    def _check_input(self, fbank: Tensor, patches: Tensor | None) -> None:
        if fbank.dim() != 3 or fbank.shape[1:] != (self.frames, MEL_BINS):
            raise ValueError(f"fbank: expected [B, {self.frames}, {MEL_BINS}], got {list(fbank.shape)}")
        if self.optimized and torch.is_autocast_enabled("cpu"):
            raise UserError(
                f"autocast: the model was optimized for inference, and its weights are packed in "
                f"{self.head.weight.dtype}; call it outside autocast, and pass the dtype to optimize_for_inference"
            )
        if patches is None:
            return
        if patches.dtype != torch.int64 or patches.dim() != 2 or patches.shape[0] != fbank.shape[0]:
            raise ValueError(
                f"patches: expected int64 [{fbank.shape[0]}, P'], got {patches.dtype} {list(patches.shape)}"
            )


def _check_arguments(
    embed_dim: int, depth: int, num_heads: int, num_classes: int, frames: int, drop_path: float
) -> None:
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
    if frames < PATCH:
        raise UserError(f"frames: must be at least {PATCH}, the width of a patch, got {frames}")
    if embed_dim % num_heads:
        raise UserError(f"num_heads: {num_heads} does not divide embed_dim {embed_dim}")
    if not isinstance(drop_path, (int, float)) or not 0 <= drop_path < 1:
        raise UserError(f"drop_path: must be at least 0 and below 1, got {drop_path!r}")
