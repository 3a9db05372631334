from .gather_tokens import reference as gather_reference
from .select_tokens import reference as select_reference


def reference(scores, x, y, keep, extra_tokens):
    index = select_reference(scores, keep)
    return index, gather_reference(x, index, extra_tokens), gather_reference(y, index, extra_tokens)


prune_tokens = reference
