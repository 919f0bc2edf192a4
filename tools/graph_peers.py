#!/usr/bin/env python3
"""tools/graph_peers.py: a graph transformer in PyTorch on molecules, to be held beside `fiedler bench samples` on one GPU.

The peer: PyTorch Geometric's GPSConv layers (local GINEConv, global multi-head attention, an MLP of twice the width, batch
norm), OGB-style embeddings of 9 atom and 3 bond features, mean pooling and 12 binary targets with missing values; about
500,000 parameters. Where torch_geometric is missing, the same layer in plain PyTorch, and `library` says so. Trained by
forward, backward and fused AdamW in bf16 autocast. Molecules are those of --data, a folder that `fiedler prepare` made,
or random ones (trees of about 25 atoms with one to three rings closed). Batches, the places of atoms among the attention's
rows included, lie on the GPU beforehand: no loading is timed. Every batch size of --batches is tried and the fastest counts.

Eager, and done within --limit seconds, PyTorch's start included: where time runs short fewer steps are timed, and the row
says how many. --compile adds torch.compile in a process of its own, ended after --compile-limit seconds.

A step is timed from its end to the next one's, after a warm-up; the median of --steps and noise = (p90 - p10) / median,
as in train_peers.py. Prints one JSON line.

Exit codes: 0 done (a way that fails says so in its row), 1 nothing could be measured, 2 bad usage, 3 no PyTorch or no GPU.
"""
import argparse
import collections
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from train_peers import short, summary

STARTED = time.monotonic()
# Numbers of values of OGB's atom and bond features.
ATOM, BOND = (119, 5, 12, 12, 10, 6, 6, 2, 2), (5, 6, 2)
Shape = collections.namedtuple("Shape", "width layers heads outputs")
# atoms: how many; bonds: (atom, atom); values: of the features of each atom and each bond, None: random ones.
Molecule = collections.namedtuple("Molecule", "atoms bonds atom_values bond_values", defaults=(None, None))
LEAST_STEPS = 3  # fewer say nothing


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


def read_molecules(folder, most):
    """The first `most` molecules of a folder of `fiedler prepare`."""
    from read_fdl import read_fdl
    _, t = read_fdl(str(pathlib.Path(folder) / "molecules.fdl"))
    atoms, bonds = t["atom_offsets"].tolist(), t["bond_offsets"].tolist()
    count = min(most, len(atoms) - 1)
    atom_values, bond_values = t["atoms"][: atoms[count]].tolist(), t["bond_features"][: bonds[count]].tolist()
    ends = [tuple(pair) for pair in t["bonds"][: bonds[count]].tolist()]
    return [Molecule(atoms[m + 1] - atoms[m], ends[bonds[m] : bonds[m + 1]], atom_values[atoms[m] : atoms[m + 1]],
                     bond_values[bonds[m] : bonds[m + 1]]) for m in range(count)]


def packed(molecules):
    """(graph of each atom, both ends of each bond in both directions), atoms counted through the batch."""
    graph, sources, ends, first = [], [], [], 0
    for number, molecule in enumerate(molecules):
        graph += [number] * molecule.atoms
        for a, b in molecule.bonds:
            sources += [first + a, first + b]
            ends += [first + b, first + a]
        first += molecule.atoms
    return graph, sources, ends


def row_places(molecules):
    """(longest, place of each atom among the rows of molecules * longest): how attention sees the batch."""
    longest = max(molecule.atoms for molecule in molecules)
    return longest, [number * longest + i for number, m in enumerate(molecules) for i in range(m.atoms)]


# ---- the peer ---------------------------------------------------------------------------------------------------------------


def plain_layer(torch, shape):
    """A GPS layer as torch_geometric.nn.GPSConv has it, without that library: the same sums, norms and numbers of parameters."""
    nn = torch.nn

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            width = shape.width
            self.local = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            self.attention = nn.MultiheadAttention(width, shape.heads, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(3))

        def forward(self, x, batch, bonds):
            sources, ends = batch["edges"]
            messages = torch.relu(x[sources] + bonds)
            near = self.norms[0](x + self.local(x + torch.zeros_like(x).index_add(0, ends, messages.to(x.dtype))))
            rows = x.new_zeros(batch["size"] * batch["longest"], shape.width).index_copy(0, batch["places"], x)
            rows = rows.view(batch["size"], batch["longest"], shape.width)
            far = self.attention(rows, rows, rows, key_padding_mask=batch["empty"], need_weights=False)[0]
            far = self.norms[1](x + far.reshape(-1, shape.width)[batch["places"]].to(x.dtype))
            x = near + far
            return self.norms[2](x + self.mlp(x))

    return Layer()


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
                if geometric is None:
                    self.layers.append(plain_layer(torch, shape))
                    continue
                local = nn.Sequential(nn.Linear(shape.width, shape.width), nn.ReLU(),
                                      nn.Linear(shape.width, shape.width))
                self.layers.append(geometric.nn.GPSConv(shape.width, geometric.nn.GINEConv(local), heads=shape.heads))
            self.out = nn.Linear(shape.width, shape.outputs)

        def forward(self, batch):
            x, e = self.atoms(batch["atoms"]), self.bonds(batch["bonds"])
            for layer in self.layers:
                x = layer(x, batch, e) if geometric is None else layer(x, batch["edges"], batch["graph"], edge_attr=e)
            sums = x.new_zeros(batch["size"], shape.width).index_add(0, batch["graph"], x)
            return self.out(sums / batch["counts"])

    return Model()


def make_batch(torch, shape, molecules, seed, device):
    size = len(molecules)
    graph, sources, ends = packed(molecules)
    longest, places = row_places(molecules)
    torch.manual_seed(seed)

    def values(rows, sizes, known, times):
        if known[0] is None:
            return torch.stack([torch.randint(n, (rows,)) for n in sizes], 1).to(device)
        return torch.tensor([row for molecule in known for row in molecule for _ in range(times)]).to(device)

    targets = torch.randint(2, (size, shape.outputs)).float()
    targets[torch.rand(size, shape.outputs) < 0.1] = math.nan  # missing
    empty = torch.ones(size * longest, dtype=torch.bool)
    empty[places] = False
    counts = torch.tensor([float(molecule.atoms) for molecule in molecules])[:, None]
    return {"atoms": values(len(graph), ATOM, [m.atom_values for m in molecules], 1),
            "bonds": values(len(sources), BOND, [m.bond_values for m in molecules], 2), "size": size,
            "edges": torch.tensor([sources, ends]).to(device), "graph": torch.tensor(graph).to(device),
            "longest": longest, "places": torch.tensor(places).to(device),
            "empty": empty.view(size, longest).to(device), "counts": counts.to(device), "targets": targets.to(device)}


def draw_molecules(known, size, seed):
    """`size` of the known ones, in random order, or made ones."""
    rng = random.Random(seed)
    if known:
        return rng.sample(known, size) if size <= len(known) else rng.choices(known, k=size)
    return [random_molecule(rng) for _ in range(size)]


def train(torch, geometric, shape, size, compiled, options):
    device, on_gpu = options.device, options.device == "cuda"
    if compiled:
        torch._dynamo.reset()
    torch.manual_seed(1)
    model = make_model(torch, geometric, shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=on_gpu)
    run = torch.compile(model) if compiled else model
    batches = [make_batch(torch, shape, draw_molecules(options.molecules, size, seed), seed, device)
               for seed in range(4)]
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

    late = lambda: time.monotonic() > options.deadline  # noqa: E731
    for number in range(options.warm_up):
        step(number)
        synchronize()
        if late():
            break
    seconds, last = [], time.perf_counter()
    for number in range(options.steps):
        if late() and len(seconds) >= LEAST_STEPS:
            break
        loss = step(number)
        synchronize()
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    value = loss.item()
    if not math.isfinite(value):
        raise RuntimeError(f"the loss is {value}")
    median, noise = summary(seconds)
    nodes = sum(b["graph"].numel() for b in batches) / len(batches)
    return {"batch": size, "parameters": sum(p.numel() for p in model.parameters()), "nodes": round(nodes),
            "edges": sum(b["edges"].shape[1] for b in batches) // len(batches), "steps": len(seconds),
            "ms_per_step": round(median * 1e3, 4), "noise": round(noise, 4), "molecules_per_second": round(size / median),
            "nodes_per_second": round(nodes / median),
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
        if rows and time.monotonic() > options.deadline:
            rows.append({"batch": size, "failure": "no time was left"})
            continue
        try:
            rows.append(train(torch, geometric, shape, size, compiled, options))
        except Exception as error:  # pylint: disable=broad-except
            rows.append({"batch": size, "failure": short(error)})
    return fastest(rows)


def measure_compiled(arguments, limit):
    """The compiled way by a process of its own: what compiles cannot be interrupted, but ended."""
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), *arguments, "--only-compiled"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            out, _ = child.communicate(timeout=limit)
            return json.loads(out)["compiled"]
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return {"failure": f"not done after {limit:g} s"}
        except (ValueError, KeyError) as error:
            return {"failure": short(error)}


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
    parser.add_argument("--data", help="a folder of `fiedler prepare` whose molecules are trained on (needs NumPy)")
    parser.add_argument("--batches", type=sizes, default=[2048], help="molecules of a batch, with commas")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=8, help="steps before them")
    parser.add_argument("--limit", type=float, default=45, help="seconds after which no more is begun, from the start on")
    parser.add_argument("--compile", action="store_true", help="by torch.compile, too")
    parser.add_argument("--compile-limit", type=float, default=240, help="seconds that this may take")
    parser.add_argument("--only-compiled", action="store_true", help=argparse.SUPPRESS)
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
    library = "plain PyTorch GPS layers"
    try:
        import torch_geometric as geometric
        import torch_geometric.nn  # noqa: F401
        library = f"PyTorch Geometric {geometric.__version__}"
    except ImportError as error:
        geometric = None
        library += f" (no PyTorch Geometric: {short(error)})"
        print(f"graph_peers: no PyTorch Geometric (torch_geometric) in this Python: {short(error)}; plain layers",
              file=sys.stderr)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("graph_peers: PyTorch sees no GPU", file=sys.stderr)
        return 3
    try:
        options.molecules = read_molecules(options.data, 4 * max(options.batches)) if options.data else None
    except (ImportError, OSError, ValueError) as error:
        print(f"graph_peers: --data {options.data}: {short(error)}", file=sys.stderr)
        return 2
    options.deadline = STARTED + (options.compile_limit if options.only_compiled else options.limit)
    shape = Shape(options.width, options.layers, options.heads, outputs=12)
    result = {"gpu": torch.cuda.get_device_name() if options.device == "cuda" else "none: CPU",
              "version": f"PyTorch {torch.__version__}", "library": library,
              "molecules": options.data or "random",
              "model": f"{shape.layers} GPS layers (GINE, {shape.heads}-head attention), width {shape.width}"}
    if options.only_compiled:
        print(json.dumps({"compiled": measure(torch, geometric, shape, True, options)}))
        return 0
    result["eager"] = measure(torch, geometric, shape, False, options)
    if options.compile:
        result["compiled"] = measure_compiled(arguments, options.compile_limit)
    result["molecules_per_second"] = max(result[way].get("molecules_per_second", 0) for way in ("eager", "compiled")
                                         if way in result)
    result["seconds"] = round(time.monotonic() - STARTED, 1)
    line = json.dumps(result)
    print(line)
    if options.out:
        options.out.write_text(line + "\n")
    return 0 if result["molecules_per_second"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
