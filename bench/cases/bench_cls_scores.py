from bench.harness.op_cases import extra_tokens, op_providers, random_qkv
from pruneattn.ops import cls_scores

LEVELS, OP = ("op",), "cls_scores"


def eager(q_cls, k, extra_tokens):
    """In the dtype of the inputs."""
    logits = (q_cls.unsqueeze(2) @ k.transpose(-2, -1)).squeeze(2) * k.shape[-1] ** -0.5
    return logits.softmax(-1)[:, :, extra_tokens:].mean(1).float()


def providers(case):
    q, k, _ = random_qkv(case)
    return op_providers(case, cls_scores, {"eager": eager}, q[:, :, 0], k, extra_tokens(case), macs=k.numel())


def test_cls_scores(side_by_side, case):
    side_by_side(case, providers(case))
