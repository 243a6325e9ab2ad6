"""A headless Chromium that opens the page of `demo.py` as a visitor would."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

SIZE = (1200, 900)


@contextmanager
def browser(size: tuple[int, int] = SIZE) -> Iterator[Any]:
    """Selenium's driver. Skips the test where Chromium or Selenium are missing."""
    selenium = pytest.importorskip("selenium.webdriver")
    paths = [shutil.which("chromium"), shutil.which("chromedriver")]
    if not all(paths):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = paths[0]
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.add_argument("--window-size={},{}".format(*size))
    options.add_argument("--hide-scrollbars")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = selenium.chrome.service.Service(paths[1])
    driver = selenium.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


class Visitor:
    """Someone at the page, who waits for what he asked for."""

    def __init__(self, driver: Any, url: str):
        self.driver = driver
        driver.get(url)
        self.wait(lambda: self.value("steps") not in ("", "0"))  # the form has come

    def wait(self, happened: Callable[[], Any], seconds: float = 90) -> Any:
        """What `happened` says, as soon as it says something."""
        last = time.monotonic() + seconds
        while not (found := happened()):
            assert time.monotonic() < last, f"it has not happened; the page says {self.told()}"
            time.sleep(0.1)
        return found

    def find(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def value(self, field: str) -> str:
        found = self.find(f"#{field} input, #{field} textarea")
        return found[0].get_attribute("value") if found else ""

    def write(self, field: str, words: object) -> None:
        from selenium.webdriver.common.keys import Keys

        (box,) = self.find(f"#{field} input, #{field} textarea")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(str(words) or Keys.DELETE, Keys.TAB)

    def choose(self, field: str, *words: str) -> None:
        """Of a list."""
        from selenium.webdriver.common.keys import Keys

        (box,) = self.find(f"#{field} input")
        for word in words:
            box.send_keys(Keys.CONTROL, "a")
            box.send_keys(word, Keys.ENTER)
        box.send_keys(Keys.TAB)

    def click(self, button: str) -> None:
        (found,) = self.find(f"#{button}")
        self.driver.execute_script("arguments[0].click()", found)

    def tab(self, name: str) -> None:
        found = [b for b in self.find("button[role=tab]") if b.text == name]
        found[0].click()

    def pictures(self, field: str) -> list[str]:
        """The bytes of all pictures there, in base 64."""
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

    def all_of(self, field: str, n: int) -> list[str]:
        """`pictures`, as soon as there are n of them and no more are waited for."""
        self.wait(lambda: len(self.find(f"#{field} img")) == n and self.idle())
        return self.pictures(field)

    def told(self) -> str:
        """The messages that are shown."""
        return " ".join(toast.text for toast in self.find("[data-testid=toast-body]"))

    def idle(self) -> bool:
        """Whether nothing is waited for."""
        return not [
            e for e in self.find(".progress-text, .eta-bar, .generating") if e.is_displayed()
        ]

    def settled(self, seconds: float = 2) -> bool:
        """Whether the page has looked the same for so long, and nothing is waited for."""
        before = self.driver.get_screenshot_as_base64()
        time.sleep(seconds)
        return self.idle() and self.driver.get_screenshot_as_base64() == before

    def complaints(self) -> list[str]:
        """What the console has been told since the last time, but for warnings."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE"
        ]

    def addresses(self) -> list[str]:
        """Everything that has been asked for since the last time."""
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]
