"""tools/gpu_common.py: what the stages of tools/gpu_check share: running programs, and the pieces that they leave."""
import datetime
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEST_PROGRAMS = ("kernel_tests", "engine_tests")


def say(text):
    print(text, flush=True)


# ---- what is measured, and on what ------------------------------------------------------------------------------------------


def output_of(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def find_gpu():
    """(name, driver) of the first GPU; None without one."""
    line = output_of(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).splitlines()
    if not line:
        return None
    name, driver = (field.strip() for field in line[0].split(","))
    return name, driver


def cuda_version():
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    found = re.search(r"release ([0-9.]+)", output_of([nvcc, "--version"]))
    return found.group(1) if found else ""


def commit_of(options):
    if options.commit:
        return options.commit
    if options.commit_file:
        return pathlib.Path(options.commit_file).read_text().strip()
    commit = output_of(["git", "rev-parse", "HEAD"])
    changed = commit and output_of(["git", "status", "--porcelain", "--", "kernels", "engine"])
    return (commit or "unknown") + ("+changes" if changed else "")


def now():
    return datetime.datetime.now(datetime.timezone.utc)


def write_piece(options, stage, found):
    date = now()
    gpu, driver = options.gpu
    piece = {"stage": stage, "sources_sha256": options.sources, "commit": options.commit_id,
             "date": date.strftime("%Y-%m-%dT%H:%M:%SZ"), "command": options.command_line, "gpu": gpu, "driver": driver,
             "cuda": found.pop("cuda", "") or cuda_version(), **found}
    path = options.out / f"{stage}-{date.strftime('%Y%m%dT%H%M%S%f')}.json"
    path.write_text(json.dumps(piece, indent=1) + "\n")
    say(f"{stage}: wrote {path}")


def run_logged(command, log, timeout=None, env=None):
    """Runs a program with its output in a file; the exit code, or a line that says why there is none."""
    say("  $ " + shlex.join(str(part) for part in command))
    with open(log, "w", encoding="utf-8") as out:
        try:
            return subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=timeout, check=False,
                                  env=env).returncode
        except OSError as error:
            return f"could not be started: {error}"
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout} s"


def tail(path, lines=15):
    return "\n".join(pathlib.Path(path).read_text(errors="replace").splitlines()[-lines:])


def shard_env(options, shard):
    return {**os.environ, "GTEST_TOTAL_SHARDS": str(options.shards), "GTEST_SHARD_INDEX": str(shard),
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.shards))}
