"""The device of a process, and the operations of a process group."""

import os
from pathlib import Path

import pytest
import torch

from pruneattn import UserError
from pruneattn.runtime import distributed


def test_local_rank_selects_the_gpu(monkeypatch):
    selected = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    assert distributed.start("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.start("cuda") == torch.device("cuda", 3)
    assert distributed.start("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="--device cuda:4: cuda:4 does not exist; torch finds 4 GPUs"):
        distributed.start("cuda:4")
    assert selected == [torch.device("cuda", index) for index in (0, 3, 1)]


def test_devices_that_do_not_exist_are_rejected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.start("auto") == torch.device("cpu")
    for name, message in (("cuda", "no GPU"), *((name, "cuda:N") for name in ("nonsense", "mps", "meta", "cuda:999"))):
        with pytest.raises(UserError, match=f"--device {name}: .*{message}"):
            distributed.start(name)


def test_restarts_that_would_hang_are_rejected(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "TORCHELASTIC_MAX_RESTARTS": 3}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: None)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        distributed.start("cpu")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    distributed.start("cpu")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    distributed.start("cpu")


def test_a_single_process_needs_no_group():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather_numbers([1.5, 2]) == [[1.5, 2]] and distributed.gather_objects("a") == ["a"]
    distributed.barrier()
    distributed.finish()


# Threads hold the values that Python gathered. They must end with the group.
GATHERING = """
import os
import torch
from pruneattn.runtime import distributed

def threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum("gloo_run" in name for name in names)

distributed.start("cpu")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
assert distributed.gather_objects(distributed.rank()) == [0, 1]
assert distributed.gather_numbers([0.5, distributed.rank()]) == [[0.5, 0.0], [0.5, 1.0]]
assert distributed.world_size() == 2 and distributed.is_main() == (distributed.rank() == 0)
distributed.barrier()
of_values, before = distributed._values._get_backend(torch.device("cpu")).options._threads, threads()
distributed.finish()
print(of_values, before - threads())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="reads the names of threads in /proc")
def test_two_processes_gather_values_and_hold_none_after_the_group(load_file):
    for output in load_file(Path(__file__).with_name("processes.py")).in_two_processes("-c", GATHERING):
        of_values, ended = map(int, output.split())
        assert ended >= of_values > 0
