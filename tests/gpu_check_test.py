#!/usr/bin/env python3
"""Tests of tools/gpu_check and its report: python3 tests/gpu_check_test.py (standard library only, no GPU)."""
import argparse
import contextlib
import fnmatch
import io
import json
import os
import re
import subprocess
import sys
import unittest

from tool_tests import ROOT, Folder, load

import gpu_common  # noqa: E402  (of tools/)
import gpu_report  # noqa: E402
import gpu_sanitizer  # noqa: E402
import gpu_trainings  # noqa: E402
import train_peers  # noqa: E402

gpu_check = load("gpu_check")
gpu_check.say = gpu_common.say = gpu_sanitizer.say = gpu_trainings.say = lambda text: None


def piece(stage, date="2025-01-01T00:00:00Z", **found):
    return {"stage": stage, "sources_sha256": "s" * 64, "commit": "abc", "date": date, "command": "tools/gpu_check",
            "gpu": "NVIDIA H200", "driver": "1.2", "cuda": "13.0", **found}


class Report(Folder):
    def programs_piece(self, date, name, failed=0):
        return piece("tests", date, binaries=[{"name": name, "passed": 5, "failed": failed, "skipped": 1,
                                               "failures": [f"{name} broke"] * failed}])

    def run_entry(self, name, preset, loss):
        return {"name": name, "preset": preset, "data": "headers", "steps": 1000, "tokens": 32768000, "val_loss": loss,
                "val_bits_per_byte": 1.0, "tokens_per_second": 1e6, "share_of_peak": 0.3, "peak_memory_bytes": 2**33,
                "parameters": 27600000}

    def test_merges_pieces_and_later_ones_win(self):
        self.write("tests-1.json", self.programs_piece("2025-01-01T00:00:00Z", "kernel_tests", failed=1))
        self.write("tests-2.json", self.programs_piece("2025-01-02T00:00:00Z", "kernel_tests"))
        self.write("tests-3.json", self.programs_piece("2025-01-03T00:00:00Z", "engine_tests"))
        self.write("train-1.json", piece("train", runs=[self.run_entry("fiedler30m-headers", "fiedler30m", 1.9),
                                                        {"name": "x", "skipped": "no data"}]))
        self.write("train-2.json", piece("train", runs=[self.run_entry("t", "tau30m-same-shape", 3.0)]))
        row = {"family": "norm", "case": "forward", "time_us": 10.0, "noise": 0.01, "gb_s": 1000.0, "tflop_s": 1.0,
               "share_of_peak": 0.5}
        self.write("bench-1.json", piece("bench", peak={"copy_gb_s": 2000.0, "gemm_tflop_s": 700.0}, bench=[row],
                                         failed={}, runs_per_sample={}))
        self.write("other.json", {"unrelated": 1})
        path, result = gpu_report.write_report(self.folder, self.folder / "results", "s" * 64)
        self.assertEqual(path.name, "nvidia-h200.json")
        self.assertEqual(result["tests"], {"passed": 10, "failed": 0, "skipped": 2})
        self.assertEqual([run["name"] for run in result["runs"]], ["fiedler30m-headers", "t"])
        self.assertEqual(result["failures"], [])
        self.assertEqual(result["peak"]["gemm_tflop_s"], 700.0)
        self.assertEqual(set(result["bench"][0]), set(gpu_report.BENCH_KEYS))
        self.assertEqual(json.loads(path.read_text()), json.loads(json.dumps(result)))
        text = path.with_suffix(".md").read_text()
        self.assertIn("1.100 nats below tau30m-same-shape", text)
        self.assertIn("no data", text)

    def test_spectra_have_their_table(self):
        row = {"graph": "power-law", "solver": "ours", "nodes": 1000000, "edges": 9998245, "degree_min": 9,
               "degree_max": 20000, "seconds": 0.75, "reached": True, "ratio": 1.0, "worst_residual": 5e-5, "higher": 0,
               "peak_bytes": 2**30, "share_of_copy": 0.25}
        slow = {**row, "solver": "eigsh", "seconds": 60.0, "reached": False, "ratio": None, "note": "stopped | 60 s"}
        settings = {"pairs": 64, "residual": 1e-4, "limit_s": 60, "cores": 16, "copy_gb_s": 4000.0}
        self.write("spectrum-1.json", piece("spectrum", settings=settings, rows=[{**row, "seconds": 9.0}]))
        self.write("spectrum-2.json", piece("spectrum", "2025-01-02T00:00:00Z", settings=settings, rows=[row, slow]))
        path, result = gpu_report.write_report(self.folder, self.folder, "s" * 64)
        self.assertEqual([r["seconds"] for r in result["spectrum"]], [0.75, 60.0])
        lines = path.with_suffix(".md").read_text().splitlines()
        table = [line for line in lines if line.startswith("| power-law")]
        self.assertEqual(len(table), 2)
        self.assertIn("| ours | 0.750 | 1.0 | 5.0e-05 | 0 | 1.00 | 25.0 |", table[0])
        self.assertNotIn("60.0", table[1])  # a solver that did not reach the residual has no time
        self.assertIn("stopped / 60 s", table[1])

    STEP = {"case": "fiedler-s-d6", "peer": "fiedler-s-d6", "name": "fiedler30m s, 6 layers", "parameters": 25000000,
            "ms_per_step": 10.0, "noise": 0.01, "tokens_per_second": 3.0e6, "share_of_peak": 0.6, "planned_bytes": 2**32,
            "profiled_ms_per_step": 11.0, "cuda_graph": "on", "kernels_ms": 9.5, "kernels_launched": 250, "kernels_note": "",
            "stages": [{"name": "attention", "ms": 5.0, "share": 0.45, "a_step": 12}],
            "kernels": [{"name": "attend<64>", "ms": 2.0, "share": 0.2, "a_step": 6}]}
    PEER = {"name": "gpt2-d6", "attention": "scaled_dot_product_attention", "parameters": 30000000, "ms_per_step": 20.0,
            "noise": 0.01, "tokens_per_second": 1.5e6, "peak_memory_bytes": 2**35}

    def test_steps_stand_beside_their_peers(self):
        same = {**self.PEER, "name": "fiedler-s-d6", "tokens_per_second": 1.0e6, "attention": "FlexAttention"}
        old = {**self.STEP, "tokens_per_second": 1.0}
        self.write("step-1.json", piece("step", steps=[old], peers=[self.PEER]))
        self.write("step-2.json", piece("step", "2025-01-02T00:00:00Z", steps=[self.STEP], peers=[self.PEER, same]))
        path, result = gpu_report.write_report(self.folder, self.folder, "s" * 64)
        self.assertEqual([(s["ratio_gpt2"], s["ratio_same"]) for s in result["steps"]], [(2.0, 3.0)])
        text = path.with_suffix(".md").read_text()
        self.assertIn("| 2.00 x | 3.00 x |", text)
        self.assertIn("| PyTorch gpt2-d6 | torch.compile, scaled_dot_product_attention | 30.0 | 20.00 |", text)
        self.assertIn("| attention | 5.000 | 45.0 | 12 |", text)
        self.assertIn("| `attend<64>` | 2.000 | 20.0 | 6 |", text)
        self.assertIn("9.50 ms of a step; the rest, 0.50 ms, is gaps", text)

    def test_failed_steps_and_peers_have_no_ratio_and_are_named(self):
        peer = {"name": "gpt2-d6", "failure": "out of memory"}
        self.write("step-1.json", piece("step", steps=[self.STEP, {"case": "x", "peer": None, "failure": "exit code 1"}],
                                        peers=[peer]))
        path, result = gpu_report.write_report(self.folder, self.folder, "s" * 64)
        self.assertEqual([s["ratio_gpt2"] for s in result["steps"]], [None, None])
        self.assertEqual(len(result["failures"]), 2)
        self.assertIn("out of memory", path.with_suffix(".md").read_text())

    def test_searches_models_and_pairs_have_their_columns(self):
        row = {"family": "matmul", "case": "dw 1x2x3", "time_us": 10.0, "noise": 0.01, "gb_s": 1000.0, "tflop_s": 1.0,
               "share_of_peak": 0.5, "share_of_copy": 0.875, "model_4090_us": 42.0,
               "search": {"tried": 20, "ours_over_best": 1.25}}
        pair = {"family": "attention", "case": "forward+backward 2x8 R1", "time_us": 10.0, "peer": "cuDNN SDPA",
                "peer_time_us": 20.0, "ratio": 2.0, "peers": {"cuDNN SDPA": 20.0, "FlashAttention SDPA": "cannot run it"}}
        self.write("bench-1.json", piece("bench", peak={"copy_gb_s": 2000.0, "gemm_tflop_s": 700.0}, bench=[row],
                                         pairs=[pair], failed={}, runs_per_sample={}))
        path, _ = gpu_report.write_report(self.folder, self.folder, "s" * 64)
        text = path.with_suffix(".md").read_text()
        self.assertIn("| 50.0 | 87.5 | 1.25 of 20 |", text)
        self.assertIn("| % of limit | % of same-size copy |", text)
        self.assertIn("| 42.00 |", text)
        self.assertIn("a model, not a measurement", text)
        self.assertIn("| attention | forward+backward 2x8 R1 | 10.00 | - | - | 20.00 | 2.00 x |", text)

    def test_failures_are_named(self):
        self.write("tests-1.json", self.programs_piece("2025-01-01T00:00:00Z", "kernel_tests", failed=1))
        self.write("train-1.json", piece("train", runs=[{"name": "a", "failure": "exit code 1"}]))
        self.write("resume-1.json", piece("resume", checks=[{"name": "r", "summary": "", "failure": "differs"}]))
        _, result = gpu_report.write_report(self.folder, self.folder, "s" * 64)
        self.assertEqual(len(result["failures"]), 3)
        self.assertEqual(result["runs"], [])

    def test_checks_stand_in_the_report_by_what_was_checked(self):
        def race(date, filter, summary, failure=""):
            return piece("sanitizer", date, checks=[{"tool": "racecheck", "binary": "engine_tests", "filter": filter,
                                                     "summary": summary, "failure": failure}])

        self.write("sanitizer-1.json", race("1", "A.*", "1 tests, 2 hazards", "exit code 86"))
        self.write("sanitizer-2.json", race("2", "B.*", "3 tests, 0 hazards"))
        self.write("equal-1.json", piece("equal", "3", checks=[{"name": "e", "summary": "near", "failure": ""},
                                                               {"name": "f", "summary": "far", "failure": "too far"}]))
        path, result = gpu_report.write_report(self.folder, self.folder, "s" * 64)
        self.assertEqual(len(result["failures"]), 2)
        text = path.with_suffix(".md").read_text()
        for said in ("1 tests, 2 hazards", "3 tests, 0 hazards", "exit code 86", "Fast and plain, e: near.", "too far"):
            self.assertIn(said, text)
        self.write("sanitizer-3.json", race("4", "A.*", "1 tests, 0 hazards"))  # the later one counts
        _, result = gpu_report.write_report(self.folder, self.folder, "s" * 64)
        self.assertEqual(len(result["failures"]), 1)

    def test_failed_benchmark_counts_until_it_is_measured(self):
        def bench(date, rows, failed):
            peak = {"copy_gb_s": 1.0, "gemm_tflop_s": None}
            return piece("bench", date, peak=peak, bench=rows, failed=failed, runs_per_sample={})

        row = {"family": "norm", "case": "forward", "time_us": 1.0}
        first = bench("1", [], {"norm/forward": "x", "loss/setup": "y"})
        self.assertEqual(len(gpu_report.failed_benchmarks([first])), 2)
        self.assertEqual(gpu_report.failed_benchmarks([first, bench("2", [row], {})]), {"loss/setup": "y"})

    def test_refuses_other_sources_other_gpus_and_nothing(self):
        with self.assertRaises(gpu_report.Refused):
            gpu_report.read_pieces(self.folder, "s" * 64)
        self.write("tests-1.json", self.programs_piece("2025-01-01T00:00:00Z", "kernel_tests"))
        with self.assertRaisesRegex(gpu_report.Refused, "sources"):
            gpu_report.read_pieces(self.folder, "t" * 64)
        other = self.programs_piece("2025-01-01T00:00:00Z", "engine_tests")
        other["gpu"] = "NVIDIA GeForce RTX 4090"
        self.write("tests-2.json", other)
        with self.assertRaisesRegex(gpu_report.Refused, "different GPUs"):
            gpu_report.read_pieces(self.folder, "s" * 64)


class SanitizerFilter(unittest.TestCase):
    # Tests by name as in the sources; those with parameters have a suffix that only the program knows.
    def named(self):
        text = "".join(path.read_text() for path in sorted((ROOT / "tests").glob("*/*_test.cpp")))
        return [f"{family}.{name}" for family, name in re.findall(r"^TEST(?:_[FP])?\((\w+), (\w+)\)", text, re.M)]

    def test_every_pattern_names_a_test(self):
        tests = self.named()
        for pattern in gpu_sanitizer.SANITIZER_FILTER.split(":"):
            family = re.sub(r"\*(_T\d+|[a-z]\w*)$", "*", pattern)  # without a parameter's name
            self.assertTrue(any(fnmatch.fnmatchcase(name, family) for name in tests), pattern)

    def test_families_of_samples_are_in_and_what_takes_too_long_is_not(self):
        patterns = gpu_sanitizer.SANITIZER_FILTER.split(":")
        chosen = [name for name in self.named() if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
        for family in ("GraphConv", "Bag", "Pool", "Dropout", "Objective", "Slots", "Sample", "HalfPanel", "ConvRotary",
                       "Dot"):
            self.assertTrue(any(name.startswith(f"{family}.Gpu") for name in chosen), family)
        self.assertIn("Sample.GpuSmallDraws", chosen)
        self.assertNotIn("Sample.GpuDrawsWhatTheContractSays", chosen)


class GpuCheck(Folder):
    def options(self, **values):
        return argparse.Namespace(**{"bin": self.folder / "bin", "work": self.folder, "timeout": 60, "test_filter": "*Gpu*",
                                     "keep": False, "shards": 1, "data": {"headers": str(self.folder)}, "seed": 3, **values})

    def test_counts_googletest(self):
        tests = [{"name": "A", "status": "RUN", "result": "COMPLETED"},
                 {"name": "B", "status": "RUN", "result": "SKIPPED"},
                 {"name": "C", "status": "RUN", "result": "COMPLETED", "failures": [{"failure": "x"}]}]
        counts = gpu_check.count_tests({"testsuites": [{"name": "S", "testsuite": tests}]})
        self.assertEqual(counts, {"passed": 1, "failed": 1, "skipped": 1, "failures": ["S.C failed"]})

    def test_missing_crashing_and_empty_test_programs_fail(self):
        self.assertEqual(gpu_check.run_test_program(self.options(), "kernel_tests")["failed"], 1)
        self.program("kernel_tests", "import sys; sys.exit(139)")
        self.assertEqual(gpu_check.run_test_program(self.options(), "kernel_tests")["failed"], 1)
        self.program("kernel_tests", """
            import sys
            open(sys.argv[2].split(":", 1)[1], "w").write('{"testsuites": []}')""")
        self.assertEqual(gpu_check.run_test_program(self.options(), "kernel_tests")["failed"], 1)

    def test_a_program_that_does_not_end_is_counted_up_to_where_it_was(self):
        self.program("kernel_tests", """
            for line in ("[ RUN      ] A.GpuOne", "[       OK ] A.GpuOne (1 ms)", "[ RUN      ] A.GpuTwo",
                         "[  FAILED  ] A.GpuTwo (2 ms)", "[ RUN      ] B.GpuThree"):
                print(line, flush=True)
            import time; time.sleep(60)""")
        counts = gpu_check.run_test_program(self.options(timeout=0.5), "kernel_tests")
        self.assertEqual((counts["passed"], counts["failed"], counts["skipped"]), (1, 2, 0))
        self.assertEqual(counts["failures"][0], "A.GpuTwo failed")
        self.assertIn("stopped after 0.5 s, in B.GpuThree", counts["failures"][1])

    def test_shards_are_added_up_and_one_that_crashes_fails(self):
        self.program("kernel_tests", """
            import json, os, sys
            shard = int(os.environ["GTEST_SHARD_INDEX"])
            if shard == int(os.environ.get("CRASH", -1)):
                sys.exit(139)
            tests = [{"name": str(k), "status": "RUN", "result": "COMPLETED"} for k in range(shard + 1)]
            open(sys.argv[2].split(":", 1)[1], "w").write(json.dumps({"testsuites": [{"name": "S", "testsuite": tests}]}))""")
        counts = gpu_check.run_test_program(self.options(shards=3), "kernel_tests")
        self.assertEqual((counts["passed"], counts["failed"]), (6, 0))
        os.environ["CRASH"] = "1"
        counts = gpu_check.run_test_program(self.options(shards=3), "kernel_tests")
        del os.environ["CRASH"]
        self.assertEqual((counts["passed"], counts["failed"]), (4, 1))

    def test_the_test_that_wants_the_card_for_itself_runs_after_the_others(self):
        self.program("engine_tests", """
            import json, os, sys
            arguments = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
            if "--gtest_list_tests" in sys.argv:
                print("Other.\\n  Gpu\\nPlan.\\n  First\\n  GpuIsWhatTheRunTakes\\nZ.\\n  Gpu")
                sys.exit()
            with open(sys.argv[0] + ".runs", "a") as runs:
                runs.write(arguments["--gtest_filter"] + " " + os.environ["GTEST_TOTAL_SHARDS"] + "\\n")
            tests = [{"name": "A", "status": "RUN", "result": "COMPLETED"}]
            open(arguments["--gtest_output"].split(":", 1)[1], "w").write(json.dumps({"testsuites": [{"name": "S", "testsuite": tests}]}))""")
        counts = gpu_check.run_test_program(self.options(shards=2), "engine_tests")
        self.assertEqual((counts["passed"], counts["failed"]), (3, 0))
        runs = (self.folder / "bin/engine_tests.runs").read_text().splitlines()
        self.assertEqual(runs, ["*Gpu*-Plan.GpuIsWhatTheRunTakes 2"] * 2 + ["Plan.GpuIsWhatTheRunTakes 1"])
        self.assertEqual(gpu_check.without("*Gpu*-A.*", "B.C"), "*Gpu*-A.*:B.C")

    def test_unknown_tools_and_programs_of_the_sanitizer_are_refused(self):
        for flags in (["--tool", "synccheck"], ["--program", "tests"]):
            with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(SystemExit) as refused:
                gpu_check.parse(flags)
            self.assertEqual(refused.exception.code, 2)

    # A stand-in for compute-sanitizer, of which shard 1 finds something, or ends in the middle of a test.
    SANITIZER = """
        import os, sys
        shard = int(os.environ["GTEST_SHARD_INDEX"])
        open(sys.argv[0] + ".arguments", "w").write(" ".join(sys.argv))
        print("[ RUN      ] Family.Gpu%d" % shard)
        if shard == 1 and os.environ.get("ENDS"):
            sys.exit(139)
        print("[  PASSED  ] %d tests." % (shard + 1))
        found = 2 if shard == 1 and os.environ.get("FINDS") else 0
        print("========= RACECHECK SUMMARY: %d hazards displayed" % found)
        sys.exit(86 if found else 0)
    """

    def test_shards_under_the_sanitizer_are_added_up_and_findings_fail(self):
        self.program("kernel_tests", "")
        self.program("sanitizer", self.SANITIZER)
        options = self.options(shards=3, sanitizer_filter="*", sanitizer_launches=0)
        run = lambda: gpu_sanitizer.sanitize(options, self.folder / "bin/sanitizer", "racecheck", "kernel_tests")  # noqa: E731
        check = run()
        self.assertEqual((check["summary"], check["failure"]), ("6 tests, 0 hazards", ""))
        self.assertNotIn("--launch-count", (self.folder / "bin/sanitizer.arguments").read_text())
        options.sanitizer_launches = 7
        self.assertEqual(run()["summary"], "6 tests, 0 hazards in the first 7 launches of each of 3 processes")
        self.assertIn("--kernel-name kns=fiedler --launch-count 7", (self.folder / "bin/sanitizer.arguments").read_text())
        for variable, said in (("FINDS", "2 findings"), ("ENDS", "at Family.Gpu1")):
            os.environ[variable] = "1"
            check = run()
            del os.environ[variable]
            self.assertIn(said, check["failure"])
        self.assertIn("is not built", gpu_sanitizer.sanitize(options, "none", "memcheck", "engine_tests")["failure"])

    # A stand-in for fiedler: its "weights" are the steps it took; broken: it forgets that it was stopped.
    FIEDLER = """
        import json, os, signal, sys, time
        args = sys.argv[2:]
        out, steps = args[args.index("--out") + 1], int(args[args.index("--steps") + 1])
        stop = []
        signal.signal(signal.SIGINT, lambda *_: stop.append(1))
        os.makedirs(out, exist_ok=True)
        first = int(open(out + "/state").read()) if "--resume" in args else 0
        with open(out + "/log.jsonl", "a") as log:
            for step in range(first + 1, steps + 1):
                time.sleep(0.02)
                print(json.dumps({"event": "step", "step": step, "tokens_per_second": 5}), file=log, flush=True)
                if stop:
                    open(out + "/state", "w").write(str(step))
                    sys.exit(0)
            print(json.dumps({"event": "end", "val_loss": 1.5, "tokens": 10}), file=log, flush=True)
        open(out + "/weights.fdl", "w").write(str(steps + (FORGETS and first)))
    """

    def test_training_reads_the_end_record(self):
        self.program("fiedler", self.FIEDLER.replace("FORGETS", "0"))
        run = gpu_trainings.Run("n", "tiny", "headers", 5, ())
        result = gpu_trainings.train(self.options(), run)
        self.assertEqual((result.get("failure"), result["val_loss"], result["tokens_per_second"]), (None, 1.5, 5))
        self.assertIn("skipped", gpu_trainings.train(self.options(), run._replace(data="novels")))
        self.program("fiedler", "import sys; sys.exit(2)")
        self.assertIn("failure", gpu_trainings.train(self.options(), run))

    def test_resume_compares_weights(self):
        run = gpu_trainings.Run("n", "tiny", "headers", 40, ())
        self.program("fiedler", self.FIEDLER.replace("FORGETS", "0"))
        check = gpu_trainings.check_resume(self.options(), run)
        self.assertEqual(check["failure"], "")
        self.assertIn("bit-equal", check["summary"])
        self.program("fiedler", self.FIEDLER.replace("FORGETS", "1"))
        self.assertIn("differ", gpu_trainings.check_resume(self.options(), run)["failure"])
        self.program("fiedler", "import time; time.sleep(0.2)")
        self.assertIn("by itself", gpu_trainings.check_resume(self.options(), run)["failure"])

    # A stand-in for fiedler: losses and weights by the way it is asked for, and by what is broken.
    WAYS = """
        import json, os, sys
        args = sys.argv[2:]
        out, steps = args[args.index("--out") + 1], int(args[args.index("--steps") + 1])
        way = out.rsplit("-", 1)[1]
        asked = {"plain": "general", "fp8": "fp8", "split": "--micro-batch"}
        assert (asked.get(way, "train") in sys.argv) and all((word in args) == (way == name) for name, word in asked.items())
        broken = json.loads(BROKEN)
        apart = {"split": 0.001, **broken.get("losses", {})}.get(way, 0)
        os.makedirs(out)
        with open(out + "/log.jsonl", "w") as log:
            for step in range(1, steps + 1 - broken.get("short", 0)):
                print(json.dumps({"event": "step", "step": step, "loss": 2 + apart}), file=log)
            print(json.dumps({"event": "end", "val_loss": 2 + broken.get("val", {}).get(way, 0),
                              "tokens_per_second": {"plain": 1}.get(way, 2)}), file=log)
        open(out + "/weights.fdl", "w").write(broken.get("weights", {}).get(way, "fast" if way == "again" else way))
    """

    def test_fast_and_plain_ways_must_agree_and_differ_in_bits(self):
        run = gpu_trainings.Run("n", "tiny", "headers", 10, ())

        def outcome(**broken):
            self.program("fiedler", self.WAYS.replace("BROKEN", repr(json.dumps(broken))))
            return gpu_trainings.check_equal(self.options(), run)

        check = outcome(losses={"plain": 0.002}, val={"plain": 0.004, "fp8": 0.04})
        self.assertEqual(check["failure"], "")
        self.assertIn("plain from fast 0.0020, by another order of sums 0.0010", check["summary"])
        self.assertIn("fast is 2.00 x as fast as plain", check["summary"])
        self.assertEqual(outcome(losses={"plain": 0.05, "split": 0.02})["failure"], "")
        for said, broken in (("losses further apart", {"losses": {"plain": 0.006}}),
                             ("validation further apart", {"val": {"plain": 0.006}}),
                             ("fp8 costs too much", {"val": {"fp8": 0.06}}),
                             ("not bit-equal", {"weights": {"again": "drifted"}}),
                             ("bit for bit", {"weights": {"plain": "fast"}}),
                             ("not every log", {"short": 1})):
            self.assertIn(said, outcome(**broken)["failure"])
        self.assertIn("skipped", gpu_trainings.check_equal(self.options(), run._replace(data="novels")))

    # A stand-in for `fiedler bench step`: what it was asked for, or nothing but an exit code.
    BENCH = """
        import json, sys
        args = sys.argv[1:]
        if "--no-conv" in args:
            sys.exit(1)
        step = {"name": " ".join(args[2:6]), "tokens_per_second": 2e6}
        json.dump({"steps": [step]}, open(args[args.index("--json") + 1], "w"))
    """

    def test_models_are_those_that_the_steps_are_held_against(self):
        self.assertLessEqual({step.peer for step in gpu_check.STEPS if step.peer}, set(train_peers.patterns()))
        self.assertIn(gpu_report.GPT2, train_peers.patterns())

    def test_steps_are_timed_and_their_failures_kept(self):
        self.program("fiedler", self.BENCH)
        options = self.options(samples=3)
        by_case = {step.case: step for step in gpu_check.STEPS}
        result = gpu_check.time_step(options, by_case["fiedler-s-d6"])
        self.assertEqual((result.get("failure"), result["name"]), (None, "--preset fiedler30m --pattern s"))
        self.assertEqual((result["case"], result["peer"]), ("fiedler-s-d6", "fiedler-s-d6"))
        self.assertIn("exit code 1", gpu_check.time_step(options, by_case["gpt-d6-no-conv"])["failure"])

    def test_without_pytorch_there_are_no_peers_and_no_failure(self):
        options = self.options(peer_python=str(self.folder / "no-python"))
        self.assertEqual(gpu_check.run_peers(options, "train_peers.py", self.folder / "out.json", []), (None, ""))

    def test_without_gpu_exit_code_3(self):
        env = {**os.environ, "PATH": str(self.folder)}
        done = subprocess.run([sys.executable, ROOT / "tools/gpu_check", "--out", self.folder, "--only", "tests"], env=env,
                              capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 3, done.stderr)
        self.assertIn("no GPU", done.stderr)


if __name__ == "__main__":
    unittest.main()
