"""Wrong command lines of `metaal`: status 2 and one line that says what is wrong, with nothing computed or written.

    python tests/campaigns/cli.py

Gate: `tests/test_cli.py` takes every second of them. Ten seconds.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import folders
import numpy as np

from metaal_jax import cli


class Mistake(NamedTuple):
    """Words after `metaal`, and what must be said."""

    words: str
    said: str


TABLE = "name,a,b,kind\nu,1,2,x\nv,2,1,y\nw,3,5,\n"
FILES = {
    "good.csv": TABLE,
    "labels.csv": "row,label\n0,x\n1,y\n",
    "one.csv": "row,label\n0,x\n",
    "late.csv": "row,label\n0,x\n7,y\n",
    "twice.csv": "row,label\n0,x\n1,y\n0,z\n",
    "wide.csv": "row,label,more\n0,x,1\n",
    "header.csv": "place,label\n0,x\n",
    "text.csv": "a,city\n1,Oslo\n2,Rome\n",
    "word.csv": "a,b\n1,2\n3,many\n",
    "comma.csv": "a;b\n1;2\n3;4,5\n",
    "hole.csv": "a,b\n1,2\n3,\n",
    "nan.csv": "a,b\n1,2\n3,nan\n",
    "ragged.csv": "a,b\n1,2\n3\n",
    "quote.csv": 'a,b\n1,2\n"3,4\n',
    "names.csv": "a,b\n",
    "empty.csv": "",
    "same.csv": "a,a,b\n1,2,3\n4,5,6\n",
    "ids.csv": "id,a\nu,1\nu,2\n",
    "noid.csv": "id,a\nu,1\n,2\n",
    "counted.csv": "0,1,2\n5,6,7\n",
    "mixed.csv": "id,1,2\nu,3,4\n",
    "rows.txt": "1 2\n",
    "broken.npy": "no array",
    "broken.npz": "no archive",
    "broken.json": "{",
}
MISTAKES = (
    Mistake("", "give a subcommand"),
    Mistake("sugest rows.npy", "did you mean suggest?"),
    Mistake("--nothing", "unknown subcommand '--nothing'"),
    # Words and numbers.
    Mistake("suggest", "FILE"),
    Mistake("suggest rows.npy --labls labels.csv", "'--labls' (did you mean --labels?)"),
    Mistake("suggest rows.npy more.npy", "unknown option 'more.npy'"),
    Mistake("suggest rows.npy -k 0", "-k: '0' must be a whole number at least 1"),
    Mistake("suggest rows.npy -k many", "-k: 'many' must be a whole number"),
    Mistake("suggest rows.npy -k 2.5", "-k: '2.5' must be a whole number"),
    Mistake("suggest rows.npy -k 99999999999", "from 1 to 2147483647"),
    Mistake("suggest rows.npy --seed -1", "--seed: '-1' must be a whole number from 0 to 4294967295"),
    Mistake("suggest rows.npy --seed 99999999999999999999", "must be a whole number from 0 to"),
    Mistake("suggest rows.npy --members 1", "--members: '1' must be"),
    Mistake("suggest rows.npy --rounds 0", "--rounds: '0' must be"),
    Mistake("suggest rows.npy --scale rows", "choose from"),
    Mistake("suggest rows.npy --strategy badg", "did you mean badge"),
    Mistake("suggest rows.npy --strategy igs", "igs is for targets"),
    Mistake("suggest rows.npy --strategy oracle", "run it with compare"),
    Mistake("suggest rows.npy --strategy albl", "give rounds="),
    Mistake("suggest rows.npy --strategy broken.json", "broken.json"),
    Mistake("suggest rows.npy --learner linaer", "did you mean linear?"),
    Mistake("suggest rows.npy --learner broken.json", "broken.json holds no learner"),
    Mistake("suggest rows.npy --labels labels.csv --label-column y", "not allowed with"),
    Mistake("suggest good.csv --id name --label-column name", "must be different columns"),
    # Files of rows.
    Mistake("suggest nothing.npy", "nothing.npy: no such file"),
    Mistake("suggest folder", "folder: no such file"),
    Mistake("suggest rows.txt", ".npy, .npz and .csv"),
    Mistake("suggest broken.npy", "broken.npy cannot be read"),
    Mistake("suggest broken.npz", "broken.npz cannot be read"),
    Mistake("suggest objects.npy", "plain arrays of numbers"),
    Mistake("suggest line.npy", "must be rows [n, d]"),
    Mistake("suggest inf.npy", "inf"),
    Mistake("suggest words.npy", "numbers"),
    Mistake("suggest other.npz", "holds z, and no rows as an array x"),
    Mistake("suggest rows.npz --id name", "and no --id name"),
    Mistake("suggest rows.npz --label-column short", "one entry for each of the 6 rows"),
    Mistake("suggest rows.npy --drop a", "--drop is for .csv"),
    Mistake("suggest rows.npy --header no", "--header is for .csv"),
    Mistake("suggest text.csv", "text.csv line 2, column city: 'Oslo' is text; leave the column out with"),
    Mistake("suggest word.csv", "word.csv line 3, column b: 'many' is no number"),
    Mistake("suggest comma.csv", "comma.csv line 3, column b: '4,5' is no number; write decimals with a point"),
    Mistake("suggest hole.csv", "hole.csv line 3, column b is empty"),
    Mistake("suggest nan.csv", "nan.csv line 3, column b: 'nan' is no finite number"),
    Mistake("suggest ragged.csv", "ragged.csv line 3 has 1 cells, line 1 has 2"),
    Mistake("suggest quote.csv", "quote.csv line 3: "),
    Mistake("suggest names.csv", "holds no rows"),
    Mistake("suggest empty.csv", "empty.csv is empty"),
    Mistake("suggest latin.csv", "latin.csv is no text in UTF-8"),
    Mistake("suggest counted.csv", "say --header yes or --header no"),
    Mistake("suggest mixed.csv", "say --header yes or --header no"),
    Mistake("suggest same.csv --drop a", "several columns 'a'"),
    Mistake("suggest good.csv --drop height", "no column 'height', which --drop asks for; its columns are name, a, b"),
    Mistake("suggest good.csv --drop name --drop a --drop b --drop kind", "no column of numbers is left"),
    Mistake("suggest good.csv --id name --drop name", "is asked for and given to --drop"),
    Mistake("suggest ids.csv --id id", "row 1 is called 'u' like row 0"),
    Mistake("suggest noid.csv --id id", "row 1 has no name"),
    # Labels.
    Mistake("suggest rows.npy --labels nothing.csv", "nothing.csv: no such file"),
    Mistake("suggest rows.npy --labels late.csv", "late.csv line 3, column row: no row '7'; rows are 0 to 5"),
    Mistake("suggest rows.npy --labels twice.csv", "twice.csv line 4, column label: row 0 is 'z' here and 'x' in"),
    Mistake("suggest rows.npy --labels wide.csv", "lines of two cells"),
    Mistake("suggest rows.npy --labels header.csv", "header.csv line 1, column row: no row 'place'"),
    Mistake("suggest good.csv --id name --drop kind --labels labels.csv", "no row '0'; --id name has no such name"),
    Mistake("suggest good.csv --label-column colour", "no column 'colour', which --label-column asks for"),
    Mistake("predict rows.npy", "there are no labels"),
    Mistake("predict rows.npy --labels one.csv", "only the class 'x' has labels"),
    # Places.
    Mistake("suggest rows.npy --out /proc/no/file", "give another --out"),
    Mistake("suggest rows.npy --out good.csv/file", "is a file; give another --out"),
    Mistake("suggest rows.npy --out folder", "folder is a folder"),
    Mistake("suggest rows.npy --state folder", "folder is a folder"),
    Mistake("suggest rows.npy --state broken.json", "broken.json holds no state"),
    Mistake("predict rows.npy --labels labels.csv --out folder", "folder is a folder"),
    Mistake("compare iris --save-results /proc/no/file", "give another --save-results"),
    Mistake("compare iris --picture curves.pdf", "must end in .png"),
    Mistake("compare iris wine --picture labels.csv", "labels.csv is a file"),
    # Comparisons.
    Mistake("compare", "SET"),
    Mistake("compare iriss", "iriss"),
    Mistake("compare iris iris", "the same set is given twice"),
    Mistake("compare iris good.csv --strategies random", "good.csv: give --label-column"),
    Mistake("compare good.csv --id name", "unknown option '--id'"),
    Mistake("compare iris --strategies random,badg --budget 20", "did you mean badge"),
    Mistake("compare iris --strategies random,random", "names something twice"),
    Mistake("compare iris --strategies random,,margin", "must be a list with commas"),
    Mistake("compare iris --strategies igs --budget 20", "igs is for targets"),
    Mistake("compare iris --budget 15", "budget=15 must be a multiple of batch_size=10"),
    Mistake("compare iris --budget 500", "a smaller budget"),
    Mistake("compare iris --seeds 0", "--seeds: '0' must be"),
    Mistake("compare iris --pool 140 --test 40 --budget 10", "there are 150"),
    Mistake("compare iris --drop a", "--drop is for .csv"),
    # The main job.
    Mistake("study --budgt 30", "did you mean --budget?"),
    Mistake("study --budget 0", "--budget 0 must be at least 1"),
    Mistake("study --seeds many", "--seeds"),
    Mistake("study --strategies badg", "did you mean badge"),
    Mistake("study --learners maml,protnet", "did you mean protonet"),
    Mistake("study --source nothing.npz", "no such file"),
    Mistake("study --save-results /proc/no/file.json", "give another --save-results"),
    # Tasks of one's own.
    Mistake("train rows.npz --label-column y --out t.json", "--group-column"),
    Mistake("train rows.npz --label-column y --group-column y --out t.json", "must be different columns"),
    Mistake("train rows.npz --label-column y --group-column g --out t.json --rate nan", "--rate: 'nan' must be"),
    Mistake("train rows.npz --label-column y --group-column g --out t.json --held-out 1", "below 1"),
    Mistake("train rows.npz --label-column y --group-column g --out t.json --shots 1,no", "--shots: 'no' must be"),
    Mistake("train rows.npz --label-column y --group-column g --out t.json --learner mamal", "maml"),
    Mistake("train rows.npz --label-column y --group-column g --out /proc/no/t.json", "give another --out"),
    Mistake("train rows.npz --label-column y --group-column g --out t.json --shots 5", "meta_train: "),
    # The others.
    Mistake("prepare", "NAME"),
    Mistake("prepare nothing_of_the_kind", "nothing_of_the_kind"),
    Mistake("strategies badg", "did you mean badge"),
    Mistake("strategies random margin", "unknown option 'margin'"),
)


def prepare(folder: Path) -> None:
    """The files that the command lines name."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "latin.csv").write_bytes("a,b\n1,é\n".encode("latin-1"))
    (folder / "folder").mkdir()
    rows = np.arange(12.0).reshape(6, 2)
    arrays = {"rows": rows, "line": rows[0], "inf": np.where(rows == 3, np.inf, rows), "words": rows.astype(str)}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "objects.npy", np.asarray([[{}]]), allow_pickle=True)
    np.savez(folder / "rows.npz", x=rows, y=np.arange(6) % 2, g=np.arange(6) // 2, short=np.arange(3))
    np.savez(folder / "other.npz", z=rows)


def command(mistake: Mistake, folder: Path) -> str:
    """What is wrong with what `metaal` does with a command line; nothing if it is refused as it should be."""
    before, place = folders.contents(folder), Path.cwd()
    os.chdir(folder)
    try:
        status, said, fault = folders.attempt(lambda: cli.main(mistake.words.split()))
    finally:
        os.chdir(place)
    changed = folders.contents(folder).keys() - before.keys()
    if fault or status != 2 or len(said) != 1 or not said[0].startswith("error: ") or mistake.said not in said[0]:
        return f"metaal {mistake.words}: status {status}, {said} {fault}"
    return f"metaal {mistake.words}: it wrote {', '.join(changed)}" if changed else ""


def main() -> int:
    """Tries all of them."""
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        wrong = list(filter(None, (command(mistake, Path(place)) for mistake in MISTAKES)))
    print(f"{len(MISTAKES)} wrong command lines, {len(wrong)} not refused as they should be")
    for line in wrong:
        print(f"  {line}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
