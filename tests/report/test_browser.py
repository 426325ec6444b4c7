"""Pages in a real browser: no console messages, everything drawn inside the page, readable in light and dark."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from lemo.eval.keep_map import KeepMap
from lemo.report.keep_page import ShownText, keep_page
from lemo.report.run_page import read_run, run_page
from tests.report.test_run_page import write_run

BROWSER = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
# Asks the browser itself: colours as drawn, and whether anything stands out of the page.
PROBE = """<script>
const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => { v /= 255;
  return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const contrast = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
addEventListener('load', () => {
  const paper = getComputedStyle(document.body).backgroundColor;
  const inks = [...document.querySelectorAll('p, td, th, figcaption')].map(e => getComputedStyle(e).color)
    .concat([...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill))
    .concat([...document.querySelectorAll('svg .curve')].map(e => getComputedStyle(e).stroke));
  const out = document.createElement('output');
  out.textContent = JSON.stringify({ paper, worst: Math.min(...inks.map(ink => contrast(ink, paper))),
    wide: document.documentElement.scrollWidth > innerWidth, figures: document.querySelectorAll('figure svg').length });
  document.body.append(out);
});
</script>"""


def pages(folder):
    found = KeepMap([[1.0, 0.0], [0.5, 1.0]], [True, False], 2, "forward", [0, 2], [2, 2], [0, 1])
    text = ShownText("a text", found, [[("first ", False), ("second ", True)], [("x" * 300, False)]])
    runs = [read_run(write_run(folder / name), {"lora": {"rank": 8}}, name) for name in ("a", "b")]
    return {"runs": (run_page(runs), 9), "blocks": (keep_page([text, text], [[0], []], [[("a", 5)], []]), 2)}


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1300, 500])
def test_pages_are_drawn_and_readable(tmp_path, dark, width):
    import json

    for name, (text, figures) in pages(tmp_path).items():
        page = tmp_path / f"{name}.html"
        page.write_text(text + PROBE)
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
        options += ["--enable-logging=stderr", "--virtual-time-budget=2000", f"--user-data-dir={tmp_path / 'profile'}"]
        # 0 is dark and 1 is light.
        options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        done = subprocess.run(
            [BROWSER, *options, page.as_uri()], capture_output=True, text=True, check=False, timeout=120
        )
        assert "CONSOLE" not in done.stderr
        (answer,) = re.findall(r"<output>(.*?)</output>", done.stdout)
        seen = json.loads(answer)
        assert seen["figures"] == figures and not seen["wide"], (name, seen)
        assert seen["paper"] == ("rgb(17, 22, 31)" if dark else "rgb(255, 255, 255)")
        assert seen["worst"] > 3, (name, seen)
