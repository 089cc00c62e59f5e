"""Comparing captures token by token, against plain loops; refusing those that cannot be aligned; the report."""

from __future__ import annotations

import csv
import json
import math
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest

from captures import Capture, CaptureWriter, LabelledText, Model, Text
from jaxmoe.errors import UserError
from jaxmoe.figures.figure import pack
from jaxmoe.routing import metrics
from jaxmoe.routing.__main__ import main
from jaxmoe.routing.compare import compare, compare_domains
from jaxmoe.routing.report import write_report
from jaxmoe.routing.summary import summarise
from tests.tolerances import bound

MODEL = Model((0, 2, 3), 12, 3, True, 60)
N = 700


def text_of(seed: int = 0, seq_length: int = 40) -> LabelledText:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 60, N).astype(np.int32)
    document, position = np.divmod(np.arange(N, dtype=np.int32), np.int32(seq_length))
    domain = (document % 2).astype(np.int32)
    following = np.append(tokens[1:], -1).astype(np.int32)
    text = Text(tokens, document, position, domain, np.zeros(N, np.int32), following)
    return LabelledText(text, ("code", "prose"), ("text",), seq_length, "digest")


def arrays_of(logits: np.ndarray, loss: np.ndarray) -> dict[str, np.ndarray]:
    """A shard's arrays for router logits [Ls, n, E], computed here independently."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    total = np.logaddexp.reduce(logits, axis=-1)
    p = np.exp(logits - total[..., None])
    return {
        "experts": order[..., :3].astype(np.uint8),
        "top_experts": order.astype(np.uint8),
        "top_logits": np.take_along_axis(logits, order, -1).astype(np.float32),
        "log_sum_exp": total.astype(np.float32),
        "entropy": -(p * np.log(p)).sum(-1).astype(np.float32),
        "probability_sums": p.sum(1).astype(np.float32),
        "predicted": np.zeros(logits.shape[1], np.int32),
        "loss": loss.astype(np.float32),
    }


def write(folder: pathlib.Path, labels: LabelledText, logits: np.ndarray, loss: np.ndarray, shard: int) -> Capture:
    with CaptureWriter(
        folder, MODEL, labels=labels, source={"framework": "test", "dtype": "x"}, keep_logits=12
    ) as writer:
        for start in range(0, N, shard):
            part = slice(start, min(start + shard, N))
            text = Text(*(a[part] for a in labels.text))
            writer.put(text, arrays_of(logits[:, part], loss[part]))
    return Capture.open(folder)


@pytest.fixture(scope="module")
def logits() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    ours = rng.normal(size=(3, N, 12))
    # prose prefers the last experts; the other capture differs by noise that grows with depth
    ours[:, text_of().text.domain == 1, 8:] += 1.5
    return ours, ours + rng.normal(size=ours.shape) * np.array([0.0, 0.02, 0.3])[:, None, None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, logits) -> tuple[Capture, Capture]:
    folder, rng = tmp_path_factory.mktemp("pair"), np.random.default_rng(2)
    loss = rng.random(N)
    return (
        write(folder / "a", text_of(), logits[0], loss, 256),
        write(folder / "b", text_of(), logits[1], loss + 0.25 + rng.normal(size=N) * 0.01, 111),
    )


def test_a_comparison_against_a_plain_loop(pair, logits):
    found = compare(*pair)
    sets = [[[set(np.argsort(-row)[:3].tolist()) for row in layer] for layer in side] for side in logits]
    for slot, layer in enumerate(found.layers):
        a, b = sets[0][slot], sets[1][slot]
        overlap = [len(x & y) / 3 for x, y in zip(a, b, strict=True)]
        assert layer.layer == MODEL.layers[slot]
        assert layer.overlap.value == pytest.approx(np.mean(overlap))
        assert layer.flip_rate.value == pytest.approx(np.mean([x != y for x, y in zip(a, b, strict=True)]))
        assert layer.flip_rate.low <= layer.flip_rate.value <= layer.flip_rate.high
        p, q = (np.exp(side[slot] - np.logaddexp.reduce(side[slot], -1)[:, None]) for side in logits)
        assert layer.divergence.value == pytest.approx(metrics.jensen_shannon(p, q).mean(), abs=bound("compare_fp32"))
        difference = logits[0][slot] - logits[1][slot]
        centred = difference - difference.mean(-1, keepdims=True)
        assert layer.logit_rms == pytest.approx(np.sqrt((centred**2).mean()), abs=bound("compare_fp32"))
        weights = []
        for side, chosen in zip((p, q), (a, b), strict=True):
            dense = np.zeros_like(side)
            for i, row in enumerate(chosen):
                dense[i, list(row)] = side[i, list(row)] / side[i, list(row)].sum()
            weights.append(dense)
        assert layer.weight_distance == pytest.approx(
            np.abs(weights[0] - weights[1]).sum(-1).mean(), abs=bound("compare_weights_fp32")
        )
    first = [next((slot for slot in range(3) if sets[0][slot][i] != sets[1][slot][i]), None) for i in range(N)]
    assert found.clean_flips.tolist() == [first.count(slot) for slot in range(3)]
    assert found.flipped_tokens.value == pytest.approx(sum(slot is not None for slot in first) / N)
    assert found.loss_change is not None and found.loss_change.value == pytest.approx(
        0.25, abs=bound("compare_loss_change")
    )
    assert 0.2485 < found.loss_change.low < found.loss_change.value < found.loss_change.high < 0.2515
    assert found.by_margin.tokens.sum() == 3 * N
    assert found.by_margin.flips.sum() == sum(round(layer.flip_rate.value * N) for layer in found.layers)
    assert found.first_by_margin.flips.sum() == found.clean_flips.sum() == len(found.first_margins)
    widest = max(found.widest, key=lambda flip: flip.margin)
    assert widest.margin == pytest.approx(found.first_margins.max())
    assert first[widest.token] == MODEL.layers.index(widest.layer)
    assert set(widest.experts_a) == sets[0][MODEL.layers.index(widest.layer)][widest.token]


def test_a_capture_equals_itself_whatever_its_shards(pair, logits, tmp_path):
    again = write(tmp_path / "again", text_of(), logits[0], np.zeros(N), 90)
    found = compare(pair[0], again)
    assert found.flipped_tokens.value == found.clean_flips.sum() == 0
    assert all(layer.overlap == (1, 1, 1) and layer.logit_rms == 0 for layer in found.layers)


def test_other_texts_tokenizers_and_models_are_refused(pair, logits, tmp_path):
    labels = text_of(seed=5)
    with pytest.raises(UserError, match="expected captures of one text, cut into the same contexts; found two"):
        compare(pair[0], write(tmp_path / "text", labels, logits[0], np.zeros(N), 300))
    with pytest.raises(UserError, match="contexts of up to 40 and 50"):
        compare(pair[0], write(tmp_path / "cut", text_of(seq_length=50), logits[0], np.zeros(N), 300))
    manifest = pair[0].folder / "manifest.json"
    original = manifest.read_text()
    try:
        manifest.write_text(
            original.replace('"digest"', '"other"', 1).replace('"tokenizer": "digest"', '"tokenizer": "x"')
        )
        manifest.write_text(original.replace('"tokenizer": "digest"', '"tokenizer": "x"'))
        with pytest.raises(UserError, match="expected captures made with one tokenizer, found two"):
            compare(Capture.open(pair[0].folder), pair[1])
        manifest.write_text(original.replace('"num_experts_per_tok": 3', '"num_experts_per_tok": 2'))
        with pytest.raises(UserError, match="num_experts_per_tok: expected the same in both, found 2 and 3"):
            compare(Capture.open(pair[0].folder), pair[1])
    finally:
        manifest.write_text(original)


def test_domains_are_apart_where_they_are_and_by_no_more_than_halves_where_they_are_not(pair, logits, tmp_path):
    for row in compare_domains(pair[0]):
        assert row.divergence.low > 3 * row.floor
        assert row.expert >= 8 and row.share_second > row.share_first
        mine = pair[0].read(0, N)
        slot = MODEL.layers.index(row.layer)
        shares = [(mine.experts[slot][mine.text.domain == d] == row.expert).any(-1).mean() for d in (0, 1)]
        assert [row.share_first, row.share_second] == pytest.approx(shares)
    noise = np.random.default_rng(3).normal(size=(3, N, 12))
    for row in compare_domains(write(tmp_path / "noise", text_of(), noise, np.zeros(N), 300)):
        assert row.divergence.value < 10 * max(row.floor, 1e-3)


def test_a_summary_is_the_sum_over_all_tokens(pair):
    found, chunk = summarise(pair[1]), pair[1].read(0, N)
    for slot, experts in enumerate(chunk.experts):
        assert np.array_equal(found.load[slot], metrics.expert_load(experts, 12))
        assert np.array_equal(found.coactivation[slot], metrics.coactivation_counts(experts, 12))
        shares = metrics.domain_specialisation(experts, chunk.text.domain, 2, 12)
        assert found.domain_load[:, slot] / found.domain_tokens[:, None] == pytest.approx(shares)
        assert found.entropy[slot] == pytest.approx(chunk.entropy[slot].mean(), rel=bound("summary_fp32"))
        local = metrics.consecutive_locality(experts, chunk.text.position > 0, 12)
        assert found.locality[slot] == pytest.approx(local)
        vocabulary = metrics.vocabulary_specialisation(experts, chunk.text.token, 12, least=1)
        assert np.array_equal(found.vocabulary(slot).token, vocabulary.token)
        assert found.vocabulary(slot).share == pytest.approx(vocabulary.share)
    assert np.array_equal(found.transition[0], metrics.transition_counts(chunk.experts[0], chunk.experts[1], 12))
    assert found.position_load.sum(axis=0).tolist() == found.load.tolist()
    p = chunk.dense_probabilities().sum(1)
    assert found.load_balancing_loss == pytest.approx(
        metrics.load_balancing_loss(found.load, p, N), rel=bound("summary_fp32")
    )


# ---- the report


class Page(HTMLParser):
    """The files that a page refers to, and the numbers in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.numbers, self._inside = "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        named = dict(attrs)
        self.links += [link for key in ("src", "href") if (link := named.get(key))]
        self._inside = tag == "script" and named.get("id") == "figures"

    def handle_endtag(self, tag) -> None:
        self._inside = False

    def handle_data(self, data) -> None:
        if self._inside:
            self.numbers += data


def unpack(packed: dict) -> np.ndarray:
    import base64

    steps = np.frombuffer(base64.b64decode(packed["data"]), "<u2").astype(np.float64)
    return np.where(steps == 65535, np.nan, packed["low"] + steps * packed["step"]).reshape(packed["shape"])


def test_packing_keeps_integers_exactly_and_numbers_to_five_digits():
    integers = np.array([[3, -7], [65000, 12]])
    assert np.array_equal(unpack(pack(integers)), integers)
    numbers = np.array([0.1, math.nan, 2.5, -1.0])
    found = unpack(pack(numbers))
    assert np.isnan(found).tolist() == np.isnan(numbers).tolist()
    assert np.nanmax(np.abs(found - numbers)) / 3.5 <= bound("packed_numbers")  # 3.5: from -1 to 2.5
    assert unpack(pack(np.full(3, math.nan))) == pytest.approx([math.nan] * 3, nan_ok=True)
    assert unpack(pack(np.full(2, 4.5))).tolist() == [4.5, 4.5]


def test_the_report_needs_no_network_and_its_files_hold_the_numbers(pair, tmp_path):
    effects = tmp_path / "effects.csv"
    effects.write_text("layer,expert,change\n0,0,0.5\n2,11,-0.25\n")
    count = write_report(list(pair), tmp_path / "report", effects=effects)
    content = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    page = Page(content)
    assert page.links == []  # links within the page are made by its script
    assert not re.search(r"https?://(?!www\.w3\.org/)", content)
    figures = {figure["key"]: figure for figure in json.loads(page.numbers)}
    assert len(figures) == count
    expected = "load load-curves balance margins coactivation transitions domains domain-divergence positions locality"
    expected += " vocabulary tokens text drift-b flips-b load-change-b widest-b effects"
    assert set(figures) == set(expected.split())
    for key in figures:
        assert (tmp_path / "report" / "png" / f"{key}.png").read_bytes().startswith(b"\x89PNG")
    load = metrics.expert_load(pair[0].read_experts()[1], 12)
    drawn = unpack(figures["load"]["values"])
    assert np.abs(drawn[0, 1] - load / load.mean()).max() / np.ptp(drawn) <= bound("packed_numbers")
    with (tmp_path / "report" / "csv" / "load.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["layer"] == "2"]
    assert [float(row["load / even share"]) for row in rows] == pytest.approx(
        load / load.mean(), rel=bound("report_digits")
    )
    with (tmp_path / "report" / "csv" / "drift-b.csv").open() as file:
        drift = [row for row in csv.DictReader(file) if row["series"].startswith("flip rate")]
    assert [float(row[""]) for row in drift] == pytest.approx(
        [layer.flip_rate.value for layer in compare(*pair).layers], rel=bound("report_digits")
    )


# What ends an element, a comment or a string in some state of an HTML or JavaScript parser.
TERMINATORS = "</script><!--<script>--></SCRIPT ]]></title></td>\u2028\u2029&lt;\\u003c<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def hostile_page(pair, tmp_path_factory) -> pathlib.Path:
    """A report whose tokens are all `TERMINATORS`."""
    from jaxmoe.routing import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "decoder", lambda *_: lambda token: TERMINATORS)
        patch.setattr(report, "save_all", lambda *_: None)
        write_report(list(pair[:1]), tmp_path_factory.mktemp("hostile") / "report")
    return tmp_path_factory.getbasetemp() / "hostile0" / "report" / "index.html"


def test_text_cannot_leave_its_place_in_the_page(hostile_page):
    """A token such as </script> is text to show, not a tag: in Python's parser and in one that follows HTML's rules."""
    content = hostile_page.read_text(encoding="utf-8")
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed")
    tree = html5lib.parse(content, namespaceHTMLElements=False)
    scripts = list(tree.iter("script"))
    assert [script.get("id") for script in scripts] == ["figures", None] and not list(tree.iter("img"))
    for numbers in (Page(content).numbers, scripts[0].text):
        figures = json.loads(numbers)
        assert next(f for f in figures if f["kind"] == "passage")["pieces"][0] == TERMINATORS
    # The control: without the escape the parser loses the figures.
    broken = html5lib.parse(content.replace("\\u003c", "<"), namespaceHTMLElements=False)
    assert next(broken.iter("script")).text != scripts[0].text


def test_a_browser_draws_every_figure(hostile_page):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    options += [f"--user-data-dir={hostile_page.parent / 'browser'}", "--dump-dom", hostile_page.as_uri()]
    done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=120, check=True)
    figures = json.loads(Page(hostile_page.read_text(encoding="utf-8")).numbers)
    assert done.stdout.count("<section id=") == len(figures) > 0
    assert "<img" not in done.stdout


def test_two_dtypes_are_named(pair, tmp_path, capsys):
    main(["compare", *(str(c.folder) for c in pair)])
    assert "rounding" not in capsys.readouterr().out
    other = tmp_path / "other"
    shutil.copytree(pair[1].folder, other)
    manifest = json.loads((other / "manifest.json").read_text())
    for dtype, said in (
        ("y", "computed in x and in y, so a part of the difference is rounding (--dtype)\n"),
        (None, ""),
    ):
        manifest["source"]["dtype"] = dtype
        (other / "manifest.json").write_text(json.dumps(manifest))
        main(["compare", str(pair[0].folder), str(other)])
        out = capsys.readouterr().out
        assert said in out and bool(said) == ("rounding" in out)


def test_the_command_line(pair, run_module: Callable[..., subprocess.CompletedProcess[str]], tmp_path):
    table = tmp_path / "drift.csv"
    done = run_module("jaxmoe.routing", "compare", *(c.folder for c in pair), "--out", table)
    assert done.returncode == 0, done.stderr
    assert f"{N} tokens" in done.stdout
    with table.open() as file:
        rates = [float(row["flip_rate"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([layer.flip_rate.value for layer in compare(*pair).layers])
    wrong = run_module("jaxmoe.routing", "compare", tmp_path, pair[0].folder)
    assert wrong.returncode == 2
    expected = f"{tmp_path}: expected a capture (a folder with manifest.json), found none"
    assert wrong.stderr == f"python -m jaxmoe.routing: {expected}\n"
