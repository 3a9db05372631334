"""Sound files below a folder, found by suffix, and those that are left out."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..errors import UserError

# Usual suffixes of libsndfile's formats. Not of MATLAB files (.mat) and raw samples (.raw), which mostly are no sound,
# and not of sample dumps (.sds): libsndfile prints text to standard output for a damaged one.
# Without a header, libsndfile decodes only sound with the suffix .gsm or .vox.
_FORMATS = {
    "AIFF": (".aif", ".aifc", ".aiff"),
    "AU": (".au", ".snd"),
    "AVR": (".avr",),
    "CAF": (".caf",),
    "FLAC": (".flac",),
    "HTK": (".htk",),
    "IRCAM": (".ircam", ".sf"),
    "MP3": (".mp1", ".mp2", ".mp3", ".mpga"),
    "MPC2K": (".snd",),
    "NIST": (".nist", ".sph"),
    "OGG": (".oga", ".ogg", ".opus"),
    "PAF": (".paf",),
    "PVF": (".pvf",),
    "RAW": (".gsm", ".vox"),
    "RF64": (".rf64",),
    "SD2": (".sd2",),
    "SVX": (".16svx", ".8svx", ".iff", ".svx"),
    "VOC": (".voc",),
    "W64": (".w64",),
    "WAV": (".bwf", ".wav", ".wave"),
    "WAVEX": (".amb",),
    "WVE": (".wve",),
    "XI": (".xi",),
}
# Sound, or video with sound, in formats that no version of libsndfile decodes.
_FOREIGN = (
    *(".3ga", ".3gp", ".aac", ".ac3", ".adts", ".amr", ".ape", ".asf", ".avi", ".awb", ".dff", ".dsf", ".dts"),
    *(".eac3", ".flv", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp4", ".mpc", ".mpeg", ".mpg", ".ra"),
    *(".shn", ".spx", ".tak", ".tta", ".weba", ".webm", ".wma", ".wmv", ".wv"),
)
# Folders that operating systems and storage devices create, in lower case.
_SYSTEM_FOLDERS = frozenset(
    {"__macosx", "__pycache__", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found"}
    | {"system volume information"}
)


class Found(NamedTuple):
    """The sound files below a folder, each list sorted."""

    clips: list[Path]
    unsupported: list[Path]  # sound by suffix, in formats that libsndfile cannot decode
    hidden: list[Path]  # sound files that are hidden or in hidden folders


@functools.cache
def audio_suffixes() -> frozenset[str]:
    """Suffixes of the formats that the installed libsndfile decodes, such as ``.wav``."""
    import soundfile

    return frozenset(suffix for name in soundfile.available_formats() for suffix in _FORMATS.get(name, ()))


@functools.cache
def unsupported_suffixes() -> frozenset[str]:
    """Suffixes of sound in formats that the installed libsndfile cannot decode, such as ``.m4a``."""
    return frozenset((*_FOREIGN, *(suffix for group in _FORMATS.values() for suffix in group))) - audio_suffixes()


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden by its name, or is a folder such as ``__MACOSX`` or ``@eaDir``."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def find_audio(folder: str | os.PathLike[str], onerror: Callable[[OSError], Any] | None = None) -> list[Path]:
    """Find audio files anywhere below ``folder``, by suffix, in sorted order, without hidden files and folders.

    The suffixes are those of all formats that libsndfile decodes. Folders that operating systems create, such as
    ``__MACOSX`` and ``@eaDir``, count as hidden. Links to folders are followed. Each folder is searched once, under its
    own name if it has one below ``folder``.

    Args:
        folder: the folder.
        onerror: called with the ``OSError`` of each folder that cannot be read, and the search continues. Without it,
            such a folder raises a ``UserError``.
    """
    return search_audio(folder, onerror).clips


def search_audio(folder: str | os.PathLike[str], onerror: Callable[[OSError], Any] | None = None) -> Found:
    """``find_audio``, with the sound files that it leaves out."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; use a folder that contains audio files")
    searched: set[str] = set()
    concealed: list[str] = []
    files = list(_walk([folder], onerror or _reject_folder, searched, concealed.append))
    clips = sorted(path for path in files if path.suffix.lower() in audio_suffixes())
    unsupported = sorted(path for path in files if path.suffix.lower() in unsupported_suffixes())
    inside = _walk([path for path in concealed if os.path.isdir(path)], lambda error: None, searched)
    hidden = [path for path in (*map(Path, concealed), *inside) if is_sound(path)]
    if hidden:  # a link to a hidden file, as in repositories of git-annex, is a clip
        known = {os.path.realpath(path) for path in (*clips, *unsupported)}
        hidden = sorted(path for path in hidden if os.path.realpath(path) not in known)
    return Found(clips, unsupported, hidden)


def is_sound(path: Path) -> bool:
    """Whether a path is a file with a suffix of sound, of any format."""
    # ._NAME is the metadata that macOS stores next to the file NAME.
    suffixes = audio_suffixes() | unsupported_suffixes()
    return path.suffix.lower() in suffixes and not path.name.startswith("._") and path.is_file()


def contains_clip(folder: Path) -> bool:
    """Whether ``find_audio`` finds a file below ``folder``. It stops at the first."""
    files = _walk([folder], _reject_folder, set(), lambda path: None)
    return any(path.suffix.lower() in audio_suffixes() for path in files)


def loose_sounds(folder: Path) -> list[Path]:
    """The sound files directly in ``folder`` that are not hidden, sorted."""
    return sorted(path for path in folder.iterdir() if not is_hidden(path.name) and is_sound(path))


def visible_folders(folder: Path) -> list[str]:
    """Names of the folders directly in ``folder`` that are not hidden, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def unsupported_reason(path: str | os.PathLike[str]) -> str:
    """The reason why a file with one of the ``unsupported_suffixes`` is not a clip."""
    suffix = Path(path).suffix
    return f"libsndfile cannot decode {suffix} files; convert it, for example with: ffmpeg -i in{suffix} out.flac"


def count_suffixes(paths: Sequence[Path]) -> str:
    """The files by suffix, such as ``"12 .m4a, 1 .wma"``."""
    return ", ".join(f"{n} {suffix}" for suffix, n in sorted(Counter(path.suffix.lower() for path in paths).items()))


def left_out(found: Found) -> list[str]:
    """A sentence for each kind of sound files that ``search_audio`` left out."""
    notes = []
    if found.unsupported:
        first = found.unsupported[0]
        notes.append(
            f"left out {count_sounds(found.unsupported)} in formats that libsndfile cannot decode "
            f"({count_suffixes(found.unsupported)}; the first: {first}); convert them, for example with: "
            f"ffmpeg -i in{first.suffix} out.flac"
        )
    if found.hidden:
        notes.append(
            f"left out {count_sounds(found.hidden)} with a hidden name or in a hidden folder (the first: "
            f"{found.hidden[0]}); rename files and folders that should be used"
        )
    return notes


def count_sounds(paths: Sequence[Path]) -> str:
    """The number of files, such as ``"12 sound files"``."""
    return "1 sound file" if len(paths) == 1 else f"{len(paths)} sound files"


def _walk(
    tops: Iterable[str | os.PathLike[str]],
    onerror: Callable[[OSError], Any],
    searched: set[str],
    conceal: Callable[[str], Any] | None = None,
) -> Iterator[Path]:
    """Files below folders, through links to folders.

    Args:
        tops: the folders.
        onerror: called with the ``OSError`` of each folder that cannot be read.
        searched: real paths of the folders that were searched. They are not searched again.
        conceal: called with the path of each hidden file or folder, which is then left out. None: leave nothing out.
    """
    found = [*tops]
    for top in found:  # grows by the links that are found
        for parent, folders, files in os.walk(top, onerror=onerror):
            real = os.path.realpath(parent)
            if real in searched:
                folders.clear()
                continue
            searched.add(real)
            if conceal is not None:
                for name in filter(is_hidden, (*folders, *files)):
                    conceal(os.path.join(parent, name))
                folders[:] = [name for name in folders if not is_hidden(name)]
                files = [name for name in files if not is_hidden(name)]
            folders.sort()
            found += [path for name in folders if os.path.islink(path := os.path.join(parent, name))]
            yield from (Path(parent, name) for name in files)


def _reject_folder(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: the folder cannot be read ({error.strerror}); change its permissions, or move it"
    ) from error
