"""Two processes train as one does with the same batch."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from pruneattn import UserError
from pruneattn.runtime import distributed


def test_a_gpu_is_taken_by_local_rank(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert distributed.start("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.start("cuda") == torch.device("cuda", 3)
    assert distributed.start("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="--device cuda:4: there is no cuda:4; torch sees 4 GPUs here"):
        distributed.start("cuda:4")
    assert taken == [torch.device("cuda", index) for index in (0, 3, 1)]


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.start("auto") == torch.device("cpu")
    for name, message in (("cuda", "no GPU"), *((name, "cuda:N") for name in ("nonsense", "mps", "meta", "cuda:999"))):
        with pytest.raises(UserError, match=f"--device {name}: .*{message}"):
            distributed.start(name)


def in_two_processes(*command):
    """Run ``python *command`` as two ranks of a group; what each of them printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The torchrun launcher only sets these variables and starts the processes.
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    processes = [
        subprocess.Popen(command, env=os.environ | group | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return outputs


# What Python gathered is held by threads that run for no longer than the group.
GATHERING = """
import os
import torch
from pruneattn.training import distributed

def threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("gloo_run" in name for name in names)

distributed.start("cpu")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
assert distributed.gather_objects(distributed.rank()) == [0, 1]
assert distributed.gather_numbers([0.5, distributed.rank()]) == [[0.5, 0.0], [0.5, 1.0]]
of_values, before = distributed._values._get_backend(torch.device("cpu")).options._threads, threads()
distributed.finish()
print(of_values, before - threads())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads have their names in /proc")
def test_nothing_that_python_gathered_is_held_after_the_group():
    for output in in_two_processes("-c", GATHERING):
        of_values, ended = map(int, output.split())
        assert ended >= of_values > 0


def test_two_gloo_processes_equal_one(train):
    options = [*train.plain, "--epochs", 3, "--shrink-epochs", 1]
    one = train("one", *options)
    arguments = [*train.arguments("two", *options), "--accumulate", "2", "--device", "cpu"]
    outputs = in_two_processes("-m", "pruneattn.train", *arguments)
    assert "epoch 3/3" in outputs[0] and outputs[1] == ""

    two = train.root / "two"
    for left, right in zip(train.log(one), train.log(two), strict=True):
        assert left.keys() == right.keys()
        for key in ("loss", "lr", "train_loss", "val_loss", "map", "top1"):
            if key in left:
                assert left[key] == pytest.approx(right[key], rel=1e-5, abs=1e-9), (key, left)
    left, right = train.state(one)["model"], train.state(two)["model"]
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=2e-5, msg=name)
    # Nine test clips over two processes: each is counted once.
    results = [json.loads((run / "result.json").read_text()) for run in (one, two)]
    assert results[0]["test"]["top1"] == results[1]["test"]["top1"]
