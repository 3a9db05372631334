"""The public surface of pruneattn on one page: python python/quickstart.py runs as it is, with no data and no GPU."""

import copy
import tempfile
from pathlib import Path

import torch

import pruneattn
from pruneattn import ops
from pruneattn.data import DATASETS, FeatureConfig, FeatureExtractor, load_dataset

torch.manual_seed(0)
torch.set_grad_enabled(False)  # all but optimize_for_inference also runs with gradients

# Sounds: one of each kind of the synthetic data set. pruneattn.data.load_audio("clip.wav") gives a wave of your own.
toy = load_dataset("toy", "test")
clips = [toy.read(number) for number in range(toy.num_classes)]  # float32 [L] at 16 kHz, of different lengths
waves = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)  # [10, longest L]

# The model's input: log-mel in frames of 10 ms, padded to 128 of them and normalised.
features = FeatureConfig(frames=128, mean=DATASETS["toy"].mean, std=DATASETS["toy"].std)
fbank = FeatureExtractor(features)(waves, torch.tensor([len(clip) for clip in clips]))  # [10, 128, 128]

# A model with fresh weights that keeps 70 % of the patches at each of its three pruning blocks.
print(f"models: {', '.join(pruneattn.list_models())}")
model = pruneattn.create_model("audiomae_tiny", num_classes=toy.num_classes, frames=128, keep_rate=0.7).eval()
logits = model(fbank)  # [10, 10]: clips, classes

# What is kept and why: patch numbers and scores of each pruning block, and where a patch lies.
trace = pruneattn.trace(model, fbank)
print(f"patches kept: {model.num_patches} -> {' -> '.join(str(kept.shape[1]) for kept in trace.kept)}")
best = trace.kept[1][0, trace.scores[2][0].argmax()]  # of the first clip, among those that entered the third block
time, mel = model.patch_position(best)  # column of 16 frames, row of 16 mel bins
print(f"the first clip's best patch: {0.16 * time:.2f} to {0.16 * (time + 1):.2f} s, mel bins from {16 * mel}\n")

# The keep-rate can be changed at any time, and the work counted: as the paper counts, and what is really computed.
for keep_rate in (1.0, 0.7, (0.9, 0.6, 0.4)):  # one number, or one per pruning block
    model.set_keep_rate(keep_rate)
    macs = pruneattn.count_macs(model)
    print(f"keep-rate {keep_rate}: {macs.paper / 1e9:.3f} GMACs a clip, {macs.computed / 1e9:.3f} really computed")

# The four ops that pruning is made of, on 10 clips with 3 heads of 64, and 1 extra token in front of 64 patches.
q, k, v = torch.randn(3, 10, 3, 65, 64)  # [B, H, N, D] each
attended, scores = ops.column_mean_attention(q, k, v, extra_tokens=1)  # [B, H, N, D], float32 [B, 64]
cls_scores = ops.cls_scores(q[:, :, 0], k, extra_tokens=1)  # float32 [B, 64]: AST's score
index = ops.select_tokens(scores, keep=32)  # int64 [B, 32]: the best patches, ascending
x = ops.gather_tokens(torch.randn(10, 65, 192), index, extra_tokens=1)  # [B, 33, C]: the extra token, these patches

# Each is defined by a reference in plain PyTorch, which runs where there is no kernel and can be forced.
with pruneattn.use_backend("reference"):
    attended_reference, scores_reference = ops.column_mean_attention(q, k, v, extra_tokens=1)
print(f"\nkernel against reference: attention {(attended - attended_reference).abs().max():.0e}, ", end="")
print(f"scores {(scores - scores_reference).abs().max():.0e}\n\n{pruneattn.backends()}\n")

# Ready for inference on a CPU: packed weights, fused steps, our attention in every block. From then on only inference.
model.set_keep_rate(0.7)
fast = pruneattn.optimize_for_inference(copy.deepcopy(model))
print(f"optimized against plain logits: {(fast(fbank) - logits).norm() / logits.norm():.0e} of their size")

# One file holds weights, configuration, features and labels. load_checkpoint reads other people's formats as well.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "model.safetensors")
    pruneattn.save_pretrained(model, path, features=features, labels=toy.labels, multilabel=False)
    again = pruneattn.load_pretrained(path)
    report = pruneattn.load_checkpoint(model, path)  # into a model that is there
print(f"loaded again: same logits {again(fbank).equal(logits)}, labels {', '.join(again.labels)}")
print(f"load_checkpoint: {len(report.missing)} parameters missing, {len(report.unused)} unused")
