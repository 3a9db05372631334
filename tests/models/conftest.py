from pathlib import Path

import pytest
import torch

from pruneattn.models import create_model


@pytest.fixture(scope="session")
def eager(load_file):
    """The eager model beside this file."""
    return load_file(Path(__file__).with_name("eager.py"))


@pytest.fixture
def make_model():
    """Makes a small model with weights large enough that attention is far from uniform."""

    def make(family, seed=0, **arguments):
        arguments = {"embed_dim": 24, "depth": 10, "num_heads": 3, "num_classes": 5, "frames": 128} | arguments
        torch.manual_seed(seed)
        model = create_model(f"{family}_tiny", **arguments).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                else:
                    parameter.normal_(std=1.0 if name.endswith(("token", "pos_embed")) else 0.3)
        return model

    return make
