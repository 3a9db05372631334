"""Draws the figures of README.md and docs/: ``python docs/tools/drawings.py`` writes SVG files to ``docs/figures``.

Every figure has its own background, which follows the light or dark color scheme of the reader. ``speed`` reads its
numbers from ``bench/results``.
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"
CPU_RESULT = ROOT / "bench" / "results" / "cpu-2026-11-26T132015.json"
GPU_RESULT = ROOT / "bench" / "results" / "gpu-2026-11-26T200724.json"
EAGER_SOFTMAX = "the paper's way"  # the result file's name for eager attention with the whole softmax matrix

_STYLE = """
:root {
  --paper: #ffffff; --ink: #24292f; --soft: #6a737d; --line: #b4bcc4; --on: #00897b; --on2: #e8a33d; --off: #eceff1;
  --base: #a9b4bf;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #1c2128; --ink: #e6edf3; --soft: #9aa5b1; --line: #59636e; --on: #26a69a; --on2: #d99a3a; --off: #2d333b;
    --base: #6b7784;
  }
}
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); }
.head { font-weight: 600; font-size: 14px; } .over { fill: #ffffff; }
.soft { fill: var(--soft); font-size: 12px; } .mid { text-anchor: middle; } .end { text-anchor: end; }
.value { font-weight: 600; } .base { fill: var(--base); } .tick { stroke: var(--ink); stroke-width: 2; }
.paper { fill: var(--paper); stroke: var(--line); } .on { fill: var(--on); } .on2 { fill: var(--on2); }
.off { fill: var(--off); } .line, .arrow { fill: none; stroke: var(--line); stroke-width: 1.5; }
.dash { fill: none; stroke: var(--line); stroke-dasharray: 4 3; stroke-width: 1.5; }
.arrow { stroke: var(--soft); marker-end: url(#tip); } .tip { fill: var(--soft); }
"""


class Drawing:
    """An SVG file that is being drawn; sizes in pixels."""

    def __init__(self, width, height, title):
        self.width, self.height, self.title, self.parts = width, height, title, []

    def box(self, x, y, width, height, kind="line"):
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" class="{kind}"/>')

    def text(self, x, y, words, kind=""):
        for number, line in enumerate(words.split("\n")):
            self.parts.append(f'<text x="{x:g}" y="{y + 16 * number:g}" class="{kind}">{line}</text>')

    def arrow(self, *points):
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="M{path}" class="arrow"/>')

    def line(self, x1, y1, x2, y2, kind="line"):
        self.parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>')

    def bar(self, x, y, width, label, value, note="", kind="base", tick=0):
        """A horizontal bar that starts at ``x``, between its label and its value; a tick marks another length."""
        self.text(x - 8, y + 12.5, label, "end")
        self.box(x, y, round(width, 1), 16, kind)
        if tick:
            self.line(x + tick, y - 2, x + tick, y + 18, "tick")
        self.text(
            round(x + max(width, tick) + 7),
            y + 12.5,
            f'<tspan class="value">{value}</tspan> <tspan class="soft">{note}</tspan>',
        )

    def cells(self, x, y, kinds, width=26, height=12, gap=3):
        """A column of small boxes, one per kind."""
        for number, kind in enumerate(kinds):
            self.box(x, y + number * (height + gap), width, height, kind)

    def svg(self):
        tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        size = f'width="{self.width}" height="{self.height}"'
        label = f'role="img" aria-label="{self.title}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" {size} {label}>',
                f"<style>{_STYLE}</style>",
                f'<defs>{tip}<path d="M0 0 L8 4 L0 8 Z" class="tip"/></marker></defs>',
                f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="8" class="paper"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def hidden_score():
    drawing = Drawing(780, 270, "Eager attention stores the softmax matrix, fused attention never does")
    titles = (
        ("Eager", "softmax matrix in memory"),
        ("Fused", "one tile at a time, not stored"),
        ("pruneattn", "whole rows in the cache"),
    )
    for number, (title, line) in enumerate(titles):
        x = 40 + 250 * number
        drawing.text(x, 32, title, "head")
        drawing.text(x, 50, line, "soft")
        drawing.box(x, 64, 120, 120, ("on", "dash", "dash")[number])
        drawing.text(x + 172, 120, "output", "mid")
        drawing.arrow((x + 124, 116), (x + 148, 116))
        if title == "Fused":
            drawing.box(x + 40, 104, 40, 40, "on")
            drawing.text(x + 60, 228, "no complete column:\nno score", "mid")
        else:
            drawing.arrow((x + 60, 188), (x + 60, 208))
            drawing.box(x, 212, 120, 10, "on2")
            drawing.text(x + 60, 244, "column means: the score", "mid")
        if title == "pruneattn":
            drawing.box(x, 104, 120, 22, "on")
    return drawing


def block_orders():
    drawing = Drawing(780, 584, "Rows that each step of a pruning block computes, in three orders of the steps")
    extra, kept, patches = 1, (1, 3, 4), 6
    everything = [True] * (extra + patches)
    stay = [True] * extra + [patch in kept for patch in range(patches)]
    cls = [True] + [False] * patches
    lanes = [
        (
            "Common implementation",
            [
                ("norm", everything),
                ("q k v", everything),
                ("softmax\nmatrix", everything),
                ("projection,\nresidual", everything),
                ("TopK,\ngather", None),
                ("MLP", stay),
            ],
        ),
        (
            "Column-mean score: needs every query; projects only the kept rows",
            [
                ("norm", everything),
                ("q k v", everything),
                ("attention\n+ score", everything),
                ("TopK,\ngather", None),
                ("projection,\nresidual", stay),
                ("MLP", stay),
            ],
        ),
        (
            "CLS score: needs one query; computes all other queries only for the kept rows",
            [
                ("norm", everything),
                ("k v", everything),
                ("q", cls),
                ("score", cls),
                ("TopK,\ngather", None),
                ("q", stay),
                ("attention", stay),
                ("projection,\nresidual", stay),
                ("MLP", stay),
            ],
        ),
    ]
    for lane, (title, steps) in enumerate(lanes):
        y = 30 + 180 * lane
        drawing.text(24, y, title, "head")
        for step, (name, rows) in enumerate(steps):
            x = 24 + 83 * step
            drawing.text(x + 30, y + 24, name, "mid soft")
            if rows is None:
                drawing.arrow((x + 10, y + 102), (x + 50, y + 102))
            else:
                kinds = ["on2" if row < extra else "on" for row in range(len(rows))]
                kinds = [kind if computed else "off" for kind, computed in zip(kinds, rows)]
                drawing.cells(x + 10, y + 50, kinds, width=40)
    drawing.cells(24, 560, ["on2"], 20)
    drawing.text(50, 571, "class token", "soft")
    drawing.cells(134, 560, ["on"], 20)
    drawing.text(160, 571, "patch", "soft")
    drawing.cells(210, 560, ["off"], 20)
    drawing.text(236, 571, "not computed", "soft")
    return drawing


def cpu_kernel():
    drawing = Drawing(780, 330, "CPU kernel: output and column sums from a few rows of the softmax matrix at a time")
    drawing.text(24, 32, "One head, a few query rows at a time", "head")
    drawing.box(24, 150, 70, 40, "on2")
    drawing.text(24, 208, "q, a few rows", "soft")
    drawing.box(150, 60, 260, 60, "off")
    drawing.text(280, 94, "keys, packed once per head", "mid")
    drawing.box(150, 150, 260, 40, "on")
    drawing.text(420, 146, "matrix rows,\nfloat32, in the cache", "soft")
    drawing.box(150, 236, 260, 12, "on2")
    drawing.text(150, 266, "column sums, float32", "soft")
    drawing.box(560, 60, 70, 130, "off")
    drawing.text(640, 100, "values, packed\nonce per head", "soft")
    drawing.box(680, 150, 70, 40, "on2")
    drawing.text(680, 208, "output rows", "soft")
    drawing.arrow((98, 170), (146, 170))
    drawing.text(122, 162, "1", "mid head")
    drawing.arrow((280, 124), (280, 147))
    drawing.text(268, 142, "1", "mid head")
    drawing.arrow((280, 194), (280, 232))
    drawing.text(268, 218, "3", "mid head")
    drawing.arrow((414, 182), (556, 182))
    drawing.text(485, 202, "4", "mid head")
    drawing.arrow((634, 170), (676, 170))
    drawing.text(280, 175, "2  exp, once per entry", "mid head over")
    steps = "1 logits   2 exp(logit - largest), row sums   3 add to column sums   4 times values / row sum"
    drawing.text(24, 306, steps.replace("   ", " · "))
    return drawing


def triton_columns():
    drawing = Drawing(
        780, 300, "Two Triton kernels: one iterates over query rows, the other over key columns of the same matrix"
    )
    drawing.text(24, 32, "column_mean_attention: two kernels, 513 = 1 + 512 tokens", "head")
    for left, head, by_rows in ((70, "1  attention", True), (470, "2  column sums", False)):
        drawing.text(left + 110, 62, head, "mid head")
        drawing.text(left + 110, 80, "keys", "mid soft")
        drawing.text(left - 34, 178, "queries", "mid soft")
        for row in range(5):
            for column in range(5):
                here = row == 2 if by_rows else column == 2 and row > 0
                kind = "on" if here else "line" if not by_rows and 0 in (row, column) else "off"
                x, width = (left, 8) if column == 0 else (left + 14 + 52 * (column - 1), 48)
                y, height = (90, 8) if row == 0 else (104 + 36 * (row - 1), 32)
                drawing.box(x, y, width, height, kind)
    drawing.arrow((296, 156), (330, 156))
    drawing.text(336, 134, "output,\nlargest logit,\n1 / sum of\nexponentials", "soft")
    drawing.text(180, 282, "rows of one program: tile by tile, the first key separately", "mid soft")
    drawing.arrow((562, 246), (562, 262))
    drawing.text(580, 282, "columns of one program, summed by its threads: the score", "mid soft")
    return drawing


def cuda_prune():
    drawing = Drawing(
        780, 330, "CUDA kernel: every block of a clip computes the same selection and copies its share of the rows"
    )
    drawing.text(24, 32, "prune_tokens: one launch, several blocks per clip, 8 warps per block", "head")
    for patch in range(16):
        drawing.box(24, 52 + 15 * patch, 36, 12, "on" if patch in (1, 2, 5, 9, 10, 14) else "off")
    drawing.text(24, 312, "scores of a clip", "soft")
    drawing.arrow((66, 170), (96, 170))
    drawing.box(102, 52, 176, 236)
    drawing.text(114, 74, "keys in registers", "head")
    drawing.text(114, 94, "floats as integers\nin the same order", "soft")
    drawing.text(114, 146, "threshold", "head")
    drawing.text(114, 166, "bit by bit from the top,\ncount and barrier per bit", "soft")
    drawing.text(114, 218, "ranks", "head")
    drawing.text(114, 238, "ballots, in patch order;\nties: lower patch number", "soft")
    drawing.arrow((284, 170), (314, 170))
    for place in range(6):
        drawing.box(322, 122 + 16 * place, 44, 13, "on2")
    drawing.text(344, 240, "kept patches,\nshared memory", "mid soft")
    drawing.text(400, 106, "block 0 copies", "soft")
    drawing.text(400, 238, "block 1 copies", "soft")
    for column, name in enumerate(("x", "attention")):
        x = 540 + 120 * column
        drawing.text(x + 40, 66, name, "mid")
        drawing.cells(x, 76, ["on2"] + ["on"] * 6, width=80, height=22, gap=6)
        drawing.parts.append(f'<path d="M{x - 8} 172.500 H{x + 88}" class="dash"/>')
    drawing.arrow((372, 158), (528, 122))
    drawing.arrow((372, 182), (528, 222))
    drawing.text(640, 296, "extra tokens, then the kept rows,\n16-byte accesses if aligned", "mid soft")
    return drawing


def rows_of(path, **values):
    """Rows of a benchmark result whose columns have these values."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["status"] == "ok" and all(row[name] == value for name, value in values.items())]


def fastest(rows, **values):
    """Of the rows whose columns have these values, the one with the lowest median time."""
    rows = [row for row in rows if all(row[name] == value for name, value in values.items())]
    return min(rows, key=lambda row: row["p50_ms"])


def speed():
    drawing = Drawing(840, 462, "Time of whole models on a CPU, and of attention with pruning on a GPU")
    drawing.text(24, 34, "Whole model on a CPU: ms per clip", "head")
    drawing.text(24, 53, "ViT-B, 512 patches, float32, 2 threads of an AMD EPYC", "soft")
    whole_models(drawing, 24, 84, "AudioMAE-B", "audiomae_base", "timm ViT")
    whole_models(drawing, 24, 272, "AST-B", "ast_base", "Hugging Face AST")
    drawing.line(490, 24, 490, 438)
    drawing.text(516, 34, "Pruning operator on a GPU: \u00b5s per call", "head")
    drawing.text(516, 53, "64 clips, 513 tokens, 12 heads, bfloat16, H100", "soft")
    attention_with_pruning(drawing, 516, 84)
    legend = [
        ("on", "pruneattn"),
        ("on2", "eager attention (whole softmax matrix)"),
        ("base", "unpruned baselines, PyTorch operators"),
    ]
    for y, (kind, words) in zip((362, 382, 402), legend):
        drawing.box(516, y, 14, 12, kind)
        drawing.text(540, y + 10.5, words, "soft")
    drawing.line(523, 420, 523, 436, "tick")
    drawing.text(540, 432, "time if it fell as much as the MACs", "soft")
    return drawing


def whole_models(drawing, left, top, title, subject, library, x0=206, scale=0.19):
    rows = rows_of(CPU_RESULT, level="model", subject=subject)
    dense_ms = fastest(rows, keep_rate=1)["p50_ms"]
    drawing.text(left, top, title, "value")
    y = top + 10
    for keep_rate in (1, 0.7, 0.5):
        shown = [("eager attention", EAGER_SOFTMAX, "on2"), ("pruneattn", "ours", "on")]
        if keep_rate == 1:
            shown = [(library, library, "base"), ("PyTorch SDPA", "SDPA", "base"), ("pruneattn", "ours", "on")]
        bottom = y + 20 * len(shown) - 4
        drawing.text(left, (y + bottom) / 2 - 3, "keep-rate", "soft")
        drawing.text(left, (y + bottom) / 2 + 13, f"{keep_rate:g}", "value")
        for label, provider, kind in shown:
            row = fastest(rows, keep_rate=keep_rate, provider=provider)
            note, tick = "", 0
            if keep_rate != 1:
                note, tick = f"\u2212{row['saving']:.0%}", round(scale * dense_ms * (1 - row["theory"]), 1)
            drawing.bar(x0, y, scale * row["p50_ms"], label, f"{row['p50_ms']:.0f}", note, kind, tick)
            y += 20
        y += 8


def attention_with_pruning(drawing, left, top, scale=0.075):
    rows = rows_of(GPU_RESULT, subject="pruned_attention", batch=64, tokens=513)
    compiled = fastest(rows, provider="SDPA, separate score, torch.topk, compiled")
    whole = [
        ("PyTorch operators", "SDPA, separate score, torch.topk, cudnn_attention", None, "base"),
        ("PyTorch operators, torch.compile", "SDPA, separate score, torch.topk, compiled", None, "base"),
        ("pruneattn", "ours", "cuda", "on"),
    ]
    attention = [
        ("FlashAttention", "SDPA alone, flash_attention", None, "base"),
        ("cuDNN", "SDPA alone, cudnn_attention", None, "base"),
    ]
    parts = (("Attention, score, TopK and gather", whole), ("Attention alone, nothing pruned", attention))
    y = top
    for title, shown in parts:
        drawing.text(left, y, title, "value")
        y += 12
        for label, provider, backend, kind in shown:
            row = fastest(rows, provider=provider, backend=backend)
            note = ""
            if kind == "on":
                note = f"{compiled['p50_ms'] / row['p50_ms']:.1f}\u00d7 faster than torch.compile"
            drawing.text(left, y + 12, label, "soft")
            drawing.bar(left, y + 18, scale * 1e3 * row["p50_ms"], "", f"{1e3 * row['p50_ms']:.0f}", note, kind)
            y += 44
        y += 26


DRAWINGS = {
    "hidden-score": hidden_score,
    "block-orders": block_orders,
    "cpu-kernel": cpu_kernel,
    "triton-columns": triton_columns,
    "cuda-prune": cuda_prune,
    "speed": speed,
}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (FIGURES / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
