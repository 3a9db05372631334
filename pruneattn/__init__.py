"""Token pruning for audio transformers, with measured speedups."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .constants import VERSION as __version__  # noqa: F401

if TYPE_CHECKING:  # Type checkers and editors read these imports; at run time the names are imported on first use.
    from . import adapters as adapters
    from . import checkpoints as checkpoints
    from . import data as data
    from . import models as models
    from . import ops as ops
    from .adapters import at_keep_rate as at_keep_rate
    from .adapters import optimize_for_inference as optimize_for_inference
    from .adapters import prune as prune
    from .adapters import set_keep_rate as set_keep_rate
    from .adapters import unprune as unprune
    from .checkpoints.load_checkpoint import load_checkpoint as load_checkpoint
    from .checkpoints.pretrained import load_pretrained as load_pretrained
    from .checkpoints.pretrained import save_pretrained as save_pretrained
    from .checkpoints.save_checkpoint import save_checkpoint as save_checkpoint
    from .errors import UserError as UserError
    from .models import create_model as create_model
    from .models import list_models as list_models
    from .models.export import export_model as export_model
    from .models.macs import count_macs as count_macs
    from .models.scores import Pruning as Pruning
    from .models.trace import trace as trace
    from .ops.backend import backends as backends
    from .ops.backend import use_backend as use_backend
else:
    # Imported on first use, so that `import pruneattn` is quick and needs no optional package.
    _PUBLIC = {
        "create_model": "models",
        "list_models": "models",
        "Pruning": "models.scores",
        "trace": "models.trace",
        "optimize_for_inference": "adapters",
        "export_model": "models.export",
        "count_macs": "models.macs",
        "load_checkpoint": "checkpoints.load_checkpoint",
        "save_checkpoint": "checkpoints.save_checkpoint",
        "load_pretrained": "checkpoints.pretrained",
        "save_pretrained": "checkpoints.pretrained",
        "prune": "adapters",
        "unprune": "adapters",
        "set_keep_rate": "adapters",
        "at_keep_rate": "adapters",
        "backends": "ops.backend",
        "use_backend": "ops.backend",
        "UserError": "errors",
    }
    _SUBMODULES = ("ops", "data", "models", "checkpoints", "adapters")

    __all__ = [*_PUBLIC, *_SUBMODULES]

    def __getattr__(name: str) -> object:
        if name in _PUBLIC:
            return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        if name in _SUBMODULES:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted([*globals(), *__all__])
