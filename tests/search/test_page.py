"""The search page in Chromium, on the service itself: an index of drawn scenes, some of them with hostile texts."""

import base64
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from helpers import encode, tiny_embedder, tiny_tokenizer, write_tar
from serving import served

from dualenc.data import ShardIndex
from dualenc.data.prepare.scenes import draw_scene
from dualenc.inference.text_model import TextPredictor
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.search.build import build_search
from dualenc.search.service.core import Limits
from dualenc.search.service.opening import open_service

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SAMPLES = 90  # more than one page of hits
HOSTILE = '<img src=x onerror="window.ran = 1"><b>bold</b> & "quoted" + -dash'
KEY = "a-key-of-this-test"
DESKTOP, PHONE = (1280, 800), (390, 844)
DONE = "#results[aria-busy=false]"


# ------------------------------------------------------------------------------------------------ what is served


def samples(seed: int) -> list[dict[str, Any]]:
    """Return scenes with two captions and fields; texts of the first are markup."""
    rng, found = np.random.default_rng(seed), []
    for i in range(SAMPLES):
        scene = draw_scene(rng, pixels=24)
        key, captions, license = f"{i:06d}", [f"{scene.caption} {i}", f"second of {i}"], "cc0"
        if i == 0:
            key, license = '<u onclick="1">key', "<i>mine</i>"
            captions = [HOSTILE, "<script>window.ran = 1</script>"]
        elif i == 3:  # words that no line can hold
            key, license, captions = "y" * 90, "z" * 300, ["x" * 300, "x" * 500]
        fields = {"captions": captions, "number": i, "license": license}
        found.append({"__key__": key, "png": encode(scene.image), "json": json.dumps(fields).encode()})
    return found


class Collection:
    """Shards of scenes, an index of the pictures, and an index of the captions as passages."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.samples = samples(seed)
        self.shards = [write_tar(folder / f"part-{i}.tar", self.samples[i * 50 : i * 50 + 50]) for i in range(2)]
        self.folder = folder
        tiny_embedder(seed).save(folder / "model")
        tokenizer = tiny_tokenizer()
        config = TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=12)
        heads = {"vector": HeadConfig("embedding", problem="cosine")}
        TextPredictor(TextModel(config, heads).eval(), tokenizer).save(folder / "text_model")
        texts = [{"id": i, "text": f"{HOSTILE} {i}" if i < 2 else f"passage {i}"} for i in range(9)]
        (folder / "passages.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in texts))
        build_search(str(folder / "model"), self.shards, folder / "images", workers=0)
        build_search(str(folder / "text_model"), [str(folder / "passages.jsonl")], folder / "texts")

    def picture(self, i: int) -> Path:
        """Return a file with the picture of a sample."""
        path = self.folder / f"{i}.png"
        path.write_bytes(self.samples[i]["png"])
        return path


@contextmanager
def serving(folder: Path, keys: Sequence[str] = ()) -> Iterator[str]:
    """Serve an index; yield the address."""
    with served(open_service(str(folder), Limits()), keys) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here to open the page in")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def collection(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed of the collection: {seed}")
    return Collection(tmp_path_factory.mktemp("collection"), seed)


@pytest.fixture(scope="module")
def address(collection: Collection) -> Iterator[str]:
    with serving(collection.folder / "images") as url:
        yield url


# -------------------------------------------------------------------------------------------- a page and its watch


class Tab:
    """A page of the browser with what it asked for and what its console said."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.console: list[str] = []
        self.urls: list[str] = []
        page.on("console", lambda message: self.console.append(message.text))
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.on("request", lambda request: self.urls.append(request.url))

    def open(self, path: str = "") -> None:
        self.page.goto(f"{self.address}/{path}")
        self.page.wait_for_selector(DONE)

    def search(self, act: Callable[[], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Do what leads to a search; return the query and the answer once its hits are shown."""
        with self.page.expect_response("**/api/search") as response:
            act()
        answer = response.value.json()
        self.page.wait_for_selector(DONE)
        return response.value.request.post_data_json, answer

    def type(self, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
        self.page.fill("#typed", text)
        return self.search(lambda: self.page.press("#typed", "Enter"))

    def hits(self) -> list[tuple[str, str]]:
        """Return key and score of each hit that is shown."""
        return [tuple(hit) for hit in self.page.evaluate(HITS)]

    def wait(self, expression: str) -> None:
        """Wait until an expression is true; the page's policy forbids the code of playwright's own way."""
        end = time.monotonic() + 20
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(10)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def query(self) -> dict[str, list[str]]:
        """Return the query in the page's address."""
        return parse_qs(urlsplit(self.page.url).query)


HITS = """[...document.querySelectorAll(".hit")].filter(e => e.checkVisibility()).map(e => [
  e.querySelector(".pick input").ariaLabel.replace("Select ", ""), e.querySelector(".score").textContent])"""


@contextmanager
def opened(
    browser: Any,
    address: str,
    path: str | None = "",
    size: tuple[int, int] = DESKTOP,
    scheme: str = "light",
    allowed: str = "(?!)",
) -> Iterator[Tab]:
    """Open the page in a fresh profile; afterwards check that all was asked of this server and nothing went wrong.

    Args:
        browser: the browser.
        address: the server.
        path: path to open; None for nothing yet.
        size: width and height of the window.
        scheme: colors that the user prefers.
        allowed: pattern of messages on the console that the test provokes.
    """
    context = browser.new_context(viewport=dict(zip(("width", "height"), size)), color_scheme=scheme)
    context.set_default_timeout(20_000)
    tab = Tab(context.new_page(), address)
    try:
        if path is not None:
            tab.open(path)
        yield tab
        assert [message for message in tab.console if not re.search(allowed, message)] == []
        assert {urlsplit(url).netloc for url in tab.urls if not url.startswith(("data:", "blob:"))} <= {
            urlsplit(address).netloc
        }
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert tab.page.evaluate("window.ran") is None
    finally:
        context.close()


def written(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the hits of an answer as the page writes them."""
    return [(hit["key"], f"{hit['score']:.3f}".replace("-", "\u2212")) for hit in answer["hits"]]


# -------------------------------------------------------------------------------------------------------- queries


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "light"), (DESKTOP, "dark")])
def test_typed_words_find_hits_and_the_address_holds_them(
    browser: Any, address: str, size: tuple[int, int], scheme: str
) -> None:
    with opened(browser, address, size=size, scheme=scheme) as tab:
        page = tab.page
        assert tab.text("#count") == f"24 of the {SAMPLES} pictures"
        assert page.locator(".example").count() >= 4
        body, answer = tab.type(" a red circle ")
        assert (body["texts"], body["minus"], body["k"]) == (["a red circle"], [], 60)
        assert tab.hits() == written(answer)
        assert tab.text("#count").startswith(f"60 hits of {SAMPLES} pictures in ")
        assert tab.query() == {"q": ["a red circle"]}
        assert page.title() == "a red circle \u2013 images"
        second = tab.type("a blue ring")[1]
        assert tab.hits() == written(second)
        tab.search(page.go_back)
        assert (page.input_value("#typed"), tab.hits()) == ("a red circle", written(answer))
        page.go_back()
        page.wait_for_selector(".example")
        assert (page.input_value("#typed"), tab.query()) == ("", {})
        tab.search(page.go_forward)
        tab.search(page.reload)
        assert (page.input_value("#typed"), tab.hits()) == ("a red circle", written(answer))
        page.click("#home")
        page.wait_for_selector(".example")
        # The colors are those of the scheme.
        red, green, blue = map(
            int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
        )
        assert (red + green + blue > 600) == (scheme == "light")


def test_signs_combine_and_leave_out(browser: Any, address: str) -> None:
    with opened(browser, address) as tab:
        for typed, texts, minus in (
            ("a dog -cat", ["a dog"], ["cat"]),
            ("a dog + a  red hat -cat -boat", ["a dog", "a red hat"], ["cat", "boat"]),
            ('t-shirt -"two words" + "on - off" + "-5 degrees"', ["t-shirt", "on - off", "-5 degrees"], ["two words"]),
            ('a + b + 5" pipe - x', ["a", "b", '5" pipe - x'], []),
            ("+ a red hat +", ["a red hat"], []),
        ):
            body, answer = tab.type(typed)
            assert (body["texts"], body["minus"]) == (texts, minus), typed
            assert tab.hits() == written(answer)
        # Words to leave out need something to leave them out of.
        tab.page.fill("#typed", "-cat")
        tab.page.press("#typed", "Enter")
        tab.page.wait_for_selector("#message:not([hidden])")
        assert "leave out" in tab.text("#message")
        assert tab.hits() == []


def test_an_example_is_searched_for_as_it_is(browser: Any, address: str) -> None:
    """One example has signs in it, and is text in all places."""
    with opened(browser, address) as tab:
        examples = tab.page.locator(".example").all_inner_texts()
        assert HOSTILE in examples
        for example in {HOSTILE, *examples[:3]}:
            body, _ = tab.search(lambda text=example: tab.page.click(f".example >> nth={examples.index(text)}"))
            assert body["texts"] == [example.replace('"', "'") if example == HOSTILE else example]
            assert body["minus"] == []
            tab.page.click("#clear")
            tab.page.wait_for_selector(".example")


def test_pictures_are_chosen_dropped_and_pasted(browser: Any, collection: Collection, address: str) -> None:
    with opened(browser, address, allowed="status of 400") as tab:
        page = tab.page
        body, answer = tab.search(lambda: page.set_input_files("#file", collection.picture(7)))
        assert body["images"] == ["data:image/png;base64," + base64.b64encode(collection.samples[7]["png"]).decode()]
        assert tab.hits() == written(answer)
        assert tab.hits()[0] == ("000007", "1.000")
        assert tab.text(".chip") == "7.png"
        page.click(".chip button")
        page.wait_for_selector(".example")
        for event, field in (("drop", "dataTransfer"), ("paste", "clipboardData")):
            data = base64.b64encode(collection.samples[8]["png"]).decode()
            tab.search(
                lambda event=event, field=field, data=data: page.evaluate(GIVE, [event, field, data, "image/png"])
            )
            assert tab.hits()[0] == ("000008", "1.000")
            page.click("#clear")
            page.wait_for_selector(".example")
        # A picture and words are one query, and the step back is the picture alone.
        tab.search(lambda: page.set_input_files("#file", collection.picture(9)))
        body, answer = tab.type("a red circle")
        assert (len(body["images"]), body["texts"]) == (1, ["a red circle"])
        body, answer = tab.search(page.go_back)
        assert (len(body["images"]), body["texts"], tab.hits()) == (1, [], written(answer))
        # The browser keeps no pictures, and a file of another kind is refused before it is sent.
        page.reload()
        page.wait_for_selector("#message:not([hidden])")
        assert "Add it again" in tab.text("#message")
        page.evaluate(GIVE, ["drop", "dataTransfer", "", "text/plain"])
        tab.wait("document.querySelector('#message').innerText.includes('not a picture')")
        # The service refuses what is not a picture inside, and there is nothing to try again.
        tab.search(lambda: page.evaluate(GIVE, ["drop", "dataTransfer", "AAAA", "image/png"]))
        assert "cannot be decoded" in tab.text("#message")
        assert not page.locator("#message button").is_visible()


GIVE = """([event, field, data, type]) => {
  const given = new DataTransfer();
  given.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], "given.png", {type}));
  const kind = event === "drop" ? DragEvent : ClipboardEvent;
  document.body.dispatchEvent(new kind(event, {[field]: given, bubbles: true, cancelable: true}));
}"""


def test_more_like_this(browser: Any, address: str) -> None:
    with opened(browser, address) as tab:
        page = tab.page
        key, row = tab.hits()[3][0], 3 * SAMPLES // 24
        page.hover(".hit >> nth=3")
        body, answer = tab.search(lambda: page.click(".hit >> nth=3 >> .like"))
        assert (body["rows"], body["texts"], tab.query()) == ([row], [], {"row": [str(row)]})
        assert tab.hits() == written(answer)
        assert key not in dict(tab.hits())
        # From the detail view: alone, and together with words.
        for button, texts in (("#with", ["a red circle"]), ("#like", [])):
            tab.type("a red circle")
            page.click(".hit >> nth=1 >> .open")
            found = int(page.locator("#sample dd").nth(1).inner_text())
            body, answer = tab.search(lambda button=button: page.click(button))
            assert body["rows"][-1:] == [found]
            assert body["texts"] == texts
            assert tab.hits() == written(answer)
            assert not page.locator("#detail").is_visible()
        page.click(".chip button")
        page.wait_for_selector(".example")


def test_the_cut_off_hides_the_lower_hits(browser: Any, address: str) -> None:
    with opened(browser, address) as tab:
        page = tab.page
        _, answer = tab.type("a red circle")
        steps = page.evaluate("history.length")
        scores = [hit["score"] for hit in answer["hits"]]
        low, high = (float(page.get_attribute("#slider", name)) for name in ("min", "max"))
        assert np.allclose([low, high], [min(scores), max(scores)])
        page.evaluate(SLIDE, (low + high) / 2)
        kept = [hit for hit in answer["hits"] if hit["score"] >= float(page.input_value("#slider"))]
        assert 0 < len(kept) < len(scores)
        assert tab.hits() == written({"hits": kept})
        assert tab.text("#count") == f"{len(kept)} of 60 hits shown"
        assert tab.text("#value") == f"{float(page.input_value('#slider')):.3f}".replace("-", "\u2212")
        assert page.get_attribute("#slider", "aria-valuetext").endswith(f"{len(kept)} hits shown")
        assert not page.locator("#more").is_visible()
        # It is part of the address and no step of its own; another query begins without it.
        assert page.evaluate("history.length") == steps
        tab.search(page.reload)
        assert len(tab.hits()) == len(kept)
        tab.type("a blue ring")
        assert (len(tab.hits()), tab.text("#value")) == (60, "none")
        tab.open(f"?q=a+red+circle&min={high + 0.5}")
        assert tab.hits() == []
        page.click("#message button")
        assert (len(tab.hits()), tab.query()) == (60, {"q": ["a red circle"]})


SLIDE = (
    "value => { const e = document.querySelector('#slider'); e.value = value; e.dispatchEvent(new Event('input')); }"
)


def test_more_hits_conditions_and_duplicates(browser: Any, address: str) -> None:
    with opened(browser, address, allowed="status of 400") as tab:
        page = tab.page
        _, first = tab.type("a red circle")
        body, answer = tab.search(lambda: page.click("#more"))
        assert body["k"] == 120
        assert tab.hits() == written(answer)
        assert len({key for key, _ in tab.hits()}) == SAMPLES
        assert tab.hits()[:60] == written(first)
        assert page.evaluate("document.activeElement.closest('.hit').matches(':nth-child(61)')")
        assert not page.locator("#more").is_visible()
        body, answer = tab.search(lambda: page.check("#distinct"))
        assert (body["distinct"], tab.query()["distinct"]) == (0.95, ["1"])
        page.fill("#where", "number < 5")
        body, answer = tab.search(lambda: page.press("#where", "Enter"))
        assert body["where"] == "number < 5"
        assert tab.hits() == written(answer)
        assert 1 <= len(tab.hits()) <= 5
        # A condition that no sample meets, and one that cannot be read, are told by the field.
        for wrong in ("number > 900", "number >"):
            page.fill("#where", wrong)
            tab.search(lambda: page.press("#where", "Enter"))
            assert page.get_attribute("#where", "aria-invalid") == "true"
            assert page.get_attribute("#where", "aria-describedby") == "where-error"
            assert tab.text("#where-error")
            assert (tab.hits(), page.locator("#message").is_visible()) == ([], False)
        tab.search(page.go_back)
        tab.search(page.go_back)
        assert page.get_attribute("#where", "aria-invalid") == "false"
        assert (tab.text("#where-error"), tab.hits()) == ("", written(answer))


# ------------------------------------------------------------------------------------------- keyboard and detail


def test_the_keyboard_reaches_everything(browser: Any, address: str) -> None:
    place = "[...document.querySelectorAll('.hit')].indexOf(document.activeElement.closest('.hit'))"
    with opened(browser, address) as tab:
        page, press = tab.page, tab.page.keyboard.press
        press("/")
        page.keyboard.type("a red circle/")
        tab.search(lambda: press("Enter"))
        assert tab.query() == {"q": ["a red circle/"]}
        columns = page.evaluate(
            "getComputedStyle(document.querySelector('#hits')).gridTemplateColumns.split(' ').length"
        )
        assert columns > 2
        moves = [
            ("ArrowDown", 0),
            ("ArrowRight", 1),
            ("ArrowDown", 1 + columns),
            ("ArrowLeft", columns),
            ("ArrowUp", 0),
        ]
        for key, wanted in [*moves, ("End", 59), ("ArrowRight", 59), ("Home", 0), ("ArrowRight", 1)]:
            press(key)
            assert page.evaluate(place) == wanted, key
        # Tab leads through the controls of this hit and then on: not through those of all.
        assert page.evaluate("document.querySelectorAll('.hit :is(button, input):not([tabindex=\"-1\"])').length") == 3
        press("x")
        assert tab.text("#selection p") == "1 selected"
        press("Enter")
        inside = "document.querySelector('#detail').contains(document.activeElement)"
        title = tab.text("#detail-title")
        for key in ["Tab"] * 8 + ["Shift+Tab"] * 8:
            press(key)
            assert page.evaluate(inside), key
        assert page.is_checked("#pick")
        press("ArrowRight")
        assert tab.text("#detail-title") == tab.hits()[2][0] != title
        press("Escape")
        assert not page.locator("#detail").is_visible()
        assert page.evaluate(place) == 2
        press("ArrowUp")
        assert page.evaluate("document.activeElement.id") == "typed"
        press("/")  # now a letter of the query
        assert page.input_value("#typed") == "a red circle//"


def test_the_detail_view_shows_the_sample(browser: Any, collection: Collection, address: str) -> None:
    with opened(browser, address, size=PHONE, path="?q=a+red+circle") as tab:
        page = tab.page
        key = tab.hits()[4][0]
        (sample,) = [one for one in collection.samples if one["__key__"] == key]
        fields = json.loads(sample["json"])
        page.click(".hit >> nth=4 >> .open")
        page.wait_for_selector("#captions li:nth-child(2)")
        tab.wait("document.querySelector('#whole').naturalWidth > 0")
        assert page.evaluate("document.querySelector('#whole').naturalWidth") == 24
        assert page.get_attribute("#whole", "alt") == fields["captions"][0]
        assert page.locator("#captions li").all_inner_texts() == fields["captions"]
        facts = dict(zip(page.locator("#sample dt").all_inner_texts(), page.locator("#sample dd").all_inner_texts()))
        assert facts["score"] == tab.hits()[4][1]
        assert (facts["number"], facts["license"]) == (str(fields["number"]), fields["license"])
        assert facts["source"].endswith(".tar")
        assert "captions" not in facts
        page.click("#close")
        assert not page.locator("#detail").is_visible()


def test_texts_of_the_collection_are_never_markup(browser: Any, collection: Collection, address: str) -> None:
    with opened(browser, address) as tab:  # `opened` asserts that no script of the collection has run
        page = tab.page
        assert HOSTILE in page.locator(".example").all_inner_texts()
        assert tab.hits()[0][0] == collection.samples[0]["__key__"]
        page.click(".hit >> nth=0 >> .open")
        page.wait_for_selector("#captions li:nth-child(2)")
        assert page.locator("#captions li").all_inner_texts() == json.loads(collection.samples[0]["json"])["captions"]
        assert tab.text("#detail-title") == collection.samples[0]["__key__"]
        assert "<i>mine</i>" in tab.text("#sample")
        tab.search(lambda: page.click("#with"))
        tab.open(f"?q={'<b>bold</b>'}&row=0&where=%3Cb%3E")
        assert page.input_value("#typed") == "<b>bold</b>"
        assert (
            page.locator(
                "main :is(b, i, u, script), main img:not(.frame img, .chip img), dialog :is(b, i, u, script)"
            ).count()
            == 0
        )
        tab.console = [one for one in tab.console if "status of 400" not in one]


def test_the_selection_is_a_list_that_shards_take(
    browser: Any, collection: Collection, address: str, tmp_path: Path
) -> None:
    with opened(browser, address, path="?q=a+red+circle&where=number+>+10") as tab:
        page = tab.page
        keys = [key for key, _ in tab.hits()]
        for i in (5, 2, 7):
            page.hover(f".hit >> nth={i}")
            page.check(f".hit >> nth={i} >> .pick input")
        page.uncheck(".hit >> nth=2 >> .pick input")
        tab.type("a blue ring")  # the selection outlives the query
        assert tab.text("#selection p") == "2 selected"
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "selection.txt")
        selected = ShardIndex.build(collection.shards).select(str(tmp_path / "selection.txt"))
        assert sorted(selected.key(i) for i in range(len(selected))) == sorted([keys[5], keys[7]])
        page.click("#all")
        shown = {key for key, _ in tab.hits()}
        assert tab.text("#selection p") == f"{len(shown | {keys[5], keys[7]})} selected"
        page.click("#forget")
        assert not page.locator("#selection").is_visible()
        assert page.locator(".pick :checked").count() == 0


# ---------------------------------------------------------------------------------------------------- other states


def test_a_key_is_asked_for_once(browser: Any, collection: Collection) -> None:
    with (
        serving(collection.folder / "images", [KEY]) as url,
        opened(browser, url, None, allowed="status of 401") as tab,
    ):
        page = tab.page
        page.goto(url)
        page.wait_for_selector("#locked")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.press("Escape")
        page.wait_for_selector("#message:not([hidden])")
        page.click("#message button")
        page.fill("#key", "another")
        page.keyboard.press("Enter")
        tab.wait("document.querySelector('#refused').textContent !== ''")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector(".hit")
        tab.wait("[...document.querySelectorAll('.hit img')].some(i => i.naturalWidth > 0)")
        _, answer = tab.type("a red circle")
        page.click(".hit >> nth=0 >> .open")
        tab.wait("document.querySelector('#whole').naturalWidth === 24")
        page.keyboard.press("Escape")
        page.reload()  # the tab keeps the key
        page.wait_for_selector(".hit")
        assert not page.locator("#locked").is_visible()
        assert (tab.hits(), KEY in page.url) == (written(answer), False)


def test_a_server_that_is_gone_and_slow_answers(browser: Any, address: str) -> None:
    with opened(browser, address, allowed="ERR_CONNECTION_REFUSED|status of 503") as tab:
        page = tab.page
        page.route("**/api/search", lambda route: route.abort("connectionrefused"))
        page.fill("#typed", "a red circle")
        page.press("#typed", "Enter")
        page.wait_for_selector("#message:not([hidden])")
        assert "does not answer" in tab.text("#message")
        page.unroute("**/api/search")
        _, answer = tab.search(lambda: page.click("#message button"))
        assert (tab.hits(), page.locator("#message").is_visible()) == (written(answer), False)
        # While an answer is awaited the page says so; a later query gives up the request of an earlier one.
        given_up: list[Any] = []
        page.on("requestfailed", lambda request: given_up.append(request.post_data_json["texts"]))
        page.route("**/api/search", lambda route: "green" in route.request.post_data or route.continue_())
        page.fill("#typed", "a green square")
        page.press("#typed", "Enter")
        page.wait_for_selector("#results[aria-busy=true]")
        assert tab.text("#count") == "Searching\u2026"
        _, answer = tab.type("a blue ring")
        assert (tab.hits(), given_up) == (written(answer), [["a green square"]])
        busy = {"error": {"message": "Too many requests wait: try again", "type": "busy"}}
        page.route("**/api/search", lambda route: route.fulfill(status=503, json=busy))
        page.fill("#typed", "a pink cross")
        page.press("#typed", "Enter")
        page.wait_for_selector("#message:not([hidden])")
        assert busy["error"]["message"] in tab.text("#message")


def test_passages_are_shown_as_text(browser: Any, collection: Collection) -> None:
    with serving(collection.folder / "texts") as url, opened(browser, url, size=PHONE) as tab:
        page = tab.page
        assert page.locator(".hit").count() == 9
        _, answer = tab.type("passage 4")
        assert tab.hits() == written(answer)
        assert page.locator(".hit .text").all_inner_texts() == [hit["caption"] for hit in answer["hits"]]
        assert page.locator(".hit img").count() == 0
        assert not page.locator("#add").is_visible()  # the model knows no pictures
        page.click(".hit >> nth=2 >> .open")
        page.wait_for_selector("#captions li")
        assert tab.text("#captions") == answer["hits"][2]["caption"]
        assert not page.locator("#detail figure").is_visible()
        body, _ = tab.search(lambda: page.click("#like"))
        assert body["rows"] == [answer["hits"][2]["row"]]


# ----------------------------------------------------------------------------------------- what all can read and use


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")])
def test_labels_contrast_and_targets(browser: Any, address: str, size: tuple[int, int], scheme: str) -> None:
    """Check every state of the page, and that the checks find faults."""
    with opened(browser, address, size=size, scheme=scheme, allowed="status of 400") as tab:
        page = tab.page

        def check(state: str) -> None:
            assert page.evaluate(FAULTS) == [], state
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0], state

        check("samples")
        page.evaluate("document.querySelector('.pick input').click()")
        check("a selection")
        page.click(".hit >> nth=1 >> .open")
        page.wait_for_selector("#captions li:nth-child(2)")
        check("the detail view")
        page.click("#close")
        tab.open("?q=a+red+circle&row=3&where=number+>+30")
        check("hits")
        tab.open("?q=a+red+circle&where=number")
        check("a wrong condition")
        tab.open("?q=-cat")
        check("a message")
        page.evaluate("document.querySelector('#locked').showModal()")
        check("the prompt for a key")
        page.emulate_media(reduced_motion="reduce")
        assert page.evaluate("getComputedStyle(document.querySelector('#hits')).transitionDuration") in ("0s", "")
        page.evaluate(SPOIL)
        assert sorted({fault.split(":")[0] for fault in page.evaluate(FAULTS)}) == [
            "alt",
            "contrast",
            "label",
            "name",
            "reference",
        ]


SPOIL = """() => {
  document.querySelector("#locked").close();
  document.querySelector("#typed").labels[0].remove();
  document.querySelector("#size").style.color = "#999a";
  document.querySelector("#add").removeAttribute("aria-label");
  document.querySelector("#add span").remove();
  document.querySelector("#where").setAttribute("aria-describedby", "nothing");
  document.querySelector("main").append(document.createElement("img"));
}"""

# Inputs without a label, buttons without a name, pictures without an alternative text, references to nothing, and
# texts whose contrast with the ground below them is under 4.5, by the formula of WCAG 2.
FAULTS = """() => {
  const top = [...document.querySelectorAll("dialog[open]")].at(-1) ?? document.body;
  const seen = [...top.querySelectorAll("*")].filter(e => e.checkVisibility({visibilityProperty: true}));
  const found = [];
  const tell = (kind, e, more = "") => found.push(`${kind}: ${e.outerHTML.slice(0, 80)} ${more}`);
  for (const e of seen) {
    if (e.matches("input") && !e.labels.length && !e.ariaLabel) tell("label", e);
    if (e.matches("button") && !(e.ariaLabel || e.innerText.trim() || e.querySelector("img[alt]"))) tell("name", e);
    if (e.matches("img") && !e.hasAttribute("alt")) tell("alt", e);
    for (const name of ["aria-describedby", "aria-labelledby", "for", "list"]) {
      const id = e.getAttribute(name);
      if (id !== null && !document.getElementById(id)) tell("reference", e, name);
    }
    if (e.matches("button, input") && !e.closest(".pick")) {
      const box = e.getBoundingClientRect();
      if (!e.matches("[type=checkbox]") && Math.min(box.width, box.height) < 24) tell("target", e, box.height);
    }
  }
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const parse = color => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255);
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((v, i) => v * a + below[i] * (1 - a));
  const ground = e => {
    const below = e.parentElement ? ground(e.parentElement) : parse(getComputedStyle(document.body).backgroundColor);
    return e.matches("dialog") ? over(parse(getComputedStyle(e).backgroundColor), below)
      : over(parse(getComputedStyle(e).backgroundColor), below);
  };
  const light = color => {
    const [r, g, b] = color.map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (e, style) => {
    const below = ground(e);
    const [a, b] = [light(over(parse(style.color), below)), light(below)];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  for (const e of seen.filter(e => !e.disabled)) {
    const own = [...e.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const ratios = own ? [contrast(e, getComputedStyle(e))] : [];
    if (e.matches("input:placeholder-shown")) ratios.push(contrast(e, getComputedStyle(e, "::placeholder")));
    if (ratios.some(ratio => ratio < 4.5)) tell("contrast", e, ratios);
  }
  return found;
}"""
