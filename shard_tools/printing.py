"""What may be printed of text that came from elsewhere: names can hold what steers a terminal."""

from __future__ import annotations

import re

MAX_CHARS = 2000
_BREAKS = re.compile(r"[ \t]*[\r\n]\s*")


def sentence(text: str) -> str:
    """The text in one line, its middle left out if it is very long; control characters, and those that change the
    direction of writing, are written \\xNN."""
    line = _BREAKS.sub(" ", text)
    if len(line) > MAX_CHARS:
        line = f"{line[: MAX_CHARS // 2]} [...] {line[-MAX_CHARS // 2 :]}"
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
