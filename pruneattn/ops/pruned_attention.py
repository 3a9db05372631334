"""A pruning block's attention by column means: output, scores, selection and gather."""

import torch
from torch.utils.flop_counter import register_flop_formula

from ._checks import check_keep
from ._registration import LIBRARY, define
from .attention import attention_backward, empty_outputs
from .backend import choose
from .column_mean_attention import check_attention, cpu_attention, cuda_partials, flops, triton_partials
from .column_mean_attention import reference as attention_reference
from .gather_tokens import scatter_tokens
from .prune_tokens import check_tokens, empty_kept
from .prune_tokens import compiled as prune_compiled
from .prune_tokens import reference as prune_reference


def merged(out):
    """``[B, H, N, D]`` as rows for the projection, ``[B, N, H * D]``: a view of what the kernels write."""
    return out.transpose(1, 2).flatten(2)


def reference(q, k, v, x, keep, extra_tokens, scale=None):
    """The definition of :func:`pruned_attention` in plain PyTorch; last, what its gradient needs."""
    out, scores, lse = attention_reference(q, k, v, extra_tokens, scale)
    return scores, *prune_reference(scores, x, merged(out), keep, extra_tokens), out, lse


def pruned_attention(q, k, v, x, keep, extra_tokens, scale=None):
    """``column_mean_attention(q, k, v, extra_tokens, scale)``, and ``prune_tokens`` of ``x`` and of its output, fused.

    From queries, keys, values and the residual stream to the rows that stay (paper, eq. 2a and section 3): on a GPU the
    parts of the scores are added up where the patches are selected, two launches in all. Differentiable in q, k, v (once)
    and x. Inside autocast, q, k and v are cast as those of ``scaled_dot_product_attention`` are; x stays.

    Args:
        q, k, v: queries, keys, values ``[B, H, N, D]``, one floating dtype, any strides.
        x: tokens ``[B, N, C]``, any dtype, any strides.
        keep: how many patches to keep, 1 to N - extra_tokens.
        extra_tokens: how many tokens at the front are not patches.
        scale: factor of the logits; ``D ** -0.5`` if not given.

    Returns:
        scores: float32 ``[B, N - extra_tokens]``, by which the patches are selected.
        index: int64 ``[B, keep]``, ascending patch numbers.
        x_kept: ``[B, extra_tokens + keep, C]``, contiguous.
        out_kept: ``[B, extra_tokens + keep, H * D]``, contiguous: rows of the attention output, heads side by side.

    Raises:
        TypeError, ValueError: an argument has another dtype, shape, range or device than said here.
    """
    return _pruned_attention(q, k, v, x, keep, extra_tokens, scale)[:4]


def _check(q, k, v, x, keep, extra_tokens, scale=None):
    check_attention(q, k, v, extra_tokens, scale)
    patches = q.shape[2] - extra_tokens
    check_keep(keep, patches)
    check_tokens(x, x, patches, extra_tokens, "q", q)


def _fake(q, k, v, x, keep, extra_tokens, scale=None):
    out, lse = empty_outputs(q)
    scores = q.new_empty((q.shape[0], q.shape[2] - extra_tokens), dtype=torch.float32)
    return scores, *empty_kept(x, merged(out), keep, extra_tokens), out, lse


def _cpu(q, k, v, x, keep, extra_tokens, scale=None):
    out, scores, lse = cpu_attention(q, k, v, extra_tokens, scale)
    return scores, *prune_compiled(scores, x, merged(out), keep, extra_tokens), out, lse


def _by_partials(partials_of):
    """The op by a kernel that leaves partial scores, which the best epilogue that may run adds up."""

    def run(q, k, v, x, keep, extra_tokens, scale=None):
        out, partials, lse = partials_of(q, k, v, extra_tokens, scale)
        prune = choose("prune_epilogue", q.device.type)
        return *prune(partials, x, merged(out), keep, extra_tokens), out, lse

    return run


_pruned_attention = define(
    "pruned_attention(Tensor q, Tensor k, Tensor v, Tensor x, SymInt keep, SymInt extra_tokens, float? scale=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    autocast=("q", "k", "v"),
    reference=reference,
    cpu=_cpu,
    cuda=_by_partials(cuda_partials),
    triton=_by_partials(triton_partials),
)


def _setup_context(ctx, inputs, output):
    q, k, v, _, _, ctx.extra_tokens, ctx.scale = inputs
    scores, index, _, _, out, lse = output
    ctx.mark_non_differentiable(scores, index, out, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, index)


def _backward(ctx, _, __, grad_x, grad_out, *___):
    *saved, index = ctx.saved_tensors
    batch, heads, tokens, channels = saved[0].shape
    if grad_x is not None:
        grad_x = scatter_tokens(grad_x, index, ctx.extra_tokens, tokens)
    grads = None, None, None
    if grad_out is not None:
        grad_out = scatter_tokens(grad_out, index, ctx.extra_tokens, tokens)  # [B, N, H * D]
        grad_out = grad_out.view(batch, tokens, heads, channels).transpose(1, 2)
        grads = attention_backward(grad_out, *saved, ctx.scale)
    return *grads, grad_x, None, None, None


torch.library.register_autograd("pruneattn::pruned_attention", _backward, setup_context=_setup_context, lib=LIBRARY)


register_flop_formula(torch.ops.pruneattn.pruned_attention, get_raw=True)(flops)
