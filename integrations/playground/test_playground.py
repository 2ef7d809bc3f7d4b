"""The playground in a real browser, against a real server."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from integrations.playground.browser import Server, browsing, serving
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.remote.webelement import WebElement

pytestmark = pytest.mark.timeout(600)

Until = Callable[..., None]
KEY = "a key"


FAKE_SERVER = r"""
const [names, total] = arguments;
const given = window.fetch;
const event = (id) => ({choices: [{index: 0, text: names[id % names.length], finish_reason: null, logprobs: {
  tokens: [names[id % names.length]], token_logprobs: [-(id % names.length)],
  top_logprobs: [Object.fromEntries(names.map((name, rank) => [name, -rank]))],
  top_token_ids: [Object.fromEntries(names.map((name) => [name, name.charCodeAt(0)]))],
}, token_ids: [names[id % names.length].charCodeAt(0)], token_texts: [names[id % names.length]]}]});
window.fetch = (path, options) => {
  if (!path.endsWith("completions")) return given(path, options);
  let sent = 0;
  const body = new ReadableStream({async pull(controller) {
    await new Promise((resolve) => setTimeout(resolve, 1));
    let text = "";
    for (let i = 0; i < 100 && sent < total; i++) text += `data: ${JSON.stringify(event(sent++))}\n\n`;
    if (sent === total) text += "data: [DONE]\n\n";
    controller.enqueue(new TextEncoder().encode(text));
    if (sent === total) controller.close();
  }});
  return Promise.resolve(new Response(body));
};
"""


@pytest.fixture
def page(browser: Chrome, server: Server, until: Until) -> Iterator[Chrome]:
    yield from opened(browser, server.url, until)


def opened(browser: Chrome, url: str, until: Until) -> Iterator[Chrome]:
    browser.get(f"{url}/")
    until(lambda: browser.find_elements("css selector", "#model option"))
    browser.get_log("browser")
    yield browser
    problems = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not problems, problems  # scripts that fail, and what the content security policy refuses


def text(browser: Chrome, name: str) -> str:
    return browser.find_element("id", name).get_attribute("textContent") or ""


def fill(browser: Chrome, **values: object) -> None:
    for name, value in values.items():
        browser.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, str(value))


def tokens(browser: Chrome, where: str = "#completion") -> list[WebElement]:
    return browser.find_elements("css selector", f"{where} .token")


def alternatives(browser: Chrome) -> list[WebElement]:
    return browser.find_elements("css selector", "#alternatives button")


def complete(browser: Chrome, until: Until, **values: object) -> str:
    fill(browser, **values)
    browser.find_element("id", "run").click()
    ended(browser, until)
    return text(browser, "completion")


def ended(browser: Chrome, until: Until) -> None:
    until(lambda: "written" in text(browser, "status"))


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    return float(lines[f'{name}{{model_name="cub"}}'])


def test_a_completion_is_what_the_server_gives(page: Chrome, server: Server, until: Until) -> None:
    prompt = 'import os\n\n\ndef main():\n    """Print the names of files."""\n    for name in os.listdir("."):\n'
    written = complete(page, until, prompt=prompt, temperature=0, max_tokens=40)
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 40, "min_p": 0.05}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        assert written == json.load(answer)["choices"][0]["text"]
    assert len(tokens(page)) == 40
    assert text(page, "written") == "40" and text(page, "asked") == str(len(prompt) + 1)
    assert float(text(page, "speed")) > 0 and text(page, "first").endswith("s")
    until(lambda: text(page, "kv").endswith("kB") and page.find_elements("css selector", "#memory polygon"))
    assert text(page, "states") and text(page, "snapshots")
    before = text(page, "completion")
    page.find_element("id", "continue").click()
    until(lambda: len(tokens(page)) == 80 and "written" in text(page, "status"))
    assert text(page, "completion").startswith(before) and int(text(page, "cached")) >= 64


def test_stop_ends_it_on_the_server_too(page: Chrome, server: Server, until: Until) -> None:
    fill(page, max_tokens=16_000, temperature=1)
    page.find_element("id", "run").click()
    until(lambda: len(tokens(page)) > 3)
    page.find_element("id", "stop").click()
    until(lambda: text(page, "status") == "Stopped.")
    count = len(tokens(page))
    until(lambda: metric(server, "hyaena:num_requests_running") == 0)
    assert 3 < len(tokens(page)) < 16_000 and len(tokens(page)) - count < 20
    assert not page.find_element("id", "stop").is_enabled() and not text(page, "error")


def test_alternatives_on_hover_and_a_click_continues_there(page: Chrome, until: Until) -> None:
    written = complete(page, until, temperature=0, max_tokens=30)
    ActionChains(page).move_to_element(tokens(page)[12]).perform()
    until(lambda: len(alternatives(page)) >= 8)
    shown = [button.text.split("\n") for button in alternatives(page)]
    shares = [float(parts[-1].removeprefix("< ").removesuffix(" %")) for parts in shown]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) < 101
    current = page.find_element("css selector", "#alternatives [aria-current]")
    assert current.text[0] == written[12].replace(" ", "␣")  # greedy: also the first of them
    assert current == alternatives(page)[0]
    other = next(button for button in alternatives(page)[1:] if button.text[0].isalnum())
    letter = other.text[0]
    ActionChains(page).move_to_element(other).click().perform()
    until(lambda: len(tokens(page)) == 43 and "written" in text(page, "status"))
    assert text(page, "completion").startswith(written[:12] + letter)
    assert not alternatives(page)
    assert int(text(page, "cached")) >= 128  # of 155 + 12 tokens before it: two pages of 64
    ActionChains(page).move_to_element(page.find_element("id", "prompt")).perform()


def test_tokens_that_come_under_a_pointer_that_rests_open_nothing(page: Chrome, until: Until) -> None:
    answer = page.find_element("id", "completion")
    box, size = page.find_element("id", "run").rect, answer.size
    ActionChains(page).move_to_element_with_offset(answer, 30 - size["width"] // 2, 20 - size["height"] // 2).perform()
    fill(page, max_tokens=200, temperature=0, prompt="x = 1\n" * 12)
    page.execute_script("document.getElementById('run').click()")
    ended(page, until)
    assert not alternatives(page)
    assert page.find_element("id", "run").rect == box  # nor does what is below move while the answer grows
    ActionChains(page).move_by_offset(2, 0).perform()
    panel = page.find_element("id", "alternatives")
    top = panel.rect["y"]
    page.execute_script("arguments[0].scrollTop -= 15", answer)  # of its end: the panel stays with its token
    until(lambda: abs(panel.rect["y"] - top - 15) < 1, 20)
    page.execute_script("arguments[0].scrollTop = 0", answer)
    until(lambda: not alternatives(page))
    ActionChains(page).move_by_offset(2, 0).perform()
    assert alternatives(page)
    ActionChains(page).move_to_element(page.find_element("id", "prompt")).perform()


def test_an_alternative_ends_the_run_before_it(page: Chrome, until: Until) -> None:
    fill(page, max_tokens=16_000, temperature=1)
    page.find_element("id", "run").click()
    until(lambda: len(tokens(page)) > 20)
    written = text(page, "completion")
    tokens(page)[10].click()
    other = alternatives(page)[-1]
    letter = other.text.split("\n")[0].replace("␣", " ").replace("↵", "\n").replace("⇥", "\t")
    fill(page, max_tokens=15)
    other.click()
    until(lambda: "15 tokens written" in text(page, "status"))
    assert len(tokens(page)) == 26 and text(page, "completion").startswith(written[:10] + letter)
    assert not text(page, "error")


def test_characters_of_several_bytes_are_one_piece(page: Chrome, until: Until) -> None:
    written = complete(page, until, prompt="é" * 40, temperature=0, max_tokens=20)
    assert len(written) == len(tokens(page)) == 10 and all(ord(character) > 127 for character in written)
    tokens(page)[0].click()
    lists = page.find_elements("css selector", "#alternatives ul")
    assert len(lists) == 2 and "bytes:\\xc3" in lists[0].text
    second = lists[1].find_elements("css selector", "button")[0]
    last = written[0].encode()[1]
    assert f"bytes:\\x{last:02x}" in second.text
    second.click()  # the second byte of the first character again, and on from there
    ended(page, until)
    until(lambda: len(tokens(page)) >= 11)
    assert text(page, "completion")[:10] == written


def test_chats(page: Chrome, until: Until) -> None:
    page.find_element("id", "tab-chat").click()
    fill(page, max_tokens=12, temperature=0, message="<b>What</b> is it?")
    page.find_element("id", "message").send_keys(Keys.CONTROL, Keys.ENTER)
    ended(page, until)
    assert page.find_element("css selector", ".question").text == "<b>What</b> is it?"
    first = text(page, "conversation")
    fill(page, message="And then?", system="Be short.")
    page.find_element("id", "run").click()
    until(lambda: len(tokens(page, "#conversation > div:nth-child(2)")) == 12)
    ended(page, until)
    assert text(page, "conversation").startswith(first + "And then?")
    asked = "Be short.\n\n### Instruction:\n<b>What</b> is it?\n\n### Response:\n"
    assert int(text(page, "asked")) > len(asked) + 12 + len("### Instruction:\nAnd then?\n\n### Response:\n")
    tokens(page, "#conversation > div:nth-child(1)")[3].click()
    alternatives(page)[1].click()
    ended(page, until)
    until(lambda: len(page.find_elements("css selector", ".question")) == 1)  # what followed is another conversation
    page.execute_script(
        """const given = window.fetch;
        window.fetch = (path, options) => path.endsWith("completions")
          ? Promise.resolve(new Response("<html>busy", {status: 503})) : given(path, options);"""
    )
    fill(page, message="Once more")
    page.find_element("id", "run").click()
    until(lambda: "503" in text(page, "error"))
    assert page.find_element("id", "message").get_attribute("value") == "Once more"  # it was not answered: kept
    assert len(page.find_elements("css selector", ".question")) == 1


def test_each_tab_has_a_status_of_its_own(page: Chrome, until: Until) -> None:
    completion, chat = (page.find_element("id", f"tab-{name}") for name in ("completion", "chat"))
    complete(page, until, temperature=0, max_tokens=5)
    chat.click()
    assert text(page, "status") == ""
    fill(page, max_tokens=16_000, temperature=1, message="What?")
    page.find_element("id", "run").click()
    until(lambda: text(page, "status") == "Writing …")
    completion.click()
    assert text(page, "status") == "Writing under Chat …"
    page.find_element("id", "stop").click()
    until(lambda: text(page, "status").startswith("5 tokens written"))
    chat.click()
    assert text(page, "status") == "Stopped."
    page.find_element("id", "clear").click()
    assert text(page, "status") == ""
    completion.click()
    assert text(page, "status") == ""


def test_output_is_text(page: Chrome, until: Until) -> None:
    line = "<script>alert(1)</script><img src=x onerror=alert(1)>\n"
    written = complete(page, until, prompt=line * 8, temperature=0, max_tokens=len(line))
    assert written == line
    tokens(page)[0].click()
    assert "<" in alternatives(page)[0].text
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    hostile = ["<script>document.title = 1</script>", "<img src=x onerror='document.title = 2'>", "</div></main><h1>"]
    page.execute_script(FAKE_SERVER, hostile, 6)  # tokens of other vocabularies are longer than a byte
    assert complete(page, until) == "".join(hostile) * 2
    tokens(page)[1].click()
    assert hostile[0].replace(" ", "␣") in alternatives(page)[0].get_attribute("textContent")
    assert not page.find_elements("css selector", "main script, main img, #alternatives img, #alternatives script")
    assert page.title == "hyaena playground" and len(page.find_elements("css selector", "h1")) == 1


def test_by_keyboard_alone(page: Chrome, until: Until) -> None:
    fill(page, max_tokens=20, temperature=0)
    assert page.switch_to.active_element.get_attribute("id") == "prompt"
    page.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ENTER)
    ended(page, until)
    page.switch_to.active_element.send_keys(Keys.TAB)
    token = page.switch_to.active_element
    assert token.get_attribute("data-piece") == "0" and alternatives(page)
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.execute_script(outline) == "solid"
    token.send_keys(Keys.ARROW_RIGHT, Keys.NULL)
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_attribute("data-piece") == "2"
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.switch_to.active_element == alternatives(page)[0]
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not alternatives(page) and page.switch_to.active_element.get_attribute("data-piece") == "2"
    names = []
    for _ in range(30):
        ActionChains(page).send_keys(Keys.TAB).perform()
        names.append(page.switch_to.active_element.get_attribute("id"))
    order = [name for name in ("run", "continue", "clear", "temperature", "seed", "stop_strings") if name in names]
    assert order == ["run", "continue", "clear", "temperature", "seed", "stop_strings"]
    assert sorted(order, key=names.index) == order
    fill(page, max_tokens=16_000)
    page.find_element("id", "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    until(lambda: text(page, "written") not in ("–", "20"))
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    until(lambda: text(page, "status") == "Stopped.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(page: Chrome, until: Until, scheme: str) -> None:
    """Text has at least the contrast 4.5 of WCAG AA on every background."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    names = ["text", "faint", "page", "card", "error", "accent", "on-accent", "p1", "p2", "p3", "p4"]
    style = "getComputedStyle(document.documentElement)"
    colours = {name: page.execute_script(f"return {style}.getPropertyValue('--{name}').trim()") for name in names}
    pairs = [("text", name) for name in ("page", "card", "p1", "p2", "p3", "p4")]
    pairs += [("faint", "page"), ("faint", "card"), ("error", "page"), ("on-accent", "accent")]
    ratios = {pair: contrast(*(colours[name] for name in pair)) for pair in pairs}
    assert min(ratios.values()) >= 4.5, ratios
    body = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(body[4:].split(",")[0]) < 128) == (scheme == "dark")


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, by WCAG 2."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_on_a_phone(page: Chrome, until: Until) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.refresh()
        until(lambda: page.find_elements("css selector", "#model option"))
        complete(page, until, max_tokens=40)
        tokens(page)[5].click()
        page.execute_script("document.querySelector('#model option').text = 'organisation/'.repeat(8)")
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        box = page.find_element("id", "alternatives").rect
        assert box["width"] == 390 and len(alternatives(page)) >= 8
        token = tokens(page)[-1]
        token.click()
        assert token.rect["y"] + token.rect["height"] <= page.execute_script("return window.scrollY") + box["y"]
        fields = page.find_elements("css selector", "input, select, textarea")
        assert {field.value_of_css_property("font-size") for field in fields} == {"16px"}  # into smaller ones iOS zooms
        assert not page.find_element("id", "temperature").is_displayed()
        page.find_element("id", "prompt").click()
        assert not alternatives(page)
        page.find_element("css selector", "summary").click()
        assert page.find_element("id", "temperature").is_displayed()
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_wrong_values_are_told_in_one_line(page: Chrome, until: Until) -> None:
    fill(page, temperature=-1)
    page.find_element("id", "run").click()
    until(lambda: text(page, "error").startswith("Temperature:"))
    assert page.switch_to.active_element.get_attribute("id") == "temperature"
    fill(page, temperature=1, max_tokens=10**9)
    page.find_element("id", "run").click()
    until(lambda: "the server allows 16384" in text(page, "error"))
    assert len(complete(page, until, max_tokens=10, temperature=0)) == 10 and not text(page, "error")
    page.get_log("browser")  # the browser itself reports the status 400


def test_twenty_thousand_tokens(page: Chrome, until: Until) -> None:
    """The page shows as many tokens as a fast server sends, and stays usable."""
    page.execute_script(FAKE_SERVER, ["a", "b", " ", "c", "\n"], 20_000)
    began = time.monotonic()
    page.find_element("id", "run").click()
    until(lambda: "written" in text(page, "status"))
    print(f"20,000 tokens shown in {time.monotonic() - began:.1f} s")
    assert page.execute_script("return document.querySelectorAll('#completion .token').length") == 20_000
    last = page.execute_script("return document.querySelector('#completion .token:last-child')")
    last.click()
    assert len(alternatives(page)) == 5
    page.find_element("id", "clear").click()
    assert not tokens(page)


def test_keys_busy_and_vanished_servers(browser: Chrome, until: Until) -> None:
    with serving("--api-key", KEY, "--max-rows", "1", "--max-waiting", "1") as server:
        browser.get(f"{server.url}/")
        until(lambda: "key is missing" in text(browser, "error"))
        field = browser.switch_to.active_element
        assert field.get_attribute("id") == "key" and not browser.find_elements("css selector", "#model option")
        browser.execute_script("document.getElementById('error').textContent = ''")
        field.send_keys("wrong", Keys.ENTER)
        until(lambda: "key is missing or wrong" in text(browser, "error"))
        field.clear()
        field.send_keys(KEY, Keys.ENTER)
        until(lambda: browser.find_elements("css selector", "#model option"))
        assert not text(browser, "error")
        assert browser.execute_script("return [localStorage.length, document.cookie]") == [0, ""]

        browser.find_element("id", "tab-chat").click()  # no template
        assert "cub has no chat template" in browser.find_element("id", "no-chat").text
        assert browser.find_element("id", "panel-completion").is_displayed()

        assert len(complete(browser, until, temperature=0, max_tokens=5)) == 5
        body = json.dumps({"prompt": "a", "max_tokens": 16_000, "stream": True, "ignore_eos": True}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
        first = urllib.request.urlopen(request)
        first.readline()  # it runs
        second = urllib.request.urlopen(request)  # and this one waits
        browser.find_element("id", "run").click()
        until(lambda: "waiting already" in text(browser, "error"))
        assert "try again in about 1 s" in text(browser, "error") and "\n" not in text(browser, "error")
        for response in (first, second):
            response.close()

        fill(browser, max_tokens=16_000)
        browser.find_element("id", "run").click()
        until(lambda: len(tokens(browser)) > 3)
        threading.Thread(target=server.process.kill).start()
        until(lambda: "connection to the server was lost" in text(browser, "error"))
        assert len(tokens(browser)) > 3
        browser.find_element("id", "run").click()
        until(lambda: "does not answer" in text(browser, "error"))
        browser.get_log("browser")


def test_a_key_ends_with_the_tab(server: Server) -> None:
    with browsing() as browser:
        browser.get(f"{server.url}/")
        browser.execute_script("sessionStorage.setItem('hyaena.key', 'x')")
        browser.switch_to.new_window("tab")
        browser.get(f"{server.url}/")
        assert browser.execute_script("return sessionStorage.length") == 0


def test_headers_allow_nothing_foreign(server: Server) -> None:
    for path in ("/", "/static/playground.js", "/static/style.css"):
        with urllib.request.urlopen(server.url + path) as answer:
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
