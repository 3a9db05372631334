"""The drawings of ``docs/kernels.md``: ``python docs/tools/drawings.py`` writes them into ``docs/figures``.

Each brings its own background, light or dark as the reader's page is, so that it can be read anywhere.
"""

from pathlib import Path

FIGURES = Path(__file__).resolve().parents[1] / "figures"

_STYLE = """
:root {
  --paper: #ffffff; --ink: #24292f; --soft: #6a737d; --line: #b4bcc4; --on: #00897b; --on2: #e8a33d; --off: #eceff1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #1c2128; --ink: #e6edf3; --soft: #9aa5b1; --line: #59636e; --on: #26a69a; --on2: #d99a3a; --off: #2d333b;
  }
}
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); }
.head { font-weight: 600; font-size: 14px; } .over { fill: #ffffff; }
.soft { fill: var(--soft); font-size: 12px; } .mid { text-anchor: middle; }
.paper { fill: var(--paper); stroke: var(--line); } .on { fill: var(--on); } .on2 { fill: var(--on2); }
.off { fill: var(--off); } .line, .arrow { fill: none; stroke: var(--line); stroke-width: 1.5; }
.dash { fill: none; stroke: var(--line); stroke-dasharray: 4 3; stroke-width: 1.5; }
.arrow { stroke: var(--soft); marker-end: url(#tip); } .tip { fill: var(--soft); }
"""


class Drawing:
    """An SVG file in the making; sizes in pixels."""

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

    def cells(self, x, y, kinds, width=26, height=12, gap=3):
        """A column of small boxes, one per kind."""
        for number, kind in enumerate(kinds):
            self.box(x, y + number * (height + gap), width, height, kind)

    def svg(self):
        tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img" aria-label="{self.title}">',
                f"<style>{_STYLE}</style>",
                f'<defs>{tip}<path d="M0 0 L8 4 L0 8 Z" class="tip"/></marker></defs>',
                f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="8" class="paper"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def hidden_score():
    drawing = Drawing(780, 270, "Eager attention stores the softmax matrix, fused attention never has it whole")
    titles = (
        ("Eager", "the matrix lies in memory"),
        ("Fused", "a tile at a time, then forgotten"),
        ("Here", "whole rows, in the cache"),
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
            drawing.text(x + 60, 228, "no column is ever whole:\nno score", "mid")
        else:
            drawing.arrow((x + 60, 188), (x + 60, 208))
            drawing.box(x, 212, 120, 10, "on2")
            drawing.text(x + 60, 244, "column means: the score", "mid")
        if title == "Here":
            drawing.box(x, 104, 120, 22, "on")
    return drawing


def block_orders():
    drawing = Drawing(780, 584, "Which rows each step of a pruning block computes, in three orders of work")
    extra, kept, patches = 1, (1, 3, 4), 6
    everything = [True] * (extra + patches)
    stay = [True] * extra + [patch in kept for patch in range(patches)]
    cls = [True] + [False] * patches
    lanes = [
        ("As usually built", [
            ("norm", everything), ("q k v", everything), ("softmax\nmatrix", everything),
            ("projection,\nresidual", everything), ("TopK,\ngather", None), ("MLP", stay),
        ]),
        ("Column mean: every query is needed, no dropped row is projected", [
            ("norm", everything), ("q k v", everything), ("attention\n+ score", everything),
            ("TopK,\ngather", None), ("projection,\nresidual", stay), ("MLP", stay),
        ]),
        ("CLS: one query gives the score, the others follow for the rows that stay", [
            ("norm", everything), ("k v", everything), ("q", cls), ("score", cls), ("TopK,\ngather", None),
            ("q", stay), ("attention", stay), ("projection,\nresidual", stay), ("MLP", stay),
        ]),
    ]  # fmt: skip
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
    drawing = Drawing(780, 330, "The CPU kernel: a few rows of the softmax matrix give output and column sums")
    drawing.text(24, 32, "One head, a few query rows at a time", "head")
    drawing.box(24, 150, 70, 40, "on2")
    drawing.text(24, 208, "q, a few rows", "soft")
    drawing.box(150, 60, 260, 60, "off")
    drawing.text(280, 94, "keys, packed once per head", "mid")
    drawing.box(150, 150, 260, 40, "on")
    drawing.text(420, 146, "rows of the matrix,\nfloat32, in the cache", "soft")
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
    drawing.text(280, 175, "2  exp, once a cell", "mid head over")
    steps = "1 logits   2 exp(logit − largest), row sums   3 add to the columns   4 times the values, by 1 / row sum"
    drawing.text(24, 306, steps.replace("   ", " · "))
    return drawing


def triton_columns():
    drawing = Drawing(780, 290, "Two Triton kernels: one goes by query rows, the other by key columns of the same matrix")
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
    drawing.text(180, 268, "a program's rows: tile by tile, the first key by itself", "mid soft")
    drawing.arrow((562, 246), (562, 262))
    drawing.text(580, 268, "a program's columns, each summed by its threads: the score", "mid soft")
    return drawing


def cuda_prune():
    drawing = Drawing(780, 330, "The CUDA kernel: every block of a clip selects alike and copies its share of the rows")
    drawing.text(24, 32, "prune_tokens: one launch, several blocks per clip, each 8 warps", "head")
    for patch in range(16):
        drawing.box(24, 52 + 15 * patch, 36, 12, "on" if patch in (1, 2, 5, 9, 10, 14) else "off")
    drawing.text(24, 312, "scores of a clip", "soft")
    drawing.arrow((66, 170), (96, 170))
    drawing.box(102, 52, 176, 236)
    drawing.text(114, 74, "keys in registers", "head")
    drawing.text(114, 94, "a float as an integer\nthat sorts the same way", "soft")
    drawing.text(114, 146, "threshold", "head")
    drawing.text(114, 166, "bit by bit from the top,\na count and a barrier each", "soft")
    drawing.text(114, 218, "ranks", "head")
    drawing.text(114, 238, "ballots: patch order,\nties to the lower number", "soft")
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
    drawing.text(640, 296, "extra tokens, then the kept rows,\n16 bytes an access where aligned", "mid soft")
    return drawing


DRAWINGS = {"hidden-score": hidden_score, "block-orders": block_orders, "cpu-kernel": cpu_kernel,
            "triton-columns": triton_columns, "cuda-prune": cuda_prune}  # fmt: skip

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (FIGURES / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
