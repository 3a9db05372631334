import errno
import io
import signal
import subprocess
import sys
from argparse import Namespace

import pytest

from pruneattn.cli import check_least, run_command
from pruneattn.errors import UserError


def leave(main):
    with pytest.raises(SystemExit) as leaving:
        run_command(main)
    return leaving.value.code


def test_the_command_returns_the_exit_code():
    assert leave(lambda: 3) == 3
    assert not leave(lambda: None)


def test_errors_become_one_line():
    def user_error():
        raise UserError("clip.wav: the file is empty")

    def full_disk():
        raise OSError(errno.ENOSPC, "No space left on device", "out.json")

    assert leave(user_error) == "error: clip.wav: the file is empty"
    assert leave(full_disk) == "error: No space left on device: out.json"


def test_ctrl_c_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert leave(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "message",
    ["DataLoader worker (pid 7) is killed by signal: Killed. ", "DataLoader worker (pid(s) 7) exited unexpectedly"],
)
def test_a_lost_worker_is_reported_in_one_line(message):
    def lost():
        raise RuntimeError(message)

    code = leave(lost)
    assert code.startswith(f"error: {message.rstrip('. ')}: a process that decodes clips died, usually because")
    assert all(word in code for word in ("memory", "/dev/shm", "--workers", "--resume")) and "\n" not in code


def test_a_file_name_that_is_not_valid_text_can_be_printed(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", write_through=True))
    leave(lambda: print("\udcff.wav"))
    assert out.getvalue() == b"\\udcff.wav\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_options_below_their_least_value_are_errors():
    args = Namespace(batch_size=1, rounds=-1, limit=None)
    check_least(args, batch_size=1, limit=1)
    with pytest.raises(UserError, match=r"^--rounds -1: must be at least 0$"):
        check_least(args, batch_size=1, rounds=0)
    with pytest.raises(UserError, match=r"--batch-size 1: must be at least 2"):
        check_least(args, batch_size=2)


@pytest.mark.parametrize("lines", [1, 100_000])  # fewer and more than the buffer of standard output holds
def test_a_closed_pipe_ends_the_command_silently(lines):
    """``pruneattn data list | head -1`` prints one line and nothing else."""
    program = f"from pruneattn.cli import run_command; run_command(lambda: (input(), print('line\\n' * {lines}))[1])"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes, text=True) as command:
        command.stdout.close()
        command.stdin.write("\n")
        command.stdin.close()
        assert command.stderr.read() == ""
    assert command.returncode == 128 + signal.SIGPIPE


def test_another_broken_pipe_is_an_error():
    def lost_worker():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert leave(lost_worker) == "error: Broken pipe"
