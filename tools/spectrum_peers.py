#!/usr/bin/env python3
"""tools/spectrum_peers.py --out RESULT.json: `fiedler spectrum` beside CuPy's and SciPy's eigen-solvers, in one run.

Two graphs of 1,000,000 nodes and 10,000,000 edges, made here from a seed, nodes in random order:
  geometric   points in the unit square, the 10,000,000 nearest pairs joined: mesh-like, clustered small eigenvalues
  power-law   preferential attachment, ten edges a node (Barabasi and Albert; duplicates fall away): expander-like

Wanted of each: the 64 smallest eigenpairs of the normalised Laplacian, every residual ||L u - mu u|| <= 1e-4. Checked
afterwards for all solvers alike, in float64: orthonormalised vectors, Rayleigh-Ritz, residuals. A solver that ends with
a worse residual is tried again in float64, then shown as not reaching it.

Which pairs were found: Ritz values are upper bounds of the eigenvalues, index by index, so of two solutions the smaller
value is the better one. "higher" counts the indices where a solver's value is above the best of all solvers by more than
half the mean distance between neighbouring values: a pair that was passed over counts at every index after it. (A small
residual alone does not say that a pair is one of the smallest.)

Time: from the matrix in memory (of the solver's device) to vectors there; ours is from host memory to host memory, with
component search, ordering and transfers. CuPy's kernels are compiled before. Ours is the better of two runs, a peer's as
well if two fit into the limit. Total: ours is the whole process, files read and written; a peer's is reading the ready
Laplacian, moving it to its device, solving and fetching the vectors, without imports and compilation.

Limits: each peer is a process of its own, ended after --limit seconds of solving (both precisions together): it is then
shown as "> limit". Whatever a peer does, the others go on. --budget bounds the time for a graph, all included: what is left
of it is shared among the peers to come, whose limits shrink with it; the note says which limit held. The peers run one
after another, alone on the machine.

Share of the copy bandwidth (ours): least traffic of the Chebyshev products by the time of the whole solve. A product of a
column with L reads two vectors and writes one (12 bytes a node in f32) and its part of the matrix, which is read once for
a block of BLOCK columns. Gathers that miss the caches and orthogonalisation are not counted, but their time is.
"""
import argparse
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import gpu_report  # noqa: E402
from read_fdl import read_fdl  # noqa: E402
from write_fdl import write_graph  # noqa: E402

PAIRS, RESIDUAL, BLOCK = 64, 1e-4, 80
OURS = "fiedler"
PEERS = ("cupyx eigsh", "cupyx lobpcg", "scipy eigsh")

# ---- graphs -----------------------------------------------------------------------------------------------------------------


def geometric_pairs(nodes, edges, rng):
    """The `edges` nearest pairs of random points, from a grid of cells a little wider than the longest of them."""
    points = rng.random((nodes, 2))
    reach = 1.04 * np.sqrt(2 * edges / nodes / (np.pi * nodes))
    cells = max(1, int(1 / reach))
    cell = np.minimum((points * cells).astype(np.int64), cells - 1)
    order = np.argsort(cell[:, 0] * cells + cell[:, 1], kind="stable")
    points, cell = points[order], cell[order]
    start = np.searchsorted(cell[:, 0] * cells + cell[:, 1], np.arange(cells * cells + 1))
    most, index = int(np.diff(start).max()), np.arange(nodes)
    found, lengths = [], []
    for dx, dy in ((0, 0), (0, 1), (1, -1), (1, 0), (1, 1)):
        x, y = cell[:, 0] + dx, cell[:, 1] + dy
        inside = (x < cells) & (y >= 0) & (y < cells)
        other = np.where(inside, x * cells + y, 0)
        begin, count = start[other], np.where(inside, start[other + 1] - start[other], 0)
        for slot in range(most):
            mine = index[slot < count]
            theirs = begin[mine] + slot
            if (dx, dy) == (0, 0):
                mine, theirs = mine[mine < theirs], theirs[mine < theirs]
            length = ((points[mine] - points[theirs]) ** 2).sum(1)
            near = length < reach * reach
            found.append(np.stack([mine[near], theirs[near]], 1))
            lengths.append(length[near])
    found, lengths = np.concatenate(found), np.concatenate(lengths)
    if len(found) < edges:
        raise RuntimeError("the cells are too small for the edges that are wanted")
    return order[found[np.argpartition(lengths, edges - 1)[:edges]]]


def power_law_pairs(nodes, edges, rng):
    """Preferential attachment: an edge's target is an end, drawn at random, of an edge before it (Batagelj and Brandes)."""
    each = edges // nodes
    source = np.repeat(np.arange(nodes, dtype=np.int64), each)
    draw = (rng.random(len(source)) * (2 * np.arange(len(source)) + 1)).astype(np.int64)  # position 2e: source, 2e + 1: target
    while True:  # a target is the target of another edge: follow it there
        follow = np.flatnonzero(draw & 1)
        if len(follow) == 0:
            break
        draw[follow] = draw[draw[follow] >> 1]
    order = rng.permutation(nodes)
    return order[np.stack([source, source[draw >> 1]], 1)]


GRAPHS = {"geometric": (geometric_pairs, 11), "power-law": (power_law_pairs, 12)}


def csr_of(nodes, pairs):
    """Offsets and columns of the simple, symmetric graph of these pairs."""
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    keys = np.concatenate([pairs[:, 0] * nodes + pairs[:, 1], pairs[:, 1] * nodes + pairs[:, 0]])
    keys.sort()
    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])]
    rows, columns = np.divmod(keys, nodes)
    return np.searchsorted(rows, np.arange(nodes + 1)), columns.astype(np.int32)


def make_graph(name, nodes, edges, path):
    make, seed = GRAPHS[name]
    offsets, columns = csr_of(nodes, make(nodes, edges, np.random.default_rng(seed)))
    write_graph(path, offsets, columns, about={"graph": name, "seed": seed})
    degrees = np.diff(offsets)
    return {"nodes": nodes, "edges": len(columns) // 2, "degree_min": int(degrees.min()),
            "degree_max": int(degrees.max())}


def laplacian(path):
    """Normalised Laplacian of a .fdl graph, as SciPy's CSR in float64."""
    import scipy.sparse as sparse

    _, tensors = read_fdl(path)
    offsets, columns = np.asarray(tensors["offsets"]), np.asarray(tensors["columns"])
    weights = np.asarray(tensors["weights"], np.float64)
    nodes = len(offsets) - 1
    rows = np.repeat(np.arange(nodes), np.diff(offsets))
    degree = np.bincount(rows, weights, nodes)
    root = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    matrix = sparse.csr_matrix((-weights * root[rows] * root[columns], columns, offsets), (nodes, nodes))
    return (matrix + sparse.diags((degree > 0).astype(np.float64))).tocsr()


def save_matrix(folder, matrix):
    for part in ("indptr", "indices", "data"):
        np.save(folder / f"{part}.npy", getattr(matrix, part))


def load_matrix(folder, dtype):
    import scipy.sparse as sparse

    offsets, columns, values = (np.load(folder / f"{part}.npy") for part in ("indptr", "indices", "data"))
    return sparse.csr_matrix((values.astype(dtype, copy=False), columns, offsets), (len(offsets) - 1,) * 2)


# ---- peers: each in a process of its own --------------------------------------------------------------------------------------


def run_scipy_eigsh(matrix, rng):
    import scipy.sparse as sparse
    from scipy.sparse.linalg import eigsh

    # ARPACK's tolerance is relative to the eigenvalue: on 2I - L it means the same for all of them.
    flipped = (2 * sparse.identity(matrix.shape[0], dtype=matrix.dtype) - matrix).tocsr()
    start = rng.standard_normal(matrix.shape[0]).astype(matrix.dtype)

    def solve():
        values, vectors = eigsh(flipped, PAIRS, which="LA", tol=RESIDUAL / 2, v0=start.copy())
        return 2 - values, vectors

    return solve, lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the whole process


def on_gpu(matrix):
    import cupy
    import cupyx.scipy.sparse

    pool = cupy.get_default_memory_pool()
    return cupy, cupyx.scipy.sparse.csr_matrix(matrix), pool.total_bytes


def run_cupyx_eigsh(matrix, rng):
    cupy, device, peak = on_gpu(matrix)
    from cupyx.scipy.sparse.linalg import eigsh

    start = cupy.asarray(rng.standard_normal(matrix.shape[0]).astype(matrix.dtype))

    def solve():
        values, vectors = eigsh(device, PAIRS, which="SA", tol=RESIDUAL, v0=start.copy())  # it works in v0; tol: of all pairs
        cupy.cuda.Device().synchronize()
        return values, vectors

    return solve, peak


def run_cupyx_lobpcg(matrix, rng):
    cupy, device, peak = on_gpu(matrix)
    from cupyx.scipy.sparse.linalg import lobpcg

    start = cupy.asarray(rng.standard_normal((matrix.shape[0], PAIRS)).astype(matrix.dtype))

    def solve():
        values, vectors = lobpcg(device, start.copy(), tol=RESIDUAL, maxiter=100000, largest=False)
        cupy.cuda.Device().synchronize()
        return values, vectors

    return solve, peak


RUNNERS = {"scipy eigsh": run_scipy_eigsh, "cupyx eigsh": run_cupyx_eigsh, "cupyx lobpcg": run_cupyx_lobpcg}


def peer_process(options):
    """Solves once, again if that is quick; after each, a line with times and memory, and the vectors in a file."""
    import scipy.sparse as sparse

    dtype = np.float32 if options.dtype == "f32" else np.float64
    prepare = RUNNERS[options.peer]
    if options.peer.startswith("cupyx"):  # compiles CuPy's kernels
        ring = sparse.diags([1.0, -0.5, -0.5], [0, 1, -1], (2000, 2000)).tocsr().astype(dtype)
        try:
            prepare(ring, np.random.default_rng(1))[0]()
        except Exception as error:  # pylint: disable=broad-except
            print(f"warm-up: {error}", file=sys.stderr)
    begin = time.monotonic()
    solve, peak = prepare(load_matrix(pathlib.Path(options.matrix), dtype), np.random.default_rng(1))
    load_seconds, first = time.monotonic() - begin, None
    for _ in range(2):
        begin = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, options.limit)  # ends the process, wherever it is
        _, vectors = solve()
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.monotonic() - begin
        vectors = vectors.get() if hasattr(vectors, "get") else vectors
        total = load_seconds + time.monotonic() - begin
        if first is None or seconds < first:
            temporary = options.vectors + ".tmp.npy"
            np.save(temporary, vectors)
            os.replace(temporary, options.vectors)
            print(json.dumps({"seconds": seconds, "total_seconds": total, "peak_bytes": int(peak())}), flush=True)
        if first is not None or seconds > options.limit / 3:
            break
        first = seconds
    return 0


def cores():
    """Cores that this process may use: its mask, and the limit of its control group, which nothing else respects."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # none, or "max"
        pass
    return count


def environment(**more):
    """Threads for all cores, in all libraries: more of them than cores slow BLAS down tenfold."""
    return {**os.environ, **{f"{of}_NUM_THREADS": str(cores()) for of in ("OMP", "OPENBLAS", "MKL")}, **more}


def last_line(text):
    lines = [line for line in (text or "").strip().splitlines() if line.strip()]
    return lines[-1] if lines else ""


def run_bounded(command, seconds, **more):
    """Return code, None if it was ended after these seconds; what it had said by then."""
    with subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more) as child:
        try:
            out, errors = child.communicate(timeout=max(seconds, 0.1))
            return child.returncode, out, errors
        except subprocess.TimeoutExpired:
            child.kill()
            out, errors = child.communicate()
            return None, out, errors


def figures_of(out):
    """The last line of a solver, if it is JSON."""
    try:
        found = json.loads(last_line(out))
        return found if isinstance(found, dict) and found.get("seconds") is not None else None
    except ValueError:
        return None


def run_peer(options, peer, judge, folder, deadline):
    """The first precision that reaches the residual; else what each came to. Never raises for what a peer does."""
    env = environment()
    env.pop("LD_LIBRARY_PATH", None)
    tries, left, vectors = [], options.limit, folder / "peer.npy"
    for dtype in ("f32", "f64"):
        limit = min(left, deadline - time.monotonic() - options.check)
        if limit < 1:
            tries.append(f"no time left for {dtype}")
            break
        vectors.unlink(missing_ok=True)
        code, out, errors = run_bounded([options.peer_python, __file__, "--peer", peer, "--matrix", folder, "--dtype", dtype,
                                         "--vectors", vectors, "--limit", limit],
                                        min(limit + options.slack, deadline - time.monotonic() - options.check), env=env)
        found = figures_of(out)
        if found is None or not vectors.exists():
            if code in (None, -signal.SIGALRM):
                tries.append(f"> {limit:.0f} s in {dtype}" + (", with loading" if code is None else ""))
                break
            tries.append(f"failed in {dtype}: {last_line(errors)[:160]}")
            continue
        found = {**found, "precision": dtype, **judge(vectors)}
        if found["worst_residual"] <= RESIDUAL:
            return {**found, "reached": True, "note": "; ".join(tries)}
        tries.append(f"residual {found['worst_residual']:.1e} in {dtype} after {found['seconds']:.1f} s")
        left -= found["seconds"]
    return {"seconds": None, "reached": False, "note": "; ".join(tries)}


# ---- ours ---------------------------------------------------------------------------------------------------------------------


def run_ours(options, graph, judge, folder):
    best = None
    for _ in range(2):
        out = folder / "ours"
        shutil.rmtree(out, ignore_errors=True)
        begin = time.monotonic()
        command = [options.bin / "fiedler", "spectrum", graph, "-k", PAIRS, "--tolerance", 0.9 * RESIDUAL, "--json", "--out", out,
                   "--device", "cpu" if options.small else "cuda"]
        code, text, errors = run_bounded(command, options.limit, env=environment())
        total, found = time.monotonic() - begin, figures_of(text)
        if code != 0 or found is None:
            note = f"> {options.limit:.0f} s" if code is None else f"failed: {last_line(errors)[:160]}"
            return {"seconds": None, "reached": False, "note": note}
        if best is None or found["seconds"] < best["seconds"]:
            best = {**found, "total_seconds": total, **judge(out / "eigenvectors.npy")}
    best["reached"] = best["status"] == "complete" and best["worst_residual"] <= RESIDUAL
    keys = ("seconds", "total_seconds", "peak_bytes", "worst_residual", "orthogonality", "ritz", "reached", "method",
            "iterations", "products", "zeros")
    times = {key: best[key] for key in ("device_seconds", "read_seconds", "prepare_seconds", "solve_seconds") if key in best}
    note = f"{best['why']}; " + "".join(f"{key.split('_', maxsplit=1)[0]} {value:.2f} s, " for key, value in times.items())
    stages = {}
    for stage in best.get("stages", []):
        stages[stage["name"]] = stages.get(stage["name"], 0) + stage["seconds"]
    print("  stages: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in stages.items()), flush=True)
    return {**{key: best[key] for key in keys}, **times, "stages": stages, "precision": "f64" if options.small else "f32",
            "note": note + f"the whole process {best['total_seconds']:.2f} s"}


def share_of_copy(row, nodes, edges, copy_gb_s):
    """Of the measured copy bandwidth, that of the products' least traffic; see above."""
    if not copy_gb_s or not row.get("products") or not row["seconds"]:
        return None
    matrix = (2 * edges + nodes) * 8 + (nodes + 1) * 8
    traffic = row["products"] * (12 * nodes + matrix / BLOCK)
    return traffic / row["seconds"] / (copy_gb_s * 1e9)


# ---- what all are judged by ---------------------------------------------------------------------------------------------------


def check_solution(matrix, vectors_file):
    """Rayleigh-Ritz of the given vectors and their true residuals, in float64."""
    import scipy.linalg

    bad = {"worst_residual": float("inf"), "orthogonality": float("inf"), "ritz": []}
    try:
        given = np.load(vectors_file)
    except (OSError, ValueError):
        return bad
    if given.shape != (matrix.shape[0], PAIRS) or not np.all(np.isfinite(given)):
        return bad
    vectors = np.ascontiguousarray(given, np.float64)

    def sums(first):  # of some rows: X'X, X'LX, and the squares of LX
        mine = slice(first, first + 32768)
        image = matrix[mine] @ vectors
        return vectors[mine].T @ vectors[mine], vectors[mine].T @ image, np.einsum("ij,ij->j", image, image)

    with ThreadPoolExecutor(cores()) as pool:
        gram, projected, squares = (sum(part) for part in zip(*pool.map(sums, range(0, matrix.shape[0], 32768))))
    norms2 = np.diag(gram)
    if np.any(norms2 <= 0):
        return bad
    values = np.diag(projected) / norms2
    # ||Lx - mu x||^2 = ||Lx||^2 - mu^2 ||x||^2: to about 1e-16, far below RESIDUAL^2
    residual = np.sqrt(np.maximum(squares / norms2 - values**2, 0))
    norms = np.sqrt(norms2)
    orthogonality = np.abs(gram / np.outer(norms, norms) - np.eye(PAIRS)).max()
    try:  # Ritz values of the space: generalised problem of 64 x 64
        ritz = scipy.linalg.eigh(projected, gram, eigvals_only=True).tolist()
    except scipy.linalg.LinAlgError:  # vectors that are not independent
        ritz = []
    return {"worst_residual": float(residual.max()), "orthogonality": float(orthogonality), "ritz": ritz}


def compare_values(rows):
    """How many of a solver's values are higher than the best found at that index."""
    known = [np.array(row["ritz"]) for row in rows if row.get("ritz")]
    best = np.min(known, axis=0) if known else None
    for row in rows:
        ritz = row.pop("ritz", None)
        if not ritz:
            row["higher"] = row["highest_excess"] = None
            continue
        spacing = (best[-1] - best[0]) / (PAIRS - 1)
        row["higher"] = int(np.sum(np.array(ritz) > best + spacing / 2))
        row["highest_excess"] = float(np.max(np.array(ritz) - best) / spacing)  # in mean distances


def measured_copy():
    """GB/s, read and written, of copies of 1 GiB on the GPU; None without CuPy."""
    try:
        import cupy

        a = cupy.zeros(1 << 28, cupy.float32)
        b = cupy.empty_like(a)
        times = []
        for _ in range(12):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            b[...] = a
            stop.record()
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop))
        bandwidth = 2 * a.nbytes / (float(np.median(times)) * 1e-3) * 1e-9
        del a, b
        cupy.get_default_memory_pool().free_all_blocks()
        return bandwidth
    except Exception:  # pylint: disable=broad-except
        return None


def peers_here(options):
    if options.peers is not None:
        return [peer for peer in options.peers.split(",") if peer]
    return ["scipy eigsh"] if options.small else list(PEERS)


def solve_all(options, name, folder, copy_gb_s):
    nodes, edges = (20_000, 200_000) if options.small else (1_000_000, 10_000_000)
    begin = time.monotonic()
    deadline = begin + options.budget
    path = folder / f"{name}.fdl"
    facts = make_graph(name, nodes, edges, path)
    matrix = laplacian(path)
    save_matrix(folder, matrix)
    print(f"{name}: {facts}, made in {time.monotonic() - begin:.0f} s", flush=True)

    def judge(vectors):
        return check_solution(matrix, vectors)

    def show(solver, row):
        rows.append({"graph": name, "solver": solver, **facts, **row})
        text = row["note"]
        if row["seconds"]:
            text = f"{row['seconds']:.3f} s, in all {row['total_seconds']:.3f} s, residual {row['worst_residual']:.1e}; {text}"
        print(f"  {solver:13} {text} [{time.monotonic() - begin:.0f} s]", flush=True)

    rows, peers = [], peers_here(options)
    show(OURS, run_ours(options, path, judge, folder))
    for k, peer in enumerate(peers):
        now = time.monotonic()
        show(peer, run_peer(options, peer, judge, folder, now + max(deadline - now, 0) / (len(peers) - k)))
    compare_values(rows)
    ours = rows[0]
    ours["share_of_copy"] = share_of_copy(ours, facts["nodes"], facts["edges"], copy_gb_s)
    for row in rows:
        row["ratio"] = row["seconds"] / ours["seconds"] if row["seconds"] and ours["seconds"] else None
    path.unlink()
    return rows


# ---- the table ------------------------------------------------------------------------------------------------------------------


def print_table(rows):
    header, table = gpu_report.spectrum_table(rows)
    print("\n".join(gpu_report.table(header, table)))


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "build/bin", help="folder of the programs")
    parser.add_argument("--out", type=pathlib.Path, help="JSON to write")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "build/spectrum_peers", help="folder for graphs and vectors")
    parser.add_argument("--graphs", default=",".join(GRAPHS), help="which graphs, separated by commas")
    parser.add_argument("--peers", help="which peers, separated by commas (default: " + ", ".join(PEERS) + ")")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a solver may take")
    parser.add_argument("--budget", type=float, help="seconds for a graph, all included (default: 20 + 3 times the limit)")
    parser.add_argument("--slack", type=float, default=40, help="seconds more for loading and compiling")
    parser.add_argument("--check", type=float, default=4, help="seconds kept for the check of a peer's vectors")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has CuPy and SciPy")
    parser.add_argument("--small", action="store_true", help="20,000 nodes, on the CPU: to try this program")
    parser.add_argument("--peer", choices=sorted(RUNNERS), help=argparse.SUPPRESS)
    parser.add_argument("--matrix", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--vectors", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peer:
        return peer_process(options)
    options.budget = 20 + 3 * options.limit if options.budget is None else options.budget
    names = [name for name in options.graphs.split(",") if name]
    for name in names:
        if name not in GRAPHS:
            parser.error(f"no graph '{name}': {', '.join(GRAPHS)}")
    options.work.mkdir(parents=True, exist_ok=True)
    copy_gb_s = None if options.small else measured_copy()
    rows = []
    for name in names:
        rows += solve_all(options, name, options.work, copy_gb_s)
    result = {"copy_gb_s": copy_gb_s, "pairs": PAIRS, "residual": RESIDUAL, "limit_s": options.limit, "budget_s": options.budget,
              "cores": cores(), "rows": rows}
    print_table(rows)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(options.work, ignore_errors=True)
    return 0 if all(row["reached"] for row in rows if row["solver"] == OURS) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
