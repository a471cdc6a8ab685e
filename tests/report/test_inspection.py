"""Ground truth: the model on each sequence; the kernel's sums; shared runs found by their definition; a browser."""

import re
from dataclasses import replace

import numpy as np
import pytest
from browsers import chromium
from contrast import contrast
from hypothesis import given
from hypothesis import strategies as st
from support import SMALL, json_lines, refused, run

from retro_np.checkpoint import save_params
from retro_np.config import EncoderConfig, RetroConfig
from retro_np.errors import UserError
from retro_np.evaluation.bits_per_byte import nats_of
from retro_np.generation import Retrieved
from retro_np.kernels.attention import attention_forward, attention_weights
from retro_np.nn.attention_maps import attention_maps
from retro_np.nn.model import retro
from retro_np.parameters import init_params
from retro_np.report.inspection import WHOLE, inspect, write_inspection
from retro_np.report.samples import show_chunks
from retro_np.retrieval.build import build_database
from retro_np.retrieval.database import Database
from retro_np.retrieval.tokenizer import encode, token_byte_lengths

M, V = 8, 300
ENCODER = EncoderConfig(16, 24, 2, 8, n_layers=1, ca_layers=(1,))
CONFIG = RetroConfig(V, 16, 24, n_heads=2, d_head=8, n_layers=2, cca_layers=(1, 2), chunk_size=M, encoder=ENCODER)
EVIL = "<script>document.title = 'taken'</script> <b>bold</b> \"quoted\" & value index token "


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, np.random.default_rng(0))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.integers(0, 2**16))
def test_weighted_sums_of_values_equal_the_kernels_output(g, n, k, r, positions, seed):
    rng = np.random.default_rng(seed)
    q, keys, values = (rng.standard_normal((2, *shape, 2, 4)) for shape in ((g, n), (k, r), (k, r)))
    mask = rng.random((2, k, r)) < 0.7
    positional = [rng.standard_normal(shape) for shape in ((n + r - 1, 2, 4), (2, 4), (2, 4))] if positions else []
    weights = attention_weights(q, keys, *positional, key_mask=mask)
    out, _ = attention_forward(q, keys, values, *positional, key_mask=mask)
    assert np.allclose(np.einsum("bhgnkr,bkrhc->bgnhc", weights, values), out, atol=1e-12)


def test_attention_maps_of_a_batch_equal_those_of_each_sequence_and_respect_the_masks(params):
    rng = np.random.default_rng(1)
    tokens, neighbours = rng.integers(1, V, (2, 21)), rng.integers(1, V, (2, 2, 3, 2 * M))
    neighbours[1, 0, 2, M:] = 0
    maps = attention_maps(params, CONFIG, tokens, neighbours)
    assert {name: weights.shape for name, weights in maps.items()} == {
        "layers.0.attention": (2, 2, 21, 21),
        "layers.0.cca": (2, 2, 2, M, 3, 2 * M),
        "layers.1.attention": (2, 2, 21, 21),
        "layers.1.cca": (2, 2, 2, M, 3, 2 * M),
        "encoder.layers.0.attention": (2, 2, 3, 2, 2 * M, 2 * M),
        "encoder.layers.0.cross_attention": (2, 2, 2, 3, 2 * M, M),
    }
    for row in range(2):
        one_row = attention_maps(params, CONFIG, tokens[row : row + 1], neighbours[row : row + 1])
        for name, weights in maps.items():
            assert np.allclose(weights[row], one_row[name][0], atol=1e-6), name
    permuted = attention_maps(params, CONFIG, tokens, neighbours[:, :, [2, 0, 1]])["layers.0.cca"]
    assert np.allclose(permuted, maps["layers.0.cca"][..., [2, 0, 1], :], atol=1e-5)
    assert (np.triu(maps["layers.0.attention"], 1) == 0).all()
    assert (maps["layers.1.cca"][1, 0, :, :, 2, M:] == 0).all()
    assert (maps["encoder.layers.0.attention"][1, 0, 2, ..., M:] == 0).all()
    assert np.allclose(maps["layers.1.cca"].sum(axis=(-1, -2)), 1, atol=1e-5)
    assert set(attention_maps(params, CONFIG, tokens, None)) == {"layers.0.attention", "layers.1.attention"}


def test_an_inspection_has_the_models_losses_and_the_weights_of_the_position_before_each_token(database, params):
    tokens = np.array(encode(database.tokenizer, "return value index chunk neighbour self " * 6))[: 3 * M + 3]
    inspection = inspect(params, CONFIG, database, tokens, k=2, n_prompt=5)
    ids, distances = database.search_keys(database.embed_chunks(tokens[: 3 * M].reshape(3, M)), 2)
    values = database.value(ids)[None]
    for neighbours, total, name in ((values, inspection.bits_on, "on"), (None, inspection.bits_off, "off")):
        logits, _ = retro(params, CONFIG, tokens[None, :-1], None if neighbours is None else values[:, :3])
        nats = nats_of(logits, tokens[None, 1:])[0]
        shown = [getattr(token, name) for chunk in inspection.chunks for token in chunk.tokens]
        assert shown[0] is None
        assert np.allclose(shown[1:], nats, atol=1e-5)
        lengths = token_byte_lengths(database.tokenizer)[tokens[1:]]
        assert total == pytest.approx(nats.sum() / np.log(2) / lengths.sum(), rel=1e-5)
    assert "".join(token.text for chunk in inspection.chunks for token in chunk.tokens) == database.text(tokens)
    assert [token.prompt for chunk in inspection.chunks for token in chunk.tokens].count(True) == 5
    assert [value.distance for value in inspection.chunks[1].values] == distances[1].tolist()
    assert inspection.chunks[3].values == []
    assert inspection.chunks[3].leakage is None
    maps = attention_maps(params, CONFIG, tokens[None], values)
    mean = sum(maps[f"layers.{p}.cca"][0].mean(axis=1) for p in (0, 1)) / 2  # (l, m, k, 2m)
    for number, chunk in enumerate(inspection.chunks):
        for position, token in enumerate(chunk.tokens):
            if number == 0:
                assert token.reads == []
            else:
                assert np.allclose(
                    np.array(token.reads) / WHOLE, mean[number - 1, position].reshape(-1), atol=1 / WHOLE
                )


def test_requests_that_a_page_cannot_show_are_refused(database, params):
    with pytest.raises(UserError, match="too short"):
        inspect(params, CONFIG, database, [5])
    with pytest.raises(UserError, match=r"too long for a page, with 2,049 tokens: give .* to 2,048"):
        inspect(params, CONFIG, database, [5] * 2049)
    with pytest.raises(UserError, match="shows 1 to 100 neighbours per chunk"):
        inspect(params, CONFIG, database, [5, 6], k=101)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, params):
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.safetensors"
    save_params(path, params, CONFIG)
    return path


@pytest.mark.slow
def test_the_command_writes_a_page_and_refuses_wrong_requests_and_overwriting(tmp_path, corpus, checkpoint):
    status, _, err = run("build", corpus, "-o", tmp_path / "db", "--embedder", "hashing", "--chunk-size", M,
                         "--vocabulary-size", V)  # fmt: skip
    assert status == 0, err
    model = checkpoint, tmp_path / "db"
    (tmp_path / "long.txt").write_text("value index " * 3000)
    for source in (["return value index token"], ["--file", tmp_path / "long.txt"], ["--prompt", "", "--length", "20"]):
        status, out, err = run("inspect", *model, *source, "-o", tmp_path / "page.html")
        assert status == 0, err
        assert "bits per byte with retrieval" in out
        assert not re.search(r"https?:|src=|url\(|@import", (tmp_path / "page.html").read_text())  # nothing is fetched
        assert ("the first 2,048 of" in out) == ("--file" in source)
    assert "takes exactly one of" in refused("inspect", *model)
    assert "takes exactly one of" in refused("inspect", *model, "text", "--prompt", "x")
    assert "no file" in refused("inspect", *model, "--file", tmp_path / "nowhere")
    assert "is a folder" in refused("inspect", *model, "some text", "-o", tmp_path)
    assert "too short" in refused("inspect", *model, "")
    assert "too long for a page" in refused("inspect", *model, "--prompt", "value index " * 3000)
    assert "k is 101" in refused("inspect", *model, "--prompt", "value", "-k", "101")
    assert "is not a file" in refused("inspect", *model, "--file", tmp_path)
    inputs = checkpoint, tmp_path / "db" / "manifest.json", tmp_path / "long.txt"
    contents = {path: path.read_bytes() for path in inputs}
    for path in inputs:
        assert "would overwrite an input" in refused("inspect", *model, "--file", tmp_path / "long.txt", "-o", path)
    assert "is not an ordinary file" in refused("inspect", *model, "some text", "-o", "/dev/null")
    assert contents == {path: path.read_bytes() for path in inputs}


def test_a_sample_is_shown_with_the_neighbours_that_it_read_not_with_those_of_a_new_search(database, params):
    tokens = np.array(encode(database.tokenizer, "return value index chunk neighbour self " * 6))[: 2 * M + 3]
    ids, distances = np.array([7, 5]), np.array([0.25, 0.5])
    read = Retrieved(0, ids, distances, database.value(ids))
    sample = inspect(params, CONFIG, database, tokens, k=2, retrieved=[read])
    assert [value.distance for value in sample.chunks[0].values] == [0.25, 0.5]
    assert ["".join(t.text for t in value.neighbour + value.continuation) for value in sample.chunks[0].values] == [
        database.text(v) for v in read.values
    ]
    searched = inspect(params, CONFIG, database, tokens, k=2)
    assert sample.chunks[1].values == searched.chunks[1].values
    assert [c.leakage for c in sample.chunks] == [c.leakage for c in searched.chunks]
    assert sample.bits_on != searched.bits_on
    assert sample.bits_off == searched.bits_off


def longest_shared_run(tokens, end, values):
    """The length of the longest run of tokens that ends at `end` and is part of one of the values."""
    slices = {tuple(value[i:j]) for value in values for i in range(len(value)) for j in range(i + 1, len(value) + 1)}
    lengths = [n for n in range(1, end + 2) if tuple(tokens[end + 1 - n : end + 1]) in slices]
    return max(lengths, default=0)


@given(st.lists(st.integers(2, 4), min_size=1, max_size=4 * M), st.integers(0, 2**16))
def test_shown_runs_are_the_longest_shared_up_to_five_and_missing_neighbours_are_left_out(database, tokens, seed):
    rng = np.random.default_rng(seed)
    ids = np.array([3, 0, -1])
    items = [Retrieved(u, ids, np.array([0.5, 1.0, np.inf]), rng.integers(2, 5, (3, 2 * M))) for u in range(2)]
    for item in items:
        item.values[2] = 0
    n_prompt = int(rng.integers(0, len(tokens) + 1))
    chunks = show_chunks(tokens[:n_prompt], tokens[n_prompt:], items, database)
    assert [token.prompt for chunk in chunks for token in chunk.tokens] == [t < n_prompt for t in range(len(tokens))]
    rows = [tokens[start : start + M] for start in range(0, len(tokens), M)]
    for chunk, row in zip(chunks, rows, strict=True):
        read = items[chunk.number - 1].values.tolist() if 0 < chunk.number <= 2 else []
        assert [t.run for t in chunk.tokens] == [min(longest_shared_run(row, i, read), 5) for i in range(len(row))]
        names = [database.documents[int(database.document_of(i))]["name"] for i in (3, 0)]
        assert [value.document for value in chunk.values] == (names if chunk.number < 2 else [])
        for value, stored in zip(chunk.values, items[min(chunk.number, 1)].values.tolist(), strict=False):
            next_row = rows[chunk.number + 1 : chunk.number + 2]
            shown = [token.run for token in value.neighbour + value.continuation]
            assert shown == [min(longest_shared_run(stored, i, next_row), 5) for i in range(2 * M)]
            assert len(value.neighbour) == M


@pytest.fixture(scope="module")
def page(tmp_path_factory, embedder, params):
    """A page with a script in its text and in its database."""
    folder = tmp_path_factory.mktemp("page")
    corpus = json_lines(folder / "c.jsonl", {f"<i>{n}</i>.py": EVIL * 3 + f"number {n} " * 9 for n in range(6)})
    database = build_database(corpus, folder / "db", SMALL, embedder)
    tokens = encode(database.tokenizer, EVIL * 2)
    facts = {"a <u>fact</u>": "</script><script>document.title = 'taken'</script>"}
    write_inspection(folder / "page.html", "A page", facts, inspect(params, CONFIG, database, tokens))
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser():
    driver = chromium()
    yield driver
    driver.quit()


def background(element):
    return element.value_of_css_property("background-color")


def test_text_in_a_page_is_escaped(browser, page):
    browser.get(page.as_uri())
    assert browser.title == "A page"
    assert browser.find_elements("css selector", "main script, .text b, .value b, main i, dl script, dl u") == []
    shown = "".join(token.get_property("textContent") for token in browser.find_elements("css selector", ".t"))
    assert shown == EVIL * 2
    assert "</script><script>" in browser.find_element("css selector", "dl").text
    assert browser.get_log("browser") == []


def test_pointing_at_a_token_lights_up_the_tokens_that_were_read_to_predict_it(browser, page):
    from selenium.webdriver import ActionChains

    browser.get(page.as_uri())
    third = browser.find_elements("css selector", ".chunk")[2]
    token = next(t for t in third.find_elements("css selector", ".t") if t.text.strip())
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    ActionChains(browser).move_to_element(token).perform()
    second = browser.find_elements("css selector", ".chunk")[1]
    lit = browser.find_elements("css selector", ".v.lit")
    assert lit
    assert len(lit) == len(second.find_elements("css selector", ".v.lit"))
    assert background(second.find_element("css selector", ".v.strongest")) != "rgba(0, 0, 0, 0)"
    status = browser.find_element("id", "status").text
    assert status.startswith(f"‘{token.get_property('textContent')}’: {token.get_attribute('data-on')} nats")
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    assert browser.find_elements("css selector", ".lit") == []


def test_a_memorys_page_says_what_share_of_the_attention_was_on_what_was_retrieved_and_from_where(
    browser, page, tmp_path, params, embedder
):
    database = Database.open(page.parent / "db", embedder)
    inspection = inspect(params, CONFIG, database, encode(database.tokenizer, EVIL * 2))
    halved = [
        replace(chunk, tokens=[replace(token, reads=[w // 2 for w in token.reads]) for token in chunk.tokens])
        for chunk in inspection.chunks
    ]
    write_inspection(tmp_path / "page.html", "A page", {}, replace(inspection, chunks=halved, shared=True))
    browser.get((tmp_path / "page.html").as_uri())
    token = browser.find_elements("css selector", ".chunk")[2].find_element("css selector", ".t")
    browser.execute_script("arguments[0].focus()", token)
    status = browser.find_element("id", "status").text
    assert re.search(r"; (49|50) % of the attention on what was retrieved, such as ‘.* % \(<i>\d</i>\.py\)$", status)
    assert "attention to what was retrieved" in browser.find_element("css selector", ".controls").text
    assert re.search(r"--peak: (49|50)%", token.get_attribute("style"))


def test_the_arrow_keys_step_through_tokens(browser, page):
    from selenium.webdriver.common.keys import Keys

    browser.get(page.as_uri())
    tokens = browser.find_elements("css selector", ".t")
    browser.execute_script("arguments[0].focus()", tokens[0])
    for keys, index in (([Keys.ARROW_RIGHT] * 3, 3), ([Keys.ARROW_LEFT], 2), ([Keys.ARROW_DOWN], M), ([Keys.HOME], 0),
                        ([Keys.END], len(tokens) - 1), ([Keys.ARROW_RIGHT], len(tokens) - 1)):  # fmt: skip
        for key in keys:
            browser.switch_to.active_element.send_keys(key)
        assert browser.switch_to.active_element == tokens[index]
        assert [t for t in tokens if t.get_attribute("tabindex") == "0"] == [tokens[index]]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", tokens[4])
    tokens[4].click()  # a click also makes that token the tab stop
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert [t for t in tokens if t.get_attribute("tabindex") == "0"] == [tokens[5]]
    browser.switch_to.active_element.send_keys(Keys.CONTROL, Keys.HOME)  # the browser handles this shortcut
    assert browser.switch_to.active_element == tokens[5]
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert browser.find_elements("css selector", ".picked, .lit") == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.slow
def test_text_is_readable_in_every_colour_mode_and_theme(browser, page, theme):
    browser.get(page.as_uri())
    browser.find_element("id", theme).click()
    canvas = browser.find_element("css selector", "body")
    assert contrast_of(canvas.value_of_css_property("color"), background(canvas), canvas) > 7
    colour_sets = set()
    for mode in ("gain", "run", "reads"):
        browser.find_element("id", mode).click()
        coloured = [t for t in browser.find_elements("css selector", ".t") if background(t) != "rgba(0, 0, 0, 0)"]
        assert coloured, mode
        colour_sets.add(frozenset(background(t) for t in coloured))
        legend = [s for s in browser.find_elements("css selector", ".key span") if s.is_displayed()]
        assert legend  # The legend shows the strongest colours.
        for token in coloured + legend:
            assert contrast_of(token.value_of_css_property("color"), background(token), canvas) > 4.5  # WCAG 2, AA
    assert len(colour_sets) == 3


@pytest.mark.slow
def test_a_focused_token_is_not_covered(browser, page):
    from selenium.webdriver.common.keys import Keys

    browser.set_window_size(1300, 700)
    try:
        browser.get(page.as_uri())
        tokens = browser.find_elements("css selector", ".t")
        browser.execute_script("arguments[0].focus()", tokens[0])
        for key in [Keys.ARROW_DOWN] * 8 + [Keys.ARROW_UP] * 8:
            browser.switch_to.active_element.send_keys(key)
            token, above, below = (
                browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", element)
                for element in (
                    browser.switch_to.active_element,
                    browser.find_element("css selector", ".controls"),
                    browser.find_element("id", "status"),
                )
            )
            assert above["bottom"] <= token["top"]
            assert token["bottom"] <= below["top"]
    finally:
        browser.set_window_size(1300, 1000)


@pytest.mark.slow
def test_when_the_pointer_leaves_a_token_the_focused_token_is_described_again(browser, page):
    from selenium.webdriver import ActionChains

    browser.get(page.as_uri())
    tokens = browser.find_elements("css selector", ".t")
    browser.execute_script("arguments[0].focus({preventScroll: true})", tokens[M + 2])
    description = browser.find_element("id", "status").text
    ActionChains(browser).move_to_element(tokens[1]).perform()
    assert browser.find_element("id", "status").text != description
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    assert browser.find_element("id", "status").text == description
    assert browser.find_elements("css selector", ".picked") == [tokens[M + 2]]


def contrast_of(ink, paint, canvas):
    """The contrast of ink on paint that may be transparent over the canvas."""
    base = channels(background(canvas))[:3]
    r, g, b, alpha = channels(paint)
    mixed = [alpha * c + (1 - alpha) * d for c, d in zip((r, g, b), base, strict=True)]
    return contrast(channels(ink)[:3], mixed)


def channels(colour):
    """Red, green, blue and alpha in [0, 1] of `rgb()`, `rgba()` and `color(srgb …)`."""
    kind, inside = colour.rstrip(")").split("(")
    numbers = [float(part) for part in inside.replace("srgb", "").replace("/", " ").replace(",", " ").split()]
    scale = 1 if kind == "color" else 255
    return [*(c / scale for c in numbers[:3]), *(numbers[3:] or [1.0])]
