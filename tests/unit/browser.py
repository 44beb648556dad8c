"""A page in headless Chromium: what it says after a script of the test's has used it, and what it tried to fetch."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000"),
)
# Before anything of the page runs: errors, refusals of the policy and fetches are counted.
BEFORE = """<script>
const seen = { errors: [], refused: [] };
addEventListener("error", e => seen.errors.push(`${e.message} at ${e.lineno}`));
addEventListener("unhandledrejection", e => seen.errors.push(`${e.reason}`));
document.addEventListener("securitypolicyviolation", e => seen.refused.push(`${e.violatedDirective} ${e.blockedURI}`));
</script>"""
AFTER = """<script>
const wait = (time = 30) => new Promise(done => setTimeout(done, time));
addEventListener("load", async () => {
  let result = null;
  try { result = await (async () => { %s })(); } catch (error) { seen.errors.push(`${error.stack}`); }
  const fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  parent.postMessage(JSON.stringify({ result, fetched, ...seen }), "*");
});
</script>"""
# A window cannot be narrower than 500 pixels, a frame can.
FRAME = """<!DOCTYPE html><body><pre id="told"></pre><script>
addEventListener("message", e => { document.getElementById("told").textContent = e.data; });
</script><iframe src="page.html" style="width: %dpx; height: 900px; border: 0"></iframe></body>"""


@dataclass(frozen=True)
class Told:
    """What a page told: the script's result, errors, refusals of its policy, fetches, lines of the console."""

    result: Any
    errors: list[str]
    refused: list[str]
    fetched: list[str]
    console: list[str]


def browser() -> str:
    """The browser's path; skips the test where there is none."""
    given = os.environ.get("CHROME")
    found = next(filter(None, map(shutil.which, [given] if given else NAMES)), None)
    if found is None:
        pytest.skip("no Chromium found: install chromium, or name one by CHROME=/path/to/it")
    return found


def use(html: str, script: str, folder: Path, width: int = 1280) -> Told:
    """Open the page, run the body of an async function in it (`wait(ms)` pauses), and return what it returned."""
    program = browser()
    page = folder / "page.html"
    head, tail = html.index("<style>"), html.rindex("</body>")
    page.write_text(html[:head] + BEFORE + html[head:tail] + AFTER % script + html[tail:], encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME % width, encoding="utf-8")
    command = [program, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    run = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="told">(.+?)</pre>', run.stdout, re.DOTALL)
    assert found, f"the page told nothing:\n{run.stderr[-3000:]}"
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    return Told(**json.loads(unescape(found.group(1))), console=console)
