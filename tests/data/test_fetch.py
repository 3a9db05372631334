import hashlib
import http.server
import io
import os
import re
import threading
import zipfile

import pytest

from pruneattn.data import fetch as module
from pruneattn.data.__main__ import main
from pruneattn.data.fetch import download, fetch, unzip
from pruneattn.errors import UserError


class Server(http.server.ThreadingHTTPServer):
    """Server of `content` at every path. `breaks` is a list of byte counts after which the next responses break off."""

    content, breaks, ranges, status = b"", (), True, None

    def __init__(self):
        self.requests = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/archive.zip"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append(wanted)
        if server.status:
            return self.send_error(server.status)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        total = len(server.content)
        if start >= total > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        end = start + server.breaks.pop(0) if server.breaks else total
        self.wfile.write(server.content[start:end])
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


CONTENT = os.urandom(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_download(server, tmp_path):
    server.content = CONTENT
    path = download(server.url, tmp_path / "a.zip", sha256=DIGEST)
    assert path.read_bytes() == CONTENT and os.listdir(tmp_path) == ["a.zip"]
    download(server.url, path, sha256=DIGEST)
    assert server.requests == [None]  # the second call had nothing to do


def test_a_broken_connection_is_resumed(server, tmp_path):
    server.content, server.breaks = CONTENT, [100_000, 50_000]
    path = download(server.url, tmp_path / "a.zip", sha256=DIGEST, pause=0)
    assert path.read_bytes() == CONTENT
    assert server.requests == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_call_resumes(server, tmp_path):
    server.content, server.breaks = CONTENT, [120_000, 0, 0, 0, 0, 0]
    with pytest.raises(UserError, match="failed .*120000 bytes are in .*a.zip.part, run the command again"):
        download(server.url, tmp_path / "a.zip", sha256=DIGEST, pause=0)
    assert os.listdir(tmp_path) == ["a.zip.part"]
    server.breaks, server.requests[:] = [], []
    assert download(server.url, tmp_path / "a.zip", sha256=DIGEST).read_bytes() == CONTENT
    assert server.requests == ["bytes=120000-"]


def test_a_server_that_cannot_resume(server, tmp_path):
    server.content, server.breaks, server.ranges = CONTENT, [100_000], False
    assert download(server.url, tmp_path / "a.zip", sha256=DIGEST, pause=0).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=100000-"]


def test_a_complete_part(server, tmp_path):
    server.content = CONTENT
    (tmp_path / "a.zip.part").write_bytes(CONTENT)
    assert download(server.url, tmp_path / "a.zip", sha256=DIGEST).read_bytes() == CONTENT


def test_a_part_of_a_longer_file_is_deleted(server, tmp_path):
    server.content = CONTENT
    (tmp_path / "a.zip.part").write_bytes(CONTENT + b"more")
    assert download(server.url, tmp_path / "a.zip", sha256=DIGEST, pause=0).read_bytes() == CONTENT


@pytest.mark.parametrize("where", ["a.zip", "a.zip.part", None])
def test_a_wrong_checksum_is_rejected(server, tmp_path, where):
    server.content = CONTENT[:-1] + b"?" if CONTENT[-1:] != b"?" else CONTENT[:-1] + b"!"
    if where:
        (tmp_path / where).write_bytes(b"rubbish" if where == "a.zip" else b"rubbish" + CONTENT[7:])
    with pytest.raises(UserError, match=f"checksum .* instead of {DIGEST}"):
        download(server.url, tmp_path / "a.zip", sha256=DIGEST)
    assert os.listdir(tmp_path) == []


def test_a_server_that_rejects_requests(server, tmp_path):
    server.status = 404
    with pytest.raises(UserError, match="the server answers 404"):
        download(server.url, tmp_path / "a.zip")
    assert len(server.requests) == 1 and os.listdir(tmp_path) == []
    server.status = 503
    with pytest.raises(UserError, match="the download failed"):
        download(server.url, tmp_path / "a.zip", pause=0)
    assert len(server.requests) == 6


def test_no_server(tmp_path):
    with pytest.raises(UserError, match="failed .*refused"):
        download("http://127.0.0.1:9/a.zip", tmp_path / "a.zip", pause=0)


def zipped(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return buffer.getvalue()


def link(name, mode=0o120777):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


UNSAFE = ["../out.txt", "a/../../out.txt", "/tmp/out.txt", "..\\out.txt", "C:\\out.txt", link("a/link")]


@pytest.mark.parametrize("bad", UNSAFE)
def test_unsafe_zip_is_rejected_before_anything_is_written(tmp_path, bad):
    (tmp_path / "a.zip").write_bytes(zipped([("a/good.txt", "x"), (bad, "target")]))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="unsafe entry"):
        unzip(tmp_path / "a.zip", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "out"] and os.listdir(tmp_path / "out") == []


def test_broken_zip_is_rejected(tmp_path):
    content = bytearray(zipped([("a/good.txt", "x" * 100)]))
    content[60] ^= 1  # within the stored text, where only the CRC detects it
    for data in (bytes(content), b"no zip"):
        (tmp_path / "a.zip").write_bytes(data)
        with pytest.raises(UserError, match="a damaged zip file"):
            unzip(tmp_path / "a.zip", tmp_path / "out")


def esc50_zip(clips=2000):
    audio = [(f"ESC-50-master/audio/{i}.wav", "") for i in range(clips)]
    return zipped([("ESC-50-master/", ""), ("ESC-50-master/meta/esc50.csv", "filename,fold\n"), *audio])


def test_fetch_esc50(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "ESC50_URL", server.url)
    server.content = esc50_zip()
    main(["fetch", "esc50", str(tmp_path / "data")])
    assert os.listdir(tmp_path / "data") == ["esc50"] and str(tmp_path / "data") in capsys.readouterr().out
    assert len(os.listdir(tmp_path / "data" / "esc50" / "audio")) == 2000
    assert fetch("esc50", tmp_path / "data") == tmp_path / "data" / "esc50" and len(server.requests) == 1
    (tmp_path / "data" / "esc50" / "audio" / "7.wav").unlink()
    with pytest.raises(UserError, match="ESC-50 is incomplete: 1999 of 2000 clips; delete the folder"):
        fetch("esc50", tmp_path / "data")


@pytest.mark.parametrize("content", [esc50_zip(clips=3), zipped([("../x", "")]), b"no zip"])
def test_fetch_deletes_an_archive_that_is_not_esc50(server, tmp_path, monkeypatch, content):
    monkeypatch.setattr(module, "ESC50_URL", server.url)
    server.content = content
    with pytest.raises(UserError):
        fetch("esc50", tmp_path)
    assert os.listdir(tmp_path) == []


def speech_commands_archive(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        for name in ("validation_list.txt", "testing_list.txt", "yes/a_nohash_0.wav", "no/a_nohash_0.wav"):
            archive.addfile(tarfile.TarInfo(f"./{name}"))
    return (tmp_path / "archive.tar.gz").read_bytes()


def test_fetch_speech_commands(server, tmp_path, monkeypatch):
    pytest.importorskip("torchaudio.datasets", exc_type=ImportError)
    server.content, server.breaks = speech_commands_archive(tmp_path), [100]
    monkeypatch.setattr(module, "SPC2_URL", server.url)
    monkeypatch.setattr(module, "SPC2_SHA256", hashlib.sha256(server.content).hexdigest())
    with pytest.raises(UserError, match="Speech Commands v0.02 is incomplete: 2 of 105829 clips"):
        fetch("spc2", tmp_path / "data")
    assert os.listdir(tmp_path / "data") == ["speech_commands_v0.02.tar.gz"]  # its digest is right: no second download
    monkeypatch.setattr(module, "SPC2_CLIPS", 2)
    content = sorted(os.listdir(fetch("spc2", tmp_path / "data")))
    assert content == ["no", "testing_list.txt", "validation_list.txt", "yes"]
    assert os.listdir(tmp_path / "data") == ["spc2"] and server.requests == [None, "bytes=100-"]


def test_digest_equals_that_of_torchaudio():
    theirs = pytest.importorskip("torchaudio.datasets.speechcommands", exc_type=ImportError)
    assert theirs._CHECKSUMS[module.SPC2_URL] == module.SPC2_SHA256


def test_datasets_that_cannot_be_fetched(tmp_path):
    with pytest.raises(UserError, match="'voxceleb1' cannot be fetched; only spc2 and esc50 can"):
        fetch("voxceleb1", tmp_path)


def test_list(capsys):
    main(["list"])
    out = capsys.readouterr().out
    assert "voxceleb1: 1251 classes" in out and "iden_split.txt" in out and "fetch spc2 DIR" in out


def test_stats(tmp_path, capsys):
    soundfile = pytest.importorskip("soundfile")
    for name, samples in (("train/dog/a.wav", [0.1, -0.1] * 400), ("train/dog/b.wav", [0.0] * 800)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / name, samples, 16000)
    (tmp_path / "train" / "dog" / "c.wav").write_text("no sound")
    main(["stats", "--dataset", "folder", "--data-dir", str(tmp_path)])
    bad, good = capsys.readouterr().out.splitlines()
    assert bad.startswith(f"left out {tmp_path / 'train' / 'dog' / 'c.wav'}: ")
    assert re.fullmatch(r"folder train, 2 clips: mean -\d+\.\d{6}, std [1-9]\.\d{6}", good)
