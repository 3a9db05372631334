"""Download the free datasets: resumable, verified, unpacked safely, and put in place in one step."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

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
        UserError: the download fails, its content is wrong, or the folder cannot be written to.
    """
    fetchers = {"spc2": _fetch_spc2, "esc50": _fetch_esc50}
    if name not in fetchers:
        raise UserError(f"{name!r} cannot be fetched; only {' and '.join(fetchers)} can")
    folder = Path(folder)
    target = folder / name
    if target.exists():
        if lack := _lack(name, target):
            raise UserError(f"{target}: {lack}; delete the folder and fetch it again")
        return target
    unpacked = folder / f".{name}.unpacking"  # on the same file system, so that one rename puts it in place
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir()
        archive, content = fetchers[name](folder, unpacked)
        os.replace(content, target)
        archive.unlink()
    except OSError as error:  # a full disk, a file in place of a folder, no permission
        raise UserError(
            f"{error.filename or folder}: cannot write {name} ({error.strerror or error}); free some space or choose "
            "another folder, and run the command again to resume"
        ) from error
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
    if lack := _lack("spc2", content):
        raise UserError(f"{archive}: {lack}")
    return archive, content


def _fetch_esc50(folder: Path, unpacked: Path) -> tuple[Path, Path]:
    """ESC-50 as an archive of GitHub. It has no published digest, so checksums and files of the content are checked."""
    archive = download(ESC50_URL, folder / "ESC-50-master.zip")
    content = unpacked / "ESC-50-master"
    try:
        unzip(archive, unpacked)
        if lack := _lack("esc50", content):
            raise UserError(f"{archive}: {lack}")
    except UserError as error:
        archive.unlink()  # the next attempt must not start with the same bad file
        raise UserError(f"{error}; the archive was deleted, run the command again to download it") from None
    return archive, content


def _lack(name: str, folder: Path) -> str | None:
    """The clips and lists that are missing in the folder of a dataset, in words; None if it is complete."""
    title, clip_folders, clips, lists = {
        "spc2": ("Speech Commands v0.02", SPEECH_COMMANDS, SPC2_CLIPS, ["validation_list.txt", "testing_list.txt"]),
        "esc50": ("ESC-50", ["audio"], ESC50_CLIPS, ["meta/esc50.csv"]),
    }[name]
    there = [folder / part for part in clip_folders if (folder / part).is_dir()]
    count = sum(file.endswith(".wav") for part in there for file in os.listdir(part))
    absent = [file for file in lists if not (folder / file).is_file()]
    if count == clips and not absent:
        return None
    return f"{title} is incomplete: {count} of {clips} clips" + "".join(f", no {file}" for file in absent)


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
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.exists():
        _check_digest(path, sha256, url)
        return path
    part = path.with_name(path.name + ".part")
    failures, most = 0, _size(part)
    while True:
        try:
            _download_rest(url, part)
            break
        except (urllib.error.HTTPError, ConnectionError) as error:
            reason = _reason(error)
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise UserError(f"{url}: {reason}") from None
            have = _size(part)
            failures = 1 if have > most else failures + 1
            most = max(most, have)
            if failures == _ATTEMPTS:
                kept = f"{have} bytes are in {part}, run the command again to resume" if have else "try again later"
                raise UserError(f"{url}: the download failed ({reason}); {kept}") from None
            time.sleep(pause * 2 ** (failures - 1))
    _check_digest(part, sha256, url)
    os.replace(part, path)
    return path


def _reason(error: Exception) -> str:
    """An error of the connection or of the server as one line."""
    if isinstance(error, urllib.error.HTTPError):
        text = f"the server answers {error.code} {error.reason}"
    elif isinstance(error, http.client.HTTPException) and not isinstance(error, ConnectionError):
        text = f"the answer is not valid HTTP: {type(error).__name__}: {error}"
    else:
        text = str(getattr(error, "reason", error)) or type(error).__name__
    return " ".join(text.split())[:300]


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
    """Append the missing bytes to ``part``.

    Raises:
        ConnectionError: the connection or the answer is broken, or ends before the end of the file.
        urllib.error.HTTPError: the server rejects the request.
        UserError: the address, or one that the server redirects to, cannot be used.
        OSError: ``part`` cannot be written.
    """
    have = _size(part)
    try:
        response = _open(url, have)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # the file is complete
        part.unlink()  # longer than the file on the server, so another file
        raise ConnectionError("the server's file has changed") from None
    with response:
        if response.status == 206:
            piece = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
            if piece is None or int(piece[1]) != have:
                part.unlink(missing_ok=True)
                raise ConnectionError("the server sent another part of the file than requested")
            start, total = have, None if piece[2] == "*" else int(piece[2])
        else:
            start, total = 0, response.length  # None if the server does not say it, or not as a number
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True, disable=None) as progress,
        ):
            while chunk := _read(response):
                file.write(chunk)
                progress.update(len(chunk))
            size = file.tell()
        if size == 0 or (total is not None and size != total):
            if total is not None and size > total:
                part.unlink()
            raise ConnectionError(f"received {size} of {total or 'an unknown number of'} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to http and https only; urllib would also follow one to ftp."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(("http://", "https://")):
            raise urllib.error.HTTPError(newurl, code, f"{msg}: a redirection to {newurl}", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, have: int) -> http.client.HTTPResponse:
    """Request the file from byte ``have`` on. Raises the errors of ``_download_rest``."""
    headers = {"User-Agent": "pruneattn", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urllib.request.build_opener(_Redirects).open(
            urllib.request.Request(url, headers=headers), timeout=30
        )
    except urllib.error.HTTPError:
        raise
    except (ValueError, http.client.InvalidURL) as error:  # urllib checks neither redirections nor proxy variables
        raise UserError(
            f"{url}: this address, or one that the server redirects to, or a proxy variable cannot be used: "
            f"{_reason(error)}"
        ) from None
    except (OSError, http.client.HTTPException) as error:  # of the connection: also of TLS, and a timeout
        raise ConnectionError(_reason(error)) from None
    if response.status not in (200, 203, 206):  # others have no content
        with response:
            raise urllib.error.HTTPError(url, response.status, response.reason, response.headers, None)
    return response


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:  # of the connection, distinguished from an error of the disk
        raise ConnectionError(_reason(error)) from None


# Errors of the disk while unpacking. Others, such as "not a directory", come from the names in the archive.
_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.EMFILE, errno.ENFILE),
}


def unzip(archive: Path, folder: Path) -> None:
    """Unpack a zip file below ``folder``. Links and entries outside of it are rejected before anything is written.

    Raises:
        UserError: the archive is damaged or not safe.
        OSError: the disk is full or cannot be written.
    """
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
    except UserError:
        raise
    except Exception as error:  # damage can lead to any error of zipfile, of a decompressor or of a file name
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        raise UserError(f"{archive}: a damaged zip file ({_reason(error)})") from None
