import errno

import pytest

from pruneattn.errors import UserError, run_command


def leave(main):
    with pytest.raises(SystemExit) as leaving:
        run_command(main)
    return leaving.value.code


def test_exit_code_is_what_the_command_returns():
    assert leave(lambda: 3) == 3
    assert not leave(lambda: None)


def test_errors_become_one_line():
    def user_error():
        raise UserError("clip.wav: the file is empty")

    def full_disk():
        raise OSError(errno.ENOSPC, "No space left on device", "out.json")

    assert leave(user_error) == "error: clip.wav: the file is empty"
    assert leave(full_disk) == "error: No space left on device: out.json"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)
