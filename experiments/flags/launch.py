"""Runs a program: command line -> settings -> `main(settings)`, with errors as one line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

from experiments.flags.absl_flags import declare, read
from prelnroberta.errors import InputError

# What the machine refuses, in any call: not bugs, and no program can check for them beforehand.
_MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def launch(main: Callable[[Any], int | None], settings: type) -> None:
    """Parses the flags of `settings`, runs `main`, and exits with its code.

    An InputError or an error of the machine (a full disk, no permission) is printed as one line,
    with exit code 2.
    """
    declare(settings)

    def guarded(argv: list[str]) -> int | None:
        if len(argv) > 1:
            print(
                f"error: unexpected argument {argv[1]!r}: flags are --name=value", file=sys.stderr
            )
            return 2
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        sys.unraisablehook = _unraisable
        try:
            return main(read(settings))
        except InputError as error:
            _refuse(str(error))
        except BrokenPipeError:  # `| head`: the reader has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except RuntimeError as error:
            from prelnroberta.distributed import multihost

            if not multihost.is_lost_host_error(error):
                raise
            print(
                "error: another host of this job has stopped: restart all hosts with the same "
                "command to resume from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            multihost.exit_immediately(multihost.RETRY_EXIT_CODE)
        except OSError as error:
            if error.errno not in _MACHINE_ERRORS:
                raise
            _refuse(f"{error.filename or 'a file could not be written'}: {error.strerror}")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    app.run(guarded)


def _unraisable(error: sys.UnraisableHookArgs) -> None:
    """Hides the tracebacks of tensorstore's threads after a failed save: they call back into an
    event loop that orbax has closed, and the error line has already said why the save failed."""
    if str(error.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(error)


def _refuse(message: str) -> NoReturn:
    """Prints the error and exits without clean-up: on a full disk, libraries that flush at exit
    print tracebacks."""
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)
