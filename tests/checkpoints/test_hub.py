"""Names on the Hub: from a cache in the layout of huggingface_hub, and from a small Hub server on this machine."""

import json
import os
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import pruneattn
from pruneattn.checkpoints.hub import is_hub_name
from pruneattn.data.fbank import FeatureConfig
from pruneattn.errors import UserError
from pruneattn.models import create_model

FEATURES = FeatureConfig(frames=128, mean=-6.85, std=5.57, padding="zero")
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


def make(seed=0):
    torch.manual_seed(seed)
    return create_model("ast_tiny", embed_dim=24, depth=2, num_heads=3, num_classes=3, prune_blocks=(1,), frames=128)


def save(model, folder):
    pruneattn.save_pretrained(model, folder, features=FEATURES, labels=["a", "b", "c"], multilabel=False)


def assert_same(model, expected):
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.fixture
def constants(tmp_path, monkeypatch):
    """huggingface_hub's settings: an empty cache, in an empty current folder."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return constants


@pytest.fixture
def cached(tmp_path, constants, monkeypatch):
    """``cached(revision)``: folder of that revision of user/name in the cache. Offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(revision, name="user/name"):
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(COMMITS[revision])
        folder = place / "snapshots" / COMMITS[revision]
        folder.mkdir(parents=True)
        return folder

    return add


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("user/name", True),
        ("MIT/ast-finetuned-audioset-10-10-0.4593", True),
        ("user/name@v1", True),
        ("user/name@refs/pr/1", True),
        (Path("user/name"), True),
        ("runs/best.safetensors", False),
        ("runs/last.pt", False),
        ("name", False),
        ("./name", False),
        ("../name", False),
        ("/user/name", False),
        ("a/b/c", False),
        ("user/name@", False),
        ("user/", False),
        ("us er/name", False),
        ("", False),
    ],
)
def test_names_of_repositories(name, expected):
    assert is_hub_name(name) is expected


# The cache -----------------------------------------------------------------------------------------------------------


def test_revisions_in_the_cache(cached):
    models = {"main": make(0), "v1": make(1)}
    for revision, model in models.items():
        save(model, cached(revision))
    assert_same(pruneattn.load_pretrained("user/name"), models["main"])
    assert_same(pruneattn.load_pretrained("user/name@v1"), models["v1"])
    assert_same(pruneattn.load_pretrained("user/name@" + COMMITS["v1"]), models["v1"])
    model = make(2)
    report = pruneattn.load_checkpoint(model, "user/name@v1")
    assert_same(model, models["v1"])
    assert report.path.endswith(os.path.join(COMMITS["v1"], "model.safetensors"))


def test_hugging_face_ast_in_the_cache(cached):
    model = make()
    pruneattn.save_checkpoint(model, cached("main"), format="huggingface", features=FEATURES, labels=["a", "b", "c"])
    loaded = pruneattn.load_pretrained("user/name")
    assert_same(loaded, model)
    assert (loaded.features, loaded.labels) == (FEATURES, ["a", "b", "c"])


def test_a_local_path_takes_precedence(cached):
    save(make(0), cached("main"))
    save(make(1), "user/name")
    assert_same(pruneattn.load_pretrained("user/name"), make(1))


def test_offline_and_not_in_the_cache(cached, tmp_path):
    (cached("main") / "config.json").write_text("{}")  # no weights
    for name in ("user/name", "runs/audiomae", "user/name@v1"):
        with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids a download") as error:
            pruneattn.load_pretrained(name)
        assert str(error.value).startswith(f"{name}: no such file or folder in {Path.cwd()}, and not in the")
        assert str(tmp_path / "hub") in str(error.value)


@pytest.mark.slow  # starts a process
def test_the_variable_for_offline_use(tmp_path, cached):
    save(make(), cached("main"))
    code = "import pruneattn; [print(pruneattn.load_pretrained(name).name) for name in ('user/name', 'user/absent')]"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(pruneattn.__file__).parents[1]), *sys.path])
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout == "ast_tiny\n" and "HF_HUB_OFFLINE forbids a download" in found.stderr, found.stderr


def test_on_the_command_line(cached, tmp_path):
    from pruneattn.convert import main

    model = make()
    save(model, cached("main"))
    main(["user/name", str(tmp_path / "out"), "--format", "huggingface"])
    assert_same(pruneattn.load_pretrained(tmp_path / "out"), model)


def test_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserError, match=r"user/name: no such file or folder in .*not installed: pip install 'pruneattn\[hub\]'"
    ):
        pruneattn.load_pretrained("user/name")
    for path in ("runs/best.safetensors", "nothing"):
        with pytest.raises(UserError, match=f"{path}: no such checkpoint; use an existing file, .*user/name"):
            pruneattn.load_pretrained(path)


# A Hub ---------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """A server for two kinds of requests: ``/api/models/USER/NAME[/revision/REVISION]`` and
    ``/USER/NAME/resolve/REVISION/FILE``; ``server.folder`` holds the files of every repository.
    """

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        parts = urllib.parse.unquote(self.path).split("?")[0].split("/")[1:]
        if parts[0] == "api":
            name, revision, file = parts[3], (parts[5:] or ["main"])[0], None
        else:
            name, revision, file = parts[1], parts[3], parts[4]
            self.server.asked.append((self.command, revision, file))
        path = None if file is None else self.server.folder / file
        status, error, data = 200, None, b""
        if name == "missing":
            status, error = 404, "RepoNotFound"
        elif name == "gated" and file:
            status, error = 403, "GatedRepo"
        elif name == "broken":
            status = 503
        elif revision not in ("main", COMMITS["main"]):
            status, error = 404, "RevisionNotFound"
        elif file is None:
            siblings = [{"rfilename": file.name} for file in self.server.folder.iterdir()]
            data = json.dumps({"id": "user/" + name, "sha": COMMITS["main"], "siblings": siblings}).encode()
        elif not path.is_file():
            status, error = 404, "EntryNotFound"
        else:
            data = path.read_bytes()
        self.send_response(status)
        self.send_header("X-Repo-Commit", COMMITS["main"])
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{file}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, constants, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = tmp_path / "served", []
    server.folder.mkdir()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    for module in (constants, pytest.importorskip("huggingface_hub.file_download")):  # versions before 1 copy it
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download(hub, monkeypatch, constants):
    model = make()
    save(model, hub.folder)
    assert_same(pruneattn.load_pretrained("user/name"), model)
    got = [(revision, file) for command, revision, file in hub.asked if command == "GET"]
    assert got == [("main", "config.json"), (COMMITS["main"], "model.safetensors")]  # all from one commit
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(pruneattn.load_pretrained("user/name"), model)
    assert hub.asked == []


def test_only_the_first_weights_are_downloaded(hub):
    model = make()
    save(model, hub.folder)
    torch.save({}, hub.folder / "pytorch_model.bin")
    save(model, hub.folder / "best.safetensors")
    assert pruneattn.load_checkpoint(make(1), "user/name").path.endswith("best.safetensors")
    assert {file for command, _, file in hub.asked if command == "GET"} == {"config.json", "best.safetensors"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user/missing", "the Hugging Face Hub has no public repository user/missing: .*hf auth login"),
        ("user/gated", "requires you to accept its terms: accept them at http.*/user/gated, then"),
        ("user/name@v9", "user/name on the Hugging Face Hub has no revision v9"),
        ("user/name", "holds none of best.safetensors, model.safetensors, pytorch_model.bin"),
        ("user/broken", "not in the Hugging Face Hub's cache .* and the Hub could not be reached .*503"),
        ("user--x/name", "not a valid name on the Hugging Face Hub"),
    ],
)
def test_names_that_the_hub_does_not_have(hub, name, message):
    (hub.folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=message) as error:
        pruneattn.load_pretrained(name)
    assert str(error.value).startswith(f"{name}: no such file or folder in {Path.cwd()}, ")
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer(hub):
    model = make()
    save(model, hub.folder)
    pruneattn.load_pretrained("user/name")
    hub.shutdown()
    hub.socket.close()
    assert_same(pruneattn.load_pretrained("user/name"), model)
    with pytest.raises(UserError, match="not in the Hugging Face Hub's cache .* and the Hub could not be reached"):
        pruneattn.load_pretrained("user/another")


def test_a_file_that_cannot_be_downloaded(hub, monkeypatch):
    save(make(), hub.folder)
    (hub.folder / "model.safetensors").unlink()
    (hub.folder / "model.safetensors").mkdir()  # listed, but not a file
    with pytest.raises(UserError, match="user/name: model.safetensors cannot be fetched from the Hugging Face Hub"):
        pruneattn.load_pretrained("user/name")
