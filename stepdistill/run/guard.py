"""From what a command raises to one line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any

import typer

from stepdistill.run.errors import CheckFailed, Stopped, UserError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # needs no name to be understood
Misuse: Any = typer.BadParameter.__base__  # click's UsageError, by whatever name typer has it


def guarded(call: Callable[[], object]) -> int:
    """Turn a user's mistake into one line on stderr and an exit code."""
    try:
        code = call()
    except KeyboardInterrupt:
        return 130
    except (CheckFailed, Stopped, UserError) as error:
        print(f"stepdistill: {' '.join(str(error).split())}", file=sys.stderr)
        return error.code
    except OSError as error:
        if error.filename is None and error.errno not in DISK:
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"stepdistill: {where}{error.strerror}", file=sys.stderr)
        return 2
    except Misuse as error:
        place = error.ctx.command_path if error.ctx else "stepdistill"
        message = error.format_message().rstrip(".")
        print(f"stepdistill: {message}; see `{place} --help`", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0
