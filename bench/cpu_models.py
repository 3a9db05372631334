"""Sections ``models`` and ``peers`` of a CPU run: what pruning saves of the fastest dense model, and others' times."""

import copy
from functools import partial

import peers
import torch
from report import dtype_name, label_text, measure, progress, saving_rows

import pruneattn
from pruneattn.models import create_model
from pruneattn.timing import with_sdpa

FAMILIES = ("audiomae", "ast")
OURS = "ours"


def make_model(settings, family, **arguments):
    """A float32 model with fixed fresh weights."""
    torch.manual_seed(0)
    return create_model(f"{family}_{settings.size}", frames=settings.frames, **arguments).eval()


def at_keep_rate(model, keep_rate, fbank):
    model.set_keep_rate(keep_rate)
    return model(fbank)


class Subject:
    """A model of ours in one precision, its input, and what it should give."""

    def __init__(self, settings, family, dtype):
        self.name, self.dtype = f"{family}_{settings.size}", dtype
        self.label = {"model": self.name, "dtype": dtype_name(dtype)}
        progress(f"checking {label_text(self.label)}")
        self.model = make_model(settings, family)
        self.fbank = torch.randn(settings.batch, settings.frames, 128)
        with torch.inference_mode(), pruneattn.use_backend("reference"):
            self.expected = self.model(self.fbank)
        self.optimised = pruneattn.optimize_for_inference(copy.deepcopy(self.model), dtype)
        self.plain = copy.deepcopy(self.model).to(dtype)
        self.check(OURS, partial(self.optimised, self.fbank))

    def check(self, name, call):
        """The call, if its logits are those of the unpruned model."""
        with torch.inference_mode():
            peers.check_logits(f"{name}, {label_text(self.label)}", call(), self.expected, self.dtype)
        return call

    @torch.inference_mode()
    def check_kept(self, keep_rate, papers_way):
        """Raise unless the paper's way and our optimised model keep the patches of the reference."""
        for model in (self.model, self.optimised):
            model.set_keep_rate(keep_rate)
        with pruneattn.use_backend("reference"):
            expected = pruneattn.trace(self.model, self.fbank)
        peers.check_kept("the paper's way", papers_way.kept(self.fbank), expected)
        peers.check_kept(OURS, pruneattn.trace(self.optimised, self.fbank).kept, expected)

    def ours(self, keep_rate):
        return partial(at_keep_rate, self.optimised, keep_rate, self.fbank)

    def peer(self, name, model):
        """An unpruned model of others, checked."""
        return self.check(name, partial(model, self.fbank.to(self.dtype)))

    def compiled_peer(self, name, model):
        progress(f"compiling {name}, {label_text(self.label)}")
        with torch.inference_mode():
            return self.peer(f"{name}, compiled", peers.compiled(model, self.fbank.to(self.dtype)))

    def papers_way(self, keep_rates):
        """The paper's way at some keep-rates: dict of name -> call."""
        self.peer("the paper's way", peers.PapersViT(self.plain))
        calls = {}
        for keep_rate in keep_rates:
            model = peers.PapersViT(self.plain, keep_rate=keep_rate)
            if keep_rate < 1 and self.dtype == torch.float32:  # in half precision near scores change places
                self.check_kept(keep_rate, model)
            calls["the paper's way", keep_rate] = partial(model, self.fbank.to(self.dtype))
        return calls


def run_models(settings):
    for family in FAMILIES:
        for dtype in settings.dtypes:
            subject = Subject(settings, family, dtype)
            yield f"What pruning saves: {subject.name}, {dtype_name(dtype)}", _saving_rows(settings, subject)


def _saving_rows(settings, subject):
    sdpa = with_sdpa(copy.deepcopy(subject.plain))
    variants = {
        ("optimised", 1.0): subject.ours(1.0),
        ("not optimised", 1.0): subject.peer("not optimised", subject.plain),
        ("SDPA", 1.0): subject.peer("SDPA", sdpa),
        ("SDPA, compiled", 1.0): subject.compiled_peer("SDPA", sdpa),
        **{("optimised", rate): subject.ours(rate) for rate in settings.keep_rates if rate < 1},
    }
    times = measure(label_text(subject.label), variants, settings.rounds)
    label = {**subject.label, "batch": settings.batch}
    return saving_rows(label, times, partial(_macs, subject))


def _macs(subject, keep_rate):
    subject.model.set_keep_rate(keep_rate)
    return pruneattn.count_macs(subject.model).paper


def run_peers(settings):
    for family in FAMILIES:
        for dtype in settings.dtypes:
            subject = Subject(settings, family, dtype)
            times = _peer_times(settings, subject)
            title = f"{subject.name}, {dtype_name(dtype)}"
            yield f"Beside what others run: {title}", [
                {**subject.label, "batch": settings.batch, "what": name, "keep_rate": rate, **time}
                for (name, rate), time in times.items()
            ]
            yield f"Speed-up: {title}", _speed_up_rows(settings, subject, times)


def _peer_times(settings, subject):
    left_out = peers.missing()
    variants = {(OURS, rate): subject.ours(rate) for rate in settings.peer_keep_rates}
    if subject.model.num_extra_tokens == 1:
        name, make = "timm ViT", peers.timm_vit
    else:
        name, make = "Hugging Face AST", peers.huggingface_ast
    if name not in left_out:
        model = make(subject.plain)
        variants[name, 1.0] = subject.peer(name, model)
        variants[f"{name}, compiled", 1.0] = subject.compiled_peer(name, model)
    variants |= subject.papers_way(settings.peer_keep_rates)
    return measure(label_text(subject.label), variants, settings.rounds)


def _speed_up_rows(settings, subject, times):
    """Per keep-rate: our time, the fastest peer that does the same, and the fastest that does not prune."""
    medians = {key: time["p50_ms"] for key, time in times.items() if key[0] != OURS}
    dense = min((key for key in medians if key[1] == 1), key=medians.get)
    rows = []
    for keep_rate in settings.peer_keep_rates:
        ours = times[OURS, keep_rate]["p50_ms"]
        best = min((key for key in medians if key[1] == keep_rate), key=medians.get)
        rows.append(
            {**subject.label, "batch": settings.batch, "keep_rate": keep_rate, "ours_ms": ours, "best_peer": best[0],
             "best_peer_ms": medians[best], "speed_up": medians[best] / ours, "best_dense_peer": dense[0],
             "best_dense_peer_ms": medians[dense], "speed_up_over_dense": medians[dense] / ours}
        )  # fmt: skip
    return rows
