from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def eager(load_file):
    """The eager model next to this file."""
    return load_file(Path(__file__).with_name("eager.py"))
