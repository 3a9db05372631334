import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_audio():
    """Folder with the real labelled audio (``esc10/``, ``speech_commands_ar/``); skips where there is none."""
    candidates = [os.environ.get("PRUNEATTN_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    for folder in candidates:
        if folder and (Path(folder) / "esc10").is_dir():
            return Path(folder)
    pytest.skip("no real audio: set PRUNEATTN_DATA to the folder that holds esc10/ and speech_commands_ar/")
