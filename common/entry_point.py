"""The way out of every command and of every rank of a run: an error becomes one message and one exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from potstill.common.disk_room import is_no_room, no_room_text
from potstill.common.errors import FORESEEN_ERRORS, PreemptedError, UserError
from potstill.common.exit_codes import DONE, ERROR, INTERRUPTED, PREEMPTED
from potstill.common.lost_ranks import is_lost_rank, lost_rank_text


def run_command(work: Callable[[], int], *, program: str, show_traceback: bool) -> int:
    """Do `work` and return its exit code, or that of what ended it; `program` begins each message on standard error.

    A traceback is shown of a defect always, of an error that a person can correct with `show_traceback` only. After a
    PreemptedError it does not return: the process ends.
    """
    try:
        code = work()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe (`potstill inspect ... | head`) has what it wants; the interpreter may not flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command continues from here", file=sys.stderr)
        return INTERRUPTED
    except PreemptedError as error:
        print(f"{program}: {text_of(error)}", file=sys.stderr)
        leave(PREEMPTED)
    except FORESEEN_ERRORS as error:
        if show_traceback:
            traceback.print_exc()
        full = is_no_room(error) and not isinstance(error, UserError)  # of which each says itself what to do
        print(f"{program}: error: {no_room_text(error) if full else text_of(error)}", file=sys.stderr)
        return ERROR
    except Exception as error:
        if is_lost_rank(error):
            if show_traceback:
                traceback.print_exc()
            print(f"{program}: error: {lost_rank_text(error)}", file=sys.stderr)
            return ERROR
        full = is_no_room(error)
        if show_traceback or not full:
            traceback.print_exc()
        found = f"{type(error).__name__}: {no_room_text(error) if full else text_of(error)}"
        if not full:
            found = f"not foreseen: {found}; this is a defect of potstill, please report it"
        print(f"{program}: error: {found}", file=sys.stderr)
        return ERROR
    return code


def leave(code: int) -> NoReturn:
    """End this process here: who asked by a signal waits for nothing that hangs, nor for the libraries' own ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def text_of(error: BaseException) -> str:
    """What an error says, or its type where it says nothing."""
    return str(error) or type(error).__name__
