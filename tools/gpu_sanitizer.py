"""tools/gpu_sanitizer.py: the stage sanitizer of tools/gpu_check."""
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

from gpu_common import TEST_PROGRAMS, run_logged, say, shard_env, tail, write_piece

# Small tests of every family: each kernel once or more under the sanitizer. Sample.GpuDrawsWhatTheContractSays is not among
# them, which racecheck makes far too long: its small form is.
SANITIZER_FILTER = ":".join((
    "*GpuSmall*", "Norm.Gpu*", "Conv.GpuSequences*", "Conv.GpuForward*", "Coordinate.GpuMatches*", "Energy.GpuDense*",
    "Energy.GpuIsolated*", "Gate.GpuLogSigmoid*", "Gate.GpuCarry*", "Attention.GpuMatchesReferenceOnRagged*",
    "Attention.GpuMatchesReferenceAtTies*", "Attention.GpuScalarGradients*", "Attention.GpuSm90Products*",
    "AttentionTree.GpuMatchesReferenceOnRagged*", "AttentionTree.GpuMatchesReferenceAtTies*", "Head.GpuNanShows*",
    "Head.GpuFp8Chunks", "Head.GpuFp8EveryElement*", "Rotary.GpuFar*", "*Dot*.GpuHidden*", "*Dot*.GpuChain*",
    "Laplacian.Gpu*", "Eigen.Gpu*", "Knn.GpuCut*", "SmallSpectra.GpuEverySize*", "SmallSpectra.GpuDuplicates*",
    "*SpectrumGpuMethod.SmallForms*",
    "*Dot*.GpuLargeScores*", "Mlp.GpuSm90MatchesReference*", "Mlp.GpuGeneralMatchesReference*",
    "Loss.GpuStreamed*", "Loss.GpuUnaligned*", "Loss.GpuSum*", "*StepGpu*one_micro_batch", "Gradnorm.Gpu*",
    "Adamw.GpuRuns*", "Adamw.GpuCast*", "Embedding.GpuRows*", "*ModelGpu*_T7",
    "GraphConv.GpuForward*", "GraphConv.GpuBackward*", "GraphConv.GpuBatch*", "Bag.GpuForward*", "Bag.GpuBackward*",
    "Bag.GpuPieces*", "Pool.GpuForward*", "Pool.GpuBackward*", "Pool.GpuEmpty*", "Dropout.GpuMatches*",
    "Objective.GpuMatches*", "Objective.GpuNan*", "Objective.GpuSum*", "Slots.GpuAppend*", "Slots.GpuSlots*",
    "Slots.GpuScatter*", "Slots.GpuBegin*", "Sample.GpuGreedy*", "Sample.GpuSteps*", "HalfPanel.Gpu*",
    "ConvRotary.GpuSequences*", "Dot.GpuSm90*", "Attention.GpuForwardShows*"))

SANITIZER_TOOLS = ("memcheck", "racecheck")


def sanitize_shard(options, sanitizer, tool, name, shard):
    """(tests passed, findings, what went wrong) of one of the processes that share the tests of a program."""
    log = options.work / f"{tool}-{name}-{shard}.log"
    # Races within cuBLAS's and cuSPARSE's kernels are not ours.
    only = ("--kernel-name", "kns=fiedler") if tool == "racecheck" else ()
    few = ("--launch-count", str(options.sanitizer_launches)) if options.sanitizer_launches else ()
    code = run_logged([sanitizer, "--tool", tool, *only, *few, "--error-exitcode", "86", options.bin / name,
                       f"--gtest_filter={options.sanitizer_filter}"], log, options.timeout, shard_env(options, shard))
    text = log.read_text(errors="replace")
    if "Device not supported" in text:
        return 0, 0, "compute-sanitizer refuses this device (\"Device not supported\")"
    if "Running 0 tests" in text:  # more processes than tests
        return 0, 0, ""
    passed = sum(int(n) for n in re.findall(r"\[  PASSED  \] (\d+) test", text))
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    findings = sum(int(errors or hazards) for errors, hazards in found)
    failure = ""
    if code != 0 or not found:
        running = [line for line in text.splitlines() if line.startswith("[ RUN")]
        failure = f"exit code {code}, {findings} findings" + (f", at {running[-1][12:].strip()}" if running else "")
        say(tail(log, 40))
    elif passed == 0:
        failure = "no test passed under it"
    return passed, findings, failure


def sanitize(options, sanitizer, tool, name):
    check = {"tool": tool, "binary": name, "filter": options.sanitizer_filter, "summary": "not run", "failure": ""}
    if not (options.bin / name).exists():
        return {**check, "failure": f"{options.bin / name} is not built"}
    with ThreadPoolExecutor(options.shards) as pool:
        parts = list(pool.map(lambda shard: sanitize_shard(options, sanitizer, tool, name, shard), range(options.shards)))
    passed, findings = sum(part[0] for part in parts), sum(part[1] for part in parts)
    failures = [failure for _, _, failure in parts if failure]
    check["summary"] = f"{passed} tests, {findings} {'errors' if tool == 'memcheck' else 'hazards'}"
    if options.sanitizer_launches:
        check["summary"] += f" in the first {options.sanitizer_launches} launches of each of {options.shards} processes"
    if failures or passed == 0:
        check["failure"] = "; ".join(failures) or "no test passed under it"
    return check


def stage_sanitizer(options):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    tools = [options.tool] if options.tool else SANITIZER_TOOLS
    programs = [options.program] if options.program else TEST_PROGRAMS
    checks = [sanitize(options, sanitizer, tool, name) for tool in tools for name in programs]
    for check in checks:
        say(f"  {check['tool']} {check['binary']}: {check['summary']}"
            + (f"; {check['failure']}" if check["failure"] else ""))
    write_piece(options, "sanitizer", {"checks": checks})
    return not any(check["failure"] for check in checks)
