#!/usr/bin/env python3
"""tools/sources_hash.py [ROOT]: one SHA-256 over kernels/ and engine/, which says what a measurement belongs to.

Hashed, in the order of the sorted relative paths: path, size and content of each file. Hidden files and compiled Python
do not count. Neither git nor time stamps are looked at. Comments count: without_comments() is for who would rather not.
"""
import hashlib
import pathlib
import re
import sys

FOLDERS = ("kernels", "engine")
# What a comment may not begin in, and then comments. A ' between digits begins nothing.
TOKENS = re.compile(r"""(?P<kept>R"(?P<end>[^()\\\s]{0,16})\(.*?\)(?P=end)"|"(?:\\.|[^"\\\n])*"|(?<=[0-9a-fA-F])'(?=[0-9a-fA-F])"""
                    r"""|'(?:\\.|[^'\\\n])*')|//[^\n]*|/\*.*?\*/""", re.DOTALL)


def without_comments(cpp):
    """The lines of C++ that are not empty, less comments and the spaces before them: two that are alike compile alike, but for
    the numbers of their lines."""
    code = TOKENS.sub(lambda token: token["kept"] or " ", cpp)
    return [line.rstrip() for line in code.splitlines() if line.strip()]


def source_files(root):
    root = pathlib.Path(root)
    found = []
    for folder in FOLDERS:
        for path in (root / folder).rglob("*"):
            parts = path.relative_to(root).parts
            hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
            if path.is_file() and not hidden and path.suffix != ".pyc":
                found.append("/".join(parts))
    return sorted(found)


def sources_sha256(root):
    digest = hashlib.sha256()
    files = source_files(root)
    if not files:
        raise FileNotFoundError(f"{root}: no files in {' or '.join(FOLDERS)}; is this the root of the repository?")
    for name in files:
        content = (pathlib.Path(root) / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


if __name__ == "__main__":
    print(sources_sha256(sys.argv[1] if len(sys.argv) > 1 else "."))
