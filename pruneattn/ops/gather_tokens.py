import torch


def reference(x, index, extra_tokens):
    kept = x[:, extra_tokens:].gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # [B, keep, C]
    return torch.cat([x[:, :extra_tokens], kept], dim=1)  # [B, extra_tokens + keep, C]


gather_tokens = reference
