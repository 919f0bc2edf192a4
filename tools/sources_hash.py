#!/usr/bin/env python3
"""tools/sources_hash.py [ROOT]: one SHA-256 over kernels/ and engine/, which says what a measurement belongs to.

Hashed, in the order of the sorted relative paths: path, size and content of each file. Hidden files and compiled Python
do not count. Neither git nor time stamps are looked at.
"""
import hashlib
import pathlib
import sys

FOLDERS = ("kernels", "engine")


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
