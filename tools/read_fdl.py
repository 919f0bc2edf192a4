#!/usr/bin/env python3
"""Reads a Fiedler file (.fdl: weights, a graph or a spectrum) with nothing but NumPy: read_fdl(path) -> (config, {name: array}).

From a shell, `read_fdl.py FILE` lists the tensors and `read_fdl.py FILE TENSOR` prints one. The format: engine/weights.h."""
import json
import sys

import numpy as np

TYPES = {"f16": "<f2", "f32": "<f4", "f64": "<f8", "i32": "<i4", "i64": "<i8", "u8": "u1"}

def dequantise(data, bits, shape):
    """Blocks of 16 rows: scales f16 [groups][16] up to a multiple of 64 bytes, then codes; a group is 32 columns."""
    (rows, cols), groups = shape, (shape[1] + 31) // 32
    scale_bytes = (groups * 32 + 63) // 64 * 64
    blocks = data.reshape(-1, scale_bytes + groups * 64 * bits)
    scales = blocks[:, : groups * 32].copy().view("<f2").astype("<f4").reshape(-1, groups, 1, 16, 1)
    codes = blocks[:, scale_bytes:].reshape(-1, groups, bits, 16, 4)  # four columns of sixteen rows a line
    if bits == 4:  # lines 2 p and 2 p + 1 in the low and the high half of a byte
        codes = np.stack([codes & 15, codes >> 4], axis=3).reshape(-1, groups, 8, 16, 4)
    values = scales * (codes.astype("<f4") - (128 if bits == 8 else 8))
    return values.transpose(0, 3, 1, 2, 4).reshape(-1, groups * 32)[:rows, :cols]


def read_fdl(path):
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    header = raw[:1024].view("<i4")
    if bytes(raw[:4]) != b"FDLW" or header[1] != 1:
        raise ValueError(f"{path}: not a .fdl file of version 1")
    table_bytes, table, _, _, payload = raw[16:56].view("<u8").tolist()
    description = json.loads(bytes(raw[table : table + table_bytes]))
    tensors = {}
    for t in description["tensors"]:
        data = raw[payload + t["offset"] : payload + t["offset"] + t["bytes"]]
        if t["dtype"] == "bf16":  # the upper half of a 32-bit float
            values = (data.view("<u2").astype("<u4") << 16).view("<f4")
        elif t["dtype"] in ("q8", "q4"):
            values = dequantise(data, int(t["dtype"][1]), t["shape"])
        else:
            values = data.view(TYPES[t["dtype"]])
        tensors[t["name"]] = values.reshape(t["shape"])
    return description["config"], tensors


if __name__ == "__main__":
    config, tensors = read_fdl(sys.argv[1])
    for name, values in tensors.items():
        if len(sys.argv) > 2 and name == sys.argv[2]:
            print(values)
        elif len(sys.argv) == 2:
            print(f"{name:40} {str(values.shape):16} mean {values.mean():+.4f}  deviation {values.std():.4f}")
