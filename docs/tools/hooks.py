"""MkDocs hook that inserts sections of the README and the help of commands, so that no page repeats them.

``<!-- readme: Heading -->`` on a line of its own becomes that section of the README, without the heading.
``<!-- help: pruneattn train -->`` becomes the output of ``python -m pruneattn train --help``.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def on_page_markdown(markdown, page, **_):
    """Expand the comments of a page."""
    markdown = re.sub(r"^<!-- readme: (.+) -->$", lambda found: readme_section(found[1]), markdown, flags=re.MULTILINE)
    return re.sub(r"^<!-- help: (.+) -->$", lambda found: help_of(found[1]), markdown, flags=re.MULTILINE)


def readme_section(heading):
    """Return the text under a heading of the README, up to the next heading of the same or a higher level.

    Its links become relative to ``docs/``.
    """
    _, marks, text = re.split(rf"^(#+) {re.escape(heading)}$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines, in_code = [], False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        if not in_code and re.match(rf"#{{1,{len(marks)}}} ", line):
            break
        lines.append(line)
    return "\n".join(lines).strip().replace("](docs/", "](")


def help_of(command):
    """Return the help of ``python -m COMMAND`` as a block of text.

    Args:
        command: module and subcommands, such as ``"pruneattn train"``.
    """
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", *command.split(), "--help"]
    text = subprocess.run(run, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return f"```text\n{text.rstrip()}\n```"
