"""A headless Chromium that opens the page of `demo.py` as a visitor would."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

WINDOW_SIZE = (1200, 900)


@contextmanager
def open_browser(size: tuple[int, int] = WINDOW_SIZE) -> Iterator[Any]:
    """Open Selenium's driver. Skips the test where Chromium or Selenium are missing."""
    selenium = pytest.importorskip("selenium.webdriver")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size={},{}".format(*size))
    options.add_argument("--hide-scrollbars")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = selenium.chrome.service.Service(chromedriver)
    driver = selenium.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


class Visitor:
    """A visitor of the page, who waits for the results. Fields are named by their `elem_id`."""

    def __init__(self, driver: Any, url: str):
        self.driver = driver
        driver.get(url)
        self.wait(self.title)  # comes with the model's fields

    def wait(self, condition: Callable[[], Any], seconds: float = 90) -> Any:
        """Wait until a condition is true, and return its value."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"timed out; the page's message: {self.messages()}"
            time.sleep(0.1)
        return value

    def find(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def title(self) -> str:
        """The heading of the page."""
        return " ".join(heading.text for heading in self.find("#title h1"))

    def box(self, field: str) -> list[Any]:
        """The text box of a field; of a slider, the one beside it."""
        return self.find(f"#{field} input:not([type=range]), #{field} textarea")

    def value(self, field: str) -> str:
        boxes = self.box(field)
        return boxes[0].get_attribute("value") if boxes else ""

    def write(self, field: str, words: object) -> None:
        from selenium.webdriver.common.keys import Keys

        (box,) = self.box(field)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(str(words) or Keys.DELETE, Keys.TAB)

    def choose(self, field: str, *words: str) -> None:
        """Choose from a list."""
        from selenium.webdriver.common.keys import Keys

        (box,) = self.box(field)
        for word in words:
            box.send_keys(Keys.CONTROL, "a")
            box.send_keys(word, Keys.ENTER)
        box.send_keys(Keys.TAB)

    def click(self, button: str) -> None:
        (element,) = self.find(f"#{button}")
        self.driver.execute_script("arguments[0].click()", element)

    def check(self, checkbox: str) -> None:
        (element,) = self.find(f"#{checkbox} input[type=checkbox]")
        self.driver.execute_script("arguments[0].click()", element)

    def open_tab(self, name: str) -> None:
        tabs = [b for b in self.find("button[role=tab]") if b.text == name]
        tabs[0].click()

    def images(self, field: str) -> list[str]:
        """The bytes of all images of a field, in base 64."""
        return self.driver.execute_async_script(
            """const [field, done] = arguments;
            const read = async (image) => {
                const blob = await (await fetch(image.src)).blob();
                return await new Promise((then) => {
                    const reader = new FileReader();
                    reader.onload = () => then(reader.result);
                    reader.readAsDataURL(blob);
                });
            };
            Promise.all([...document.querySelectorAll(`#${field} img`)].map(read)).then(done);""",
            field,
        )

    def wait_for_images(self, field: str, n: int) -> list[str]:
        """`images`, as soon as there are n of them and no more are awaited."""
        self.wait(lambda: len(self.find(f"#{field} img")) == n and self.is_idle())
        return self.images(field)

    def messages(self) -> str:
        """The messages that are shown."""
        return " ".join(toast.text for toast in self.find("[data-testid=toast-body]"))

    def is_idle(self) -> bool:
        """Whether no result is awaited."""
        return not [
            e for e in self.find(".progress-text, .eta-bar, .generating") if e.is_displayed()
        ]

    def is_settled(self, seconds: float = 2) -> bool:
        """Whether the page looks the same after some seconds and no result is awaited."""
        before = self.driver.get_screenshot_as_base64()
        time.sleep(seconds)
        return self.is_idle() and self.driver.get_screenshot_as_base64() == before

    def console_errors(self) -> list[str]:
        """The errors in the console since the last call."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE"
        ]

    def requested_urls(self) -> list[str]:
        """Every address requested since the last call."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]
