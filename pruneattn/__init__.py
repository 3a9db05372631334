"""Token pruning for audio transformers whose saving shows on the clock."""

from importlib import import_module

from .constants import VERSION as __version__  # noqa: F401

# Imported on first use, so that `import pruneattn` stays quick and needs no optional package.
_PUBLIC = {
    "create_model": "models",
    "list_models": "models",
    "Pruning": "models.scores",
    "trace": "models.trace",
    "optimize_for_inference": "models.optimize",
    "export_model": "models.export",
    "count_macs": "models.macs",
    "load_checkpoint": "checkpoints.load_checkpoint",
    "save_checkpoint": "checkpoints.save_checkpoint",
    "load_pretrained": "checkpoints.pretrained",
    "save_pretrained": "checkpoints.pretrained",
    "prune": "adapters",
    "unprune": "adapters",
    "set_keep_rate": "adapters",
    "backends": "ops.backend",
    "use_backend": "ops.backend",
    "UserError": "errors",
}
_SUBMODULES = ("ops", "data", "models", "checkpoints", "adapters")

__all__ = [*_PUBLIC, *_SUBMODULES]


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
