import torch


def reference(q, k, v, extra_tokens, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = ((q @ k.transpose(-2, -1)).float() * scale).softmax(-1)  # [B, H, N, N] float32
    out = weights.to(v.dtype) @ v  # [B, H, N, D]
    scores = weights[:, :, extra_tokens:, extra_tokens:].mean(dim=(1, 2))  # [B, N - extra_tokens]
    # The projection reads [B, N, H * D]: store the rows of a token together.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, scores.detach()


column_mean_attention = reference
