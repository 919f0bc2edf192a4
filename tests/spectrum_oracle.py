#!/usr/bin/env python3
"""tests/spectrum_oracle.py BINARY: `fiedler spectrum` against SciPy, on whole graphs with all their components.

Graphs made here always; those of the project's shared data where they are (FIEDLER_SHARED_DATA, else ../shared/data
beside the repository). Of each: the number of zeros against a count of components, eigenvalues to 1e-5, angles between
eigenspaces to 1e-3 (a cluster of eigenvalues is one space), residuals and orthogonality of what was written, and the
same again for a shuffled order of the nodes.

The oracle solves each component on its own, so that no zero is repeated: densely where it is small, else by eigsh
(ARPACK) on a Chebyshev polynomial of the Laplacian that is large on the wanted end of the spectrum: the same vectors,
found in a tenth of the time. Its own residuals are checked, too.

A vector of residual r lies within r / gap of its eigenspace, so solutions are asked for to a tolerance of CLUSTER / 2000
and eigenvalues nearer than CLUSTER are one space: then the angle must be below 1e-3 / 2.

Exit codes: 0 all agree, 1 something differs (it says what), 77 no SciPy: nothing was tested.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time

try:
    import numpy as np
    import scipy.linalg
    import scipy.sparse as sparse
    import scipy.sparse.csgraph as csgraph
    import scipy.sparse.linalg as splinalg
except ImportError as missing:
    print(f"SKIPPED, NOTHING TESTED: {missing}; install python3-scipy")
    sys.exit(77)

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from write_fdl import write_graph  # noqa: E402

EIGENVALUE, ANGLE, ORTHOGONALITY = 1e-5, 1e-3, 1e-5
CLUSTER = {"cpu": 2e-5, "cuda": 2e-3}  # the CPU solves in double, the GPU in f32
DENSE = 2600                           # components up to this size are solved densely


# ---- graphs ---------------------------------------------------------------------------------------------------------------


def adjacency(nodes, pairs, weights=None):
    """Symmetric, without loops; a pair twice is the same edge."""
    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    weights = np.ones(len(pairs)) if weights is None else weights
    matrix = sparse.coo_matrix((weights, (pairs[:, 0], pairs[:, 1])), (nodes, nodes)).tocsr()
    matrix = matrix.maximum(matrix.T)
    matrix = (matrix - sparse.diags(matrix.diagonal())).tocsr()
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return matrix.astype(np.float32).astype(np.float64)  # the graph's weights are f32


def random_graph(nodes, edges, seed, weighted):
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, nodes, (edges, 2))
    return adjacency(nodes, pairs, rng.uniform(0.1, 3.0, edges) if weighted else None)


def grid(rows, columns):
    index = np.arange(rows * columns).reshape(rows, columns)
    across = np.stack([index[:, :-1].ravel(), index[:, 1:].ravel()], 1)
    down = np.stack([index[:-1].ravel(), index[1:].ravel()], 1)
    return adjacency(rows * columns, np.concatenate([across, down]))


def cycle(nodes):
    index = np.arange(nodes)
    return adjacency(nodes, np.stack([index, (index + 1) % nodes], 1))


def complete(nodes):
    return adjacency(nodes, np.stack(np.triu_indices(nodes, 1), 1))


def star(leaves):
    return adjacency(leaves + 1, np.stack([np.zeros(leaves, int), np.arange(1, leaves + 1)], 1))


def union(*parts):
    return sparse.block_diag(parts, format="csr")


def shuffled(matrix, seed):
    order = np.random.default_rng(seed).permutation(matrix.shape[0])
    moved = matrix[order][:, order].tocsr()
    moved.sort_indices()
    return moved, order


def made_graphs():
    """name, adjacency, k (0: all), normalised"""
    isolated = sparse.csr_matrix((40, 40))
    mixed = union(random_graph(500, 1500, 1, True), cycle(60), cycle(60), complete(12), star(30), grid(9, 9), isolated)
    yield "mixed components", mixed, 150, True
    yield "mixed components", mixed, 150, False
    yield "all pairs of two cycles", union(cycle(24), cycle(24)), 48, False
    yield "random, weighted", random_graph(2500, 10000, 2, True), 64, True
    yield "grid 48 x 40", grid(48, 40), 40, False  # double eigenvalues nearly everywhere
    yield "long grid 300 x 6", grid(300, 6), 24, True
    yield "weak ties", weak_ties(), 20, True


def weak_ties():
    """Ten communities with a few edges between them: ten eigenvalues near 0, then a gap."""
    rng = np.random.default_rng(5)
    inside = [block * 200 + rng.integers(0, 200, (1600, 2)) for block in range(10)]
    between = rng.integers(0, 2000, (40, 2))
    return adjacency(2000, np.concatenate(inside + [between]))


SHARED = (("cora", "planetoid/cora.edges", 2708, 78), ("citeseer", "planetoid/citeseer.edges", 3327, 438),
          ("wordnet", "wordnet_graph/edges.tsv", 117659, 1377), ("debian", "debian_deps/edges.tsv", 63436, 1934))


def shared_graphs(folder):
    """name, file, nodes, zeros of the real graphs; none where they are not."""
    data = pathlib.Path(os.environ.get("FIEDLER_SHARED_DATA") or ROOT.parent / "shared/data")
    archive = data / "graphs.tar.xz"
    if not archive.exists():
        print(f"NOT TESTED: the real graphs ({archive.name} is not in FIEDLER_SHARED_DATA or ../shared/data)")
        return
    with tarfile.open(archive) as tar:
        wanted = {path for _, path, _, _ in SHARED}
        for member in tar:
            if member.isfile() and member.name in wanted:
                path = folder / member.name.replace("/", "-")
                path.write_bytes(tar.extractfile(member).read())
    for name, path, nodes, zeros in SHARED:
        yield name, folder / path.replace("/", "-"), nodes, zeros


# ---- the oracle -----------------------------------------------------------------------------------------------------------


def laplacian(matrix, normalised):
    degree = np.asarray(matrix.sum(1)).ravel()
    if not normalised:
        return (sparse.diags(degree) - matrix).tocsr()
    root = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    return (sparse.diags((degree > 0).astype(float)) - sparse.diags(root) @ matrix @ sparse.diags(root)).tocsr()


def component_pairs(block, count):
    """The `count` smallest eigenpairs of a connected component's Laplacian."""
    nodes = block.shape[0]
    if nodes <= max(DENSE, 2 * count):
        return scipy.linalg.eigh(block.toarray(), subset_by_index=[0, min(count, nodes) - 1])
    return large_pairs(block, count)


def filtered_pairs(block, count, cut, degree=20):
    """eigsh on T_degree((block - c) / e), which is within [-1, 1] on [cut, upper] and grows fast below it."""
    nodes, upper = block.shape[0], abs(block).sum(1).max()
    centre, half = (upper + cut) / 2, (upper - cut) / 2
    scaled = ((block - centre * sparse.identity(nodes)) / half).tocsr()

    def polynomial(x):
        before, now = x.ravel(), scaled @ x.ravel()
        for _ in range(degree - 1):
            before, now = now, 2 * (scaled @ now) - before
        return now

    operator = splinalg.LinearOperator((nodes, nodes), polynomial, dtype=float)
    _, vectors = splinalg.eigsh(operator, count, which="LA", ncv=min(nodes, 2 * count + 20), tol=1e-10,
                                v0=np.random.default_rng(3).normal(size=nodes))
    values = np.einsum("ij,ij->j", vectors, block @ vectors)
    order = np.argsort(values)
    return values[order], vectors[:, order]


def large_pairs(block, count):
    cut = 0.05 * abs(block).sum(1).max()
    while True:
        values, vectors = filtered_pairs(block, count, cut)
        if values[-1] < cut:
            return values, vectors
        cut *= 2


def oracle(lap, count, labels):
    """The `count` smallest pairs beyond the zeros, and one more value, from the components one by one."""
    found = []
    sizes = np.bincount(labels)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    for nodes in members:
        if len(nodes) == 1:
            continue
        block = lap[nodes][:, nodes].tocsr()
        values, vectors = component_pairs(block, min(count + 2, len(nodes)))
        residual = np.linalg.norm(block @ vectors - vectors * values, axis=0).max()
        assert residual < 1e-7, f"the oracle's own residual is {residual}"
        found += [(value, nodes, vectors[:, j]) for j, value in enumerate(values) if j > 0]
    found.sort(key=lambda pair: pair[0])
    found = found[:count + 1]
    vectors = np.zeros((lap.shape[0], len(found)))
    for j, (_, nodes, vector) in enumerate(found):
        vectors[nodes, j] = vector
    return np.array([value for value, _, _ in found]), vectors


# ---- comparison -------------------------------------------------------------------------------------------------------------


class Differs(Exception):
    pass


def check(condition, text):
    if not condition:
        raise Differs(text)


def run(options, source, folder, *flags):
    out = pathlib.Path(folder) / f"out{len(list(pathlib.Path(folder).glob('out*')))}"
    command = [options.binary, "spectrum", str(source), "--out", str(out), "--json", "--device", options.device, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    check(done.returncode == 0, f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}\n  {' '.join(command)}")
    summary = json.loads(done.stdout)
    return summary, np.load(out / "eigenvalues.npy"), np.load(out / "eigenvectors.npy"), np.load(out / "residuals.npy")


def check_pairs(lap, values, vectors, residuals, tolerance):
    """What was written is what it says: residuals, orthogonality, order, signs."""
    check(values.dtype == np.float64 and vectors.dtype == np.float32, "types")
    check(np.all(np.isfinite(vectors)) and np.all(np.diff(values) >= 0), "values are not finite and ascending")
    u = vectors.astype(np.float64)
    true = np.linalg.norm(lap @ u - u * values, axis=0)
    rounding = 2.0 ** -23 * max(1.0, abs(lap).sum(1).max())  # what rounding a vector to f32 may add
    check(np.all(true <= 1.05 * residuals + rounding), f"residuals are {true.max():.2e}, said to be {residuals.max():.2e}")
    check(true.max() <= tolerance + rounding, f"worst residual {true.max():.2e} above the tolerance {tolerance:.2e}")
    gram = np.abs(u.T @ u - np.eye(u.shape[1])).max()
    check(gram <= ORTHOGONALITY, f"vectors are orthonormal to {gram:.2e} only")
    largest = u[np.abs(u).argmax(0), np.arange(u.shape[1])]
    check(np.all(largest > 0), "the largest component of a vector is not positive")


def clusters(values, count, near):
    """[begin, end) of runs of near values among the first `count`; the last one may go on beyond them and is left out."""
    begin = 0
    for j in range(1, len(values) + 1):
        if j == len(values) or values[j] - values[j - 1] > near:
            if j <= count:
                yield begin, j
            begin = j


def largest_angle(a, b):
    """Sine of the largest angle between two spaces of one dimension."""
    a, b = np.linalg.qr(a)[0], np.linalg.qr(b)[0]
    return np.linalg.norm(b - a @ (a.T @ b), 2)


def null_vectors(matrix, labels, normalised):
    """One unit vector for each component, sparse."""
    degree = np.asarray(matrix.sum(1)).ravel()
    entries = np.sqrt(np.where(degree > 0, degree, 1)) if normalised else np.ones(len(labels))
    norms = np.sqrt(np.bincount(labels, entries**2))
    return sparse.csr_matrix((entries / norms[labels], (np.arange(len(labels)), labels)))


def compare(matrix, k, normalised, got, components, beyond_null=False):
    """What needs no oracle: counts, and that the pairs are pairs; the Laplacian."""
    summary, values, vectors, residuals = got
    lap = laplacian(matrix, normalised)
    zeros, labels = components
    given = 0 if beyond_null else zeros
    check(summary["status"] == "complete", f"status {summary['status']}")
    check(summary["zeros"] == zeros, f"{summary['zeros']} zeros found, {zeros} components")
    check(len(values) == k, f"{len(values)} pairs, not {k}")
    check(np.all(values[:given] == 0), "a zero is not 0")
    check(np.all(values[given:] > 0), "more zeros than components")
    check_pairs(lap, values, vectors, residuals, summary["tolerance"])
    overlap = null_vectors(matrix, labels, normalised).T @ vectors.astype(np.float64)
    check(np.abs(overlap[:, given:]).max() <= ORTHOGONALITY, "vectors are not orthogonal to the null space")
    check(np.abs(overlap[:, :given] - np.eye(zeros, given)).max(initial=0) <= ORTHOGONALITY, "zeros are not one a component")
    return lap, labels


def compare_oracle(lap, labels, zeros, values, vectors, near):
    count = len(values) - zeros
    expected, spaces = oracle(lap, count, labels)
    error = np.abs(values[zeros:] - expected[:count]).max()
    check(error <= EIGENVALUE, f"eigenvalues differ by {error:.2e}")
    worst = 0.0
    for begin, end in clusters(expected, count, near):
        angle = largest_angle(spaces[:, begin:end], vectors[:, zeros + begin:zeros + end].astype(np.float64))
        gap = min([abs(expected[j] - expected[i]) for j, i in ((begin, begin - 1), (end - 1, end))
                   if 0 <= i < len(expected)] or [1.0])
        worst = max(worst, angle)
        check(angle <= ANGLE, f"eigenspace {begin}..{end - 1} ({expected[begin]:.6g}, gap {gap:.1e}) is off by {angle:.2e}")
    return error, worst


# ---- the tests --------------------------------------------------------------------------------------------------------------


def components_of(matrix):
    return csgraph.connected_components(matrix, directed=False)


def test_made(options, folder):
    near = CLUSTER[options.device]
    for name, matrix, k, normalised in made_graphs():
        flag = "--normalised" if normalised else "--combinatorial"
        start = time.monotonic()

        def solved(adjacency_matrix, label):
            path = folder / f"{label}.fdl"
            write_graph(path, adjacency_matrix.indptr, adjacency_matrix.indices, adjacency_matrix.data)
            return run(options, path, folder, "-k", str(k), flag, "--tolerance", str(near / 2000))

        components = components_of(matrix)
        got = solved(matrix, "graph")
        lap, labels = compare(matrix, k, normalised, got, components)
        error, angle = compare_oracle(lap, labels, components[0], got[1], got[2], near)
        moved, order = shuffled(matrix, 7)
        again = solved(moved, "shuffled")
        compare(moved, k, normalised, again, components_of(moved))
        shift = np.abs(again[1] - got[1]).max()
        check(shift <= EIGENVALUE, f"another order of the nodes moves eigenvalues by {shift:.2e}")
        for begin, end in clusters(got[1], k - 1, near):
            turned = largest_angle(got[2][order, begin:end].astype(float), again[2][:, begin:end].astype(float))
            check(turned <= 2 * ANGLE, f"another order of the nodes turns eigenspace {begin}..{end - 1} by {turned:.2e}")
        say(name + (", normalised" if normalised else ""), got[0], error, angle, start)


def test_shared(options, folder):
    for name, path, nodes, zeros in shared_graphs(folder):
        if options.only and name not in options.only:
            continue
        start = time.monotonic()
        pairs = np.loadtxt(path, dtype=np.int64, usecols=(0, 1))
        matrix = adjacency(nodes, pairs)
        components = components_of(matrix)
        check(components[0] == zeros, f"{name}: SciPy counts {components[0]} components, the data's README {zeros}")
        large = nodes > 10000  # its thousand vectors of zeros would be a gigabyte of files
        k = 16 if large else zeros + 48
        flags = ["--beyond-null"] if large else []
        got = run(options, path, folder, "-k", str(k), "--nodes", str(nodes), "--first-id", "0", "--tolerance",
                  str(CLUSTER[options.device] / 2000), *flags)
        lap, labels = compare(matrix, k, True, got, components, large)
        error, angle = compare_oracle(lap, labels, 0 if large else zeros, got[1], got[2], CLUSTER[options.device])
        say(name, got[0], error, angle, start)


def say(name, summary, error, angle, start):
    print(f"  {name}: {summary['zeros']} zeros, eigenvalues within {error:.1e}, angles within {angle:.1e}; {summary['method']}, "
          f"{summary['seconds']:.2f} s of {time.monotonic() - start:.1f} s", flush=True)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", nargs="?", default=str(ROOT / "build/bin/fiedler"))
    parser.add_argument("--device", choices=sorted(CLUSTER), default="cpu")
    parser.add_argument("--only", default="", help="of the real graphs only these, separated by commas")
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    with tempfile.TemporaryDirectory() as name:
        try:
            test_made(options, pathlib.Path(name))
            test_shared(options, pathlib.Path(name))
        except Differs as difference:
            print(f"FAILED: {difference}")
            return 1
    print("all agree")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
