#!/usr/bin/env python3
"""tests/export_oracle.py FIEDLER: what `fiedler export` and `fiedler quantize` write, read back by other programs: safetensors and
gguf by their official Python packages, quantised .fdl by tools/read_fdl.py (NumPy). Exit code 77, with a line that says
so, where a package is missing; what can be checked without it has been checked by then."""
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile

try:
    import numpy as np
except ImportError:
    print("SKIPPED: nothing was read back: Python has no numpy")
    sys.exit(77)

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
from read_fdl import read_fdl  # noqa: E402


def run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"FAILED: {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def same(ours, theirs, where):
    assert set(ours) == set(theirs), f"{where}: tensors {sorted(set(ours) ^ set(theirs))} are not in both"
    for name, values in ours.items():
        assert values.shape == theirs[name].shape, f"{where}: {name}: {values.shape} and {theirs[name].shape}"
        assert np.array_equal(values, theirs[name]), f"{where}: {name} differs"


def bf16(bits):
    return (bits.astype("<u4") << 16).view("<f4")


def check_safetensors(folder, expected):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata()["producer"] == "fiedler"
        same(expected, {name: file.get_tensor(name) for name in file.keys()}, "safetensors")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "fiedler" and config["fiedler"]["channels"] == config["hidden_size"]


def check_gguf(path, expected, tokenizer):
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {}
    for t in reader.tensors:
        values = bf16(np.array(t.data).view("<u2")) if t.tensor_type == gguf.GGMLQuantizationType.BF16 else np.array(t.data)
        tensors[t.name] = values.reshape(tuple(reversed(t.shape.tolist())))
    same(expected, tensors, "gguf")
    field = reader.fields["general.architecture"]
    assert bytes(field.parts[field.data[0]]).decode() == "fiedler"
    knobs = reader.fields["fiedler.config"]
    assert json.loads(bytes(knobs.parts[knobs.data[0]]).decode())["pattern"]
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == reader.fields["fiedler.vocab_size"].parts[-1][0]
    assert bytes(tokens.parts[tokens.data[1]]).decode() == "<|endoftext|>"
    model = reader.fields["fiedler.tokenizer_model"]
    assert bytes(np.array([model.parts[i][0] for i in model.data], np.uint8)) == tokenizer, "gguf: another tokenizer"


def check_quantised(fiedler, scratch, expected):
    for bits, most in (("int8", 0.01), ("int4", 0.13)):
        run(fiedler, "quantize", scratch / "run", "--bits", bits, "--out", scratch / f"{bits}.fdl")
        _, tensors = read_fdl(scratch / f"{bits}.fdl")
        tensors.pop("tokenizer.model")
        run(fiedler, "export", scratch / f"{bits}.fdl", "--dtype", "f32", "--out", scratch / f"{bits}-f32.fdl")
        _, back = read_fdl(scratch / f"{bits}-f32.fdl")
        back.pop("tokenizer.model")
        same({n: np.asarray(v) for n, v in tensors.items()}, back, bits)  # NumPy and the engine read the same values
        for name, values in tensors.items():
            error = np.linalg.norm(values - expected[name]) / max(np.linalg.norm(expected[name]), 1e-30)
            assert error < most, f"{bits}: {name} is off by {error:.3f} of its norm"


def main(fiedler):
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        (scratch / "text").mkdir()
        (scratch / "text" / "a.txt").write_text("".join(f"The {i}th of {i * i} lines, in words: {'ab' * (i % 7)}.\n" for i in range(9000)))
        run(fiedler, "train", "--data", scratch / "text", "--data-cache", scratch / "cache", "--out", scratch / "run",
            "--steps", 3, "--vocab", 600, "--context", 64, "--batch-tokens", 512, "--channels", 96, "--heads", 3,
            "--layers", 2, "--pattern", "sd", "--spectral-dims", 12, "--spectral-source", "random", "--device", "cpu",
            "--sample-every", 0)
        tokenizer = (scratch / "run" / "tokenizer.model").read_bytes()
        run(fiedler, "export", scratch / "run", "--dtype", "f32", "--out", scratch / "model.fdl")
        _, expected = read_fdl(scratch / "model.fdl")
        assert bytes(expected.pop("tokenizer.model")) == tokenizer
        check_quantised(fiedler, scratch, expected)
        missing = [p for p in ("safetensors", "gguf") if importlib.util.find_spec(p) is None]
        for dtype in ("f32", "bf16"):
            run(fiedler, "export", scratch / "run", "--dtype", dtype, "--out", scratch / f"{dtype}.fdl")
            _, expected = read_fdl(scratch / f"{dtype}.fdl")
            expected.pop("tokenizer.model")
            if "gguf" not in missing:
                run(fiedler, "export", scratch / "run", "--dtype", dtype, "--format", "gguf", "--out", scratch / f"{dtype}.gguf")
                check_gguf(scratch / f"{dtype}.gguf", expected, tokenizer)
        if "safetensors" not in missing:
            run(fiedler, "export", scratch / "run", "--dtype", "f32", "--format", "safetensors", "--out", scratch / "st")
            _, expected = read_fdl(scratch / "model.fdl")
            expected.pop("tokenizer.model")
            check_safetensors(scratch / "st", expected)
    if missing:
        print(f"SKIPPED: not read by the official packages: Python has no {' and no '.join(missing)}")
        sys.exit(77)
    print("safetensors, gguf and quantised files read back")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
