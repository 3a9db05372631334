"""Models made ready for inference on a CPU: weights packed for oneDNN, linear layers fused with what follows them."""

import torch
from torch import nn

from ..errors import UserError
from .blocks import Linear
from .vit import own_model


def optimize_for_inference(model, dtype=None):
    """Prepare a model for fast inference where it is, in place.

    On a CPU the weights of the blocks are packed once for oneDNN, bias, GELU and residual add are fused into the
    matrix products, and attention runs our kernels in every block. Keep-rates can still be changed, and
    ``state_dict``, ``copy.deepcopy`` and ``save_pretrained`` go on working; training, moving, casting, autocast and
    ``torch.compile`` do not. On other devices there is nothing to pack: use ``torch.compile`` there.

    Args:
        model: of :func:`pruneattn.create_model`, with its weights loaded.
        dtype: ``torch.float32`` or ``torch.bfloat16``: precision of weights and activations. None: as they are.
            Inputs may stay float32; scores are float32 in any case; logits have this dtype.

    Returns:
        The model, in eval mode, without gradients.

    Raises:
        UserError: not a model of this package, or one that cannot run in this precision here.
    """
    model = own_model(model, "optimize_for_inference")
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise UserError(f"optimize_for_inference: dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if not model.optimized:
        model.to(dtype=dtype)
    elif dtype not in (None, model.head.weight.dtype):
        raise UserError(f"optimize_for_inference: the model is packed in {model.head.weight.dtype} already")
    model.eval().requires_grad_(False)
    if can_pack(model.head.weight):
        for i, block in enumerate(model.blocks):
            parts = model.pruning.parts if i in model.prune_blocks else ("qkv",)
            block.attn.qkv = PackedQKV.of(block.attn.qkv, parts)
            block.attn.proj = PackedLinear.of(block.attn.proj)
            block.mlp.fc1 = PackedLinear.of(block.mlp.fc1)
            block.mlp.fc2 = PackedLinear.of(block.mlp.fc2)
        model.optimized = True
    return model


def can_pack(weight):
    """Whether oneDNN has a packed form of such a weight on this machine."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and supported())


class PackedLinear(nn.Module):
    """A linear layer for inference whose weight ``[out, in]`` lies as oneDNN reads it fastest. Copies share it."""

    def __init__(self, weight, bias):
        super().__init__()
        self.in_features = weight.shape[1]
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight.detach()), persistent=False)
        self.register_buffer("bias", bias.detach())

    @classmethod
    def of(cls, linear):
        """The packed form of a linear layer; one that is packed already stays."""
        return cls(linear.weight, linear.bias) if isinstance(linear, Linear) else linear

    def forward(self, x):
        return self._apply_weight(x, "none")

    def gelu(self, x):
        return self._apply_weight(x, "gelu")

    def add(self, x, residual):
        self._refuse_gradients(x, residual)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.packed, self.bias, "add")

    def _apply_weight(self, x, then):
        self._refuse_gradients(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, then, [], "none")

    @staticmethod
    def _refuse_gradients(*inputs):
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            raise UserError("a model that was optimized for inference has no gradients: load it again to train it")

    @property
    def weight(self):
        """The weight ``[out, in]`` as it was before it was packed."""
        return self.packed.to_dense()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return type(self), (self.weight, self.bias)


class PackedQKV(nn.Module):
    """The projection to queries, keys and values in the ``parts`` that its block asks for, such as ("q", "kv")."""

    def __init__(self, weight, bias, parts):
        super().__init__()
        self.dim = dim = weight.shape[1]
        sizes = [len(part) * dim for part in parts]
        rows = zip(parts, weight.split(sizes), bias.split(sizes))
        self.packed = nn.ModuleDict({part: PackedLinear(w, b) for part, w, b in rows})

    @classmethod
    def of(cls, linear, parts):
        return cls(linear.weight, linear.bias, parts) if isinstance(linear, Linear) else linear

    def project(self, x, parts):
        found = []
        for part, linear in self.packed.items():
            common = "".join(letter for letter in part if letter in parts)
            if common:  # a part of a packed one costs as much as the whole
                first = part.index(common) * self.dim
                found.append(linear(x)[..., first : first + len(common) * self.dim])  # [B, N, .. * C]
        return found

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name in ("weight", "bias"):
            destination[prefix + name] = torch.cat([getattr(part, name) for part in self.packed.values()])

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        # The parts are saved as one layer, not one by one.
        destination = {} if destination is None else destination
        self._save_to_state_dict(destination, prefix, keep_vars)
        return destination
