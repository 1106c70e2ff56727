"""The page about runs: what stands on it; in a browser, that it is drawn and asks for nothing."""

import base64
import gzip
import html.parser
import json
import pathlib
import re
import subprocess
import time

import numpy as np
import pytest

pytest.importorskip("plotly", reason="report needs plotly: pip install 'fedjaxprune[report]'")

from fedjaxprune import traffic
from fedjaxprune.cli.main import main
from fedjaxprune.experiment.analysis import compare, groups
from fedjaxprune.experiment.analysis.report import costs, frame, page, series
from fedjaxprune.experiment.folder import failure, load
from tests import browser
from tests.folders import MIB, big, changed, line, rising, write

DENSE = {
    "mask.sparsity": 0.0,
    "mask.sparsity_by_layer": {"a/kernel": 0.0, "b/kernel": 0.0},
    "mask.unchanged_fraction": 1.0,
}


def make(*folders):
    return page.make(*compare.of_folders(folders))


def gradual(finals, **arguments):
    """Make lines in which every number that has a picture of its own changes."""
    return [
        changed(
            one,
            {
                "mask.sparsity": 0.1 * n,
                "mask.unchanged_fraction": 0.9 if n < 2 else 0.8,
                "mask.clients_per_weight": 1.5 + n,
                "clients.participating": 2 + n,
            },
        )
        for n, one in enumerate(rising(finals, **arguments))
    ]


def unpack(text, name):
    packed = re.search(rf'id="{name}">([^<]*)<', text)
    assert packed is not None
    return gzip.decompress(base64.b64decode(packed[1])).decode()


def pictures(text):
    """Read the pictures of a page by key: variants by name."""
    made = json.loads(unpack(text, "pictures"))["pictures"]
    return {
        one["key"]: dict(zip(one["names"], map(json.loads, one["variants"]), strict=True))
        for one in made
    }


def numbers(array):
    """Read an array as plotly writes it."""
    if isinstance(array, dict):
        kinds = {"f4": np.float32, "f8": np.float64, "i4": np.int32, "i1": np.int8, "i2": np.int16}
        values = np.frombuffer(base64.b64decode(array["bdata"]), kinds[array["dtype"]])
        return values.reshape([int(n) for n in array.get("shape", str(len(values))).split(",")])
    return np.array(array)


def group(*folders):
    (members,) = groups.group(load.read_all(folders)[0])[0]
    return members


class Reader(html.parser.HTMLParser):
    """Collect addresses that a browser would ask for, and the text."""

    def __init__(self):
        super().__init__()
        self.addresses, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.texts.append(data)


def test_one_run_has_every_picture_and_asks_for_nothing(tmp_path):
    lines = [line(1, stage="warm"), *gradual([0.1, 0.2, 0.3, 0.4])[1:]]
    settings = {"method": {"name": "feddip", "sparsity": 0.7}}
    text = make(write(tmp_path / "<b>run</b>", lines, settings))
    drawn = pictures(text)
    assert list(drawn) == ["score", "loss", "sparsity", "layers", "changes", "coverage",
                           "traffic", "clients", "participation", "cohorts"]  # fmt: skip
    assert list(drawn["score"]) == ["rounds", "bytes", "FLOPs"]
    reader = Reader()
    reader.feed(text)
    assert reader.addresses == ["data:,"]  # the icon, which is empty
    assert "<b>run</b>" not in text
    assert "&lt;b&gt;run&lt;/b&gt;" in text
    assert "fedjaxprune run --method feddip" in text
    assert "finished after 4 rounds" in text
    assert "<h1>Feddip reaches 40.0 % accuracy at 30 % sparsity" in text.replace(
        "\N{NO-BREAK SPACE}", " "
    )
    assert "plotly" in unpack(text, "library")[:2000]


def test_curves_say_what_the_record_says(tmp_path):
    folder = write(tmp_path / "a", gradual([0.1, 0.2, 0.4]))
    drawn = pictures(make(folder))
    against = drawn["score"]
    for name, x in {"rounds": [1, 2, 3], "bytes": [2, 4, 6], "FLOPs": [3e9, 6e9, 9e9]}.items():
        (trace,) = against[name]["data"]
        np.testing.assert_allclose(numbers(trace["x"]), x)
        np.testing.assert_allclose(numbers(trace["y"]), [10, 20, 40])
    (changes,) = drawn["changes"][""]["data"]
    np.testing.assert_allclose(numbers(changes["y"]), [10, 10, 20], rtol=1e-6)


def test_what_is_constant_has_a_sentence_and_no_picture(tmp_path):
    one = make(write(tmp_path / "a", rising([0.1, 0.2])))
    assert list(pictures(one)) == ["score", "loss", "traffic", "clients", "participation"]
    for words in (
        "Sparsity: 50 % in every round.",
        "Sparsity by layer: in every round, a 25 %, b 50 %.",
        "Clients in a round: 2 in every round.",
    ):
        assert f"<li>{words}</li>" in one
    dense = [changed(one, DENSE) for one in rising([0.1, 0.2])]
    write(tmp_path / "s" / "dense", dense)
    write(tmp_path / "s" / "fixed", rising([0.1] * 3), {"method": {"name": "fixed"}})
    text = make(tmp_path / "s")
    for words in (
        "Sparsity, constant: fedavg 0 %; fixed 50 %.",
        "Sparsity by layer: nothing is pruned (fedavg).",
    ):
        assert f"<li>{words}</li>" in text
    assert list(pictures(text)["layers"]) == ["fixed"]  # opens on one that prunes


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.5, 0.5], "50 % in every layer and round"),
        (np.linspace(0, 0.6, 13), "in every round, from 0 % in l0 to 60 % in l12"),
    ],
)
def test_layers_of_constant_sparsity_have_a_sentence(tmp_path, values, words):
    layers = {f"l{n}/kernel": float(value) for n, value in enumerate(values)}
    lines = [changed(one, {"mask.sparsity_by_layer": layers}) for one in rising([0.1, 0.2])]
    text = make(write(tmp_path / "a", lines))
    assert f"<li>Sparsity by layer: {words}.</li>" in text
    assert "layers" not in pictures(text)


def test_every_table_scrolls_in_its_own_box_by_keyboard_too(tmp_path):
    write(tmp_path / "a", rising([0.1, 0.2]))
    write(tmp_path / "b", rising([0.1, 0.2]), {"method": {"name": "feddip"}})
    text = make(tmp_path / "a", tmp_path / "b")
    assert (
        text.count("<table>") == text.count('class="scroll many" tabindex="0" role="region"') == 2
    )


def test_a_regression_has_its_error_drawn(tmp_path):
    lines = [
        changed(one, {"test.accuracy": None, "test.error": 2.0 - n, "clients.accuracy": ...})
        for n, one in enumerate(rising([0.1, 0.2]))
    ]
    text = make(write(tmp_path / "a", lines))
    drawn = pictures(text)
    assert "clients" not in drawn
    (trace,) = drawn["score"]["rounds"]["data"]
    np.testing.assert_allclose(numbers(trace["y"]), [2, 1])
    assert "<h3>Test error</h3>" in text


def test_seeds_become_a_mean_with_a_band(tmp_path):
    write(tmp_path / "s" / "a", rising([0.1, 0.2]), seed=0)
    write(tmp_path / "s" / "b", rising([0.3, 0.6]), seed=1)
    band, mean = pictures(make(tmp_path / "s"))["score"]["rounds"]["data"]
    deviations = 100 * np.std([[0.1, 0.2], [0.3, 0.6]], axis=0, ddof=1)
    np.testing.assert_allclose(numbers(mean["y"]), [20, 40])
    low, high = np.array([[20, 40] - deviations, np.add([20, 40], deviations)])
    np.testing.assert_allclose(numbers(band["y"]), [*high, *low[::-1]], rtol=1e-6)
    assert band["legendgroup"] == mean["legendgroup"]  # hidden together


def test_equal_rounds_of_a_heat_map_are_one_block(tmp_path):
    members = group(write(tmp_path / "a", rising([0.1] * 6)))
    found = series.layers(members.runs[0])
    assert found is not None
    paths, edges, table = found
    assert paths == ["a/kernel", "b/kernel"]
    assert edges.tolist() == [0.5, 2.5, 6.5]
    assert table.tolist() == [[25, 75], [50, 50]]


def test_participation_counts_clients_that_sent_something(tmp_path):
    members = group(write(tmp_path / "a", rising([0.1] * 4)))
    # Client 0 always (twice named in round 3), 1 in rounds 1 and 4, 2 in round 2; 5 only received.
    lines = [line(1), line(2), line(4)]
    run = members.runs[0]._replace(lines=lines)
    assert series.participation(run) == {0: 3, 1: 1, 2: 1, 3: 1}


def test_the_spread_over_clients_is_read_at_tests(tmp_path):
    lines = [line(1), line(2, accuracy=0.4), line(3), line(4, accuracy=0.5)]
    found = series.spread(group(write(tmp_path / "a", lines)).runs[0])
    assert found is not None
    assert found[0].tolist() == [2, 4]
    np.testing.assert_allclose(found[1]["lowest"], [30, 40])
    np.testing.assert_allclose(found[1]["upper_quartile"], [45, 55])


def test_traffic_is_by_kind_and_direction(tmp_path):
    members = group(write(tmp_path / "a", rising([0.1, 0.1])))
    totals = series.traffic(members.runs[0])
    assert {name: row.tolist() for name, row in totals.items()} == {
        "values up": [1, 2],
        "values down": [0.75, 1.5],
        "masks down": [0.25, 0.5],
    }
    assert MIB == traffic.BITS_PER_MIB


def test_the_front_is_what_nobody_beats():
    points = [(3.0, 0.7), (1.0, 0.5), (2.0, 0.4), (3.0, 0.6), (4.0, 0.7), (5.0, 0.9)]
    assert costs.front(points) == [(1.0, 0.5), (3.0, 0.7), (5.0, 0.9)]


def test_a_failed_and_an_interrupted_run_are_shown_as_such(tmp_path):
    failed = write(tmp_path / "f", rising([0.1, 0.2]), finished=False)
    (failed / failure.FAILED).write_text('{"round": 3, "error": "OSError: <full>"}')
    broken = write(tmp_path / "b", rising([0.1]), {"method.name": "fedprox"}, finished=False)
    text = make(failed, broken)
    assert "failed in round 3: OSError: &lt;full&gt;" in text
    marks = [t["text"] for t in pictures(text)["score"]["rounds"]["data"] if "text" in t]
    assert marks == [["failed in round 3"], ["interrupted"]]
    assert all("Pareto front" not in t["name"] for t in pictures(text)["front"]["bytes"]["data"])


def test_stages_are_marked_where_they_begin(tmp_path):
    lines = [line(1, stage="warm"), line(2, stage="warm"), *gradual([0.1, 0.2, 0.3])[2:]]
    assert series.stages(group(write(tmp_path / "a", lines)).runs[0]) == [
        series.Mark(1, "warm"),
        series.Mark(3, "train"),
    ]
    layout = pictures(make(tmp_path / "a"))["sparsity"][""]["layout"]
    assert [a["text"] for a in layout["annotations"]] == ["warm", "train"]
    assert [shape["x0"] for shape in layout["shapes"]] == [0.5, 2.5]


def test_stages_of_several_methods_are_one_mark_a_round_that_says_whose_they_are(tmp_path):
    folders = []

    def marks():
        layout = pictures(make(*folders))["sparsity"][""]["layout"]
        colors = [shape["line"]["color"] for shape in layout["shapes"]]
        return dict(zip((a["text"] for a in layout["annotations"]), colors, strict=True))

    def add(name, stages, settings):
        played = zip(gradual([0.1] * 4), stages, strict=True)
        lines = [changed(one, {"stage": stage}) for one, stage in played]
        folders.append(write(tmp_path / name, lines, settings))

    add("a", ["warm", "train", "train", "train"], {"method.name": "fedavg"})
    assert marks() == {"warm": "#888888", "train": "#888888"}
    add("b", ["agree", "agree", "train", "train"], {"method": {"name": "mpfl", "votes": 1}})
    assert marks() == {
        "warm (fedavg) / agree (mpfl)": "#888888",
        "train (fedavg)": frame.LIGHT[0],
        "train (mpfl)": frame.LIGHT[1],
    }
    add("c", ["agree", "agree", "agree", "train"], {"method": {"name": "mpfl", "votes": 2}})
    assert list(marks()) == [
        "warm (fedavg) / agree (mpfl)",
        "train (fedavg)",
        "train (mpfl, method.votes 1)",
        "train (mpfl, method.votes 2)",
    ]
    del folders[0]
    assert next(iter(marks())) == "agree"  # everybody's


def test_runs_without_some_figures_have_the_other_pictures(tmp_path):
    lacking = {"clients.accuracy": ..., "mask.sparsity_by_layer": ...,
               "compute.training_flops": None, "mask.clients_per_weight": ...,
               "traffic.by_client": []}  # fmt: skip
    lines = [changed(one, lacking) for one in gradual([0.1, 0.2, 0.3])]
    drawn = pictures(make(write(tmp_path / "a", lines)))
    assert list(drawn) == ["score", "loss", "sparsity", "changes", "traffic", "cohorts"]
    assert list(drawn["score"]) == ["rounds", "bytes"]


def test_colors_stand_out_from_both_pages():
    def light(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = page._file("page.css")
    cards = re.findall(r"--card: (#\w{6})", style)
    for card, palette in zip(cards, (frame.LIGHT, frame.DARK), strict=True):
        for color in palette:
            low, high = sorted((light(card), light(color)))
            assert (high + 0.05) / (low + 0.05) >= 3, (card, color)  # WCAG's for graphics
    assert len(frame.LIGHT) == len(frame.DARK) == len(set(frame.LIGHT))


def test_no_two_of_many_runs_look_the_same():
    colors, dashes, symbols = frame.LIGHT, frame.DASHES, frame.SYMBOLS
    for other in (dashes, symbols):
        looks = {(frame.nth(colors, i), frame.nth(other, i)) for i in range(28)}
        assert len(looks) == 28


def test_the_command_writes_one_file_and_says_where(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", rising([0.1, 0.2]))
    main(["report", "a"])
    assert capsys.readouterr() == ("report: report.html\n", "")
    before = (tmp_path / "report.html").read_bytes()
    main(["report", "a"])
    assert (tmp_path / "report.html").read_bytes() == before  # the same runs, the same page
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for out in ("folder", "nowhere/x.html", ".", "/", "file/x.html", "x" * 300, "a\0b"):
        with pytest.raises(SystemExit):
            main(["report", "a", "--out", out])
        _, err = capsys.readouterr()
        assert err.startswith(f"error: --out: cannot write {out!r}")
        assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "file", "folder", "report.html"]


def many(folder, num_runs):
    for number in range(num_runs):
        finals = np.linspace(0.1, 0.5 + 0.01 * number, 30).tolist()
        write(
            folder / f"{number}",
            rising(finals),
            {"client.optimizer.learning_rate": 0.01 * (1 + number)},
        )
    return folder


def test_a_thousand_rounds_of_fifty_layers_stay_small(tmp_path):
    assert len(make(big(tmp_path / "a"))) < 5_000_000


def going(folder):
    return write(folder, rising([0.1, 0.2]), finished=False)


def failed(folder):
    (going(folder) / failure.FAILED).write_text('{"round": 3, "error": "OSError: full"}')
    return folder


def one(folder):
    return write(folder, [line(1, stage="warm"), *gradual([0.1, 0.2, 0.3])[1:]])


CASES = {
    "one": one,
    "twenty": lambda folder: many(folder, 20),
    "going": going,
    "failed": failed,
    "big": big,
}


@pytest.mark.browser
@pytest.mark.parametrize("width", [1300, 400])
@pytest.mark.parametrize("case", CASES)
def test_a_browser_draws_every_picture_and_asks_for_nothing(tmp_path, case, width):
    chromium = browser.find()
    if chromium is None:
        pytest.skip("no chromium or google-chrome in the PATH")
    path = tmp_path / "report.html"
    page.write(path, make(CASES[case](tmp_path / "run")))
    log = tmp_path / "net.json"
    process = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--no-first-run", f"--user-data-dir={tmp_path / 'user'}",
         "--enable-logging=stderr", "--log-level=0", f"--log-net-log={log}",
         f"--window-size={width},900", "--virtual-time-budget=60000", "--dump-dom",
         path.as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in process.stderr, process.stderr
    head, _, body = process.stdout.partition("<body")
    assert re.search(r'data-drawn="\d+"', head[:500])
    num_places = body.count('data-number="')
    assert num_places >= 5
    assert len(re.findall(r'class="plot js-plotly-plot"', body)) == num_places
    assert 'class="error"' not in body
    assert not asked(log), asked(log)


PLACES = """JSON.stringify([...document.querySelectorAll(".plot")].map((place) => {
  const picture = place.querySelector(".main-svg");
  return [place.clientWidth, place.clientHeight, picture?.clientWidth, picture?.clientHeight];
}))"""


@pytest.mark.browser
def test_a_turned_phone_has_pictures_of_the_new_width(tmp_path):
    if browser.find() is None:
        pytest.skip("no chromium or google-chrome in the PATH")
    path = tmp_path / "report.html"
    page.write(path, make(many(tmp_path / "run", 3)))
    with browser.opened(width=400) as send:

        def wait(expression, is_so):
            found = None
            for _ in range(300):
                found = send("Runtime.evaluate", expression=expression)["result"].get("value")
                if found and is_so(json.loads(found)):
                    return
                time.sleep(0.1)
            raise AssertionError(found)

        send("Page.navigate", url=path.as_uri())
        wait("JSON.stringify(document.documentElement.dataset)", lambda noted: "drawn" in noted)
        for width in (850, 390, 1300):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            send("Emulation.setDeviceMetricsOverride", **size)
            wait(
                PLACES,
                lambda places, width=width: all(
                    place[:2] == place[2:] and place[0] < width and place[1] > 200
                    for place in places
                ),
            )


def asked(log: pathlib.Path) -> list[str]:
    """List what the page asked the network for, from the browser's own log."""
    events = json.loads(log.read_text())["events"]
    urls = {str(event.get("params", {}).get("url", "")) for event in events}
    # The browser's own calls home are kept from the network by the options, or go to its makers.
    home = ("google.com", "googleapis.com", "gvt1.com")
    return sorted(
        url for url in urls if url.startswith(("http", "ws")) and not any(h in url for h in home)
    )


def test_a_name_that_is_no_text_does_not_keep_the_page_from_being_written(tmp_path):
    page.write(tmp_path / "report.html", "<p>run \udcff</p>")
    assert (tmp_path / "report.html").read_text() == "<p>run ?</p>"
