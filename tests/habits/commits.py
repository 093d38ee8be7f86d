"""Check the subjects of commits: "room: what", of at most 72 characters; a blank line before the rest.

python -m tests.habits.commits          the commits that are not on origin/main; where that is not known, those
                                        since the last tag, or since there is this check
python -m tests.habits.commits FILE     one message, as the hook commit-msg has it
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

LENGTH = 72
SUBJECT = re.compile(r"[a-z][\w./-]*(, [a-z][\w./-]*)*: \S.*[^\s.]")
#: What git writes: of merges, reverts, and of what is to be squashed.
OF_GIT = re.compile(r"(Merge|Revert|fixup!|squash!|amend!) ")
ROOT = Path(__file__).parents[2]


def complaints(message: str) -> list[str]:
    """What is wrong with a commit's message."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    subject, *rest = lines or [""]
    if OF_GIT.match(subject):
        return []
    found = []
    if not SUBJECT.fullmatch(subject):
        found.append(f'expected "room: what" without a full stop, found "{subject}"')
    if len(subject) > LENGTH:
        found.append(f'expected at most {LENGTH} characters, found {len(subject)}: "{subject}"')
    if rest and rest[0].strip():
        found.append(f'expected a blank line after the subject, found "{rest[0]}"')
    return found


def git(*words: str) -> str:
    """What a command of git prints; nothing when it fails."""
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def unchecked() -> list[str]:
    """The ids of the commits to be checked."""
    rule = git("log", "--diff-filter=A", "--format=%H", "--", str(Path(__file__).relative_to(ROOT))).split()[-1:]
    bases = (git("rev-parse", "--verify", "--quiet", "origin/main"), git("describe", "--tags", "--abbrev=0"), *rule)
    base = next(filter(None, bases), None)
    return git("rev-list", "--reverse", f"{base}..HEAD").split() if base else []


def main(words: list[str]) -> int:
    """Print what is wrong; the exit code."""
    if words:
        messages = {words[0]: Path(words[0]).read_text()}
    else:
        messages = {commit[:12]: git("log", "-1", "--format=%B", commit) for commit in unchecked()}
        print(f"{len(messages)} commits")
    wrong = [f"{name}: {what}" for name, message in messages.items() for what in complaints(message)]
    print("\n".join(wrong), end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
