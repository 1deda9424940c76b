"""What guests and foreign domains call themselves, made harmless for a terminal: control characters, and what turns
text around or hides in it, are shown as escapes."""

from __future__ import annotations

import re

# C1 controls and what turns text around or hides in it: JSON itself escapes only what is below the space.
_UNSEEN = re.compile(
    "[\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)


def printable(text: str) -> str:
    """Control characters, and what else does not print, as backslash escapes; line ends stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """So that nobody's name can look like another row."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def in_json(document: str) -> str:
    """A JSON document that a terminal may show: unprintable characters occur inside of strings only."""
    return _UNSEEN.sub(_escaped, document)


def _escaped(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", errors="surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
