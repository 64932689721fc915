"""TensorBoard on a folder of logs, and a headless Chromium that looks at it."""

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--enable-unsafe-swiftshader",
    "--hide-scrollbars",
)


@contextlib.contextmanager
def tensorboard(folder: str | Path, *, timeout: float = 120.0) -> Iterator[str]:
    """The address of a TensorBoard on a folder of logs, while the context is active.

    Raises:
        RuntimeError: if it ends, or does not say its address in time.
    """
    folder = Path(folder).resolve()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder.name]  # as it is shown
    command += ["--host", "localhost", "--port", "0", "--load_fast=false", "--reload_interval=2"]
    process = subprocess.Popen(
        command, cwd=folder.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        said, end = b"", time.monotonic() + timeout
        while time.monotonic() < end and process.poll() is None:
            said += process.stderr.readline()
            if found := re.search(rb"at (http://localhost:\d+)/", said):
                yield found[1].decode()
                return
        raise RuntimeError(f"TensorBoard did not start: {said.decode(errors='replace')}")
    finally:
        process.terminate()
        process.communicate()


@contextlib.contextmanager
def browser(width: int = 1500, height: int = 900) -> Iterator[WebDriver]:
    """A headless Chromium with a window of so many pixels, while the context is active.

    Raises:
        RuntimeError: if Chromium or its driver is not installed.
    """
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise RuntimeError(
            "chromium and chromedriver are not both installed: on Debian, "
            "apt-get install chromium chromium-driver."
        )
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=Service(driver))
    try:
        window.set_page_load_timeout(120)
        yield window
    finally:
        window.quit()


class Dashboard:
    """A dashboard of TensorBoard in a browser.

    Args:
        window: the browser.
        address: of TensorBoard.
    """

    def __init__(self, window: WebDriver, address: str) -> None:
        self._window, self._address = window, address

    def open(self, name: str, query: str = "") -> None:
        """Opens a dashboard by the name behind the hash of its address, anew."""
        self._window.get("about:blank")
        self._window.get(f"{self._address}/?darkMode=false&smoothing=0{query}#{name}")

    @property
    def text(self) -> str:
        """All text that is shown, in shadow roots too."""
        return str(self._window.execute_script(_VISIBLE_TEXT))

    def count(self, selector: str) -> int:
        """How many elements a CSS selector finds, in shadow roots too."""
        return int(self._window.execute_script(_COUNT, selector))

    def wait(self, condition: Callable[[], bool], *, timeout: float = 90.0) -> bool:
        """Whether a condition has come true in time."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.5)
        return False

    def shows(self, *texts: str, timeout: float = 90.0) -> bool:
        """Whether all these texts come to be shown in time."""
        return self.wait(lambda: all(text in self.text for text in texts), timeout=timeout)

    def errors(self) -> list[str]:
        """What the browser's console has said of errors since the last look."""
        messages = self._window.get_log("browser")  # type: ignore[attr-defined]
        return [m["message"] for m in messages if m["level"] == "SEVERE"]

    def loaded_images(self) -> int:
        """How many pictures are shown that have arrived."""
        return int(self._window.execute_script(_LOADED_IMAGES))

    def tick(self, label: str) -> bool:
        """Clicks on the box beside a label; whether there is one."""
        return bool(self._window.execute_script(_TICK, label))

    def settle(self, seconds: float = 3.0) -> None:
        """Lets transitions end."""
        time.sleep(seconds)

    def save(self, path: str | Path) -> None:
        """Writes a picture of the window."""
        self._window.save_screenshot(str(path))


_WALK = """
const found = [];
const walk = root => {
  for (const element of root.querySelectorAll('*')) {
    found.push(element);
    if (element.shadowRoot) walk(element.shadowRoot);
  }
};
walk(document);
"""

_VISIBLE_TEXT = (
    _WALK
    + """
return found.filter(e => e.getClientRects().length && !['STYLE', 'SCRIPT'].includes(e.tagName))
  .flatMap(e => Array.from(e.childNodes).filter(n => n.nodeType === 3).map(n => n.data.trim()))
  .filter(t => t).join('\\n');
"""
)

_LOADED_IMAGES = (
    _WALK
    + """
return found.filter(e => e.tagName === 'IMG' && e.getClientRects().length
  && e.complete && e.naturalWidth > 100).length;
"""
)

_TICK = (
    _WALK
    + """
const box = found.find(e => e.tagName === 'PAPER-CHECKBOX' && e.textContent.includes(arguments[0]));
if (box) box.click();
return Boolean(box);
"""
)

_COUNT = (
    _WALK + "return found.filter(e => e.getClientRects().length && e.matches(arguments[0])).length;"
)
