"""Puts into a lock the SHA-256 of every file that may be installed for its pins: pip refuses any other file.

    python tools/lock_hashes.py requirements/*.txt --index https://INDEX/simple

Run it after a pin changed. The index is asked in the form of PEP 691, nothing is downloaded. A lock's first lines name
its Python ("CPython 3.11"); hashes are those of the wheels which a Linux x86_64 machine with it takes, or of the source
archive where there is no such wheel. A version the index does not know keeps the hashes it has: torch's +cpu wheels
come from PyTorch's own index, and are entered by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==([^\s\\;]+)((?:\s*\\?\s*--hash=\S+)*)\s*$", re.MULTILINE)
PYTHON = re.compile(r"CPython (\d+)\.(\d+)")
NEWEST_GLIBC = 40  # minor version: wheels built against a newer one are left out
PEP_691 = {"Accept": "application/vnd.pypi.simple.v1+json"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("locks", type=Path, nargs="+", metavar="LOCK", help="lock files, rewritten in place")
    parser.add_argument("--index", required=True, metavar="URL", help="simple index of packages that speaks JSON")
    arguments = parser.parse_args()
    try:
        with httpx.Client(headers=PEP_691, timeout=60, follow_redirects=True) as client:
            for lock in arguments.locks:
                text = lock.read_text(encoding="utf-8")
                lock.write_text(with_hashes(text, str(lock), client, arguments.index.rstrip("/")), encoding="utf-8")
    except (ValueError, OSError, httpx.HTTPError) as error:
        print(f"lock_hashes.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def with_hashes(text: str, name: str, client: httpx.Client, index: str) -> str:
    """The lock `text` with the hashes of every pin, one a line.

    Raises:
        ValueError: a line is no pin, no Python is named, or a pin has no file to install and no hash of its own.
    """
    python = PYTHON.search(text)
    if python is None:
        raise ValueError(f"{name} does not say for which Python it is; needed: 'CPython 3.11' in a comment")
    tags = usable_tags((int(python[1]), int(python[2])))
    for line in PIN.sub("", text).splitlines():
        if line.strip() and not line.startswith("#"):
            raise ValueError(f"{name} has the line {line!r}; needed: a comment, or NAME==VERSION")
    pins = list(PIN.finditer(text))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pin: hashes_of(pin[1], pin[2], tags, client, index), pins))
    pieces, end = [], 0
    for pin, hashes in zip(pins, found, strict=True):
        if not hashes:
            hashes = sorted(set(re.findall(r"--hash=(\S+)", pin[3])))
            if not hashes:
                raise ValueError(
                    f"{name}: {index} has no file of {pin[1]}=={pin[2]} for Linux x86_64 and CPython "
                    f"{python[1]}.{python[2]}, and the lock no hash; mend the pin, or enter '--hash=sha256:...' by hand"
                )
            print(f"{name}: kept the hashes of {pin[1]}=={pin[2]}, which the index does not have")
        pieces += [text[end : pin.start()], " \\\n    ".join([f"{pin[1]}=={pin[2]}", *(f"--hash={h}" for h in hashes)])]
        end = pin.end()
    print(f"{name}: {len(pins)} packages, {sum(map(len, found))} hashes from the index")
    return "".join([*pieces, text[end:].rstrip("\n"), "\n"])


def usable_tags(python: tuple[int, int]) -> frozenset[Tag]:
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(5, NEWEST_GLIBC)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    interpreter = f"cp{python[0]}{python[1]}"
    return frozenset(
        [*cpython_tags(python, platforms=platforms), *compatible_tags(python, interpreter, platforms=platforms)]
    )


def hashes_of(name: str, version: str, tags: frozenset[Tag], client: httpx.Client, index: str) -> list[str]:
    """What pip may install of one pin, as "sha256:...": wheels, or the source archive where no wheel fits."""
    response = client.get(f"{index}/{canonicalize_name(name)}/")
    if response.status_code == httpx.codes.NOT_FOUND:
        return []
    response.raise_for_status()
    wheels, sources = [], []
    for file in response.json()["files"]:
        filename, digest = file["filename"], file["hashes"].get("sha256")
        if digest is None:
            continue
        try:
            if filename.endswith(".whl"):
                _, found, _, file_tags = parse_wheel_filename(filename)
                if found == Version(version) and file_tags & tags:
                    wheels.append(f"sha256:{digest}")
            elif filename.endswith(".tar.gz") and parse_sdist_filename(filename)[1] == Version(version):
                sources.append(f"sha256:{digest}")
        except (ValueError, InvalidVersion):
            continue  # an old release whose name follows no rule: not one that is pinned
    return sorted(wheels or sources)


if __name__ == "__main__":
    sys.exit(main())
