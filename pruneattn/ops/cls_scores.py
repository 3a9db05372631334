import torch


def reference(q_cls, k, extra_tokens, scale=None):
    scale = q_cls.shape[-1] ** -0.5 if scale is None else scale
    logits = (k @ q_cls.unsqueeze(-1)).squeeze(-1).float() * scale  # [B, H, N]
    return logits.softmax(-1)[:, :, extra_tokens:].mean(1).detach()  # [B, N - extra_tokens]


cls_scores = reference
