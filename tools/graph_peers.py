#!/usr/bin/env python3
"""tools/graph_peers.py: a graph transformer in PyTorch Geometric on molecule-sized graphs, to be held beside ours on one GPU.

The peer: GPSConv layers (local GINEConv, global multi-head attention, an MLP of twice the width, batch norm), OGB-style
embeddings of 9 atom and 3 bond features, mean pooling and 12 binary targets with missing values; about 500,000
parameters. Trained by forward, backward and fused AdamW in bf16 autocast on random molecules (trees of about 25 atoms
with one to three rings closed), whose batches lie on the GPU beforehand: no loading is timed. Eager, and by
torch.compile where that works; every batch size of --batches is tried and the fastest of each way counts.

A step is timed from its end to the next one's, after a warm-up that compiles; the median of --steps and
noise = (p90 - p10) / median, as in train_peers.py. Prints one JSON line.

Exit codes: 0 done (a way that fails says so in its row), 1 nothing could be measured, 2 bad usage, 3 no PyTorch, no
PyTorch Geometric or no GPU.
"""
import argparse
import collections
import json
import math
import pathlib
import random
import sys
import time

from train_peers import short, summary

# Numbers of values of OGB's atom and bond features.
ATOM, BOND = (119, 5, 12, 12, 10, 6, 6, 2, 2), (5, 6, 2)
Shape = collections.namedtuple("Shape", "width layers heads outputs")
Molecule = collections.namedtuple("Molecule", "atoms bonds")


# ---- molecules (no PyTorch here) --------------------------------------------------------------------------------------------


def random_molecule(rng):
    """A tree that grows near its tip, as chains with branches do, and one to three bonds that close rings."""
    atoms = min(60, max(6, round(rng.gauss(25, 8))))
    bonds = [(max(0, i - 1 - int(rng.expovariate(1.5))), i) for i in range(1, atoms)]
    for _ in range(rng.randint(1, 3)):
        first = rng.randrange(atoms - 5)
        if (first, first + 5) not in bonds:
            bonds.append((first, first + 5))
    return Molecule(atoms, bonds)


def packed(molecules):
    """(graph of each atom, both ends of each bond in both directions), atoms counted through the batch."""
    graph, sources, ends, first = [], [], [], 0
    for number, (atoms, bonds) in enumerate(molecules):
        graph += [number] * atoms
        for a, b in bonds:
            sources += [first + a, first + b]
            ends += [first + b, first + a]
        first += atoms
    return graph, sources, ends


# ---- the peer ---------------------------------------------------------------------------------------------------------------


def make_model(torch, geometric, shape):
    nn = torch.nn

    class Embeddings(nn.Module):
        def __init__(self, sizes):
            super().__init__()
            # One table: the features' values are counted on, so that a row is one embedding_bag.
            self.register_buffer("first", torch.tensor([sum(sizes[:i]) for i in range(len(sizes))]))
            self.table = nn.EmbeddingBag(sum(sizes), shape.width, mode="sum")

        def forward(self, values):
            return self.table(values + self.first)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.atoms, self.bonds = Embeddings(ATOM), Embeddings(BOND)
            self.layers = nn.ModuleList()
            for _ in range(shape.layers):
                local = nn.Sequential(nn.Linear(shape.width, shape.width), nn.ReLU(),
                                      nn.Linear(shape.width, shape.width))
                self.layers.append(geometric.nn.GPSConv(shape.width, geometric.nn.GINEConv(local), heads=shape.heads))
            self.out = nn.Linear(shape.width, shape.outputs)

        def forward(self, batch):
            x, e = self.atoms(batch["atoms"]), self.bonds(batch["bonds"])
            for layer in self.layers:
                x = layer(x, batch["edges"], batch["graph"], edge_attr=e)
            return self.out(geometric.nn.global_mean_pool(x, batch["graph"], batch["size"]))

    return Model()


def make_batch(torch, shape, size, seed, device):
    rng = random.Random(seed)
    graph, sources, ends = packed([random_molecule(rng) for _ in range(size)])
    values = lambda rows, sizes: torch.stack([torch.randint(n, (rows,)) for n in sizes], 1).to(device)  # noqa: E731
    targets = torch.randint(2, (size, shape.outputs)).float()
    targets[torch.rand(size, shape.outputs) < 0.1] = math.nan  # missing
    return {"atoms": values(len(graph), ATOM), "bonds": values(len(sources), BOND), "size": size,
            "edges": torch.tensor([sources, ends]).to(device), "graph": torch.tensor(graph).to(device),
            "targets": targets.to(device)}


def train(torch, geometric, shape, size, compiled, options):
    device, on_gpu = options.device, options.device == "cuda"
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = make_model(torch, geometric, shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=on_gpu)
    run = torch.compile(model) if compiled else model
    batches = [make_batch(torch, shape, size, seed, device) for seed in range(4)]
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def step(number):
        batch = batches[number % len(batches)]
        with torch.autocast(device, dtype=torch.bfloat16):
            outputs = run(batch)
        known = ~torch.isnan(batch["targets"])
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            outputs.float(), batch["targets"].nan_to_num(), reduction="none")
        loss = (losses * known).sum() / known.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for number in range(options.warm_up):
        step(number)
    synchronize()
    seconds, last = [], time.perf_counter()
    for number in range(options.steps):
        loss = step(number)
        synchronize()
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    value = loss.item()
    if not math.isfinite(value):
        raise RuntimeError(f"the loss is {value}")
    median, noise = summary(seconds)
    return {"batch": size, "parameters": sum(p.numel() for p in model.parameters()),
            "nodes": sum(b["graph"].numel() for b in batches) // len(batches),
            "edges": sum(b["edges"].shape[1] for b in batches) // len(batches),
            "ms_per_step": round(median * 1e3, 4), "noise": round(noise, 4), "molecules_per_second": round(size / median),
            "peak_memory_bytes": torch.cuda.max_memory_reserved() if on_gpu else None, "loss": round(value, 4)}


def fastest(rows):
    """The row with the most molecules a second, with the others' rates; where all fail, why."""
    measured = [row for row in rows if "failure" not in row]
    if not measured:
        return {"failure": "; ".join(f"batch {row['batch']}: {row['failure']}" for row in rows)}
    best = dict(max(measured, key=lambda row: row["molecules_per_second"]))
    best["by_batch"] = {str(row["batch"]): row.get("molecules_per_second", row.get("failure")) for row in rows}
    return best


def measure(torch, geometric, shape, compiled, options):
    rows = []
    for size in options.batches:
        try:
            rows.append(train(torch, geometric, shape, size, compiled, options))
        except Exception as error:  # pylint: disable=broad-except
            rows.append({"batch": size, "failure": short(error)})
    return fastest(rows)


def sizes(text):
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 2:
        raise ValueError
    return numbers


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="file for the JSON line too")
    parser.add_argument("--width", type=int, default=128, help="channels of a layer")
    parser.add_argument("--layers", type=int, default=3, help="GPS layers")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--batches", type=sizes, default=[512, 2048, 8192], help="molecules of a batch, with commas")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=8, help="steps before them")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the program out")
    options = parser.parse_args(arguments)
    if min(options.width, options.layers, options.heads, options.steps, options.warm_up) < 1:
        parser.error("all sizes are at least 1")
    if options.width % options.heads:
        parser.error(f"{options.heads} heads do not divide a width of {options.width}")
    try:
        import torch
    except ImportError:
        print("graph_peers: no PyTorch in this Python", file=sys.stderr)
        return 3
    try:
        import torch_geometric as geometric
        import torch_geometric.nn  # noqa: F401
    except ImportError as error:
        print(f"graph_peers: no PyTorch Geometric (torch_geometric) in this Python: {short(error)}", file=sys.stderr)
        return 3
    if options.device == "cuda" and not torch.cuda.is_available():
        print("graph_peers: PyTorch sees no GPU", file=sys.stderr)
        return 3
    shape = Shape(options.width, options.layers, options.heads, outputs=12)
    result = {"gpu": torch.cuda.get_device_name() if options.device == "cuda" else "none: CPU",
              "version": f"PyTorch {torch.__version__}, PyTorch Geometric {geometric.__version__}",
              "model": f"{shape.layers} GPSConv layers (GINEConv, {shape.heads}-head attention), width {shape.width}",
              "eager": measure(torch, geometric, shape, False, options),
              "compiled": measure(torch, geometric, shape, True, options)}
    rates = {way: result[way].get("molecules_per_second", 0) for way in ("eager", "compiled")}
    result["molecules_per_second"] = max(rates.values())
    line = json.dumps(result)
    print(line)
    if options.out:
        options.out.write_text(line + "\n")
    return 0 if result["molecules_per_second"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
