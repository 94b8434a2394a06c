"""`python -m tests.screenshots RUN`: the pictures of pages in `docs/guides`, from the run of `make quickstart`.

Run it in the folder where the quickstart ran. It needs the extra `demo`, selenium, pillow, chromium and chromedriver.
"""

import argparse
import base64
import io
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import browser
from tests.ports import free_port

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "guides"
MAX_HEIGHT = 1900  # pixels
# Picture -> the parts of the report in it.
PARTS = {
    "report.png": ("header", "#accuracy", "#gates"),
    "experts.png": ("#redundancy", "#agreement"),
    "routers.png": ("#routing",),
}
KEEP_ONLY = """
for (const part of document.querySelectorAll('header, nav, footer, section')) part.hidden = !part.matches(arguments[0]);
"""
QUESTION = """Context: N/A
Question: Lea listens to a frog. Which sense is used?
Options: (A) hearing (B) sight (C) smell (D) taste (E) touch"""
PATIENCE = 600  # seconds


def main():
    """Write all pictures."""
    parser = argparse.ArgumentParser(prog="python -m tests.screenshots", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder, such as runs/quickstart")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the pictures")
    options = parser.parse_args()
    with browser(1000, 900) as window:
        window.get((options.run / "report.html").absolute().as_uri())
        for name, parts in PARTS.items():
            window.execute_script(KEEP_ONLY, ", ".join(parts))
            save(window, options.output / name)
        with demo(options.run) as url:
            ask(window, url)
            save(window, options.output / "demo.png")


def save(window, path):
    """A picture of the page, as high as the page or MAX_HEIGHT."""
    width, height = window.execute_script("return [document.body.clientWidth, document.body.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": width, "height": min(height, MAX_HEIGHT), "scale": 1}
    shown = window.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    picture = Image.open(io.BytesIO(base64.b64decode(shown["data"])))
    picture.convert("RGB").quantize(128).save(path, optimize=True)  # few colours make a small file
    print(f"Written to {path}.")


@contextmanager
def demo(run):
    """`mola demo` in a process of its own; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "mola", "demo", str(run), "--port", str(port), "--max_new_tokens", "32"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            next(line for line in process.stderr if "The demo is at " in line)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def ask(window, url):
    """Ask the question, and wait for the tables of the experts."""
    window.set_window_size(1280, 900)  # as wide as eight experts
    window.get(url)
    wait = WebDriverWait(window, PATIENCE)
    wait.until(lambda _: window.find_elements("xpath", "//button[normalize-space()='Answer']"))
    window.find_element("tag name", "textarea").send_keys(QUESTION)
    window.find_element("xpath", "//button[normalize-space()='Answer']").click()
    wait.until(lambda _: window.find_elements("css selector", "table th[scope=row]"))


if __name__ == "__main__":
    main()
