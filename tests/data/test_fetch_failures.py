"""Downloads from broken servers and damaged archives: one clear error each, and the next fetch starts clean."""

import errno
import io
import os
import random
import socketserver
import ssl
import threading
import urllib.request
import zipfile

import pytest

from pruneattn.data import fetch as module
from pruneattn.data.fetch import download, fetch, unzip
from pruneattn.errors import UserError


class Server(socketserver.ThreadingTCPServer):
    """Answers each connection with the next of `answers`, bytes or a callable of the request; the last one repeats."""

    daemon_threads = allow_reuse_address = True

    def __init__(self):
        self.answers, self.requests = [], []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/archive.zip"


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        request = b""
        while b"\r\n\r\n" not in request and not request.startswith(b"\x16") and (more := self.request.recv(4096)):
            request += more  # up to the empty line; TLS has none
        server = self.server
        server.requests.append(request)
        answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        self.wfile.write(answer)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def answer(status, *headers, body=b""):
    return "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *headers, "", ""]).encode("latin-1") + body


def redirect(target, status="302 Found"):
    return answer(status, f"Location: {target}", "Content-Length: 0")


CHUNKED = "Transfer-Encoding: chunked"
# Answers, and the error. All attempts get the same answer.
BROKEN = {
    "nothing": (b"", "failed .Remote end closed"),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.0\r\n", "failed .*not valid HTTP: BadStatusLine: SSH-2.0"),
    "status is no number": (b"HTTP/1.1 abc OK\r\n\r\n", "failed .*BadStatusLine"),
    "status line too long": (b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n", "failed .*LineTooLong"),
    "too many headers": (answer("200 OK", *("A: b" for _ in range(200))), "failed .*more than 100 headers"),
    "cut in the headers": (b"HTTP/1.1 200 OK\r\nContent-Le", "failed .received 0 of"),
    "fewer bytes than promised": (answer("200 OK", "Content-Length: 9", body=b"1234"), "failed .received 4 of 9 bytes"),
    "empty": (answer("200 OK", "Content-Length: 0"), "failed .received 0 of"),
    "cut chunk": (answer("200 OK", CHUNKED, body=b"9\r\n1234"), "failed .*IncompleteRead"),
    "chunk without a size": (answer("200 OK", CHUNKED, body=b"zz\r\n1234"), "failed .*IncompleteRead"),
    "chunk with a negative size": (answer("200 OK", CHUNKED, body=b"-5\r\n12345\r\n0\r\n\r\n"), "failed"),
    "chunk size too long": (answer("200 OK", CHUNKED, body=b"1" * 70_000 + b"\r\n"), "failed .*LineTooLong"),
    "no content": (answer("204 No Content"), "the server answers 204 No Content"),
    "other part": (answer("206 Partial Content", "Content-Range: bytes 7-9/10", body=b"123"), "another part"),
    "part without a range": (answer("206 Partial Content", body=b"123"), "failed .*another part"),
    "strange range": (answer("206 Partial Content", "Content-Range: bytes x-y/z", body=b"123"), "another part"),
    "more than the file": (answer("206 x", "Content-Range: bytes 0-2/2", body=b"123"), "failed .received 3 of 2 bytes"),
    "range not satisfiable": (answer("416 Range Not Satisfiable"), "the server answers 416"),
    "error on two lines": (answer("503 Try\tagain  later"), "failed .the server answers 503 Try again later"),
    "not modified": (answer("304 Not Modified"), "the server answers 304"),
    "redirect without a target": (answer("302 Found", "Content-Length: 0"), "the server answers 302 Found"),
    "redirect loop": (redirect("/archive.zip"), "the server answers 302 .*infinite loop"),
    "redirect to a file": (redirect("file:///etc/hostname"), "the server answers 302 .*not allowed"),
    "redirect to ftp": (redirect("ftp://127.0.0.1:9/a"), "the server answers 302 .*a redirection to ftp://"),
    "redirect to a closed port": (redirect("http://127.0.0.1:9/a"), "failed .*refused"),
    "redirect to half an address": (redirect("http://[::1/a"), "redirects to.*cannot be used: Invalid IPv6 URL"),
    "redirect to an invalid name": (redirect(f"http://{'a' * 70}.example/"), "redirects to.*cannot be used: .*label"),
    "redirect to an empty label": (redirect("http://a..example/"), "redirects to.*cannot be used: .*label"),
    "redirect to a port in words": (redirect("http://127.0.0.1:http/"), "redirects to.*cannot be used: .*port"),
    "redirect to a port out of range": (redirect("http://127.0.0.1:99999/"), "127.0.0.1"),
    "redirect to TLS without TLS": (None, "failed .*SSL|failed .*EOF|failed .*reset"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("part", [b"", b"abc"], ids=["new", "resumed"])
def test_broken_answers_are_one_clear_error(server, tmp_path, case, part):
    content, message = BROKEN[case]
    server.answers = [redirect(server.url.replace("http:", "https:")) if content is None else content]
    if part:
        (tmp_path / "a.zip.part").write_bytes(part)
    with pytest.raises(UserError, match=message) as error:
        download(server.url, tmp_path / "a.zip", pause=0)
    text = str(error.value)
    assert text.startswith(f"{server.url}: ") and "\n" not in text and len(text) < 1000
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("case", BROKEN)
def test_broken_answers_do_not_spoil_the_next_download(server, tmp_path, case):
    server.answers = [BROKEN[case][0] or b"", answer("200 OK", "Content-Length: 10", body=b"0123456789")]
    try:
        download(server.url, tmp_path / "a.zip", pause=0)
    except UserError:  # an error that another attempt would not change
        download(server.url, tmp_path / "a.zip", pause=0)
    assert (tmp_path / "a.zip").read_bytes() == b"0123456789" and os.listdir(tmp_path) == ["a.zip"]


def test_a_length_that_is_no_number_is_ignored(server, tmp_path):
    for length in ("abc", "-5", "1e3"):
        server.answers = [answer("200 OK", f"Content-Length: {length}", body=b"0123456789")]
        path = download(server.url, tmp_path / f"{length}.zip", pause=0)
        assert path.read_bytes() == b"0123456789"


def test_a_part_in_pieces_is_joined(server, tmp_path):
    server.answers = [answer("206 x", f"Content-Range: bytes {n}-{n + 1}/6", body=b"ab") for n in (0, 2, 4)]
    assert download(server.url, tmp_path / "a.zip", pause=0).read_bytes() == b"ababab"
    assert [b"Range: bytes=%d-" % n in server.requests[n // 2] for n in (0, 2, 4)] == [False, True, True]


def test_a_server_that_never_gets_further_is_given_up(server, tmp_path):
    """The file grows in every second attempt, but never beyond its size in the first one."""
    long, short = (answer("200 OK", "Content-Length: 100", body=b"x" * n) for n in (50, 20))
    server.answers = [long, short] * 50
    with pytest.raises(UserError, match="the download failed"):
        download(server.url, tmp_path / "a.zip", pause=0)
    assert len(server.requests) == 5


ERRORS = [
    TimeoutError("timed out"),
    ssl.SSLError("decryption failed or bad record mac"),
    OSError(errno.EHOSTUNREACH, "No route to host"),
    ConnectionAbortedError("aborted"),
    UnicodeError("label empty or too long"),
    ValueError("proxy URL with no authority: 'x'"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_errors_of_the_connection(server, tmp_path, monkeypatch, error):
    """Those that urllib lets through while it waits for the answer."""

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", fail)
    with pytest.raises(
        UserError, match=error.strerror or str(error) if isinstance(error, OSError) else "cannot be used"
    ):
        download(server.url, tmp_path / "a.zip", pause=0)


def test_a_proxy_variable_that_is_no_address(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http:/proxy")
    with pytest.raises(UserError, match="a proxy variable cannot be used"):
        download("http://example.invalid/a.zip", tmp_path / "a.zip", pause=0)


# Archives ------------------------------------------------------------------------------------------------------------


def esc50_zip(clips=3, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("ESC-50-master/meta/esc50.csv", "filename,fold\n")
        for number in range(clips):
            archive.writestr(f"ESC-50-master/audio/{number}.wav", random.Random(number).randbytes(60) * 3)
    return buffer.getvalue()


def encrypted():
    content = bytearray(esc50_zip())
    for mark, place in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        at = content.find(mark)
        content[at + place] |= 1
    return bytes(content)


def unknown_method():
    content = bytearray(esc50_zip())
    content[content.find(b"PK\1\2") + 10] = 97
    return bytes(content)


def file_below_a_file():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ESC-50-master/audio", "")
        archive.writestr("ESC-50-master/audio/1.wav", "")
    return buffer.getvalue()


def long_name():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ESC-50-master/" + "a" * 300, "")
    return buffer.getvalue()


def damaged(method):
    content = bytearray(esc50_zip(method=method))
    start = content.find(b"0.wav") + 5
    content[start : start + 40] = bytes(range(100, 140))
    return bytes(content)


ARCHIVES = {
    "encrypted": encrypted,
    "unknown method": unknown_method,
    "deflate": lambda: damaged(zipfile.ZIP_DEFLATED),
    "bzip2": lambda: damaged(zipfile.ZIP_BZIP2),
    "lzma": lambda: damaged(zipfile.ZIP_LZMA),
    "stored": lambda: damaged(zipfile.ZIP_STORED),
    "cut": lambda: esc50_zip()[:-40],
    "a file below a file": file_below_a_file,
    "long name": long_name,
    "empty zip": lambda: b"PK\5\6" + bytes(18),
    "web page": lambda: b"<html>try again</html>",
    "other content": lambda: esc50_zip(clips=2),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_the_fetch_after_a_damaged_archive_starts_again(server, tmp_path, monkeypatch, case):
    monkeypatch.setattr(module, "ESC50_URL", server.url)
    monkeypatch.setattr(module, "ESC50_CLIPS", 3)
    server.answers = [answer("200 OK", body=ARCHIVES[case]()), answer("200 OK", body=esc50_zip())]
    with pytest.raises(
        UserError, match=r"ESC-50-master.zip: .*the archive was deleted, run the command again"
    ) as error:
        fetch("esc50", tmp_path)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []
    assert len(os.listdir(fetch("esc50", tmp_path) / "audio")) == 3 and os.listdir(tmp_path) == ["esc50"]


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_any_damage_to_an_archive_is_a_user_error(tmp_path, method, step):
    """Bytes of a small archive, replaced and cut: all exceptions of zipfile and of the decompressors."""
    content = esc50_zip(clips=1, method=method)
    rng = random.Random(method)
    (tmp_path / "out").mkdir()
    rejected = 0
    for place in range(0, len(content), step):
        for bad in (content[:place], content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]):
            (tmp_path / "a.zip").write_bytes(bad)
            try:
                unzip(tmp_path / "a.zip", tmp_path / "out")
            except UserError:
                rejected += 1
    assert rejected > len(content) / step


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_full_disk_keeps_the_archive(server, tmp_path, monkeypatch, code):
    monkeypatch.setattr(module, "ESC50_URL", server.url)
    monkeypatch.setattr(module, "ESC50_CLIPS", 3)
    server.answers = [answer("200 OK", body=esc50_zip())]

    def fail(self, entry, folder):
        raise OSError(code, os.strerror(code), str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", fail)
        with pytest.raises(UserError, match=f"cannot write esc50 .{os.strerror(code)}.*run the command again"):
            fetch("esc50", tmp_path)
    assert os.listdir(tmp_path) == ["ESC-50-master.zip"]
    fetch("esc50", tmp_path)
    assert len(server.requests) == 1


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "data").touch()
    with pytest.raises(UserError, match="data: cannot write esc50 .File exists"):
        fetch("esc50", tmp_path / "data")
