"""The compiled extension (csrc/bindings.cpp). It knows nothing of torch: tensors are addresses, sizes and strides.

Functions that start with ``cuda_`` exist only if ``build_info()["cuda"]`` is true. All functions raise ValueError for a
size out of range. ``threads`` is a number of OpenMP threads, ``device`` the index of a GPU, and ``stream`` the handle
of a CUDA stream.
"""

from typing import TypedDict

#: Address of a ``[B, H, N, D]`` tensor, and its strides over clips, heads and tokens, in elements.
_Heads = tuple[int, int, int, int]
#: Source address, destination address, batch stride, token stride and row size of a tensor to gather, in bytes.
_Rows = list[tuple[int, int, int, int, int]]
#: Address of a ``[B, N, C]`` tensor, rows per batch (N), and strides over batches and rows, in elements.
_TokenRows = tuple[int, int, int, int]

class _BuildInfo(TypedDict):
    cuda: bool
    cuda_architectures: str
    cuda_reason: str
    compiler: str

MAX_PATCHES: int
MAX_TOKENS: int

def build_info() -> _BuildInfo: ...
def cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def cpu_use_isa(name: str) -> None: ...
def cpu_select_tokens(
    scores_ptr: int, batch: int, patches: int, batch_stride: int, keep: int, index_ptr: int, threads: int
) -> None: ...
def cpu_gather_tokens(
    index_ptr: int, batch: int, patches: int, keep: int, extra_tokens: int, rows: _Rows, threads: int
) -> None: ...
def cpu_prune_tokens(
    scores_ptr: int,
    batch: int,
    patches: int,
    batch_stride: int,
    keep: int,
    index_ptr: int,
    extra_tokens: int,
    rows: _Rows,
    threads: int,
) -> None: ...
def cpu_attention(
    dtype: str,
    batch: int,
    heads: int,
    queries: int,
    tokens: int,
    channels: int,
    q: _Heads,
    k: _Heads,
    v: _Heads,
    out: _Heads,
    lse_ptr: int,
    scale: float,
    threads: int,
) -> None: ...
def cpu_column_mean_attention(
    dtype: str,
    batch: int,
    heads: int,
    tokens: int,
    channels: int,
    q: _Heads,
    k: _Heads,
    v: _Heads,
    out: _Heads,
    lse_ptr: int,
    scale: float,
    extra_tokens: int,
    scores_ptr: int,
    threads: int,
) -> None: ...
def cpu_cls_scores(
    dtype: str,
    batch: int,
    heads: int,
    tokens: int,
    channels: int,
    q: _Heads,
    k: _Heads,
    scale: float,
    extra_tokens: int,
    scores_ptr: int,
    threads: int,
) -> None: ...
def cpu_int8_linear(
    dtype: str,
    rows: int,
    channels: int,
    out: int,
    x: _TokenRows,
    residual: _TokenRows,
    y_ptr: int,
    weight_ptr: int,
    scale_ptr: int,
    bias_ptr: int,
    norm_weight_ptr: int,
    norm_bias_ptr: int,
    epsilon: float,
    gelu: bool,
    threads: int,
) -> None: ...
def cuda_select_tokens(
    scores_ptr: int, batch: int, patches: int, batch_stride: int, keep: int, index_ptr: int, device: int, stream: int
) -> None: ...
def cuda_gather_tokens(
    index_ptr: int, batch: int, patches: int, keep: int, extra_tokens: int, rows: _Rows, device: int, stream: int
) -> None: ...
def cuda_prune_tokens(
    scores_ptr: int,
    batch: int,
    patches: int,
    batch_stride: int,
    keep: int,
    index_ptr: int,
    extra_tokens: int,
    rows: _Rows,
    device: int,
    stream: int,
) -> None: ...
def cuda_prune_epilogue(
    partials_ptr: int,
    batch: int,
    partial_rows: int,
    patches: int,
    batch_stride: int,
    row_stride: int,
    keep: int,
    scores_ptr: int,
    index_ptr: int,
    extra_tokens: int,
    rows: _Rows,
    device: int,
    stream: int,
) -> None: ...
def cuda_cls_scores(
    dtype: str,
    batch: int,
    heads: int,
    tokens: int,
    channels: int,
    q: _Heads,
    k: _Heads,
    scale: float,
    extra_tokens: int,
    partials_ptr: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_most_tokens(device: int) -> int: ...
def cuda_attention_parts(heads: int, tokens: int, device: int) -> int: ...
def cuda_column_mean_attention(
    dtype: str,
    batch: int,
    heads: int,
    tokens: int,
    channels: int,
    q: _Heads,
    k: _Heads,
    v: _Heads,
    out: _Heads,
    lse_ptr: int,
    scale: float,
    extra_tokens: int,
    partials_ptr: int,
    parts: int,
    device: int,
    stream: int,
) -> None: ...
