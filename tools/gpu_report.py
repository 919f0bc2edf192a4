"""tools/gpu_report.py: turns the pieces that gpu_check's stages wrote into <gpu>.json and <gpu>.md.

A piece is one JSON file, <stage>-<time>.json: {"stage", "sources_sha256", "commit", "date", "command", "gpu", "driver",
"cuda", ...what the stage found}. Pieces of other sources or of another GPU are refused. Of two answers to the same
question (a test program, a training run, a benchmark case) the later one counts.
"""
import json
import pathlib
import re

RUN_KEYS = ("name", "preset", "data", "steps", "tokens", "val_loss", "val_bits_per_byte", "tokens_per_second",
            "share_of_peak", "peak_memory_bytes", "parameters")
SPECTRUM_KEYS = ("graph", "solver", "nodes", "edges", "degree_min", "degree_max", "precision", "method", "seconds", "reached",
                 "ratio", "worst_residual", "orthogonality", "higher", "highest_excess", "zeros", "iterations", "products",
                 "peak_bytes", "share_of_copy", "note")
BENCH_KEYS = ("family", "case", "time_us", "noise", "gb_s", "tflop_s", "share_of_peak", "share_of_copy", "model_4090_us",
              "search", "peer", "peer_time_us", "ratio")
PAIR_KEYS = ("family", "case", "time_us", "peer", "peer_time_us", "ratio", "peers")
GPT2 = "gpt2-d6"  # the training of tools/train_peers.py that all of ours are held against


class Refused(Exception):
    """Pieces that must not be put into one report."""


def slug(gpu):
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "unknown-gpu"


def read_pieces(folder, sources):
    pieces = []
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        try:
            piece = json.loads(path.read_text())
        except ValueError as error:
            raise Refused(f"{path}: not JSON ({error}); delete it and run its stage again") from error
        if not isinstance(piece, dict) or "stage" not in piece:
            continue
        if piece["sources_sha256"] != sources:
            raise Refused(f"{path}: measured on sources {piece['sources_sha256'][:12]}, these are {sources[:12]}; "
                          "delete it and run its stage again")
        pieces.append((piece["date"], path.name, piece))
    if not pieces:
        raise Refused(f"{folder}: no pieces; run a stage first")
    pieces = [piece for _, _, piece in sorted(pieces, key=lambda entry: entry[:2])]
    gpus = sorted({piece["gpu"] for piece in pieces})
    if len(gpus) > 1:
        raise Refused(f"{folder}: pieces of different GPUs: {', '.join(gpus)}")
    return pieces


def latest(pieces, stage, key, identity):
    """All entries of a stage's list `key`, by identity; later pieces replace earlier ones."""
    found = {}
    for piece in pieces:
        if piece["stage"] == stage:
            for entry in piece.get(key, []):
                found[tuple(entry[field] for field in identity)] = entry
    return list(found.values())


def combine(pieces):
    last = pieces[-1]
    binaries = latest(pieces, "tests", "binaries", ("name",))
    benches = [piece for piece in pieces if piece["stage"] == "bench"]
    runs = latest(pieces, "train", "runs", ("name",))
    return {
        "gpu": last["gpu"],
        "driver": last["driver"],
        "cuda": next((piece["cuda"] for piece in reversed(pieces) if piece["cuda"]), ""),
        "commit": last["commit"],
        "sources_sha256": last["sources_sha256"],
        "command": "; ".join(dict.fromkeys(piece["command"] for piece in pieces)),
        "date": last["date"],
        "peak": benches[-1]["peak"] if benches else {"copy_gb_s": None, "gemm_tflop_s": None},
        "tests": {count: sum(binary[count] for binary in binaries) for count in ("passed", "failed", "skipped")},
        "runs": [{key: run.get(key) for key in RUN_KEYS} for run in runs
                 if not run.get("failure") and not run.get("skipped")],
        "bench": [{key: row.get(key) for key in BENCH_KEYS}
                  for row in latest(pieces, "bench", "bench", ("family", "case"))],
        "pairs": [{key: row.get(key) for key in PAIR_KEYS} for row in latest(pieces, "bench", "pairs", ("family", "case"))],
        "steps": step_ratios(*latest_steps(pieces)),
        "step_peers": latest_steps(pieces)[1],
        "spectrum": [{key: row.get(key) for key in SPECTRUM_KEYS}
                     for row in latest(pieces, "spectrum", "rows", ("graph", "solver"))],
        "spectrum_settings": next((piece["settings"] for piece in reversed(pieces) if piece["stage"] == "spectrum"), None),
        "sanitizer": latest(pieces, "sanitizer", "checks", ("tool", "binary", "filter")),
        "resume": latest(pieces, "resume", "checks", ("name",)),
        "equal": latest(pieces, "equal", "checks", ("name",)),
        "not_run": [f"training {run['name']}: {run['skipped']}" for run in runs if run.get("skipped")],
        "failures": failures(pieces, binaries, runs),
    }


def latest_steps(pieces):
    """Steps and their peers of the last piece of the stage step: ratios hold within one run only."""
    for piece in reversed(pieces):
        if piece["stage"] == "step":
            return piece["steps"], piece["peers"]
    return [], []


def step_ratios(steps, peers):
    """Adds to each step how much faster it is than PyTorch's GPT-2, and than its own architecture in PyTorch."""
    speed = {peer["name"]: peer["tokens_per_second"] for peer in peers if not peer.get("failure")}
    found = []
    for step in steps:
        ours = step.get("tokens_per_second")
        ratio = lambda name: round(ours / speed[name], 4) if ours and name in speed else None  # noqa: E731
        found.append({**step, "ratio_gpt2": ratio(GPT2), "ratio_same": ratio(step.get("peer"))})
    return found


def failures(pieces, binaries, runs):
    """Every failure in words: what a reader must see before any figure."""
    found = [f"{binary['name']}: {name}" for binary in binaries for name in binary["failures"]]
    found += [f"training {run['name']}: {run['failure']}" for run in runs if run.get("failure")]
    for check in latest(pieces, "sanitizer", "checks", ("tool", "binary", "filter")):
        if check["failure"]:
            found.append(f"compute-sanitizer {check['tool']} on {check['binary']}: {check['failure']}")
    for row in latest(pieces, "spectrum", "rows", ("graph", "solver")):
        if row["solver"] == "fiedler" and not row["reached"]:
            found.append(f"spectrum of {row['graph']}: {row['note']}")
    for check in latest(pieces, "resume", "checks", ("name",)):
        if check["failure"]:
            found.append(f"resume of {check['name']}: {check['failure']}")
    for check in latest(pieces, "equal", "checks", ("name",)):
        if check["failure"]:
            found.append(f"fast and plain way, {check['name']}: {check['failure']}")
    steps, peers = latest_steps(pieces)
    found += [f"step {step['case']}: {step['failure']}" for step in steps if step.get("failure")]
    found += [f"PyTorch's {peer['name']}: {peer['failure']}" for peer in peers if peer.get("failure")]
    return found + [f"benchmark {name}: {why}" for name, why in failed_benchmarks(pieces).items()]


def failed_benchmarks(pieces):
    """Cases that failed and were not measured by a later piece."""
    failed = {}
    for piece in pieces:
        if piece["stage"] != "bench":
            continue
        for row in piece["bench"]:
            for name in (row["case"], "setup"):
                failed.pop(f"{row['family']}/{name}", None)
        failed.pop("bench_peers.py", None)
        failed.update(piece["failed"])
    return failed


# ---- Markdown -----------------------------------------------------------------------------------------------------------


def number(value, digits=2, scale=1.0):
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def comparisons(runs):
    """The distances that the presets are for: fiedler30m against the published form and against the dot product."""
    loss = {(run["preset"], run["data"]): run["val_loss"] for run in runs if run["val_loss"] is not None}
    lines = []
    for data in sorted({data for _, data in loss}):
        ours = loss.get(("fiedler30m", data))
        for other in ("tau30m-same-shape", "gpt30m"):
            theirs = loss.get((other, data))
            if ours is not None and theirs is not None:
                where = "below" if ours < theirs else "above"
                lines.append(f"* {data}: fiedler30m ends {abs(theirs - ours):.3f} nats {where} {other}.")
    return lines


def runs_markdown(runs):
    if not runs:
        return []
    rows = [(run["name"], run["data"], number(run["parameters"], 1, 1e-6), run["steps"], number(run["val_loss"], 4),
             number(run["val_bits_per_byte"], 4), number(run["tokens_per_second"], 0),
             number(run["share_of_peak"], 1, 100), number(run["peak_memory_bytes"], 2, 2**-30)) for run in runs]
    header = ("run", "data", "parameters, M", "steps", "validation loss, nats", "bits per byte", "tokens/s",
              "% of measured peak", "peak memory, GiB")
    return ["", "## Trainings", "", *table(header, rows), "", *comparisons(runs)]


def times(ratio):
    return "-" if ratio is None else f"{ratio:.2f} x"


def steps_markdown(result):
    if not result.get("steps"):
        return []
    rows = [(step["case"], f"`{step['name']}`", number(step["parameters"], 1, 1e-6), number(step["ms_per_step"]),
             number(step["noise"], 1, 100), number(step["tokens_per_second"], 0), number(step["share_of_peak"], 1, 100),
             number(step["planned_bytes"], 2, 2**-30), times(step["ratio_gpt2"]), times(step["ratio_same"]))
            for step in result["steps"] if not step.get("failure")]
    rows += [(f"PyTorch {peer['name']}", f"torch.compile, {peer['attention']}", number(peer["parameters"], 1, 1e-6),
              number(peer["ms_per_step"]), number(peer["noise"], 1, 100), number(peer["tokens_per_second"], 0), "-",
              number(peer["peak_memory_bytes"], 2, 2**-30), "", "")
             for peer in result["step_peers"] if not peer.get("failure")]
    header = ("step", "model", "parameters, M", "ms a step", "noise, %", "tokens/s", "% of measured peak",
              "peak memory, GiB", "tokens/s / torch.compile GPT-2", "tokens/s / PyTorch, same architecture")
    lines = ["", "## Training steps, side by side", "",
             "`fiedler bench step` and tools/train_peers.py in one run, on synthetic tokens: medians of the times from one "
             "step's end to the next. Memory: the arena's peak; of PyTorch, what its allocator reserved.", "",
             *table(header, rows)]
    for step in result["steps"]:
        if not step.get("failure"):
            lines += profile_markdown(step)
    return lines


def profile_markdown(step):
    """Where a step's time goes: its stages, its longest kernels, and what no kernel accounts for."""
    lines = ["", f"### Profile of {step['case']}", "",
             f"Time between the marks of the stages, measured without a CUDA graph: {number(step['profiled_ms_per_step'])} ms a "
             f"step; with it (CUDA graph {step['cuda_graph']}) {number(step['ms_per_step'])} ms.", "",
             *table(("stage", "ms a step", "%", "times a step"),
                    [(stage["name"], number(stage["ms"], 3), number(stage["share"], 1, 100), stage["a_step"])
                     for stage in step["stages"]])]
    if not step["kernels"]:
        return lines + ["", f"No table of kernels: {step['kernels_note']}."]
    gaps = step["ms_per_step"] - step["kernels_ms"]
    return lines + ["", f"{step['kernels_launched']} kernels take {number(step['kernels_ms'])} ms of a step; the rest, "
                    f"{number(gaps)} ms, is gaps.", "",
                    *table(("kernel", "ms a step", "%", "launches a step"),
                           [(f"`{kernel['name']}`", number(kernel["ms"], 3), number(kernel["share"], 1, 100),
                             kernel["a_step"]) for kernel in step["kernels"]])]


def pairs_markdown(result):
    if not result.get("pairs"):
        return []
    peers = sorted({name for pair in result["pairs"] for name in pair["peers"] if name})
    rows = []
    for pair in result["pairs"]:
        cells = []
        for name in peers:
            theirs = pair["peers"].get(name)
            measured = isinstance(theirs, (int, float))
            cells += [number(theirs) if measured else "-", times(theirs / pair["time_us"]) if measured else "-"]
        rows.append((pair["family"], pair["case"], number(pair["time_us"]), *cells))
    header = ["family", "case", "ours, us"]
    for name in peers:
        header += [f"{name}, us", "theirs / ours"]
    return ["", "### Attention, forward and backward together", "", *table(header, rows)]


def bench_markdown(result):
    if not result["bench"]:
        return []
    peak = result["peak"]
    rows = [(row["family"], row["case"], number(row["time_us"]), number(row["noise"], 1, 100), number(row["gb_s"], 0),
             number(row["tflop_s"], 1), number(row["share_of_peak"], 1, 100), number(row.get("share_of_copy"), 1, 100),
             searched(row), row["peer"] or "", number(row["peer_time_us"]), number(row["ratio"]),
             number(row.get("model_4090_us")))
            for row in result["bench"]]
    header = ("family", "case", "time, us", "noise, %", "GB/s", "TFLOP/s", "% of limit", "% of same-size copy",
              "ours / best found", "peer", "peer, us", "peer / ours", "4090 model, us")
    return ["", "## Kernels", "",
            f"Measured peak: copy {number(peak['copy_gb_s'], 0)} GB/s (bytes read and written), bf16 matrix product of "
            f"8192 x 8192 x 8192 {number(peak['gemm_tflop_s'], 0)} TFLOP/s. Each sample is one run after the L2 cache "
            "has been filled with other, clean lines, the time the median of 20 samples, noise (p90 - p10) / median; runs under 10 us are "
            "timed 20 at a time after one such flush. Peers are timed the same way in the same session. % of limit: of the "
            "larger of bytes / copy rate and, for tensor cores, flops / product rate. % of same-size copy: the time of a plain "
            "copy of as many bytes as the case moves (half read, half written; all read where it only reads), measured in the "
            "same way, over the case's time: a few microseconds do not reach the rate of a copy of 1 GiB. Ours / best found: "
            "against the fastest of so many cuBLASLt algorithms, samples of both taken in turn. **4090 model**: the larger of bytes / 1008 GB/s and flops / 165 "
            "TFLOP/s, over the share of the limit reached here; a model, not a measurement.", "",
            *table(header, rows), *pairs_markdown(result)]


def searched(row):
    search = row.get("search")
    return f"{search['ours_over_best']:.2f} of {search['tried']}" if search else ""


def spectrum_table(rows):
    """Header and rows of the solvers' table."""
    cells = []
    for row in rows:
        residual, higher = row.get("worst_residual"), row.get("higher")
        solver = row["solver"] + (f", {row['precision']}" if row.get("precision") else "")
        cells.append((row["graph"], solver, number(row["seconds"] if row["reached"] else None, 3),
                      number(row.get("ratio"), 1), "-" if residual is None else f"{residual:.1e}",
                      "-" if higher is None else higher, number(row.get("peak_bytes"), 2, 2**-30),
                      number(row.get("share_of_copy"), 1, 100), (row.get("note") or "").replace("|", "/")))
    header = ("graph", "solver", "time, s", "time / ours", "worst residual", "values too high", "peak memory, GiB",
              "% of copy", "note")
    return header, cells


def spectrum_markdown(result):
    if not result.get("spectrum"):
        return []
    graphs = {row["graph"]: f"{row['graph']}: {row['nodes']:,} nodes, {row['edges']:,} edges, degrees {row['degree_min']} to "
                            f"{row['degree_max']:,}" for row in result["spectrum"]}
    settings = result["spectrum_settings"]
    return ["", "## Spectra", "",
            f"The {settings['pairs']} smallest eigenpairs of the normalised Laplacian, all residuals at most "
            f"{settings['residual']:.0e}, checked in float64; a solver may take {settings['limit_s']:.0f} s; "
            f"{settings['cores']} CPU cores. {'; '.join(graphs.values())}. \"Values too high\": indices where a solver's Ritz "
            "value is above the best of all solvers by more than half the mean distance of neighbours. \"% of copy\": least "
            "traffic of the products with the Laplacian, by the time of the whole solve, of the measured copy bandwidth "
            f"({number(settings['copy_gb_s'], 0)} GB/s). Ours is from host memory to host memory. `tools/spectrum_peers.py` "
            "says more.", "", *table(*spectrum_table(result["spectrum"]))]


def markdown(result):
    tests = result["tests"]
    lines = [f"# {result['gpu']}", "",
             f"Driver {result['driver']}, CUDA {result['cuda']}; {result['date']}; commit {result['commit']}; "
             f"sources {result['sources_sha256'][:12]} (`tools/check_results` says whether they are still these).", "",
             f"Command: `{result['command']}`", "",
             f"Tests on the GPU: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped."]
    for check in result["sanitizer"]:
        lines.append(f"compute-sanitizer {check['tool']}, {check['binary']}: {check['summary']}.")
    for check in result["equal"]:
        lines.append(f"Fast and plain, {check['name']}: {check.get('skipped') or check['summary']}.")
    for check in result["resume"]:
        lines.append(f"Resume, {check['name']}: {check['summary']}.")
    if result["failures"]:
        lines += ["", "## Failures", "", *(f"* {failure}" for failure in result["failures"])]
    if result["not_run"]:
        lines += ["", "## Not run", "", *(f"* {line}" for line in result["not_run"])]
    return "\n".join(lines + runs_markdown(result["runs"]) + steps_markdown(result) + spectrum_markdown(result) +
                     bench_markdown(result)) + "\n"


def write_report(pieces_folder, results_folder, sources):
    """Writes both files and returns (path of the JSON, result)."""
    result = combine(read_pieces(pieces_folder, sources))
    folder = pathlib.Path(results_folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (slug(result["gpu"]) + ".json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    return path, result
