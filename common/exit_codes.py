"""The exit codes that every command and every rank of a run shares."""

from __future__ import annotations

# 75 is EX_TEMPFAIL of sysexits.h: starting again continues the work.
DONE, ERROR, USAGE, INCOMPLETE, PREEMPTED, INTERRUPTED = 0, 1, 2, 3, 75, 130
EXIT_CODES = {
    DONE: "the work is done",
    ERROR: "an error; the last line on standard error says what, where and what to do",
    USAGE: "the command line is wrong",
    INCOMPLETE: "not everything is done or whole: missing or failed units, damage found, nothing to read",
    PREEMPTED: "saved and stopped before the end, as asked by a signal or a time limit; the same command continues",
    INTERRUPTED: "interrupted from the keyboard",
}
