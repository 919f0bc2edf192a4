#!/usr/bin/env python3
"""tests/readme_test.py FIEDLER: what README.md says that the program prints is what it prints (standard library only)."""
import pathlib
import re
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PROGRAM = pathlib.Path(sys.argv.pop(1)).resolve()


def fiedler(*words):
    return subprocess.run([PROGRAM, *words], capture_output=True, text=True, check=False)


class Readme(unittest.TestCase):
    def test_presets_need_what_the_table_says(self):
        row = r"^\| `([^`]+)`[^|]*\| ([\d,]+) \|[^|]*\| [\d,]+, ([\d,]+) \| ([\d,]+) \| (\S+) (\wiB) \|"
        rows = re.findall(row, README, re.MULTILINE)
        self.assertGreaterEqual(len(rows), 7)
        for preset, parameters, context, tokens, memory, unit in rows:
            with self.subTest(preset):
                plan = fiedler("plan", "--preset", preset, "--memory-budget", "24GiB", "--device", "cuda").stdout
                self.assertIn(f" {parameters.replace(',', '')} parameters ({preset})", plan)
                step = re.search(r"^step +(\d+) tokens: .* x (\d+) tokens", plan, re.MULTILINE)
                self.assertEqual([tokens.replace(",", ""), context.replace(",", "")], list(step.groups()))
                needs = re.search(rf"^memory +(\S+) {unit} on the GPU", plan, re.MULTILINE)
                digits = len(memory.partition(".")[2])
                self.assertEqual(memory, f"{float(needs[1]):.{digits}f}")

    def test_refusals_read_as_shown(self):
        shown = re.findall(r"^( *)\$ fiedler (.*)\n((?:\1(?!```).+\n)+)", README, re.MULTILINE)
        self.assertGreaterEqual(len(shown), 2)
        for _, command, answer in shown:
            with self.subTest(command):
                done = fiedler(*command.split())
                self.assertEqual(done.returncode, 2)
                self.assertEqual(done.stderr.split(), answer.split())


if __name__ == "__main__":
    unittest.main()
