"""tools/gpu_trainings.py: the stages train, resume and equal of tools/gpu_check."""
import collections
import json
import pathlib
import random
import shlex
import shutil
import signal
import subprocess
import time

import gpu_report
from gpu_common import run_logged, say, tail, write_piece

# ---- the trainings: name, preset, data (given by --data NAME=FOLDER), steps, further flags --------------------------------
Run = collections.namedtuple("Run", "name preset data steps flags")
SAME_SHAPE = ("--batch-tokens", "32768")
RUNS = [
    Run("fiedler30m-headers", "fiedler30m", "headers", 1000, SAME_SHAPE),
    Run("gpt30m-headers", "gpt30m", "headers", 1000, SAME_SHAPE),
    Run("tau30m-same-shape-headers", "tau30m-same-shape", "headers", 1000, SAME_SHAPE),
    Run("fiedler30m-novels", "fiedler30m", "novels", 1000, SAME_SHAPE),
    Run("gpt30m-novels", "gpt30m", "novels", 1000, SAME_SHAPE),
    Run("tau30m-same-shape-novels", "tau30m-same-shape", "novels", 1000, SAME_SHAPE),
    # The published model itself, with its own vocabulary of 30,522: trains and is timed.
    Run("tau30m-headers", "tau30m", "headers30522", 100, ("--batch-tokens", "131072")),
]
# What the spectral embedding does: none, the corpus' own, a random orthonormal matrix of the same shape; three seeds.
RUNS += [Run(f"spectral-{arm}-{data}-seed{seed}", "fiedler30m", data, 500, SAME_SHAPE + ("--seed", str(seed)) + flags)
         for data in ("novels", "headers")
         for arm, flags in (("none", ("--spectral-dims", "0")),
                            ("corpus", ("--spectral-dims", "64", "--spectral-source", "corpus")),
                            ("random", ("--spectral-dims", "64", "--spectral-source", "random")))
         for seed in (1, 2, 3)]
TRAIN_FLAGS = ("--memory-budget", "24GiB", "--device", "cuda", "--sample-every", "0")
# The run that is stopped and resumed: small, but of the real kind of step.
RESUME = Run("fiedler30m", "fiedler30m", "headers", 60, ("--batch-tokens", "8192", "--log-every", "1",
                                                        "--checkpoint-every", "20", "--val-every", "0"))


def records(folder):
    """The records of a run's JSONL log, in order; lines still being written are left out."""
    found = []
    for path in sorted(pathlib.Path(folder).rglob("*.jsonl"), key=lambda p: p.stat().st_mtime):
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                found.append(record)
    return found


def end_record(folder):
    """The last record of a finished run, with what earlier records say where it does not; None if it did not finish."""
    all_records = records(folder)
    if not all_records or all_records[-1].get("event") != "end":
        return None
    merged = {}
    for record in all_records:
        merged.update(record)
    return merged


def train_command(options, run, folder, *more):
    return [options.bin / "fiedler", "train", "--preset", run.preset, "--data", options.data[run.data], "--steps",
            str(run.steps), *run.flags, *TRAIN_FLAGS, "--out", folder, *more]


def train(options, run):
    result = {"name": run.name, "preset": run.preset, "data": run.data, "steps": run.steps}
    if run.data not in options.data:
        return {**result, "skipped": f"no --data {run.data}=FOLDER was given"}
    folder, log = options.work / run.name, options.work / f"{run.name}.log"
    shutil.rmtree(folder, ignore_errors=True)
    code = run_logged(train_command(options, run, folder), log, options.timeout)
    end = end_record(folder) if folder.exists() else None
    if code != 0 or not end:
        say(tail(log))
        return {**result, "failure": f"exit code {code}" + ("" if end else ", no \"end\" in its log")}
    if not options.keep:
        shutil.rmtree(folder)
    return {**result, **{key: end.get(key) for key in gpu_report.RUN_KEYS[3:]}}


def stage_train(options):
    chosen = [run for run in RUNS if not options.runs or run.name in options.runs]
    results = []
    for run in chosen:
        results.append(train(options, run))
        outcome = results[-1].get("failure") or results[-1].get("skipped")
        say(f"  {run.name}: " + (f"NOT RUN or failed: {outcome}" if outcome else
                                 f"loss {results[-1]['val_loss']}, {results[-1]['tokens_per_second']} tokens/s"))
    write_piece(options, "train", {"runs": results})
    return not any(result.get("failure") for result in results)


# ---- resume -------------------------------------------------------------------------------------------------------------------------


def last_step(folder):
    steps = [record["step"] for record in records(folder) if isinstance(record.get("step"), int)]
    return steps[-1] if steps else 0


def train_until(options, run, folder, step):
    """Trains, sends SIGINT once the log has reached `step`; why it failed, or an empty line."""
    log = options.work / f"resume-{run.name}-first.log"
    command = train_command(options, run, folder)
    say("  $ " + shlex.join(str(part) for part in command) + f"   (SIGINT at step {step})")
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + options.timeout
        while process.poll() is None and last_step(folder) < step:
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                return f"did not reach step {step} in {options.timeout} s"
            time.sleep(0.02)
        if process.poll() is not None:
            return f"ended by itself before step {step} (exit code {process.returncode})\n{tail(log)}"
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(timeout=options.timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return "did not end after SIGINT"
    if code != 0:
        return f"exit code {code} after SIGINT, not 0\n{tail(log)}"
    return "" if last_step(folder) < run.steps else "was already done when SIGINT came"


def weights_of(folder):
    found = sorted(pathlib.Path(folder).rglob("weights.fdl"), key=lambda p: p.stat().st_mtime)
    return found[-1].read_bytes() if found else b""


def check_resume(options, run):
    check = {"name": run.name, "summary": "not run", "failure": ""}
    if run.data not in options.data:
        return {**check, "failure": f"no data: give --data {run.data}=FOLDER"}
    whole, parts = options.work / "resume-whole", options.work / "resume-parts"
    for folder in (whole, parts):
        shutil.rmtree(folder, ignore_errors=True)
    code = run_logged(train_command(options, run, whole), options.work / "resume-whole.log", options.timeout)
    if code != 0:
        return {**check, "failure": f"uninterrupted run: exit code {code}\n{tail(options.work / 'resume-whole.log')}"}
    step = random.Random(options.seed).randrange(2, run.steps - 2)
    why = train_until(options, run, parts, step)
    if why:
        return {**check, "failure": why}
    stopped = last_step(parts)
    log = options.work / "resume-second.log"
    code = run_logged(train_command(options, run, parts, "--resume"), log, options.timeout)
    if code != 0:
        return {**check, "failure": f"resumed run: exit code {code}\n{tail(log)}"}
    expected, got = weights_of(whole), weights_of(parts)
    if not expected or expected != got:
        differing = sum(a != b for a, b in zip(expected, got)) + abs(len(expected) - len(got))
        return {**check, "failure": f"weights.fdl differ in {differing} of {len(expected)} bytes (stopped at {stopped})"}
    for folder in (whole, parts):
        if not options.keep:
            shutil.rmtree(folder)
    return {**check, "summary": f"stopped by SIGINT after step {stopped} of {run.steps}, resumed: weights bit-equal to "
                                f"an uninterrupted run ({len(expected)} bytes)"}


def stage_resume(options):
    check = check_resume(options, RESUME)
    say(f"  {check['name']}: {check['failure'] or check['summary']}")
    write_piece(options, "resume", {"checks": [check]})
    return not check["failure"]


# ---- the fast way and the plain one ---------------------------------------------------------------------------------------------

# fast is the default; plain takes neither kernels of the GPU's own architecture nor a CUDA graph; fp8 has the head's products
# in 8 bits; split differs from fast in nothing but the order of sums: how far rounding alone drives two runs apart.
WAYS = {"fast": (), "again": (), "plain": ("--kernels", "general", "--cuda-graph", "off"), "fp8": ("--head-precision", "fp8"),
        "split": ("--micro-batch", "16")}
EQUAL_RUNS = [Run(f"{preset}-equal", preset, "novels", 200, (*SAME_SHAPE, "--log-every", "1", "--val-every", "0",
                                                              "--checkpoint-every", "0")) for preset in ("gpt30m", "fiedler30m")]
ROUNDINGS = 3  # so many times as far apart as split and fast may plain and fast be; or LEAST
LEAST, FP8_LOSS = 0.005, 0.05  # nats; what fp8 may cost in validation, beyond rounding


def losses_of(folder):
    return [record["loss"] for record in records(folder) if isinstance(record.get("step"), int) and "loss" in record]


Trained = collections.namedtuple("Trained", "losses weights val speed")


def later(a, b):
    """Mean distance of the losses in the later half."""
    apart = [abs(x - y) for x, y in zip(a.losses, b.losses)]
    half = apart[len(apart) // 2:]
    return sum(half) / max(1, len(half))


def check_equal(options, run):
    check = {"name": run.name, "failure": "", "summary": "not run"}
    if run.data not in options.data:
        return {**check, "skipped": f"no --data {run.data}=FOLDER was given"}
    found = {}
    for way, flags in WAYS.items():
        folder, log = options.work / f"{run.name}-{way}", options.work / f"{run.name}-{way}.log"
        shutil.rmtree(folder, ignore_errors=True)
        code = run_logged(train_command(options, run, folder, *flags), log, options.timeout)
        end = end_record(folder) if folder.exists() else None
        if code != 0 or not end:
            return {**check, "failure": f"{way}: exit code {code}\n{tail(log)}"}
        found[way] = Trained(losses_of(folder), weights_of(folder), end["val_loss"], end["tokens_per_second"])
        shutil.rmtree(folder)
    fast, again, plain, fp8, split = (found[way] for way in WAYS)
    noise, noise_val = later(fast, split), abs(fast.val - split.val)
    check["summary"] = (f"{len(fast.losses)} steps, mean distance of the losses of the later half: plain from fast {later(fast, plain):.4f}, by "
                        f"another order of sums {noise:.4f}; validation {fast.val:.4f}, plain {plain.val:.4f}, other order {split.val:.4f}, "
                        f"head in fp8 {fp8.val:.4f}; fast is {fast.speed / plain.speed:.2f} x as fast as plain, with fp8 "
                        f"{fp8.speed / plain.speed:.2f} x; fast twice: weights "
                        + ("bit-equal" if fast.weights == again.weights else "DIFFER"))
    if any(len(run_found.losses) != run.steps for run_found in found.values()):
        check["failure"] = f"not every log has the losses of {run.steps} steps"
    elif not fast.weights or fast.weights != again.weights:
        check["failure"] = "the fast way is not bit-equal from run to run"
    elif fast.weights in (plain.weights, fp8.weights, split.weights):
        check["failure"] = "another way is the fast one, bit for bit: it did not take other kernels"
    elif not later(fast, plain) <= max(LEAST, ROUNDINGS * noise):
        check["failure"] = f"losses further apart than rounding explains: {check['summary']}"
    elif not abs(fast.val - plain.val) <= max(LEAST, ROUNDINGS * max(noise, noise_val)):
        check["failure"] = f"validation further apart than rounding explains: {check['summary']}"
    elif not fp8.val - fast.val <= FP8_LOSS + noise_val:
        check["failure"] = f"the head in fp8 costs too much: {check['summary']}"
    return check


def stage_equal(options):
    checks = [check_equal(options, run) for run in EQUAL_RUNS]
    for check in checks:
        say(f"  {check['name']}: {check.get('skipped') or check['failure'] or check['summary']}")
    write_piece(options, "equal", {"checks": checks})
    return not any(check["failure"] for check in checks)
