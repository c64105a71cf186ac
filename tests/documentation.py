"""What the documentation tells a reader to type."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if path.name != "LOG.md" and "```" in path.read_text(encoding="utf-8")
]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the code blocks of a page, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The words of each command of a shell block. A synopsis (`[--tasks LIST]`, `cpu|gpu`) becomes one command with all
    of its options for each of its alternatives."""
    found = []
    for line in block.replace("\\\n", "").splitlines():
        if line.startswith("codequant "):
            line = line.replace("[", "").replace("]", "")
        forms: list[list[str]] = [[]]
        for word in shlex.split(line, comments=True):
            forms = [[*form, choice] for choice in word.split("|") for form in forms]
        found += [form for form in forms if form]
    return found


def command(page: str, program: str) -> list[str]:
    """The one command of a page that calls a program."""
    (found,) = [
        words
        for language, text in blocks(ROOT / "docs" / page)
        if language == "sh"
        for words in commands(text)
        if words[0] == program
    ]
    return found
