"""Download the free datasets: resumable, verified, unpacked safely, and put in place in one step."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from ..errors import UserError
from .readers import SPEECH_COMMANDS

SPC2_URL = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
SPC2_SHA256 = "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"
SPC2_CLIPS = 105829
ESC50_URL = "https://github.com/karoldvl/ESC-50/archive/master.zip"
ESC50_CLIPS = 2000

_CHUNK = 1 << 20
_ATTEMPTS = 5


def fetch(name: str, folder: str | os.PathLike[str]) -> Path:
    """Download ``spc2`` or ``esc50`` into ``folder/name``. If that exists, only check it.

    An interrupted download is resumed. The folder of the dataset appears only when it is complete.

    Returns:
        Path of the folder of the dataset.

    Raises:
        UserError: the download fails, or its content is wrong.
    """
    fetchers = {"spc2": _fetch_spc2, "esc50": _fetch_esc50}
    if name not in fetchers:
        raise UserError(f"{name!r} cannot be fetched; only {' and '.join(fetchers)} can")
    folder = Path(folder)
    target = folder / name
    if target.exists():
        check = {"spc2": check_spc2, "esc50": check_esc50}[name]
        check(target)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    unpacked = folder / f".{name}.unpacking"  # on the same file system, so that one rename puts it in place
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir()
    try:
        archive, content = fetchers[name](folder, unpacked)
        os.replace(content, target)
        archive.unlink()
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return target


def _fetch_spc2(folder: Path, unpacked: Path) -> tuple[Path, Path]:
    """Speech Commands v0.02: our download, which can be resumed, then torchaudio's dataset class."""
    try:
        from torchaudio.datasets import SPEECHCOMMANDS
    except (ImportError, OSError, RuntimeError) as error:  # torchaudio for another torch fails in several ways
        raise UserError(
            f"fetching spc2 needs torchaudio, which cannot be imported ({error}): pip install 'pruneattn[audio]'; "
            f"or unpack {SPC2_URL} into {folder / 'spc2'} yourself"
        ) from None
    archive = download(SPC2_URL, folder / "speech_commands_v0.02.tar.gz", sha256=SPC2_SHA256)
    os.symlink(archive.resolve(), unpacked / archive.name)  # the class looks here before it downloads
    SPEECHCOMMANDS(unpacked, download=True)
    content = unpacked / "SpeechCommands" / "speech_commands_v0.02"
    check_spc2(content)
    return archive, content


def _fetch_esc50(folder: Path, unpacked: Path) -> tuple[Path, Path]:
    """ESC-50 as an archive of GitHub. It has no published digest, so checksums and files of the content are checked."""
    archive = download(ESC50_URL, folder / "ESC-50-master.zip")
    try:
        unzip(archive, unpacked)
        content = unpacked / "ESC-50-master"
        check_esc50(content)
    except UserError:
        archive.unlink()  # the next attempt must not start with the same bad file
        raise
    return archive, content


def check_spc2(folder: Path) -> None:
    """Raise a ``UserError`` unless the folder has the 105,829 clips of Speech Commands v0.02 and its lists."""
    lists = ["validation_list.txt", "testing_list.txt"]
    _check_content(folder, "Speech Commands v0.02", SPEECH_COMMANDS, SPC2_CLIPS, lists)


def check_esc50(folder: Path) -> None:
    """Raise a ``UserError`` unless the folder has the 2000 clips of ESC-50 and its CSV."""
    _check_content(folder, "ESC-50", ["audio"], ESC50_CLIPS, ["meta/esc50.csv"])


def _check_content(folder: Path, name: str, clip_folders: Sequence[str], clips: int, lists: Sequence[str]) -> None:
    there = [folder / part for part in clip_folders if (folder / part).is_dir()]
    count = sum(file.endswith(".wav") for part in there for file in os.listdir(part))
    absent = [file for file in lists if not (folder / file).is_file()]
    if count != clips or absent:
        without = "".join(f", no {file}" for file in absent)
        found = f"{count} of {clips} clips{without}"
        raise UserError(f"{folder}: {name} is incomplete: {found}; delete the folder and fetch it again")


def download(url: str, path: str | os.PathLike[str], *, sha256: str | None = None, pause: float = 1.0) -> Path:
    """Download ``url`` to ``path``, which appears only when it is complete. An existing file is kept.

    Unfinished data is kept in ``path.part``. The next attempt or the next call resumes it if the server supports HTTP
    Range, and starts again if it does not.

    Args:
        url: http or https address.
        path: file to write.
        sha256: hexadecimal digest of the whole file, if one is known.
        pause: seconds before the second attempt; they double with each further attempt.

    Raises:
        UserError: the server rejects the request, five attempts in a row make no progress, or the digest differs (then
            the file is deleted).
    """
    path = Path(path)
    if path.exists():
        _check_digest(path, sha256, url)
        return path
    part = path.with_name(path.name + ".part")
    failures = 0
    while True:
        before = _size(part)
        try:
            _download_rest(url, part)
            break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise UserError(f"{url}: the server answers {error.code} {error.reason}") from None
            failures = 1 if _size(part) > before else failures + 1
            if failures == _ATTEMPTS:
                raise UserError(
                    f"{url}: the download failed ({getattr(error, 'reason', error)}); {_size(part)} bytes are in "
                    f"{part}, run the command again to resume"
                ) from None
            time.sleep(pause * 2 ** (failures - 1))
    _check_digest(part, sha256, url)
    os.replace(part, path)
    return path


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check_digest(path: Path, sha256: str | None, url: str) -> None:
    if sha256 is None:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        path.unlink()
        raise UserError(f"{url}: checksum {found} instead of {sha256}; the file was deleted, run the command again")


def _download_rest(url: str, part: Path) -> None:
    """Append the missing bytes to ``part``. Raise ``ConnectionError`` if the server stops before the end."""
    have = _size(part)
    headers = {"User-Agent": "pruneattn", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # the file is complete
        part.unlink()  # longer than the file on the server, so another file
        raise ConnectionError("the server's file has changed") from None
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        start = have if resumed else 0
        left = response.headers.get("Content-Length")
        total = start + int(left) if left else None
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, disable=None) as progress,
        ):
            while chunk := _read(response):
                file.write(chunk)
                progress.update(len(chunk))
            if total is not None and file.tell() < total:
                raise ConnectionError(f"received {file.tell()} of {total} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK)
    except OSError as error:  # of the connection, distinguished from an error of the disk
        raise ConnectionError(str(error)) from None


def unzip(archive: Path, folder: Path) -> None:
    """Unpack a zip file below ``folder``. Links and entries outside of it are rejected before anything is written."""
    try:
        with zipfile.ZipFile(archive) as content:
            entries = content.infolist()
            for entry in entries:
                parts = PurePosixPath(entry.filename.replace("\\", "/")).parts
                link = stat.S_ISLNK(entry.external_attr >> 16)
                if link or not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
                    raise UserError(f"{archive}: rejected because of an unsafe entry: {entry.filename}")
            for entry in tqdm(entries, desc=f"unpacking {Path(archive).name}", unit="file", disable=None):
                content.extract(entry, folder)  # checks the entry's CRC
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive}: a damaged zip file ({error}); download it again") from None
