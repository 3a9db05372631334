"""Checkpoints on the Hugging Face Hub, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

#: Files that describe the use of the weights. They are downloaded into the folder of the weights.
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^@\s]+)?")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def is_hub_name(path: str | Path) -> bool:
    """Whether `path` has the form of a Hub repository, ``user/name`` or ``user/name@revision``, not of a file name."""
    return _NAME.fullmatch(str(path)) is not None and not str(path).endswith(_WEIGHTS)


def download(name: str, weights: Sequence[str]) -> Path:
    """Download the weights and configuration of a Hub repository into the local cache, unless the cache contains them.

    All files come from one commit. Only the cache is used if ``HF_HUB_OFFLINE=1`` or if the Hub does not answer.

    Args:
        name: ``user/name``, or ``user/name@revision`` with a branch, tag or commit.
        weights: file names of weights; the first file that the repository has is downloaded.

    Returns:
        Path of the weights. The configuration files are in the same folder.

    Raises:
        UserError: huggingface_hub is not installed, or neither the Hub nor the cache has such weights. Every message
            also says that no local file has this name.
    """
    absent = f"{name}: no such file or folder in {Path.cwd()}"
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise UserError(
            f"{absent}, and huggingface_hub, which could look for it on the Hugging Face Hub, is not installed: "
            "pip install 'pruneattn[hub]'"
        ) from None
    repository, _, revision = name.partition("@")
    files, local_only = [CONFIG, PREPROCESSOR, *weights], constants.HF_HUB_OFFLINE
    silence: Exception | None = None
    try:
        if not local_only:
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            info = huggingface_hub.HfApi().model_info(repository, revision=revision or None, timeout=timeout)
            present = {file.rfilename for file in info.siblings or ()}
            files = [file for file in files if file in present]
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{absent}, and {repository} on the Hugging Face Hub has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{absent}, and the Hugging Face Hub has no public repository {repository}: correct the name, or log in "
            "with `hf auth login` if the repository is private"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{absent}, and not a valid name on the Hugging Face Hub ({_line(error)})") from error
    except Exception as error:  # requests, httpx or the Hub itself, depending on the version: no connection or answer
        local_only, silence = True, error
    for file in files:
        try:
            path = huggingface_hub.hf_hub_download(
                repository, file, revision=revision or None, local_files_only=local_only
            )
        except errors.LocalEntryNotFoundError as error:
            silence = silence or error
            continue
        except errors.GatedRepoError as error:
            raise UserError(
                f"{absent}, and {repository} on the Hugging Face Hub requires you to accept its terms: accept them at "
                f"{constants.ENDPOINT}/{repository}, then log in with `hf auth login`"
            ) from error
        except (errors.HfHubHTTPError, OSError) as error:
            raise UserError(f"{name}: {file} cannot be fetched from the Hugging Face Hub: {_line(error)}") from error
        if file in weights:
            return Path(path)
        revision = Path(path).parent.name  # the folder of a snapshot is named after its commit: pin the other files
    if silence is None:
        raise UserError(
            f"{absent}, and {repository} on the Hugging Face Hub holds none of {', '.join(weights)}; use the "
            "name of a repository with its weights in one of these files"
        )
    cache = f"not in the Hugging Face Hub's cache ({constants.HF_HUB_CACHE})"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{absent}, and {cache}; HF_HUB_OFFLINE forbids a download: unset it") from silence
    raise UserError(
        f"{absent}, {cache}, and the Hub could not be reached ({_line(silence)}): correct the path, or connect to the "
        "network"
    ) from silence


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
