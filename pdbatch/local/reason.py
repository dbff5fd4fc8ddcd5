"""Why a process ended, out of what it logged."""

from __future__ import annotations

import re

_ERROR = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Died|Interrupt)): (.+)$")
_OURS = re.compile(r"(?:^|\s)pdbatch: (?:error: )?(.+)$")
_SHORT = 400


def last_words(log: str) -> str:
    """The most telling line of a log's end: ours, else the last exception, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        if match := _OURS.search(line):
            return match[1][:_SHORT]
    for line in reversed(lines):
        if match := _ERROR.match(line):
            return f"{match[1]}: {match[2]}"[:_SHORT]
    return lines[-1][:_SHORT] if lines else ""
