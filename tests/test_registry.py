"""Laws of finding parts: what a name stands for, whose it is, what is imported, what is refused."""

import functools
import hashlib
import subprocess
import sys
import textwrap
from typing import Any

import pydantic
import pytest

from fedjaxprune import registry
from fedjaxprune.data.sources import files
from fedjaxprune.errors import ConfigError, FedJaxPruneError, first_line, near_miss
from fedjaxprune.method import Method
from fedjaxprune.registry import imports, listing
from fedjaxprune.settings import Settings, setting

HEAD = """
from fedjaxprune.method import Method
from fedjaxprune.registry import Part
from fedjaxprune.settings import Settings, setting
"""
METHOD = (
    HEAD
    + """
class Mine(Settings):
    rate: float = setting(0.5, "A rate.", ge=0)

def build(settings, task):
    return ("built", settings.rate, task)
"""
)
IMPORTED = "X cannot be imported ("
NO_MODEL = ", not a model: it must be a Part or a function of input_shape and num_classes."
NO_CLASS = ", not a model: "
NEITHER = (
    ", which is neither a setting (keyword-only and annotated) nor one of input_shape, num_classes."
)


def write(file, text, doc=""):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text((f'"""{doc}"""\n' if doc else "") + textwrap.dedent(text))
    return file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Put a package of built-ins in the place of fedjaxprune's; its files are named as the test."""
    top = f"parts_{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]}"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for kind, one in registry.KINDS.items():
        monkeypatch.setitem(registry.KINDS, kind, one._replace(place=f"{top}.{kind}s"))
    root = tmp_path / top
    variants = (
        'METHOD = Method(build, Mine, variants={"plain": {"rate": 0.0}, "far": {"a.b": 1}})\n'
    )
    write(root / "__init__.py", "")
    write(root / "methods" / "__init__.py", "")
    write(root / "methods" / "pruned.py", METHOD + variants, "Pruned: it prunes.\n\nMore.")
    write(
        root / "methods" / "large" / "__init__.py",
        METHOD + "METHOD = Method(build, Mine)",
        "Large.",
    )
    write(root / "methods" / "_shared.py", "raise RuntimeError")
    write(root / "methods" / "no_method.py", "x = 1")
    write(root / "methods" / "unfinished.py", "METHOD = (")
    write(
        root / "methods" / "broken.py", "\n\nimport no_such_package_at_all\nMETHOD = 1", "Broken."
    )
    write(root / "models" / "__init__.py", "")
    table = 'PARTS = {"tiny_net": Part(build=lambda s: 1, summary="A net " "of one layer."), '
    table += '"tiny_mlp": Part(build=lambda s: 2)}\n'
    write(root / "models" / "nets.py", HEAD + table, "Networks.")
    write(root / "models" / "tools.py", "x = 1", "No parts here.")
    table = (
        'PARTS: dict[str, Part] = {"tfds": Part(build=lambda s: 3), "digits": Part(lambda s: 4)}'
    )
    write(root / "datasets.py", HEAD + table, "Data.")
    return root


def install(root, name, points, version="1.2", text="", module="lab_mod"):
    """Write the metadata of an installed distribution, and one module."""
    info = root / f"{name.replace('-', '_')}-{version}.dist-info"
    write(
        info / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: S.\n"
    )
    write(info / "entry_points.txt", points)
    if text:
        write(root / f"{module}.py", text)


def refused(kind: str, name: Any, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        registry.find(kind, name, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text[-1] in ".?"
    return text


def test_a_built_in_method_is_a_file_and_nothing_else_is_imported(folder):
    found = registry.find("method", "pruned")
    assert (found.kind, found.name, dict(found.variant)) == ("method", "pruned", {})
    assert found.origin == registry.Origin("built-in")
    assert found.part.build(found.part.settings(rate=2), "task") == ("built", 2.0, "task")
    loaded = [name for name in sys.modules if name.startswith(f"{folder.name}.methods.")]
    assert loaded == [f"{folder.name}.methods.pruned"]
    assert registry.find("method", "large").part.settings().rate == 0.5


def test_a_variant_is_addressed_through_its_method(folder):
    assert dict(registry.find("method", "pruned/plain").variant) == {"rate": 0.0}
    assert dict(registry.find("method", "pruned/far").variant) == {"a.b": 1}
    assert registry.find("method", "pruned/far").name == "pruned/far"
    text = refused("method", "pruned/plane")
    assert "must be one of plain, far, got 'plane'; did you mean 'plain'?" in text
    assert refused("method", "large/plain").startswith("method: 'large' has no variants")
    assert "did you mean 'pruned/plain'?" in refused("method", "prned/plain")


def test_other_kinds_have_tables_and_only_the_module_of_the_name_is_imported(folder):
    assert registry.find("model", "tiny_net").part.build(None) == 1
    assert registry.find("dataset", "digits").part.build(None) == 4
    assert f"{folder.name}.models.tools" not in sys.modules


def test_listing_reads_text_and_imports_nothing(folder):
    listed = registry.names("method")
    assert list(listed) == ["broken", "large", "pruned", "unfinished"]
    assert listed["pruned"] == registry.Listed(
        "Pruned: it prunes.",
        registry.Origin("built-in"),
        {"plain": "rate = 0.0", "far": "a.b = 1"},
    )
    models = registry.names("model")
    assert {name: one.summary for name, one in models.items()} == {
        "tiny_net": "A net of one layer.",
        "tiny_mlp": "Networks.",
    }
    assert list(registry.names("dataset")) == ["tfds", "digits"]
    assert registry.names("uplink") == {}
    assert not [name for name in sys.modules if name.startswith(f"{folder.name}.")]


def test_importing_and_listing_the_real_ones_imports_neither_jax_nor_numpy():
    program = """
    import sys
    from fedjaxprune import registry
    before = {name for name in sys.modules if name.startswith("fedjaxprune.")}
    for kind in registry.KINDS:
        registry.names(kind)
    assert {name for name in sys.modules if name.startswith("fedjaxprune.")} == before
    heavy = {"jax", "numpy", "flax", "optax", "tensorflow_datasets", "click", "yaml"}
    print(sorted(heavy & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", list(registry.KINDS))
def test_real_built_ins_have_one_place_a_summary_and_a_plain_name(kind):
    for name, one in registry.names(kind).items():
        assert one.summary, name
        assert name.replace("_", "a").isalnum(), name
    modules = listing._modules(registry.KINDS[kind].place)
    texts = [file.read_text() for _, file in modules] if kind != "method" else []
    tables = [listing._table(listing.ast.parse(text)) for text in texts]
    assert sum(map(len, tables)) == len({name for table in tables for name in table})


def test_an_installed_package_offers_parts(folder, tmp_path):
    points = (
        "[fedjaxprune.methods]\nrigl = lab_one:METHOD\n[fedjaxprune.models]\nnet = lab_one:net\n"
    )
    text = (
        METHOD
        + 'METHOD = Method(build, Mine, variants={"v": {"rate": 1}})\n'
        + "def net(*, width: int = 3): return width\n"
    )
    install(tmp_path, "lab-one", points, text='"""From the lab."""\n' + text, module="lab_one")
    own = registry.Origin("package", package="lab-one", version="1.2")
    assert registry.names("method")["rigl"] == registry.Listed("From the lab.", own)
    assert "lab_one" not in sys.modules
    found = registry.find("method", "rigl/v")
    assert (found.origin, dict(found.variant)) == (own, {"rate": 1})
    net = registry.find("model", "net").part
    assert net.build(net.settings(width=5), input_shape=(2,), num_classes=3) == 5
    assert "did you mean 'rigl'?" in refused("method", "rigle")
    assert refused("model", "rigl") == "model: 'rigl' is a method, not a model."
    del sys.modules["lab_one"]


def test_a_package_whose_text_is_out_of_reach_is_listed_with_its_own_summary(folder, tmp_path):
    install(tmp_path, "far-lab", "[fedjaxprune.uplinks]\nfar = nowhere.at_all:PART\n")
    assert registry.names("uplink")["far"].summary == "S."
    text = refused("uplink", "far")
    assert text == (
        "uplink: 'far' of far-lab cannot be imported (ModuleNotFoundError: No module named "
        "'nowhere')."
    )


def test_a_name_that_two_packages_offer_is_refused_and_both_are_named(folder, tmp_path):
    install(tmp_path, "lab-a", "[fedjaxprune.methods]\nrigl = lab_a:METHOD\n")
    install(tmp_path, "lab-b", "[fedjaxprune.methods]\nrigl = lab_b:METHOD\n", version="3.0")
    assert refused("method", "rigl") == (
        "method: 'rigl' is offered by lab-a 1.2 and lab-b 3.0: write lab_a:METHOD or lab_b:METHOD."
    )


def test_a_built_in_is_never_shadowed(folder, tmp_path):
    install(tmp_path, "lab-c", "[fedjaxprune.methods]\npruned = lab_c:METHOD\n")
    assert registry.find("method", "pruned").origin.source == "built-in"
    assert registry.names("method")["pruned"].origin.source == "built-in"


def test_a_part_that_fails_to_import_is_reported_when_it_is_asked_for(folder):
    assert refused("method", "broken") == (
        "method: 'broken' cannot be imported (ModuleNotFoundError: No module named "
        "'no_such_package_at_all', broken.py line 4)."
    )
    assert refused("method", "unfinished") == (
        "method: 'unfinished' cannot be imported (SyntaxError: '(' was never closed "
        "(unfinished.py, line 1))."
    )


def test_a_file_is_found_with_its_checksum_and_again_when_it_changes(folder, tmp_path):
    text = METHOD + 'METHOD = Method(build, Mine, variants={"v": {"rate": 3}})\n'
    file = write(tmp_path / "own" / "mine.py", text)
    write(tmp_path / "own" / "beside_mine.py", "")
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    origin = registry.Origin("file", path=str(file.resolve()), sha256=checksum)
    for name in (f"{file}:METHOD", "own/mine.py:METHOD", "./own/mine.py:METHOD", "own/mine.py"):
        found = registry.find("method", name)
        assert (found.name, found.origin) == (name, origin)
        assert found.part is registry.find("method", name).part
    assert dict(registry.find("method", "own/mine.py:METHOD/v").variant) == {"rate": 3}
    write(file, text + "import beside_mine\nX = 1\n")
    assert registry.find("method", "own/mine.py").origin.sha256 != checksum


def test_paths_are_seen_from_where_a_run_was_started(tmp_path, monkeypatch):
    for place in ("there", "here"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "own.py").write_text(f"METHOD = {place!r}\n")
        (tmp_path / place / "x.csv").write_text(place)
    (tmp_path / "here" / "new.csv").write_text("new")
    monkeypatch.chdir(tmp_path / "here")
    assert imports.refer("own.py", "METHOD", "")[0] == "here"
    with registry.as_started_in(str(tmp_path / "there")):
        assert imports.refer("./own.py", "METHOD", "")[0] == "there"
        assert files.find("x.csv").read_text() == "there"
        assert files.find("new.csv").read_text() == "new"  # only here
        assert files.find(str(tmp_path / "here" / "x.csv")).read_text() == "here"
    assert files.find("x.csv").read_text() == "here"


def test_annotations_of_a_file_may_be_texts(folder, tmp_path):
    text = "from __future__ import annotations\n" + METHOD + "METHOD = Method(build, Mine)\n"
    file = write(tmp_path / "late.py", text + "def net(*, width: int = 2): return width\n")
    assert registry.find("method", f"{file}").part.settings().rate == 0.5
    assert registry.find("model", f"{file}:net").part.settings(width="4").width == 4


def test_a_module_is_found_from_the_working_folder(folder, tmp_path):
    file = write(tmp_path / "loose_mod.py", METHOD + "METHOD = Method(build, Mine)\n")
    found = registry.find("method", "loose_mod:METHOD")
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.origin == registry.Origin("file", path=str(file), sha256=checksum)
    assert registry.find("tracker", "pydantic:create_model").origin == registry.Origin(
        "package", package="pydantic", version=pydantic.VERSION
    )


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (None, "x.py:NAME", "'x.py:NAME' cannot be read (No such file or directory)."),
        (None, "x.py", "'x.py' cannot be read (No such file or directory)."),
        ("NAMES = 1", "x.py:NAME", "X does not exist: x.py has no NAME; did you mean 'NAMES'?"),
        ("A = 1\ndef b(): 0\n_c = 2", "x.py", "must be x.py:NAME, got X (its names are A, b)."),
        ("", "x.py", "must be x.py:NAME, got X (its names are none)."),
        ("def", "x.py", "X is no Python file (invalid syntax (<unknown>, line 1))."),
        ("def", "x.py:F", f"{IMPORTED}SyntaxError: invalid syntax (x.py, line 1))."),
        ("\n1 / 0", "x.py:F", f"{IMPORTED}ZeroDivisionError: division by zero, x.py line 2)."),
        ("raise SystemExit", "x.py:F", f"{IMPORTED}SystemExit: SystemExit, x.py line 1)."),
        ("N = 3", "x.py:N", f"X is of type int{NO_MODEL}"),
        (
            "class Net: 0",
            "x.py:Net",
            f"X is the class Net{NO_CLASS}name a function that makes one,",
        ),
        (
            "class Net:\n init = apply = 0",
            "x.py:Net",
            f"X is the class Net{NO_CLASS}name an instance of it, such as `net = Net(...)`, or a ",
        ),
        ("class A:\n def __call__(self): 0\nn = A()", "x.py:n", f"X is of type A{NO_MODEL}"),
        (HEAD + "P = Part(build=3)", "x.py:P", "X has a `build` that is no function."),
        (HEAD + "P = Part(len, dict)", "x.py:P", "X has `settings` that are no subclass of "),
        ("def f(*, name: int = 1): 0", "x.py:f", "X has a setting called 'name', which a config "),
        (METHOD + "P = Method(build, Mine)", "x.py:P", "X is a method, not a model."),
        ("def f(width, *, input_shape): 0", "x.py:f", f"X has the parameter 'width'{NEITHER}"),
        ("def f(*, width=3): 0", "x.py:f", f"X has the parameter 'width'{NEITHER}"),
        ("def f(*, w: 'No' = 3): 0", "x.py:f", "X has a signature that fails: name 'No' is not "),
        ("class Z: 0\ndef f(*, width: Z = 3): 0", "x.py:f", "X has unusable settings: "),
    ],
)
def test_what_a_file_can_have_wrong_is_one_sentence(folder, tmp_path, text, name, said):
    if text is not None:
        write(tmp_path / "x.py", text)
    text = refused("model", name).removeprefix("model").removeprefix(":").strip()
    assert text.startswith(said.replace("X ", f"{name!r} "))


def test_an_unknown_name_says_what_is_allowed_and_where_it_stands(folder):
    assert refused("model", "tiny_nett", path="model.name") == (
        "model.name must be one of tiny_net, tiny_mlp, path/to/file.py:NAME or "
        "package.module:NAME, got 'tiny_nett'; did you mean 'tiny_net'?"
    )
    assert refused("method", "tiny_net") == "method: 'tiny_net' is a model, not a method."
    assert refused("uplink", "pruned") == "uplink: 'pruned' is a method, not an uplink."
    assert refused("method", "").endswith("got ''.")
    assert len(refused("model", "x" * 999)) < 250
    assert refused("models", "a").startswith("the kind must be one of method, model, dataset, ")
    for value in (3, None, 0.5, ["a"], {}):
        assert "it must be a Method, a Part or a function." in refused("method", value)
    assert issubclass(ConfigError, FedJaxPruneError)


@pytest.mark.parametrize(
    "name", ["fashion_mnist", "iris", "emnist/byclass", "c4/en.x-y:3.0.1", "mnist:3.0.1"]
)
def test_any_other_data_set_is_one_of_tfds(folder, name):
    found = registry.find("dataset", name)
    assert (found.name, dict(found.variant)) == (name, {"tfds_name": name})
    assert found.part is registry.find("dataset", "tfds").part
    assert dict(registry.find("dataset", "tfds").variant) == {}


@pytest.mark.parametrize("name", ["digit", "tiny_net", "fashion mnist", "../x", "", "3d"])
def test_what_does_not_look_like_a_name_of_tfds_is_refused(folder, name):
    refused("dataset", name)
    refused("model", "fashion_mnist")


class Width(Settings):
    width: int = setting(3, "How wide.")


def _build(settings: Width, task: Any) -> Any:
    return settings, task


def make_net(input_shape, *, num_classes, width: int = 3):
    """Make a net.

    More.
    """
    return input_shape, num_classes, width


def split(labels, *, num_clients, alpha: float = 0.5):
    return labels, num_clients, alpha


def test_values_are_parts_too():
    by_value = registry.Origin("value")
    found = registry.find("model", make_net)
    assert (found.name, found.origin, found.part.summary) == ("make_net", by_value, "Make a net.")
    own = found.part.settings(width=7)
    assert found.part.build(own, input_shape=(2,), num_classes=9) == ((2,), 9, 7)
    given = registry.Part(make_net, Width)
    assert registry.find("model", given).part is given
    method = Method(_build, Width)
    assert registry.find("method", method).part is method
    assert registry.find("method", registry.find("method", method)).part is method
    partial = registry.find("model", functools.partial(make_net, (4,), width=5))
    assert partial.part.build(partial.part.settings(), num_classes=1) == ((4,), 1, 5)
    assert refused("model", method).endswith("is a method, not a model.")
    assert refused("model", split).startswith(
        "model: the function 'split' has the parameter 'labels', which is neither a setting "
    )


def test_a_function_and_a_part_become_methods():
    def mine(task, *, rate: float = 0.25):
        return task, rate

    made = registry.find("method", mine).part
    assert isinstance(made, Method)
    assert registry.find("method", registry.Part(_build, Width)).part == Method(_build, Width)
    assert made.build(made.settings.model_validate({"rate": 1}), "task") == ("task", 1.0)


def test_positional_context_is_passed_by_the_names_of_the_kind():
    made = registry.find("partition", split).part
    assert made.build(made.settings(alpha=2), "rng", "labels", num_clients=3, keys=None) == (
        "labels", 3, 2.0
    )  # fmt: skip
    in_order = registry.part(lambda rng, labels, *, num_clients: (rng, labels, num_clients))
    assert in_order.build(Settings(), 1, 2, num_clients=3, keys=4) == (1, 2, 3)


def test_a_function_of_settings_is_a_build():
    def build(settings: Width, *, input_shape, num_classes):
        return settings.width, input_shape, num_classes

    made = registry.find("model", build).part
    assert (made.build, made.settings) == (build, Width)


def test_annotations_of_context_may_be_known_to_a_checker_only():
    def net(input_shape: "Unknown", *, width: "int" = 3) -> "Unknown":  # type: ignore  # noqa: F821
        return input_shape, width

    made = registry.find("model", net).part
    assert made.build(made.settings(width="4"), input_shape=2, num_classes=3) == (2, 4)


def test_a_function_for_a_tracker_is_what_is_built():
    assert registry.find("tracker", split).part.build("folder", {}, 3) is split


def test_a_setting_of_a_function_may_be_described():
    def net(*, width: int = setting(4, "How wide.", unit="channels", ge=1)):
        return width

    made = registry.part(net)
    row = registry.describe_settings(made.settings)[0]
    assert row == ("width", "integer", "4", "channels", "at least 1", "How wide.")
    assert made.build(made.settings()) == 4
    with pytest.raises(pydantic.ValidationError):
        made.settings.model_validate({"width": 0})


def test_errors_share_their_sentences():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert near_miss("Fed-Dip", ["feddip", "fedavg"]) == "; did you mean 'feddip'?"
    assert near_miss("zzz", ["feddip"]) == "."
