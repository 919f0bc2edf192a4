#!/usr/bin/env python3
"""tests/molecule_oracle.py FIEDLER: prepared molecules against RDKit's Python and DeepChem's scaffold split, atom by atom.
Molecules made here always; those of the project's shared data where they are (FIEDLER_SHARED_DATA, else ../shared/data).
Exit code 77, with a line that says so, without RDKit's Python or a fiedler that can prepare molecules."""
import csv
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.dont_write_bytecode = True
sys.path.insert(0, str(ROOT / "tools"))
try:
    import numpy as np
    from rdkit import Chem, RDLogger
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
except ImportError as missing:
    print(f"SKIPPED: molecules were not compared: {missing}")
    sys.exit(77)
from read_fdl import read_fdl  # noqa: E402

RDLogger.DisableLog("rdApp.*")
SMILES = ["CCO", "c1ccccc1O", "C[C@H](N)C(=O)O", "F/C=C\\F", "[NH4+].[Cl-]", "*C#N", "[2H]O[2H]", "O=[N+]([O-])c1ccccc1", "[Og]", "CS(=O)(=O)Cl",
          "FS(F)(F)(F)(F)F", "[CH3]", "C1CC2CC1C2", "c1ccc2[nH]ccc2c1", "[Fe+2]", "CC(C)=[N+]=[N-]", "P(Cl)(Cl)(Cl)(Cl)Cl"]
CHIRAL = ["CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW", "CHI_OTHER"]
HYBRID = ["SP", "SP2", "SP3", "SP3D", "SP3D2"]
BONDS = ["SINGLE", "DOUBLE", "TRIPLE", "AROMATIC"]
STEREO = ["STEREONONE", "STEREOZ", "STEREOE", "STEREOCIS", "STEREOTRANS", "STEREOANY"]


def place(values, value):
    """The place of a value; the one behind the last for others."""
    return values.index(value) if value in values else len(values)


def features(mol):
    atoms = [[place(list(range(1, 119)), a.GetAtomicNum()), place(CHIRAL, str(a.GetChiralTag())), place(list(range(11)), a.GetTotalDegree()),
              place(list(range(-5, 6)), a.GetFormalCharge()), place(list(range(9)), a.GetTotalNumHs()),
              place(list(range(5)), a.GetNumRadicalElectrons()), place(HYBRID, str(a.GetHybridization())),
              int(a.GetIsAromatic()), int(a.IsInRing())] for a in mol.GetAtoms()]
    bonds = sorted([*sorted((b.GetBeginAtomIdx(), b.GetEndAtomIdx())), place(BONDS, str(b.GetBondType())), place(STEREO, str(b.GetStereo())),
                    int(b.GetIsConjugated())] for b in mol.GetBonds())
    return atoms, bonds


def deepchem_scaffold_split(scaffolds):
    sets = {}
    for i, s in enumerate(scaffolds):
        sets.setdefault(s, []).append(i)
    n, parts, train, val = len(scaffolds), [None] * len(scaffolds), 0, 0
    for members in sorted(sets.values(), key=lambda x: (len(x), x[0]), reverse=True):
        part = "train"
        if train + len(members) > 0.8 * n:
            part = "test" if train + val + len(members) > 0.9 * n else "val"
        train, val = train + len(members) * (part == "train"), val + len(members) * (part == "val")
        for i in members:
            parts[i] = part
    return parts


def check(fiedler, table, column, folder, split):
    done = subprocess.run([fiedler, "prepare", "--task", "molecules", table, "--out", folder], capture_output=True, text=True)
    if "built without RDKit" in done.stderr:
        print("SKIPPED: this fiedler cannot prepare molecules")
        sys.exit(77)
    assert done.returncode == 0, done.stderr
    config, t = read_fdl(folder / "molecules.fdl")
    smiles = [row[column] for row in csv.DictReader(open(table))]
    assert config["molecules"] == len(smiles)
    text, ends = bytes(t["scaffold_smiles_bytes"]), t["scaffold_smiles_offsets"]
    scaffolds = []
    for i, s in enumerate(smiles):
        mol = Chem.MolFromSmiles(s)
        atoms, bonds = features(mol)
        a, b = slice(*t["atom_offsets"][i : i + 2]), slice(*t["bond_offsets"][i : i + 2])
        assert t["atoms"][a].tolist() == atoms, f"{s}: atoms\n{t['atoms'][a].tolist()}\n{atoms}"
        if "bonds" in t:
            ours = np.hstack([t["bonds"][b], t["bond_features"][b]]).tolist()
            assert ours == bonds, f"{s}: bonds\n{ours}\n{bonds}"
        k = t["scaffold"][i]
        scaffolds.append(MurckoScaffoldSmiles(mol=mol, includeChirality=False))
        assert text[ends[k] : ends[k + 1]].decode() == scaffolds[-1], f"{s}: scaffold"
    if split:
        out = folder / "split.csv"
        words = ["train", "--task", "molecules", "--data", folder, "--split", "scaffold", "--save-split", out, "--out", folder / "run", "--layers", "0",
                 "--steps", "1", "--device", "cpu", "--channels", "32", "--heads", "2"]
        done = subprocess.run([fiedler, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        parts = [row["part"] for row in csv.DictReader(open(out))]
        assert parts == deepchem_scaffold_split(scaffolds), f"{table}: the scaffold split is not DeepChem's"
    print(f"{pathlib.Path(table).name}: {len(smiles)} molecules, {len(t['atoms'])} atoms as RDKit's Python has them")


def main():
    fiedler = sys.argv[1]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        made = scratch / "made.csv"
        made.write_text("smiles,y\n" + "".join(f"{s},{i}\n" for i, s in enumerate(SMILES)))
        check(fiedler, made, "smiles", scratch / "made", split=False)
        data = pathlib.Path(os.environ.get("FIEDLER_SHARED_DATA") or ROOT.parent / "shared/data") / "molecules.tar.xz"
        if not data.exists():
            print(f"NOT TESTED: the real molecules ({data.name} is not in FIEDLER_SHARED_DATA or ../shared/data)")
            return
        with tarfile.open(data) as tar:
            tar.extractall(scratch)
        for name in ("esol", "freesolv", "bbbp"):
            check(fiedler, scratch / "moleculenet" / f"{name}.csv", "smiles", scratch / name, split=True)


main()
