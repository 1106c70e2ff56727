"""Two hundred ways to damage a run folder, drawn by a seed: every file of it, in every kind."""

import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator

from fedjaxprune.experiment.folder import layout

Damage = Callable[[pathlib.Path, random.Random], None]  # of a run folder

NUMBER = 200
_JSON = ("_METADATA", "about/metadata", ".json")  # ends of names of files that hold JSON
OUTSIDE = "outside"  # folder beside the run, to which links lead


def beside(run: pathlib.Path) -> pathlib.Path:
    """Give the folder beside a run; it is never to be written."""
    return run.parent / OUTSIDE


# What happens to a whole file.


def _cut(path: pathlib.Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(max(1, len(content)))])


def _double(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(2 * path.read_bytes())


def _empty(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def _flip(path: pathlib.Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(8):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)


def _zeros(path: pathlib.Path, rng: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _sparse(path: pathlib.Path, rng: random.Random) -> None:
    """Append zeros that take no room on the disk."""
    os.truncate(path, 2**36)


def _remove(path: pathlib.Path, rng: random.Random) -> None:
    path.unlink()


def _pipe(path: pathlib.Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _device(path: pathlib.Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/dev/tty", "/dev/stdin"]))


def _link(path: pathlib.Path, rng: random.Random) -> None:
    """Leave a link to the same content outside."""
    target = _outside(path)
    shutil.move(path, target)
    path.symlink_to(target)


def _hard_link(path: pathlib.Path, rng: random.Random) -> None:
    target = _outside(path)
    shutil.copy(path, target)
    path.unlink()
    os.link(target, path)


def _loop(path: pathlib.Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _folder(path: pathlib.Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "inner").write_text("text")


def _brackets(path: pathlib.Path, rng: random.Random) -> None:
    path.write_text(rng.choice("[{(") * 20_000)


def _closed(path: pathlib.Path, rng: random.Random) -> None:
    path.write_text("[" * 20_000 + "]" * 20_000)


def _outside(path: pathlib.Path) -> pathlib.Path:
    """Name a new file outside of the run of a file."""
    run = next(one for one in path.parents if (one.parent / OUTSIDE).is_dir())
    return run.parent / OUTSIDE / str(len(list((run.parent / OUTSIDE).iterdir())))


OF_FILE = {
    "cut": _cut,
    "double": _double,
    "empty": _empty,
    "flip": _flip,
    "zeros": _zeros,
    "sparse": _sparse,
    "remove": _remove,
    "pipe": _pipe,
    "device": _device,
    "link": _link,
    "hard link": _hard_link,
    "loop": _loop,
    "folder": _folder,
    "brackets": _brackets,
    "closed brackets": _closed,
}

# What happens to a value in a file of JSON, or in the config.

VALUES = {
    "infinity": "Infinity",
    "nan": "NaN",
    "digits": "9" * 5_000,
    "beyond int64": str(2**64),
    "int64": str(2**63 - 1),
    "int32": str(2**31 - 1),
    "billion": "1000000000",
    "large": "1e308",
    "negative": "-1",
    "half": "0.5",
    "zero": "0",
    "true": "true",
    "null": "null",
    "list": "[1, [2], {}]",
    "no list": "[]",
    "mapping": '{"a": {"b": []}}',
    "deep": "[" * 5_000 + "]" * 5_000,
    "markup": '"[/bold][link=file:///x]<script>"',
    "control": '"\\u001b]0;x\\u0007 \\u202eabc"',
    "surrogate": '"\\ud800"',
    "formula": '"=HYPERLINK(1)"',
    "path": '"../../../outside"',
    "long": json.dumps("x" * 100_000),
}


def _paths(tree: object, path: tuple = ()) -> Iterator[tuple]:
    """List the places of all values of a tree."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield (*path, key)
        yield from _paths(value, (*path, key))


def _replace(text: str, value: str, rng: random.Random) -> str:
    """Put a value at some place of a text of JSON."""
    tree = json.loads(text)
    *steps, last = rng.choice(list(_paths(tree)))
    place = tree
    for step in steps:
        place = place[step]
    place[last] = "@@"
    return json.dumps(tree).replace('"@@"', value)


def _in_json(path: pathlib.Path, value: str, rng: random.Random) -> None:
    path.write_text(_replace(path.read_text(), value, rng))


def _in_record(path: pathlib.Path, value: str, rng: random.Random) -> None:
    rows = path.read_text().splitlines()
    row = rng.randrange(len(rows))
    rows[row] = _replace(rows[row], value, rng)
    path.write_text("\n".join(rows) + "\n")


def _in_config(path: pathlib.Path, value: str, rng: random.Random) -> None:
    """Put a value behind a key of the config; JSON is YAML, too."""
    rows = path.read_text().splitlines()
    row = rng.choice([n for n, one in enumerate(rows) if ": " in one])
    rows[row] = f"{rows[row].partition(': ')[0]}: {value}"
    path.write_text("\n".join(rows) + "\n")


# What happens to the folder as a whole.


def _write(name: str, text: str) -> Damage:
    def change(run: pathlib.Path, rng: random.Random) -> None:
        (run / name).write_text(text)

    return change


def _add(name: str, text: str) -> Damage:
    """Add lines to a file."""

    def change(run: pathlib.Path, rng: random.Random) -> None:
        (run / name).write_text((run / name).read_text() + text)

    return change


def _setting(old: str, new: str) -> Damage:
    """Change a line of the config."""

    def change(run: pathlib.Path, rng: random.Random) -> None:
        text = (run / layout.CONFIG).read_text()
        assert old in text, old
        (run / layout.CONFIG).write_text(text.replace(old, new, 1))

    return change


def _link_folder(name: str) -> Damage:
    """Move a folder outside and leave a link to it."""

    def change(run: pathlib.Path, rng: random.Random) -> None:
        shutil.move(run / name, beside(run) / "moved")
        (run / name).symlink_to(beside(run) / "moved")

    return change


def _plant(name: str) -> Damage:
    """Leave a link to a folder outside where nothing was."""

    def change(run: pathlib.Path, rng: random.Random) -> None:
        (beside(run) / "planted").mkdir()
        (beside(run) / "planted" / "file").write_text("as before")
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).symlink_to(beside(run) / "planted")

    return change


def _plant_file(name: str) -> Damage:
    def change(run: pathlib.Path, rng: random.Random) -> None:
        (beside(run) / "planted").write_text("as before")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(beside(run) / "planted")

    return change


def _step(name: str) -> Damage:
    """Name the newest checkpoint otherwise."""

    def change(run: pathlib.Path, rng: random.Random) -> None:
        newest = max((run / layout.CHECKPOINTS).iterdir(), key=lambda one: one.name)
        newest.rename(newest.with_name(name))

    return change


def _more(name: str) -> Damage:
    """Add a copy of the newest checkpoint under another name."""

    def change(run: pathlib.Path, rng: random.Random) -> None:
        newest = max((run / layout.CHECKPOINTS).iterdir(), key=lambda one: one.name)
        shutil.copytree(newest, newest.with_name(name))

    return change


def _nested(name: str) -> Damage:
    def change(run: pathlib.Path, rng: random.Random) -> None:
        path = run / name
        path.mkdir(parents=True, exist_ok=True)
        here = os.open(path, os.O_RDONLY)
        for _ in range(800):  # longer together than a path may be
            os.mkdir("d" * 20, dir_fd=here)
            inner = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inner
        os.close(here)

    return change


def _crowd(name: str) -> Damage:
    """Make many files."""

    def change(run: pathlib.Path, rng: random.Random) -> None:
        (run / name).mkdir(parents=True, exist_ok=True)
        for number in range(5_000):
            (run / name / str(number)).touch()

    return change


def _arrays(shape: list[int], chunks: list[int]) -> Damage:
    """Let the newest checkpoints say that their arrays are of another shape."""

    def change(run: pathlib.Path, rng: random.Random) -> None:
        import tensorstore

        for folder in (run / layout.CHECKPOINTS).glob("*/arrays"):
            base = {"driver": "file", "path": f"{folder}/"}
            store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
            for key in store.list().result():
                if key.endswith(b".zarray"):
                    found = json.loads(store.read(key).result().value)
                    found |= {"shape": shape, "chunks": chunks, "fill_value": None}
                    store.write(key, json.dumps(found).encode()).result()

    return change


def _said_shapes(shape: list[int]) -> Damage:
    """Let what is said beside the arrays name another shape, in all places."""

    def put(tree):
        if isinstance(tree, dict):
            return {k: shape if k in ("shape", "write_shape") else put(v) for k, v in tree.items()}
        return [put(one) for one in tree] if isinstance(tree, list) else tree

    def change(run: pathlib.Path, rng: random.Random) -> None:
        for path in (run / layout.CHECKPOINTS).rglob("*"):
            if path.is_file() and path.name == "_METADATA":
                path.write_text(json.dumps(put(json.loads(path.read_text()))))

    return change


def _claimed_network(*, width: int, chunk: int) -> Damage:
    """Claim a wide network in the config, beside it and in checkpoints that lack its chunks."""

    def change(run: pathlib.Path, rng: random.Random) -> None:
        _setting("  - 8\n", f"  - {width}\n")(run, rng)
        path = run / layout.NETWORK
        known = json.loads(path.read_text())
        for one in known["params"].values():
            one[1] = [width if size == 8 else size for size in one[1]]
        path.write_text(json.dumps(known))
        _arrays([64, width], [64, chunk])(run, rng)

    return change


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
SPECIAL: dict[str, Damage] = {
    "aliases": _write(layout.CONFIG, BOMB),
    "aliases below": _add(layout.CONFIG, BOMB),
    "a merged alias": _add(layout.CONFIG, "x: &x {a: 1}\ny: {<<: *x}\n"),
    "a tag": _add(layout.CONFIG, "x: !!python/object/apply:os.system ['touch x']\n"),
    "two documents": _add(layout.CONFIG, "---\nseed: 1\n"),
    "a key twice": _add(layout.CONFIG, "seed: 0\n"),
    "keys that are no texts": _add(layout.CONFIG, "1: 2\n[a]: 3\n"),
    "a long line": _add(layout.CONFIG, f"x: {'y' * 10**6}\n"),
    "huge sizes": _setting("  - 8\n", "  - 1000000000000\n"),
    "negative sizes": _setting("  - 8\n", "  - -8\n"),
    "sizes that are texts": _setting("  - 8\n", "  - a\n  - {b: c}\n"),
    "many sizes": _setting("  - 8\n", "  - 8\n" * 3_000),
    "a setting of a model that is not there": _setting("  - 8\n", "  - 8\n  width: 3\n"),
    "a setting of a model that is lost": _setting("  hidden_sizes:\n  - 8\n", ""),
    "a model with another's settings": _setting("name: mlp", "name: lenet5"),
    "an unknown model": _setting("name: mlp", "name: '[/bold]'"),
    "a model that is a module": _setting("name: mlp", "name: 'os:system'"),
    "a model in a pipe": _setting("name: mlp", "name: '/dev/stdin.py:x'"),
    "an unknown method": _setting("name: gradual_magnitude", "name: nobody/knows"),
    "data that are a device": _setting("name: digits", "name: /dev/zero"),
    "data outside": _setting("name: digits", "name: ../outside/data.csv"),
    "many rounds": _setting("num_rounds: 4", "num_rounds: 2147483647"),
    "many clients": _setting("num_clients: 4", "num_clients: 2147483647"),
    "devices": _setting("devices: 1", "devices: 4096"),
    "a working folder that is a device": _setting("started_in: ", "started_in: /dev/null #"),
    "code of a stranger": _setting("parts: {}", "parts: {model: {name: x, sha256: '[/bold]'}}"),
    "a value in Python": _setting("parts: {}", "parts: {model: {source: value, name: x}}"),
    "arrays of 2^60 entries": _arrays([2**30, 2**30], [2**30, 2**30]),
    "arrays of 2^34 entries in one chunk": _arrays([2**34], [2**34]),
    "arrays of 2^34 entries in chunks": _arrays([2**34], [1024]),
    "arrays of negative sizes": _arrays([-8], [8]),
    "arrays with chunks of nothing": _arrays([64, 8], [0, 0]),
    "shapes of 2^60 entries": _said_shapes([2**30, 2**30]),
    "shapes that are no numbers": _said_shapes(["a"]),  # type: ignore[list-item]
    "a network of 512 GiB": _claimed_network(width=2**31 - 1, chunk=2**31 - 1),
    "a network of 16 GiB": _claimed_network(width=2**26, chunk=1024),
    "linked checkpoints": _link_folder(layout.CHECKPOINTS),
    "a linked checkpoint": _link_folder(f"{layout.CHECKPOINTS}/3"),
    "linked arrays": _link_folder(f"{layout.CHECKPOINTS}/3/arrays"),
    "a planted export": _plant("export"),
    "a planted draft of an export": _plant(".export.new"),
    "a planted picture": _plant_file(layout.PICTURE),
    "a planted summary": _plant_file(layout.SUMMARY),
    "planted skipped checkpoints": _plant(layout.SKIPPED),
    "planted tensorboard": _plant("tensorboard"),
    "a planted checkpoint that comes next": _plant(f"{layout.CHECKPOINTS}/4"),
    "a planted draft of a checkpoint": _plant(f"{layout.CHECKPOINTS}/4.orbax-checkpoint-tmp"),
    "a draft of a checkpoint": _more("4.orbax-checkpoint-tmp"),
    "a checkpoint with many digits": _step("9" * 60),
    "a checkpoint of round 2^63": _more(str(2**63)),
    "a negative checkpoint": _step("-3"),
    "a checkpoint with other digits": _step("٣"),
    "a checkpoint with zeros before": _more("0003"),
    "a checkpoint that is no number": _step("1e9"),
    "a checkpoint of round 0": _step("0"),
    "a checkpoint that has not been": _more("4"),
    "no checkpoint": lambda run, rng: shutil.rmtree(run / layout.CHECKPOINTS),
    "deep folders": _nested("deep"),
    "deep folders in checkpoints": _nested(f"{layout.CHECKPOINTS}/3/deep"),
    "many files": _crowd(f"{layout.CHECKPOINTS}/3/many"),
    "many checkpoints": _crowd(layout.CHECKPOINTS),
}  # fmt: skip


def plans(base: pathlib.Path, seed: int) -> dict[str, Damage]:
    """Draw the damages of a run folder by name: all special ones, then every kind in turn."""
    rng = random.Random(seed)
    names = sorted(str(one.relative_to(base)) for one in base.rglob("*") if one.is_file())
    texts: dict[str, Callable[[pathlib.Path, str, random.Random], None]]
    texts = {name: _in_json for name in names if name.endswith(_JSON)}
    texts |= {layout.CONFIG: _in_config, layout.METRICS: _in_record}
    whole = {
        f"{kind}: {name}": _on_file(name, change)
        for kind, change in OF_FILE.items()
        for name in names
    }
    odd = {
        f"{kind} in {name}": _on_value(name, put, text)
        for kind, text in VALUES.items()
        for name, put in texts.items()
    }
    # The files at the top come as often as those of checkpoints together.
    top = [pair for pair in whole.items() if "/" not in pair[0]]
    deep = [pair for pair in whole.items() if "/" in pair[0]]
    inner = list(odd.items())
    for pairs in (top, deep, inner):
        rng.shuffle(pairs)
    found = dict(SPECIAL)
    for three in zip(top, deep, inner, strict=False):
        found |= dict(three)
    return dict(list(found.items())[:NUMBER])


def _on_file(name: str, change: Damage) -> Damage:
    return lambda run, rng: change(run / name, rng)


def _on_value(
    name: str, put: Callable[[pathlib.Path, str, random.Random], None], text: str
) -> Damage:
    return lambda run, rng: put(run / name, text, rng)
