"""Take the picture of the playground for the README: the real page, with cub, in Chromium.

    make .envs/playground/.installed
    .envs/playground/bin/python -m scripts.playground_screenshot docs/images/playground.png

``--dark`` and ``--phone`` show the page as it is elsewhere.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from integrations.playground.browser import browsing, serving
from selenium.webdriver import ActionChains, Chrome

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


def wait(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the page did not do what was asked")
        time.sleep(0.1)


def show(browser: Chrome, tokens: int) -> None:
    """Write a completion, take another token in it, write again, and point at a token."""
    browser.execute_script(
        "for (const [name, value] of Object.entries(arguments[0])) document.getElementById(name).value = value",
        {"seed": 4, "max_tokens": tokens, "temperature": 0.6},
    )
    status = browser.find_element("id", "status")
    browser.find_element("id", "run").click()
    wait(lambda: "written" in status.text)
    browser.execute_script("document.querySelectorAll('#completion .token')[20].click()")
    browser.find_elements("css selector", "#alternatives button")[1].click()
    wait(lambda: "written" in status.text)
    time.sleep(1.5)  # the last look at the memory
    browser.execute_script("document.getElementById('completion').scrollTop = 0")
    # The token in doubt that is furthest to the right of those in sight, so that the panel hides little.
    place = browser.execute_script(
        "const bottom = document.getElementById('completion').getBoundingClientRect().bottom - 20;"
        "const all = [...document.querySelectorAll('#completion .token')];"
        "const left = (token) => token.getBoundingClientRect().left;"
        "const good = all.filter((token) => token.matches('.p2, .p3') && token.textContent.trim()"
        "  && token.getBoundingClientRect().bottom < bottom);"
        "return all.indexOf(good.sort((a, b) => left(b) - left(a))[0])"
    )
    ActionChains(browser).move_to_element(browser.find_elements("css selector", "#completion .token")[place]).perform()
    wait(lambda: browser.find_elements("css selector", "#alternatives button"))


def main() -> None:
    """Start a server and a browser, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--phone", action="store_true")
    args = parser.parse_args()
    width, height = SIZES["phone" if args.phone else "desktop"]
    with serving() as server, browsing() as browser:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": args.phone}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if args.dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        browser.get(server.url)
        wait(lambda: browser.find_elements("css selector", "#model option"))
        show(browser, 320)
        args.file.parent.mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(args.file))


if __name__ == "__main__":
    main()
