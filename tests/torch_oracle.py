#!/usr/bin/env python3
"""tests/torch_oracle.py FIEDLER: loss and gradients of one training step against tools/fiedler_torch.py, in double, for every
kind of layer; and the way back, from PyTorch through `fiedler import` to `fiedler eval`.

The gradients are read from the first moments of a one-step run: AdamW's moment1 is (1 - beta1) g. The data are token shards
with exactly one window, so both see the same tokens. Exit code 77, with a line that says so: no PyTorch or no safetensors."""
import json
import pathlib
import re
import subprocess
import sys
import tempfile

try:
    import numpy as np
    import safetensors.torch  # noqa: F401
    import torch
except ImportError as missing:
    print(f"SKIPPED: no PyTorch reference was run: {missing}. Install torch and safetensors to compare loss and gradients.")
    sys.exit(77)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
import fiedler_torch  # noqa: E402

LENGTH, VOCAB = 48, 50257  # that of shards without a tokenizer
MODELS = {
    "coordinates": ["--pattern", "sb:9"],
    "one energy": ["--pattern", "s", "--scalar-kind", "energy", "--rope", "all"],
    "bands of energies": ["--pattern", "sb", "--scalar-kind", "energy", "--no-gate"],
    "dot products": ["--pattern", "dd:7", "--no-tied"],
    "bare": ["--pattern", "sd", "--no-conv", "--no-gate", "--no-qk-norm", "--rope", "none"],
    "spectral embedding": ["--pattern", "sb", "--spectral-dims", "12", "--spectral-source", "random"],
}


def write_shard(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def run(*words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"FAILED: {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def is_decayed(name):
    return name.endswith(".weight") and "conv" not in name


def blocks_of(path, model):
    """The file's block, cut into tensors as engine/params.h lays them out: decayed ones first, then the others."""
    values, at, cut = np.fromfile(path, "<f4"), 0, {}
    names = [n for n in model.names if not n.startswith(("spectral.U", "feature_laplacian."))]
    for decayed in (True, False):
        for name in names:
            if is_decayed(name) == decayed:
                shape = tuple(model.tensor(name).shape)
                size = int(np.prod(shape))
                cut[name] = values[at : at + size].reshape(shape)
                at += (size + 7) // 8 * 8
    assert at == len(values), f"{path}: {len(values)} values, {at} expected"
    return cut


def compare(fiedler, folder, title, flags):
    rng = np.random.default_rng(len(title))
    data = folder / "data"
    data.mkdir()
    tokens = rng.integers(1, VOCAB, LENGTH + 1)
    write_shard(data / "train.bin", tokens)
    write_shard(data / "val.bin", rng.integers(1, VOCAB, 4 * LENGTH + 1))
    run(fiedler, "train", "--data", data, "--out", folder / "run", "--steps", 1, "--lr", "1e-30", "--warmup", 0, "--clip", "1e6",
        "--context", LENGTH, "--batch-tokens", LENGTH, "--vocab", VOCAB, "--channels", 32, "--heads", 2, "--layers", 2,
        "--scalars", 4, "--device", "cpu", "--sample-every", 0, "--init-std", "0.2", "--tau", "median-learned", *flags)
    run(fiedler, "export", folder / "run", "--format", "safetensors", "--dtype", "f32", "--out", folder / "exported")
    model = fiedler_torch.load(folder / "exported", torch.float64)
    window = torch.from_numpy(tokens.astype(np.int64))
    loss = model.loss(window[None, :-1], window[None, 1:])
    loss.backward()
    single = fiedler_torch.load(folder / "exported", torch.float32)
    single.loss(window[None, :-1], window[None, 1:]).backward()
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    ours = next(r["loss"] for r in records if r["event"] == "step")
    error = abs(ours - loss.item()) / loss.item()
    assert error < 1e-5, f"{title}: loss {ours} here, {loss.item()} in PyTorch"
    worst, moments = 0, blocks_of(folder / "run" / "step_00000001" / "moment1.bin", model)
    gradient = {n: [np.zeros(m.shape) if t.tensor(n).grad is None else t.tensor(n).grad.double().numpy() for t in (model, single)]
                for n, m in moments.items()}
    kind = lambda name: name.split(".", 2)[-1]  # noqa: E731: the same tensor of all layers
    for name, moment in moments.items():
        reference = gradient[name][0]
        largest, error_here = np.abs(reference).max(), np.abs(moment / 0.1 - reference).max()
        # At most 16 times the error that the same formulas have in f32, in any layer (sums are in another order, and those
        # of few values cancel), and a few roundings of the largest.
        low = max(np.abs(f - d).max() for n, (d, f) in gradient.items() if kind(n) == kind(name))
        allowed = 16 * low + 1e-5 * largest + 1e-12
        assert error_here <= allowed, f"{title}: gradient of {name} is off by {error_here:.1e}, allowed {allowed:.1e}"
        worst = max(worst, error_here / max(largest, 1e-8))
    print(f"{title:20} loss {ours:.6f} ({error:.0e} apart), gradients at most {worst:.0e} of their largest apart")
    come_back(fiedler, folder, model, data)


def come_back(fiedler, folder, model, data):
    """A change made in PyTorch is seen by `fiedler eval` after `fiedler import`."""
    with torch.no_grad():
        model.embedding_weight.mul_(1.25)
    fiedler_torch.save(model, folder / "changed")
    run(fiedler, "import", folder / "changed", "--out", folder / "changed.fdl")
    out = run(fiedler, "eval", folder / "changed.fdl", "--data", data, "--device", "cpu")
    ours = float(re.search(r"validation loss +([0-9.]+)", out).group(1))
    tokens = torch.from_numpy(np.fromfile(data / "val.bin", "<u2")[512:].astype(np.int64))
    with torch.no_grad():
        model = fiedler_torch.load(folder / "changed", torch.float64)
        theirs = model.loss(tokens[:-1].view(4, LENGTH), tokens[1:].view(4, LENGTH)).item()
    assert abs(ours - theirs) < 1.01e-4, f"imported model: loss {ours} here, {theirs} in PyTorch"


if __name__ == "__main__":
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as scratch:
        for title, flags in MODELS.items():
            folder = pathlib.Path(scratch) / title.replace(" ", "_")
            folder.mkdir()
            compare(pathlib.Path(sys.argv[1]).resolve(), folder, title, flags)
