"""Whole commands on two hundred run folders from strangers, each within ten seconds."""

import os
import pathlib
import random
import re
import shutil

import pytest

from fedjaxprune.experiment.folder import failure, layout
from tests import damage
from tests.at_once import Said, Worker

SEED, PARTS = 16, 8
MEMORY = 2**30  # bytes that a command may take beyond those that it began with
DEEPEST = 100  # levels that are looked at
SETTINGS = [
    "--method", "gradual_magnitude", "--model", "mlp", "--hidden-sizes", "8", "--dataset", "digits",
    "--num-clients", "4", "--num-rounds", "4", "--cohort-size", "2", "--batch-size", "16",
    "--steps", "1", "--checkpoints.every", "1", "--checkpoints.keep", "3", "--devices", "1",
    "--chunk-size", "1",
]  # fmt: skip
LINE = re.compile(r"(warning|note|error): [^\n]+")


def begin(folder: pathlib.Path) -> Worker:
    """Make a run that failed in its last round, and a sound one; start the process."""
    base, other = folder / "base", folder / "other"
    worker = Worker(folder, lambda: [["run", *SETTINGS, "--folder", str(base)]])
    try:
        worker.run(["list", "method"])
    finally:
        worker.close()
    shutil.copytree(base, other)
    (base / layout.SUMMARY).unlink()
    shutil.rmtree(base / layout.CHECKPOINTS / "4")
    rows = (base / layout.METRICS).read_text().splitlines(keepends=True)
    (base / layout.METRICS).write_text("".join(rows[:-1]))
    (base / failure.FAILED).write_text('{"round": 4, "error": "OSError: no space left"}\n')

    def prepare() -> list[list[str]]:
        shutil.rmtree(folder / "first", ignore_errors=True)
        (folder / "first" / "made").mkdir(parents=True)
        shutil.copytree(base, folder / "first" / "run")
        return commands(folder / "first" / "run", other)

    return Worker(folder, prepare)


def commands(run: pathlib.Path, other: pathlib.Path) -> list[list[str]]:
    """Give the four commands on a run; the last one continues it."""
    made = run.parent / "made"
    return [
        ["compare", str(run), str(other)],
        ["report", str(run), str(other), "--out", str(made / "report.html")],
        ["export", str(run), "--out", str(made / "export")],
        ["run", "--resume", str(run)],
    ]


def seen(folder: pathlib.Path, but: tuple[str, ...]) -> dict[str, object]:
    """Note what is in a folder: kinds, sizes, times and contents."""
    found: dict[str, object] = {}
    for root, folders, files in os.walk(folder):
        if root == str(folder):
            folders[:] = [name for name in folders if name not in but]
        if root.count(os.sep) > str(folder).count(os.sep) + DEEPEST:
            folders.clear()
        for path in (os.path.join(root, name) for name in (*folders, *files)):
            about = os.lstat(path)
            content = os.readlink(path) if os.path.islink(path) else None
            if os.path.isfile(path) and about.st_size < 2**24:
                content = pathlib.Path(path).read_bytes()
            found[path] = (about.st_mode, about.st_size, about.st_mtime_ns, content)
    return found


def faults_of(args: list[str], said: Said) -> list[str]:
    """List what is wrong with the end of a command."""
    lines = said.err.splitlines()
    ends = [line for line in lines if line.startswith("error: ")]
    found = []
    if said.status not in (0, 2):
        found.append(f"status {said.status}")
    if said.status == 2 and (len(ends) != 1 or lines[-1:] != ends):
        found.append("no single sentence")
    if said.status == 0 and (ends or not said.out.strip()):
        found.append("no result")
    if not all(LINE.fullmatch(line) for line in lines):
        found.append("other words on stderr")
    if said.bytes > MEMORY:
        found.append(f"{said.bytes / 2**20:.0f} MiB")
    return [f"{args[0]}: {one}: {said.out[-300:]} {said.err[-1200:]}" for one in found]


def faults(name: str, change: damage.Damage, base: pathlib.Path, worker: Worker) -> list[str]:
    """Damage a copy of a run, run all commands on it, and list what is wrong."""
    place = worker.folder / "place"
    shutil.rmtree(place, ignore_errors=True)
    for folder in (damage.OUTSIDE, "made"):
        (place / folder).mkdir(parents=True)
    run = place / "run"
    shutil.copytree(base, run)
    change(run, random.Random(name))
    found = []
    for args in commands(run, worker.folder / "other"):
        own = ("made", "run") if "--resume" in args else ("made",)  # where it may write
        before = seen(place, own)
        said = worker.run(args)
        found += faults_of(args, said)
        after = seen(place, own)
        paths = {path for path in {*before, *after} if before.get(path) != after.get(path)}
        found += [f"{args[0]}: changed {sorted(paths)[:5]}"] if paths else []
    return [f"{name}: {one}" for one in found]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """Give a process that works in a folder with a run and a sound one."""
    made = begin(tmp_path_factory.mktemp("hostile"))
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.xdist_group("hostile folders")
@pytest.mark.parametrize("part", range(PARTS))
def test_commands_on_a_hostile_folder_end_with_a_sentence_or_a_result(worker, part):
    plans = damage.plans(worker.folder / "base", SEED)
    assert len(plans) == damage.NUMBER
    found = []
    for name in list(plans)[part::PARTS]:
        found += faults(name, plans[name], worker.folder / "base", worker)
    assert not found, "\n".join(found)
