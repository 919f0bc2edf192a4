#!/usr/bin/env python3
"""Writes a Fiedler file (.fdl) with nothing but NumPy: write_fdl(path, config, {name: array}), and write_graph.

The counterpart of read_fdl.py: a graph made in Python goes into `fiedler spectrum` without a text file between. The
format: engine/weights.h; of graphs: engine/spectrum_file.h. Checksums are XXH3-64, computed here.
"""
import json

import numpy as np

TYPES = {"float32": "f32", "float64": "f64", "int32": "i32", "int64": "i64", "uint8": "u8"}
ALIGN = 256

# ---- XXH3-64 of more than 240 bytes, seed 0, as its specification defines it ------------------------------------------------
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
    "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d"
    "8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc"
    "8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e")
P32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
P64 = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
MASK = (1 << 64) - 1
STRIPE, BLOCK = 64, 1024


def secret_words(offset, count=8):
    return np.frombuffer(SECRET[offset:offset + 8 * count], "<u8")


def stripe_sums(stripes, keys):
    """What stripes [..., s, 8] with their keys [s, 8] add to the eight lanes, modulo 2^64: [..., 8]."""
    mixed = stripes ^ keys
    product = (mixed & np.uint64(0xFFFFFFFF)) * (mixed >> np.uint64(32))
    swapped = stripes[..., [1, 0, 3, 2, 5, 4, 7, 6]]
    return (product + swapped).sum(axis=-2, dtype=np.uint64)


def xxh3(data):
    """XXH3-64 of a bytes-like object of more than 240 bytes."""
    raw = np.frombuffer(data, np.uint8)
    size = raw.size
    if size <= 240:
        raise ValueError("xxh3: only for more than 240 bytes")
    lanes = [P32[2], P64[0], P64[1], P64[2], P64[3], P32[1], P64[4], P32[0]]
    blocks = (size - 1) // BLOCK
    block_keys = np.stack([secret_words(8 * n) for n in range(BLOCK // STRIPE)])
    scramble = [int(word) for word in secret_words(128)]
    for first in range(0, blocks, 8192):
        count = min(8192, blocks - first)
        words = raw[first * BLOCK:(first + count) * BLOCK].view("<u8").reshape(count, BLOCK // STRIPE, 8)
        for sums in stripe_sums(words, block_keys).tolist():
            for i in range(8):
                lane = (lanes[i] + sums[i]) & MASK
                lanes[i] = (lane ^ lane >> 47 ^ scramble[i]) * P32[0] & MASK
    rest = (size - 1 - blocks * BLOCK) // STRIPE
    tail = raw[blocks * BLOCK:blocks * BLOCK + rest * STRIPE].copy().view("<u8").reshape(rest, 8)
    last = raw[size - STRIPE:].copy().view("<u8").reshape(1, 8)
    for words, keys in ((tail, block_keys[:rest]), (last, secret_words(121)[None])):
        lanes = [(lane + int(add)) & MASK for lane, add in zip(lanes, stripe_sums(words, keys))]
    keys = [int(word) for word in secret_words(11)]
    result = size * P64[0]
    for i in range(0, 8, 2):
        product = (lanes[i] ^ keys[i]) * (lanes[i + 1] ^ keys[i + 1])
        result += (product & MASK) ^ (product >> 64)
    result &= MASK
    result = (result ^ result >> 37) * 0x165667919E3779F9 & MASK
    return result ^ result >> 32


# ---- the file ---------------------------------------------------------------------------------------------------------------


def rounded(count):
    return (count + ALIGN - 1) // ALIGN * ALIGN


def write_fdl(path, config, tensors):
    """tensors: {name: array of f32, f64, i32, i64 or u8}, written in order; none may be empty."""
    entries, pieces, offset = [], [], 0
    for name, values in tensors.items():
        values = np.ascontiguousarray(values)
        if values.size == 0:
            raise ValueError(f"{name}: an empty tensor is left out")
        entries.append({"name": name, "dtype": TYPES[values.dtype.name], "shape": list(values.shape), "offset": offset,
                        "bytes": values.nbytes})
        pieces.append(values)
        offset += rounded(values.nbytes)
    table = json.dumps({"config": config, "tensors": entries}).encode()
    table += b" " * max(0, ALIGN - len(table))  # JSON may end in spaces: never too short for xxh3
    payload = rounded(1024 + len(table))
    file = np.zeros(payload + offset, np.uint8)
    file[1024:1024 + len(table)] = np.frombuffer(table, np.uint8)
    for entry, values in zip(entries, pieces):
        begin = payload + entry["offset"]
        file[begin:begin + values.nbytes] = values.reshape(-1).view(np.uint8)
    header = file[:1024].view("<i4")
    header[:3] = int.from_bytes(b"FDLW", "little"), 1, len(entries)
    header[4:16].view("<u8")[:] = len(table), 1024, xxh3(table), offset, payload, xxh3(file[payload:])
    file[1016:1024].view("<u8")[:] = xxh3(file[:1016])
    file.tofile(path)


def write_graph(path, offsets, columns, weights=None, about=None):
    """A symmetric CSR without diagonal, rows ascending: offsets [nodes + 1], columns and weights [2 edges] (default: 1)."""
    weights = np.ones(len(columns), np.float32) if weights is None else np.asarray(weights, np.float32)
    config = {"kind": "graph", "version": 1, "nodes": len(offsets) - 1, "edges": len(columns) // 2, "about": about or {}}
    tensors = {"offsets": np.asarray(offsets, np.int64)}
    if len(columns):
        tensors.update(columns=np.asarray(columns, np.int32), weights=weights)
    write_fdl(path, config, tensors)
