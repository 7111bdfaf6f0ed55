"""Every command in README and docs is one that the program takes: subcommands, flags, settings, files."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from searche1.cli import build_parser, plan_parser
from searche1.config import config_keys

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(searche1|python tools/\S+\.py|bash scripts/\S+\.sh|python -m searche1)( |$)")


def commands(text):
    """Commands in ```bash blocks, continued lines joined, and those in backticks."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.partition("  #")[0].partition(" | ")[0].strip()
    for quoted in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        yield quoted.strip()


def found_commands():
    for page in PAGES:
        for command in dict.fromkeys(commands(page.read_text(encoding="utf-8"))):
            bare = re.sub(r"^(torchrun|NODES=).*?-m searche1", "searche1", command)
            bare = re.sub(r"^(\w+=\S+ )+", "", bare).replace("python -m searche1", "searche1")
            if COMMAND.match(bare) and not re.search(r"[\[\]<>…]|\.\.\.", bare):
                yield pytest.param(bare, id=f"{page.stem}: {bare[:60]}")


FOUND = list(found_commands())


def test_there_are_commands_to_look_at():
    assert len(FOUND) > 40


def check_searche1(words):
    if words[:1] == ["plan"]:
        plan_parser().parse_intermixed_args(words[1:])
    elif words[:1] == ["retriever"]:
        told = subprocess.run([sys.executable, "-m", "searche1", "retriever", "--help"], capture_output=True, text=True)
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        assert all(flag in told.stdout for flag in flags), (flags, told.stdout)
    elif words:
        parsed, rest = build_parser().parse_known_args(words)
        assert not [word for word in rest if "=" not in word or word.startswith("-")], rest
        assert parsed.run is not None
    for word in words:
        if re.match(r"[a-z]+\.[a-z_]+=", word):
            assert word.split("=")[0] in config_keys(), word
        if re.match(r"configs/\S+\.yaml$", word):
            assert (ROOT / word).is_file(), word


HELP = {}


def help_of(file):
    if file not in HELP:
        HELP[file] = subprocess.run([sys.executable, str(ROOT / file), "--help"], capture_output=True, text=True).stdout
    return HELP[file]


@pytest.mark.parametrize("command", FOUND)
def test_a_command_of_the_docs_is_one(command):
    words = [{"N": "1", "G": "h800"}.get(word, word) for word in shlex.split(command)]  # placeholders
    if words[0] == "searche1" and len(words) == 2:  # a mention
        assert words[1] in build_parser().format_help()
    elif words[0] == "searche1":
        try:
            check_searche1(words[1:])
        except SystemExit as error:
            assert error.code == 0, command  # --help
    else:
        file = words[1]
        assert (ROOT / file).is_file(), file
        flags = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
        if words[0] == "python" and flags:
            assert all(flag in help_of(file) for flag in flags), (command, help_of(file))
