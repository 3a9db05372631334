"""Errors meant for the person at the keyboard."""

import io
import signal
import sys


class UserError(ValueError):
    """Something the user gave cannot be used. The message names the thing and the remedy."""


def check_least(args, **least):
    """Raise a ``UserError`` if a parsed option is below its least value; one that was not given (None) is not."""
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise UserError(f"--{name.replace('_', '-')} {given}: must be at least {value}")


def run_command(main):
    """Run a command line entry point and leave with the exit code it returns.

    A ``UserError``, an operating system error or a lost loader worker becomes one line and exit code 1, Ctrl-C one line
    and 130.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as of stderr: a file name may be no text
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        # A full disk, a read-only folder, a missing permission: errno text and path say which.
        where = f": {error.filename}" if error.filename else ""
        sys.exit(f"error: {error.strerror or error}{where}")
    except RuntimeError as error:
        # From torch's signal handler, and so out of any line of the main process, whoever reads the loader.
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        sys.exit(
            f"error: {str(error).splitlines()[0].rstrip('. ')}: a process that decodes clips died, most often for want of "
            "memory or of room in /dev/shm: give fewer --workers (train goes on from its last checkpoint with --resume)"
        )
