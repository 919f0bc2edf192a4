#!/usr/bin/env python3
"""Tests of tools/: python3 tests/tools_test.py (standard library only, no GPU)."""
import argparse
import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

from tool_tests import ROOT, Folder, load

import bench_peers  # noqa: E402  (of tools/)
import graph_peers  # noqa: E402
import sources_hash  # noqa: E402
import train_peers  # noqa: E402

edge_report = load("edge_report")
planted_graph = load("planted_graph")
check_results = load("check_results")
check_ptxas = load("check_ptxas")
same_code = load("same_code")


class SourcesHash(Folder):
    def test_changes_with_content_and_name_only(self):
        self.write("kernels/a.cu", "one")
        self.write("engine/b/c.cpp", "two")
        before = sources_hash.sources_sha256(self.folder)
        self.write("tests/t.cpp", "elsewhere")
        self.write("kernels/.hidden", "x")
        self.write("kernels/__pycache__/a.pyc", "x")
        os.utime(self.folder / "kernels/a.cu", (1, 1))
        self.assertEqual(before, sources_hash.sources_sha256(self.folder))
        self.write("kernels/a.cu", "One")
        changed = sources_hash.sources_sha256(self.folder)
        self.assertNotEqual(before, changed)
        (self.folder / "kernels/a.cu").rename(self.folder / "kernels/z.cu")
        self.assertNotEqual(changed, sources_hash.sources_sha256(self.folder))

    def test_boundary_between_files_counts(self):
        self.write("kernels/a", "xy")
        self.write("kernels/b", "z")
        before = sources_hash.sources_sha256(self.folder)
        self.write("kernels/a", "x")
        self.write("kernels/b", "yz")
        self.assertNotEqual(before, sources_hash.sources_sha256(self.folder))

    def test_no_sources_is_an_error(self):
        with self.assertRaises(FileNotFoundError):
            sources_hash.sources_sha256(self.folder)

    def test_comments_are_left_out_and_nothing_else(self):
        code = """// head
int a = 60'000;  // it's
/* of
two lines */ int b = 0x1'f;

const char* c = "// no \\" comment", d = '"', e = '\\'';  // yes
auto f = R"x(/* no )" // comment */)x"; /* yes */ int g;
"""
        left = ["int a = 60'000;", "  int b = 0x1'f;", """const char* c = "// no \\" comment", d = '"', e = '\\'';""",
                """auto f = R"x(/* no )" // comment */)x";   int g;"""]
        self.assertEqual(sources_hash.without_comments(code), left)


class CheckResults(Folder):
    def test_verdicts(self):
        good = self.write("good.json", {"sources_sha256": "a" * 64})
        bad = self.write("bad.json", "{}")
        self.assertTrue(check_results.verdict(good, "a" * 64)[0])
        self.assertFalse(check_results.verdict(good, "b" * 64)[0])
        self.assertIn("STALE", check_results.verdict(good, "b" * 64)[1])
        self.assertFalse(check_results.verdict(bad, "a" * 64)[0])
        self.assertFalse(check_results.verdict(self.folder / "missing.json", "a" * 64)[0])

    @unittest.skipUnless(shutil.which("git"), "no git")
    def test_comments_do_not_make_figures_stale(self):
        def git(*arguments):
            command = ["git", "-C", self.folder, "-c", "user.name=n", "-c", "user.email=e", *arguments]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

        def verdict():
            return check_results.verdict(results, sources_hash.sources_sha256(self.folder), self.folder)

        self.write("kernels/a.cu", "int a;  // one\n")
        self.write("engine/list.txt", "// not C++\n")
        git("init", "-q")
        git("add", ".")
        git("commit", "-qm", "c")
        recorded = {"sources_sha256": sources_hash.sources_sha256(self.folder), "commit": git("rev-parse", "HEAD")}
        results = self.write("results.json", recorded)
        self.assertIn("on these sources", verdict()[1])
        self.write("kernels/a.cu", "// another\nint a;\n")
        self.assertTrue(verdict()[0])
        self.assertIn("but for comments", verdict()[1])
        for name, content in (("kernels/a.cu", "int b;\n"), ("engine/list.txt", "// other\n"), ("kernels/b.cu", "")):
            before = (self.folder / name).read_text() if (self.folder / name).exists() else None
            self.write(name, content)
            self.assertIn("STALE", verdict()[1], name)
            (self.folder / name).unlink() if before is None else self.write(name, before)
        self.assertTrue(verdict()[0])
        for wrong in ({"commit": "0" * 40}, {"sources_sha256": "0" * 64}):  # of no commit, and not of this one
            results = self.write("results.json", {**recorded, **wrong})
            self.assertIn("STALE", verdict()[1])


class CheckPtxas(unittest.TestCase):
    @staticmethod
    def kernel(name, arch, spilled=0, shared=1024):
        return [f"ptxas info    : Compiling entry function '{name}' for 'sm_{arch}'",
                f"ptxas info    : Function properties for {name}",
                f"    64 bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads",
                f"ptxas info    : Used 40 registers, used 1 barriers, {shared} bytes smem, 440 bytes cmem[0]"]

    def said(self, *kernels):
        lines, well = check_ptxas.verdict([line for k in kernels for line in k], ["80", "89"])
        return "\n".join(lines), well

    def test_a_clean_build(self):
        lines, well = self.said(self.kernel("f", "80"), self.kernel("f", "89"), self.kernel("g", "90a", shared=49152))
        self.assertTrue(well, lines)
        for part in ("sm_80: 1 kernels", "sm_90a: 1 kernels", "no register spills"):
            self.assertIn(part, lines)

    def test_what_is_amiss_is_said(self):
        one = self.kernel("f", "80")
        for kernels, part in (((one, self.kernel("f", "89", spilled=8)), "f spills: 64 bytes stack frame, 8 bytes"),
                              ((one, self.kernel("f", "89", shared=49168)), "f: 49168 bytes of static shared memory"),
                              ((one,), "sm_89: no kernel was built"),
                              ((one, self.kernel("f", "89"), self.kernel("g", "89")), "only one of them has g"),
                              ((["ninja: no work to do."],), "sm_80: no kernel was built")):
            lines, well = self.said(*kernels)
            self.assertFalse(well)
            self.assertIn(part, lines)
            self.assertNotIn("no register spills", lines)

    def test_a_log_that_is_not_there(self):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertEqual(check_ptxas.main(["/nowhere/log", "80"]), 2)
        self.assertIn("/nowhere/log", out.getvalue())


class SameCode(Folder):
    SOURCE = """namespace { template <int n> __global__ void add_kernel(float* x) { x[threadIdx.x] += n; } }
        void launch(float* x) { add_kernel<1><<<1, 32>>>(x), add_kernel<2><<<1, 32>>>(x); }"""

    @unittest.skipUnless(pathlib.Path(same_code.NVCC).exists(), "needs nvcc")
    def test_instructions_are_compared_and_nothing_else(self):
        def compiled(text):
            (self.folder / "f.cu").write_text(text)
            return same_code.compiled(self.folder, "f.cu", "90a")
        first = compiled(self.SOURCE)
        self.assertEqual(len(first), 2)
        self.assertEqual(first, compiled("// said otherwise\n\n" + self.SOURCE))
        self.assertEqual(first, compiled(self.SOURCE.replace("float* x", "float* other").replace("x[", "other[")
                                         .replace("(x)", "(other)")))
        other = compiled(self.SOURCE.replace("+= n", "+= n + 1"))
        self.assertEqual(first.keys(), other.keys())
        self.assertTrue(all(first[name] != other[name] for name in first))

    @unittest.skipUnless(pathlib.Path(same_code.NVCC).exists(), "needs nvcc")
    def test_no_such_file(self):
        with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit) as ended:
            same_code.main(["HEAD", "no_such_kernel"])
        self.assertEqual(ended.exception.code, 2)
        self.assertIn("kernels/no_such_kernel.cu", said.getvalue())

    def test_no_such_revision(self):
        with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit) as ended:
            same_code.git("diff", "--name-only", "no-such-revision")
        self.assertEqual(ended.exception.code, 2)
        self.assertIn("no-such-revision", said.getvalue())


class BenchPeers(unittest.TestCase):
    def test_shapes_from_names(self):
        shape = bench_peers.attention_shape
        self.assertEqual(shape("backward 32x1024 causal"), (32, 6, 1024, 64, True, 0, 0))
        self.assertEqual(shape("forward 32x1024 bidirectional width 16"), (32, 24, 1024, 16, False, 0, 0))
        self.assertEqual(shape("forward B4 T512 H3 D128 R8 causal"), (4, 3, 512, 128, True, 0, 8))
        self.assertEqual(shape("forward+backward 32x1024 H6 D64 R8 window 256"), (32, 6, 1024, 64, True, 256, 8))
        self.assertEqual(bench_peers.word_number("backward 32768x384 of 256", "of", 0), 256)
        self.assertEqual(bench_peers.shape_of("forward 32768x384x1536 relu", 3), [32768, 384, 1536])
        self.assertEqual(bench_peers.shape_of("forward+gradient 4096x30522", 2), [4096, 30522])
        for case in ("forward 32x1024 ragged", "decode 1024", "forward causal"):
            with self.assertRaises(bench_peers.NoPeer):
                bench_peers.attention_shape(case)

    def test_fastest_peer_counts_and_failures_are_said(self):
        row = {"time_us": 10.0}
        bench_peers.merge(row, {"a": 30.0, "b": 20.0, "c": "cannot run it: x"})
        self.assertEqual((row["peer"], row["peer_time_us"], row["ratio"]), ("b", 20.0, 2.0))
        bench_peers.merge(row, {"c": "cannot run it: x"})
        self.assertEqual((row["peer"], row["ratio"]), ("none: c cannot run it: x", None))


    def test_pairs_join_forward_and_backward(self):
        rows = [{"family": "attention", "case": case, "time_us": time} for case, time in
                (("forward 2x8 R1", 1.0), ("backward 2x8 R1", 2.5), ("forward 2x8 R8", 4.0), ("decode 8", 1.0))]
        rows.append({"family": "norm", "case": "forward 2x8 R1", "time_us": 9.0})
        self.assertEqual(bench_peers.pairs_of(rows), [("attention", "2x8 R1", 3.5)])


class TrainPeers(unittest.TestCase):
    def test_summary_is_the_harness_median_and_noise(self):
        median, noise = train_peers.summary([3.0, 1.0, 2.0, 10.0, 4.0])
        self.assertEqual((median, noise), (3.0, 3.0))

    def test_unknown_models_and_no_pytorch_are_said(self):
        with self.assertRaises(SystemExit) as stopped, contextlib.redirect_stderr(io.StringIO()):
            train_peers.main(["--out", "unused.json", "--models", "gpt5"])
        self.assertEqual(stopped.exception.code, 2)


class SourceTrees(unittest.TestCase):
    def run_tool(self, *words):
        return subprocess.run([sys.executable, str(ROOT / "tools/source_trees"), *map(str, words)], capture_output=True, text=True)

    def test_a_folder_is_a_document_in_order_of_paths(self):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            for name, text in (("a/z.py", "z\n"), ("a/b/y.py", "y\n"), ("a/no.txt", "no\n"), ("c/x.h", "x\n"), ("own.py", "own\n")):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text)
            (root / "c/latin.h").write_bytes(b"\xe9\n")
            out = root / "trees.jsonl"
            done = self.run_tool(root, "--out", out, "--min-bytes", 1)
            self.assertEqual(done.returncode, 0, done.stderr)
            texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
            self.assertEqual(texts, ["==> a/b/y.py <==\ny\n\n==> a/z.py <==\nz\n\n", "==> c/x.h <==\nx\n\n"])
            self.assertEqual(self.run_tool(root, "--out", out, "--min-bytes", 1, "--max-bytes", 20).returncode, 0)
            self.assertTrue(all(len(json.loads(line)["text"]) <= 20 for line in out.read_text().splitlines()))

    def test_nothing_to_write_leaves_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "trees.jsonl"
            done = self.run_tool(folder, "--out", out)
            self.assertEqual(done.returncode, 2)
            self.assertIn("no tree has enough text", done.stderr)
            self.assertEqual(list(pathlib.Path(folder).iterdir()), [])


class GraphPeers(unittest.TestCase):
    def test_molecules_are_connected_and_about_25_atoms(self):
        rng = random.Random(1)
        molecules = [graph_peers.random_molecule(rng) for _ in range(500)]
        self.assertAlmostEqual(sum(m.atoms for m in molecules) / 500, 25, delta=1.5)
        for atoms, bonds, _, _ in molecules:
            self.assertEqual(len(bonds), len(set(bonds)))
            reached = {0}
            for a, b in sorted(bonds, key=lambda bond: bond[1]):
                self.assertTrue(0 <= a < b < atoms)
                self.assertIn(a, reached)
                reached.add(b)
            self.assertEqual(len(reached), atoms)

    def test_batches_count_atoms_through(self):
        graph, sources, ends = graph_peers.packed([graph_peers.Molecule(2, [(0, 1)]), graph_peers.Molecule(3, [(1, 2)])])
        self.assertEqual(graph, [0, 0, 1, 1, 1])
        self.assertEqual(list(zip(sources, ends)), [(0, 1), (1, 0), (3, 4), (4, 3)])

    def test_attention_has_a_row_of_the_longest_for_each_molecule(self):
        molecules = [graph_peers.Molecule(2, []), graph_peers.Molecule(3, []), graph_peers.Molecule(1, [])]
        self.assertEqual(graph_peers.row_places(molecules), (3, [0, 1, 3, 4, 5, 6]))

    def test_the_prepared_molecules_are_read_as_they_are(self):
        class Array(list):  # as much of NumPy's as is needed
            def __getitem__(self, part):
                return Array(list.__getitem__(self, part))

            def tolist(self):
                return list(self)

        rows = lambda count, width: Array([list(range(width * i, width * i + width)) for i in range(count)])  # noqa: E731
        arrays = {"atom_offsets": Array([0, 2, 5]), "bond_offsets": Array([0, 1, 3]), "atoms": rows(5, 9),
                  "bonds": Array([[0, 1], [0, 1], [1, 2]]), "bond_features": rows(3, 3)}
        with mock.patch.dict("sys.modules", read_fdl=mock.Mock(read_fdl=lambda path: ({}, arrays))):
            first, second = graph_peers.read_molecules("folder", 9)
            self.assertEqual(len(graph_peers.read_molecules("folder", 1)), 1)
        self.assertEqual((first.atoms, first.bonds, first.bond_values), (2, [(0, 1)], [[0, 1, 2]]))
        self.assertEqual((second.atoms, second.bonds), (3, [(0, 1), (1, 2)]))
        self.assertEqual(second.atom_values[0], list(range(18, 27)))

    def test_drawn_molecules_are_known_ones(self):
        known = [graph_peers.Molecule(n, []) for n in range(1, 6)]
        self.assertEqual(sorted(m.atoms for m in graph_peers.draw_molecules(known, 5, 1)), [1, 2, 3, 4, 5])
        self.assertEqual(len(graph_peers.draw_molecules(known, 12, 1)), 12)

    def test_what_compiles_too_long_is_ended(self):
        began = time.monotonic()
        with mock.patch.object(graph_peers.sys, "executable", "/bin/sh"), \
             mock.patch.object(graph_peers.pathlib.Path, "resolve", lambda self: "-c"):
            told = graph_peers.measure_compiled(["sleep 60"], 0.2)
            self.assertIn("failure", graph_peers.measure_compiled(["true"], 20))
        self.assertEqual(told, {"failure": "not done after 0.2 s"})
        self.assertLess(time.monotonic() - began, 20)

    def test_the_fastest_batch_counts_and_failures_are_told(self):
        rows = [{"batch": 8, "molecules_per_second": 5}, {"batch": 16, "molecules_per_second": 9},
                {"batch": 32, "failure": "no memory"}]
        best = graph_peers.fastest(rows)
        self.assertEqual((best["batch"], best["by_batch"]), (16, {"8": 5, "16": 9, "32": "no memory"}))
        self.assertEqual(graph_peers.fastest(rows[2:]), {"failure": "batch 32: no memory"})

    def test_bad_sizes_are_refused(self):
        for arguments in (["--heads", "3"], ["--batches", "1"], ["--batches", "x"], ["--layers", "0"]):
            with self.assertRaises(SystemExit) as stopped, contextlib.redirect_stderr(io.StringIO()):
                graph_peers.main(arguments)
            self.assertEqual(stopped.exception.code, 2)


class EdgeReport(Folder):
    # A stand-in for `fiedler generate`: counts on from the prompt's last word, a token a word; where it is told so, it says
    # another word instead, and in another text goes on from that.
    FIEDLER = """
        import json, sys
        args = sys.argv[2:]
        given = lambda flag: args[args.index(flag) + 1]
        assert given("--max-tokens") == "64" and given("--sampling-temperature") == "0"
        wrong = {int(w): int(w) + 1000 for w in args[0].split("-")[1:]}
        with open(given("--out"), "w") as out:
            prompts = [json.loads(line)["prompt"] for line in open(given("--prompt-file"))]
            for index, prompt in reversed(list(enumerate(prompts))):
                words, last = [], int(prompt.split()[-1])
                for _ in range(64):
                    last = wrong.get(last + 1, last + 1)
                    words.append(last)
                print(json.dumps({"index": index, "prompt": prompt, "tokens": words,
                                  "text": "".join(" %d" % w for w in words)}), file=out)
    """

    def options(self, **values):
        self.program("fiedler", self.FIEDLER)
        return argparse.Namespace(**{"fiedler": self.folder / "bin/fiedler", "gpu": False, "gpu_texts": None, "prompts": None, **values})

    def test_texts_are_strictly_alike_up_to_the_first_difference_and_go_on_after_it(self):
        options, prompts = self.options(), ["0", "100"]
        right = edge_report.generate(options, self.folder, prompts, "model")
        self.assertEqual([record["tokens"][0] for record in right], [1, 101])
        for model, strict, differences in (("model", 1, 0), ("model-17", (16 + 64) / 128, 1), ("model-17-20-164", (16 + 63) / 128, 3),
                                           ("model-1-101", 0, 2)):
            ours = edge_report.generate(options, self.folder, prompts, model)
            self.assertEqual(edge_report.strict(ours, right), strict, model)
            alike = edge_report.alike(options, self.folder, right, ours, model)
            self.assertAlmostEqual(alike, 1 - differences / 128, msg=model)

    def test_texts_of_a_gpu_elsewhere_must_have_the_same_prompts(self):
        options = self.options(prompts=self.write("prompts.jsonl", '{"prompt": "0"}\n'))
        files = {name: name for name in ("f32", "bf16", "int8", "int4-17")}
        files["int4"] = files.pop("int4-17")
        edge_report.generate(options, self.folder, ["0"], "gpu-3")
        options.gpu_texts = (self.folder / "texts.jsonl").rename(self.folder / "gpu.jsonl")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            edge_report.report_texts(options, self.folder, {**files, "int4": "int4-17"})
        # After the GPU's own slip at 3 everything is counted on from it: nothing else differs.
        self.assertIn("| CPU f32 | GPU bf16 | 0.031 | 0.984 |", out.getvalue())
        self.assertIn("| int8 | CPU f32 | 1.000 | 1.000 |", out.getvalue())
        self.assertIn("| int4 | CPU f32 | 0.250 | 0.984 |", out.getvalue())
        options.prompts = self.write("prompts.jsonl", '{"prompt": "7"}\n')
        with self.assertRaises(SystemExit) as refused:
            edge_report.report_texts(options, self.folder, files)
        self.assertIn("other prompts", str(refused.exception))


class PlantedGraph(Folder):
    def make(self, name, *arguments):
        out = self.folder / name
        code = planted_graph.main([str(out), "--nodes", "2000", "--edges", "9000", *arguments])
        read = lambda kind: pathlib.Path(f"{out}.{kind}").read_text().splitlines()  # noqa: E731
        return code, {kind: read(kind) for kind in ("edges", "features", "labels", "split")}

    def test_edges_join_classes_as_asked_and_files_fit_together(self):
        code, files = self.make("g")
        self.assertEqual(code, 0)
        labels = [int(line) for line in files["labels"]]
        ends = [tuple(map(int, line.split("\t"))) for line in files["edges"]]
        within = sum(labels[u] == labels[v] for u, v in ends) / len(ends)
        self.assertAlmostEqual(within, 0.75 + 0.25 / 8, delta=0.03)
        nodes, features, count = map(int, files["features"][0].split())
        self.assertEqual((nodes, features, len(labels), len(files["split"])), (2000, 64, 2000, 2000))
        self.assertEqual(sum(len(line.split()) for line in files["features"][1:]), count)
        self.assertLessEqual({"train", "val", "test", "none"}, set(files["split"]))

    def test_seeds_repeat(self):
        self.assertEqual(self.make("a")[1], self.make("b")[1])
        self.assertNotEqual(self.make("a")[1], self.make("b", "--seed", "2")[1])

    def test_what_cannot_be_written_is_said(self):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.assertEqual(planted_graph.main([str(self.folder / "none/g"), "--nodes", "2000", "--edges", "10"]), 2)
        self.assertIn("planted_graph:", said.getvalue())


if __name__ == "__main__":
    unittest.main()
