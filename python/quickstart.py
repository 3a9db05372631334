"""A tour of the public API on one page. ``python python/quickstart.py`` needs no data and no GPU."""

import copy
import tempfile
from pathlib import Path

import torch

import pruneattn
from pruneattn import ops
from pruneattn.data import DATASETS, FeatureConfig, FeatureExtractor, load_dataset

torch.manual_seed(0)
torch.set_grad_enabled(False)  # everything except optimize_for_inference also runs with gradients

# Sounds: one of each class of the synthetic dataset. pruneattn.data.load_audio("clip.wav") reads your own sounds.
toy = load_dataset("toy", "test")
clips = [toy.read(number) for number in range(toy.num_classes)]  # float32 [L] at 16 kHz, of different lengths
waves = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)  # [10, longest L]

# The model's input: log-mel in frames of 10 ms, padded to 128 frames and normalized.
features = FeatureConfig(frames=128, mean=DATASETS["toy"].mean, std=DATASETS["toy"].std)
fbank = FeatureExtractor(features)(waves, torch.tensor([len(clip) for clip in clips]))  # [10, 128, 128]

# A model with random weights that keeps 70 % of the patches at each of its three pruning blocks.
print(f"models: {', '.join(pruneattn.list_models())}")
model = pruneattn.create_model("audiomae_tiny", num_classes=toy.num_classes, frames=128, keep_rate=0.7).eval()
logits = model(fbank)  # [10, 10]: clips, classes

# The kept patches: their numbers and scores at each pruning block, and their positions.
trace = pruneattn.trace(model, fbank)
print(f"patches kept: {model.num_patches} -> {' -> '.join(str(kept.shape[1]) for kept in trace.kept)}")
best = trace.kept[1][0, trace.scores[2][0].argmax()]  # in the first clip, among the input patches of the third block
time, mel = model.patch_position(best)  # column of 16 frames, row of 16 mel bins
print(f"the first clip's best patch: {0.16 * time:.2f} to {0.16 * (time + 1):.2f} s, mel bins from {16 * mel}\n")

# Multiply-accumulates of a clip at any keep-rate, without changing the model: by the paper's count, and as computed.
for keep_rate in (1.0, 0.7, (0.9, 0.6, 0.4)):  # one number, or one per pruning block
    macs = pruneattn.count_macs(model, keep_rate)
    print(f"keep-rate {keep_rate}: {macs.paper / 1e9:.3f} GMACs per clip, {macs.computed / 1e9:.3f} computed")

# The keep-rate of a model can be changed at any time, here for one call.
with pruneattn.at_keep_rate(model, 1.0):
    print(f"logits change by {(model(fbank) - logits).norm() / logits.norm():.0%} without pruning")

# The four ops of pruning, on 10 clips with 3 heads of 64, and 1 extra token before 64 patches.
q, k, v = torch.randn(3, 10, 3, 65, 64)  # [B, H, N, D] each
attended, scores = ops.column_mean_attention(q, k, v, extra_tokens=1)  # [B, H, N, D], float32 [B, 64]
cls_scores = ops.cls_scores(q[:, :, 0], k, extra_tokens=1)  # float32 [B, 64]: AST's score
index = ops.select_tokens(scores, keep=32)  # int64 [B, 32]: the best patches, ascending
x = ops.gather_tokens(torch.randn(10, 65, 192), index, extra_tokens=1)  # [B, 33, C]: the extra token, these patches

# A reference in plain PyTorch defines each op. It runs if there is no kernel, and can be forced.
with pruneattn.use_backend("reference"):
    attended_reference, scores_reference = ops.column_mean_attention(q, k, v, extra_tokens=1)
print(f"\nkernel against reference: attention {(attended - attended_reference).abs().max():.0e}, ", end="")
print(f"scores {(scores - scores_reference).abs().max():.0e}\n\n{pruneattn.backends()}\n")

# Inference on a CPU: packed weights, fused steps, this package's attention in every block.
fast = pruneattn.optimize_for_inference(copy.deepcopy(model))
print(f"optimized against plain logits: relative error {(fast(fbank) - logits).norm() / logits.norm():.0e}")

# One file contains weights, configuration, features and labels. load_checkpoint also reads formats of other projects.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "model.safetensors")
    pruneattn.save_pretrained(model, path, features=features, labels=toy.labels, multilabel=False)
    again = pruneattn.load_pretrained(path)
    report = pruneattn.load_checkpoint(model, path)  # into an existing model
print(f"loaded again: same logits {again(fbank).equal(logits)}, labels {', '.join(again.labels)}")
print(f"load_checkpoint: {len(report.missing)} parameters missing, {len(report.unused)} unused")
