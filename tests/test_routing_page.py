"""The routing page: its numbers are the scores, it trusts no text, keeps to its budget and shows what it says."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

import numpy as np
import pytest
import torch

from moe_lens.corpus import Document, token_batches
from moe_lens.routing.attribution import attribution_hooks, router_logit_attrs
from moe_lens.routing.rank_shift import ranks
from moe_lens.routing_page import routing_page_html, write_routing_page
from moe_lens.routing_page_data import MINIMUM_POSITIONS, RoutingDecisions, routing_decisions
from tests.families import VARIANTS, Variant, write_checkpoint, write_tokenizer

EVIL = "<script>alert('moe')</script><!--\"&amp;\u2028\u2029 {{script}} {{data}}"
SENTENCE = "The router sends every token to the experts whose readouts score it highest. "
# Plain; a dense layer, shared experts and choice limited to groups; shared experts and biases.
FAMILIES = ("olmoe", "deepseek_v2_groups", "qwen2_moe")


def corpus(n: int = 3) -> list[Document]:
    return [Document(f"{EVIL} {i}", f"topic {i}", f"{i}: {SENTENCE * (1 + i)}") for i in range(n)]


class Page(NamedTuple):
    """What is in a page's data, read as its JavaScript reads it, but independently of it."""

    data: dict[str, Any]

    def array(self, text: str, kind: str, *shape: int) -> np.ndarray:
        return np.frombuffer(base64.b64decode(text), kind).reshape(*shape)

    def n(self, doc: int) -> int:
        return len(self.data["documents"][doc]["tokens"])

    def chosen(self, doc: int) -> np.ndarray:
        shape = (len(self.data["routers"]), self.n(doc), self.data["top_k"])
        return self.array(self.data["documents"][doc]["chosen"], "<u2", *shape)

    def weights(self, doc: int) -> np.ndarray:
        return self.array(self.data["documents"][doc]["weights"], "<f4", *self.chosen(doc).shape)

    def logits(self, doc: int, place: int) -> np.ndarray:
        return self.array(
            self.data["documents"][doc]["logits"][place], "<f4", self.n(doc), self.data["experts"]
        )

    def scores(self, doc: int, place: int, by: str, pos: int) -> dict[str, np.ndarray]:
        """Each sender's scores for every expert at a position."""
        document, receiver = self.data["documents"][doc], self.data["receivers"][place]
        scale = self.array(document["scale"], "<f4", len(self.data["receivers"]), self.n(doc))[place, pos]

        def rows(granularity: str) -> dict[int, list[tuple[str, np.ndarray]]]:
            divided = receiver["stored"][granularity]
            n_rows = sum(slots + len(names) for _, slots, names in divided)
            levels = self.array(
                document["scores"][granularity][place], "<i2", self.n(doc), n_rows, self.data["experts"]
            )[pos]
            found, row = {}, 0
            for component, slots, names in divided:
                router = receiver["stored"]["layer"][component][2][0]
                if slots:
                    at = self.data["routers"].index(int(router[1:]))
                    names = [f"{router}E{e}" for e in self.chosen(doc)[at, pos]] + names
                found[component] = [
                    (name, levels[row + i].astype(np.float64) * scale) for i, name in enumerate(names)
                ]
                row += len(names)
            assert row == n_rows
            return found

        merged = rows("layer") | ({} if by == "layer" else rows(by))
        return {name: values for senders in merged.values() for name, values in senders}


class Case(NamedTuple):
    model: Any
    decisions: RoutingDecisions
    page: Page


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, model_of: Callable[[str], Any]) -> Case:
    model = model_of(request.param)
    decisions = routing_decisions(model, corpus())
    return Case(model, decisions, Page(json.loads(decisions.json)))


def exact(model: Any, document: Document, receiver: int, by: str) -> tuple[Any, Any]:
    """The document by itself: the scores, and the cache."""
    tokens, _, _ = next(iter(token_batches(model, [document], batch_size=1, prepend_bos=True)))
    names = [
        *attribution_hooks(model, [receiver], by=by),
        f"blocks.{receiver}.mlp.hook_expert_indices",
        f"blocks.{receiver}.mlp.hook_routing_weights",
    ]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=list(dict.fromkeys(names)))
    return router_logit_attrs(model, cache, receiver=receiver, by=by), cache


@pytest.mark.parametrize("by", ["layer", "head", "expert"])
def test_numbers_are_the_scores(case: Case, by: str) -> None:
    model, decisions, page = case
    assert decisions.completeness_error <= 1e-5
    # The tolerance is what the page says, and room for another batch's float32.
    assert 0 < decisions.quantisation_error < 1e-3
    assert page.data["errors"]["quantisation"] == pytest.approx(decisions.quantisation_error, rel=1e-2)
    tolerance = decisions.quantisation_error + 1e-5
    for doc, document in enumerate(corpus()):
        for place, receiver in enumerate(model.cfg.moe_layers):
            attrs, cache = exact(model, document, receiver, by)
            router = page.data["routers"].index(receiver)
            indices = cache[f"blocks.{receiver}.mlp.hook_expert_indices"][0].numpy()
            np.testing.assert_array_equal(page.chosen(doc)[router], indices)
            weights = cache[f"blocks.{receiver}.mlp.hook_routing_weights"][0].numpy()
            np.testing.assert_allclose(page.weights(doc)[router], weights, atol=1e-6)
            np.testing.assert_allclose(page.logits(doc, place), attrs.logits[0].numpy(), atol=1e-5)
            assert page.n(doc) == attrs.logits.shape[1] == page.data["documents"][doc]["length"]
            for pos in (0, 1, page.n(doc) - 1):
                stored = page.scores(doc, place, by, pos)
                assert set(stored) <= set(attrs.senders)
                for sender, name in enumerate(attrs.senders):
                    wanted = attrs.values[sender, 0, pos].numpy()
                    # Only experts that were not chosen are not there, and they send nothing.
                    np.testing.assert_allclose(
                        stored.get(name, np.zeros_like(wanted)), wanted, atol=tolerance
                    )
                    assert name in stored or re.fullmatch(r"M\d+E\d+", name)
                total = np.sum(list(stored.values()), axis=0)
                np.testing.assert_allclose(total, page.logits(doc, place)[pos], atol=len(stored) * tolerance)


def test_tokens_are_text(case: Case) -> None:
    for document, row in zip(corpus(), case.page.data["documents"], strict=True):
        assert row["name"] == document.name
        tokens = case.model.to_str_tokens(document.text, prepend_bos=True)
        assert row["tokens"] == tokens


def test_cut_documents_are_the_same(model_of: Callable[[str], Any]) -> None:
    model = model_of("olmoe")
    whole = Page(json.loads(routing_decisions(model, corpus()).json))
    cut = routing_decisions(model, corpus(), max_positions=5)
    page = Page(json.loads(cut.json))
    assert cut.n_positions == 15
    assert [d["length"] for d in page.data["documents"]] == [d["length"] for d in whole.data["documents"]]
    for doc in range(3):
        np.testing.assert_allclose(page.logits(doc, 0), whole.logits(doc, 0)[:5], atol=1e-5)
        np.testing.assert_array_equal(page.chosen(doc), whole.chosen(doc)[:, :5])


def test_budget(model_of: Callable[[str], Any]) -> None:
    model = model_of("olmoe")
    documents = [Document(str(i), "", SENTENCE * (4 + i)) for i in range(5)]
    everything = routing_decisions(model, documents)
    assert everything.n_documents == 5
    assert not everything.left_out
    seen = set()
    for share in (1.0, 0.8, 0.4, 0.2, 0.1, 0.05):
        budget = int(len(everything.json) * share)
        part = routing_decisions(model, documents, byte_budget=budget)
        data = json.loads(part.json)
        assert len(part.json) <= budget
        assert data["by"] == list(part.by)
        assert data["left_out"] == list(part.left_out)
        assert set(part.by) | set(part.left_out) == {"layer", "head", "expert"}
        assert part.by[0] == "layer"
        assert len(data["documents"]) == part.n_documents == 5 - data["n_dropped"]
        assert data["budget"] == budget
        lengths = [len(d["tokens"]) for d in data["documents"]]
        assert sum(lengths) == part.n_positions
        # Nothing is cut to less than the minimum while something could still be left out.
        if max(lengths) < MINIMUM_POSITIONS:
            assert part.by == ("layer",)
            assert part.n_documents == 1
        seen.add((part.by, part.n_documents))
    assert len(seen) >= 3
    with pytest.raises(
        ValueError, match=r"one position of one document takes .* more than byte_budget=1,000"
    ):
        routing_decisions(model, documents, byte_budget=1_000)


def test_what_can_be_given(model_of: Callable[[str], Any]) -> None:
    model = model_of("olmoe")
    texts = [document.text for document in corpus()]
    documents = [Document(f"text {i}", "", text) for i, text in enumerate(texts)]
    wanted = json.loads(routing_decisions(model, documents).json)
    assert json.loads(routing_decisions(model, texts).json) == wanted
    batches = token_batches(model, documents, batch_size=2, prepend_bos=True)
    assert json.loads(routing_decisions(model, batches).json) == wanted
    one = next(iter(batches))
    from_tensor = json.loads(routing_decisions(model, [(one.tokens, one.mask)]).json)
    assert [d["name"] for d in from_tensor["documents"]] == ["row 0", "row 1"]
    assert [d["logits"] for d in from_tensor["documents"]] == [d["logits"] for d in wanted["documents"][:2]]
    few = routing_decisions(model, documents, n_documents=1, receivers=[1], by=["layer"])
    assert (few.n_documents, few.by) == (1, ("layer",))
    assert [r["layer"] for r in json.loads(few.json)["receivers"]] == [1]
    for settings, message in (
        (dict(by=["source"]), "is none that the page shows"),
        (dict(receivers=[99]), "99"),
        (dict(n_documents=0), "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            routing_decisions(model, documents, **settings)


def test_the_shortest_that_are_long_enough(model_of: Callable[[str], Any]) -> None:
    model = model_of("olmoe")
    lengths = {"long": 6, "tiny": 0, "middle": 4, "longest": 8}
    documents = [Document(name, "", "Mary " + SENTENCE * n) for name, n in lengths.items()]
    shown = json.loads(routing_decisions(model, documents, n_documents=2).json)["documents"]
    assert [d["name"] for d in shown] == ["long", "middle"]
    shown = json.loads(routing_decisions(model, documents, n_documents=9).json)["documents"]
    assert [d["name"] for d in shown] == list(lengths)


def test_half_precision_has_rounding(checkpoint: Callable[[str], Path]) -> None:
    from moe_lens import HookedMoE

    model = HookedMoE.from_pretrained(checkpoint("olmoe_bf16"), device="cpu", verbose=False)
    assert model.cfg.dtype == torch.bfloat16
    decisions = routing_decisions(model, corpus())
    assert decisions.completeness_error <= 1e-5
    assert decisions.model_logit_difference > 0
    assert decisions.rounding_ratio is not None
    assert 0 < decisions.rounding_ratio <= 1
    page = Page(json.loads(decisions.json))
    for by in ("layer", "head", "expert"):
        attrs, _ = exact(model, corpus()[0], 2, by)
        stored = page.scores(0, 2, by, 4)
        rounding = attrs.values[attrs.senders.index("rounding"), 0, 4].numpy()
        np.testing.assert_allclose(stored["rounding"], rounding, atol=decisions.quantisation_error + 1e-6)
        total = np.sum(list(stored.values()), axis=0)
        tolerance = len(stored) * decisions.quantisation_error + 1e-5
        np.testing.assert_allclose(total, page.logits(0, 2)[4], atol=tolerance)


class _Parsed(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data


def test_no_text_is_trusted(model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("olmoe")
    monkeypatch.setattr(model, "to_str_tokens", lambda tokens: [EVIL] * len(tokens))
    decisions = routing_decisions(model, corpus())
    assert not set("<>&\u2028\u2029") & set(decisions.json)
    assert decisions.json.isascii()
    page = routing_page_html(decisions, EVIL)
    assert "<script>alert" not in page
    parsed = _Parsed(page)
    assert [attributes.get("type") for attributes, _ in parsed.scripts] == ["application/json", None]
    assert json.loads(parsed.scripts[0][1])["documents"][0]["tokens"][0] == EVIL
    assert parsed.scripts[0][1].strip() == decisions.json
    assert not [a for _, a in parsed.tags if a.get("src") or a.get("href")]
    policies = [a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert (policies[0] or "").startswith("default-src 'none'")
    assert "innerHTML" not in page
    assert "insertAdjacentHTML" not in page
    assert "eval(" not in page


def test_write_routing_page(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    path = write_routing_page(model_of("olmoe"), corpus(), tmp_path / "page.html", n_documents=1)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "plotly" not in text
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_routing_page(model_of("olmoe"), corpus(), tmp_path / "absent" / "page.html")


# ---- in a browser ----

BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)


class _Shown(HTMLParser):
    """The text of elements with an id, and the attributes of the page's section."""

    VOID = frozenset(("meta", "br", "input", "img", "link", "hr"))

    def __init__(self, dom: str):
        super().__init__()
        self.section: dict[str, str | None] = {}
        self.text: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self._open: list[tuple[str, str | None]] = []
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if attributes.get("id") == "routing-page":
            self.section = attributes
        if tag not in self.VOID:
            self._open.append((tag, attributes.get("id")))
        if any(name == "rp-table" for _, name in self._open):
            if tag == "tr":
                self.rows.append([])
            elif tag == "td":
                self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, name in self._open:
            if name:
                self.text[name] = self.text.get(name, "") + data
        if self._open and self._open[-1][0] == "td" and self.rows:
            self.rows[-1][-1] += data


def with_script(path: Path, script: str) -> Path:
    """The page as a reader would leave it who did what the script does."""
    acted = path.with_name("acted.html")
    acted.write_text(
        path.read_text(encoding="utf-8").replace("</main>", f"<script>{script}</script></main>"),
        encoding="utf-8",
    )
    return acted


def in_browser(path: Path, profile: Path, **where: Any) -> _Shown:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--dump-dom", "--virtual-time-budget=5000", "--window-size=1200,2000"]
    address = f"file://{path}#{urlencode(where)}"
    run = subprocess.run([*command, address], capture_output=True, text=True, timeout=120, check=True)
    return _Shown(run.stdout)


def number(text: str | None) -> float:
    return float((text or "").replace("−", "-"))


@pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")
@pytest.mark.parametrize(
    ("family", "by", "doc", "pos", "place", "rank"),
    [
        ("olmoe", "layer", 0, 0, 0, 1),
        ("olmoe", "layer", 1, 9, -1, 6),
        ("olmoe", "head", 2, 17, -1, 4),
        ("olmoe", "expert", 2, 30, -1, 5),
        ("qwen2_moe", "expert", 1, 12, -1, 2),
        ("deepseek_v2_groups", "head", 1, 3, -1, 3),
    ],
)
def test_page_shows_the_decision(
    model_of: Callable[[str], Any],
    tmp_path: Path,
    family: str,
    by: str,
    doc: int,
    pos: int,
    place: int,
    rank: int,
) -> None:
    model = model_of(family)
    path = write_routing_page(model, corpus(), tmp_path / "page.html")
    receiver = model.cfg.moe_layers[place]
    attrs, cache = exact(model, corpus()[doc], receiver, by)
    logits = attrs.logits[0, pos]
    order = ranks(logits)
    expert = int((order == rank).nonzero())
    picked = cache[f"blocks.{receiver}.mlp.hook_expert_indices"][0, pos].tolist()
    chosen = expert in picked
    others = [e for e in order.argsort().tolist() if (e in picked) != chosen]
    boundary = others[0] if chosen else others[-1]
    if model.cfg.router.n_groups == 1:
        assert int(order[boundary]) == model.cfg.top_k + chosen
    margin = float(logits[expert] - logits[boundary])
    push = attrs.values[:, 0, pos, expert] - attrs.values[:, 0, pos, boundary]
    top = int(push.abs().argmax())
    without = int(ranks(logits - attrs.values[top, 0, pos])[expert])

    shown = in_browser(
        path, tmp_path / "profile", doc=doc, pos=pos, layer=receiver, expert=expert, by=by, count=0
    )
    section = shown.section
    assert section.get("data-error") is None
    assert section.get("data-ready") == "true"
    assert section.get("data-rank") == str(rank)
    assert section.get("data-boundary") == str(boundary)
    assert section.get("data-chosen") == str(chosen).lower()
    assert number(section.get("data-margin")) == pytest.approx(margin, abs=1e-5)
    assert section.get("data-top") == attrs.senders[top]
    assert number(section.get("data-push")) == pytest.approx(float(push[top]), abs=1e-4)
    assert section.get("data-without") == str(without)

    # And what is there to be read.
    sentence = shown.text["rp-sentence"]
    verb = "is chosen" if chosen else "is not chosen"
    assert sentence.startswith(f"Expert {expert} {verb}, rank {rank} of {model.cfg.n_experts}")
    assert f"the boundary, expert {boundary}" in sentence
    body, total = shown.rows[:-1], shown.rows[-1]
    assert total[0] == "margin"
    assert number(total[4]) == pytest.approx(margin, abs=1e-3)
    table = {row[0]: number(row[4]) for row in body}
    wanted = dict(zip(attrs.senders, push.tolist(), strict=True))
    silent = {name for name, value in wanted.items() if name not in table and value == 0}
    assert set(table) == set(wanted) - silent
    for name, value in table.items():
        assert value == pytest.approx(wanted[name], abs=1e-3)
    sizes = [abs(wanted[row[0]]) for row in body]
    assert all(a >= b - 1e-3 for a, b in pairwise(sizes))
    assert "<script>" in shown.text["rp-document"]


@pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")
def test_page_without_an_address_and_with_a_wrong_one(
    model_of: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("olmoe")
    monkeypatch.setattr(model, "to_str_tokens", lambda tokens: [EVIL, "\n", "", "\u202e"] * len(tokens))
    path = write_routing_page(model, corpus(), tmp_path / "page.html", n_documents=2, max_positions=4)
    wrong = dict(doc=7, pos=99, layer="x", expert=-1, by="<b>", colour="red", count="many")
    for where in ({}, wrong, dict(doc=1, pos=2, colour="rank")):
        shown = in_browser(path, tmp_path / "profile", **where)
        assert shown.section.get("data-error") is None
        assert shown.section.get("data-ready") == "true"
        assert shown.text["rp-sentence"].startswith("Expert ")
        tokens = shown.text["rp-tokens"]
        assert "<script>alert(" in tokens
        assert "↵\n" in tokens
        assert "∅" in tokens
        assert "⟨202e⟩" in tokens
        assert "more tokens are not in this page" in tokens
        assert "to their first 4 tokens (these data may take 4.0 MB)" in shown.text["rp-note"]


_ACT = """
const root = document.getElementById("routing-page"), log = [];
const selected = (list) => document.querySelector("#rp-" + list + " [aria-selected=true]");
const press = (list, key) => {
  selected(list).focus();
  selected(list).dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  log.push(location.hash.slice(1) + "|" + root.dataset.rank + "|" + (document.activeElement === selected(list)));
};
press("tokens", "ArrowRight"); press("tokens", "End"); press("tokens", "ArrowRight"); press("tokens", "Home");
press("tokens", "ArrowDown"); press("tokens", "ArrowUp");
press("experts", "ArrowDown"); press("experts", "ArrowUp"); press("experts", "End"); press("experts", "Home");
document.querySelector("#rp-by [data-value=head]").click(); log.push(location.hash.slice(1));
document.getElementById("rp-document").value = "1";
document.getElementById("rp-document").dispatchEvent(new Event("change")); log.push(location.hash.slice(1));
document.querySelectorAll(".rp-token")[5].click(); log.push(location.hash.slice(1));
root.dataset.log = log.join(" ");
"""


@pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")
def test_keys_and_clicks(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    path = write_routing_page(model_of("olmoe"), corpus(), tmp_path / "page.html")
    n = Page(json.loads(routing_decisions(model_of("olmoe"), corpus()).json)).n(0)
    acted = with_script(path, _ACT)
    shown = in_browser(acted, tmp_path / "profile", doc=0, pos=3, layer=1, expert=2, by="layer")
    assert shown.section.get("data-error") is None
    log = (shown.section.get("data-log") or "").split(" ")
    steps = [dict(parse_qsl(entry.split("|")[0])) for entry in log]
    positions = [int(step["pos"]) for step in steps]
    assert positions[:4] == [4, n - 1, n - 1, 0]
    assert all(entry.endswith("|true") for entry in log[:10])
    # Down goes to another row, and up from there back to the first.
    below, above = positions[4:6]
    assert 0 <= above <= below
    ranks_shown = [int(entry.split("|")[1]) for entry in log[:10]]
    assert ranks_shown[7] in (ranks_shown[6] - 1, ranks_shown[5])
    assert ranks_shown[8:] == [8, 1]
    assert [step["by"] for step in steps[9:]] == ["layer", "head", "head", "head"]
    assert [step["doc"] for step in steps[10:]] == ["0", "1", "1"]
    assert positions[-1] == 5


@pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")
def test_page_says_how_large_rounding_is(
    checkpoint: Callable[[str], Path], model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    from moe_lens import HookedMoE

    half = HookedMoE.from_pretrained(checkpoint("olmoe_bf16"), device="cpu", verbose=False)
    path = write_routing_page(half, corpus(1), tmp_path / "half.html")
    note = in_browser(path, tmp_path / "profile", doc=0, pos=3, layer=1).text["rp-note"]
    ratio = routing_decisions(half, corpus(1)).rounding_ratio
    assert f"rounding is at most {ratio:.2f} of what rounding can be." in note
    path = write_routing_page(model_of("olmoe"), corpus(1), tmp_path / "single.html")
    assert "rounding" not in in_browser(path, tmp_path / "profile", doc=0, pos=3).text["rp-note"]


@pytest.mark.skipif(BROWSER is None, reason="no headless browser is installed")
def test_every_expert_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_lens import HookedMoE

    monkeypatch.setitem(VARIANTS, "all_chosen", Variant("olmoe", dict(num_experts_per_tok=8)))
    directory = write_checkpoint("all_chosen", tmp_path / "checkpoint")
    write_tokenizer(directory)
    model = HookedMoE.from_pretrained(directory, dtype=torch.float32, device="cpu", verbose=False)
    path = write_routing_page(model, corpus(1), tmp_path / "page.html")
    shown = in_browser(path, tmp_path / "profile", doc=0, pos=3, layer=1, expert=2)
    assert shown.section.get("data-error") is None
    assert shown.section.get("data-ready") == "true"
    assert shown.text["rp-sentence"].endswith("every expert is chosen here, so there is no boundary.")
    assert shown.text["rp-waterfall-title"] == "No boundary"
    assert not shown.rows
