"""Checkpoints by their name on the Hugging Face Hub."""

import re
from pathlib import Path

from ..errors import UserError

# What tells how the weights are to be used; fetched with them, so that both lie in one folder.
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[^@\s]+)?")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def is_hub_name(path):
    """Whether `path` can be a repository on the Hub, ``user/name`` or ``user/name@revision``, and not a file's name."""
    return _NAME.fullmatch(str(path)) is not None and not str(path).endswith(_WEIGHTS)


def download(name, weights):
    """Path of a Hub repository's weights in the local cache, downloaded if need be, with its configuration beside.

    Everything comes from one commit. With ``HF_HUB_OFFLINE=1``, and when the Hub does not answer, only the cache is
    looked at.

    Args:
        name: ``user/name``, or ``user/name@revision`` with a branch, tag or commit.
        weights: names of weights files; the first that the repository has is taken.

    Raises:
        UserError: huggingface_hub is not installed, or neither Hub nor cache has such a file. Every message says that
            there is no local file of this name either, since that may be what was meant.
    """
    absent = f"{name}: no such file or folder in {Path.cwd()}"
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise UserError(
            f"{absent}; to look for it on the Hugging Face Hub as well: pip install 'pruneattn[hub]'"
        ) from None
    repository, _, revision = name.partition("@")
    files, local_only, silence = [CONFIG, PREPROCESSOR, *weights], constants.HF_HUB_OFFLINE, None
    try:
        if not local_only:
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            info = huggingface_hub.HfApi().model_info(repository, revision=revision or None, timeout=timeout)
            present = {file.rfilename for file in info.siblings}
            files = [file for file in files if file in present]
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{absent}, and {repository} on the Hugging Face Hub has no revision {revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{absent}, and no repository {repository} on the Hugging Face Hub, or a private one: correct the name, "
            "or log in with `hf auth login`"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{absent}, and no name that the Hugging Face Hub allows ({_line(error)})") from error
    except Exception as error:  # of requests, httpx or the Hub itself, by version: no connection, or no answer
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
                f"{absent}, and {repository} on the Hugging Face Hub asks you to accept its terms: do so at "
                f"{constants.ENDPOINT}/{repository}, then log in with `hf auth login`"
            ) from error
        except (errors.HfHubHTTPError, OSError) as error:
            raise UserError(f"{name}: {file} cannot be fetched from the Hugging Face Hub: {_line(error)}") from error
        if file in weights:
            return Path(path)
        revision = Path(path).parent.name  # a snapshot's folder has the name of its commit: the rest is of it, too
    if silence is None:
        raise UserError(
            f"{absent}, and {repository} on the Hugging Face Hub holds none of {', '.join(weights)}; give the name of "
            "a repository with the weights in one such file"
        )
    cache = f"not in the Hugging Face Hub's cache ({constants.HF_HUB_CACHE})"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{absent}, and {cache}; HF_HUB_OFFLINE forbids a download: unset it") from silence
    raise UserError(
        f"{absent}, {cache}, and the Hub could not be reached ({_line(silence)}): correct the path, or connect to the "
        "network"
    ) from silence


def _line(error):
    return " ".join(str(error).split()) or type(error).__name__
