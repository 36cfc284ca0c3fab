"""The page in a real browser: it draws, sorts and answers without an error and without the network, wide and narrow, light and dark."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import zlib
from html import unescape

import pytest

from fqonnx.report import GroupReport
from fqonnx.report.html import render
from tests.report_samples import realistic_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars", "--disable-dev-shm-usage",
]  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: install the package chromium")

PROBE = """
<script>
const told = [];
addEventListener("error", (event) => told.push(event.message ?? "a resource failed"));
addEventListener("securitypolicyviolation", (event) => told.push("blocked " + event.blockedURI));
console.error = (...words) => told.push(words.join(" "));
addEventListener("load", () => setTimeout(() => {
  const answer = { told, requests: performance.getEntriesByType("resource").map((e) => e.name), ...(%s)() };
  parent.postMessage(JSON.stringify(answer), "*");
}, 50));
</script>
"""


def browse(tmp_path, *arguments):
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def ask(tmp_path, html, function, width=1280):
    """What ``function`` returns in the page. It is laid out in a frame of that width: a window of its own is at least 500 wide."""
    # The test looks into the page with an inline script, which the page's policy allows.
    (tmp_path / "page.html").write_text(html.replace("<title>", PROBE % function + "<title>", 1), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<pre id='answer'></pre><script>addEventListener('message', (event) => {"
        "document.getElementById('answer').textContent = event.data; });</script>"
        f"<iframe src='page.html' style='width:{width}px;height:900px;border:0'></iframe>"
    )
    dom = browse(tmp_path, "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri())
    answer = json.loads(unescape(re.search(r'<pre id="answer">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert answer["told"] == []
    assert answer["requests"] == []
    return answer


def pixels(png):
    """Rows of an 8-bit RGB or RGBA image as lists of (r, g, b)."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    data, at = b"", 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", png[at + 8 : at + 18])
        elif kind == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += 12 + length
    assert depth == 8
    step = {2: 3, 6: 4}[colour]
    raw, previous, rows = zlib.decompress(data), bytes(width * step), []
    for y in range(height):
        line = y * (width * step + 1)
        filtered, row = raw[line], bytearray(raw[line + 1 : line + 1 + width * step])
        for i in range(len(row)):
            left, up, corner = row[i - step] if i >= step else 0, previous[i], previous[i - step] if i >= step else 0
            row[i] = (row[i] + _predicted(filtered, left, up, corner)) & 255
        previous = bytes(row)
        rows.append([tuple(row[x : x + 3]) for x in range(0, len(row), step)])
    return rows


def _predicted(kind, left, up, corner):
    if kind == 4:
        estimate = left + up - corner
        return min((left, up, corner), key=lambda v: abs(estimate - v))
    return (0, left, up, (left + up) // 2)[kind]


LAYOUT = """() => ({
  overflow: document.documentElement.scrollWidth - innerWidth,
  outside: [...document.querySelectorAll("main *")].filter((e) => {
    const box = e.getBoundingClientRect();
    return box.width && box.right > innerWidth + 1 && !e.closest(".scroll, .panels, svg");
  }).map((e) => e.outerHTML.slice(0, 80)),
  small: [...document.querySelectorAll("main *")].filter((e) => e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 10)
    .map((e) => e.outerHTML.slice(0, 80)),
  sections: document.querySelectorAll("section").length,
})"""


@pytest.mark.parametrize("width", [1280, 820, 390])
def test_nothing_sticks_out(tmp_path, width):
    answer = ask(tmp_path, render(realistic_report(passed=False)), LAYOUT, width)
    assert answer["overflow"] <= 0
    assert answer["outside"] == []
    assert answer["small"] == []
    assert answer["sections"] == 9


def test_a_click_sorts_the_table(tmp_path):
    groups = realistic_report().groups
    groups = (*groups[:5], GroupReport(name="unmeasured"), *groups[5:])
    function = """() => {
      const table = document.getElementById("groups");
      const column = (i) => [...table.tBodies[0].rows].map((row) => row.cells[i].dataset.value);
      const buttons = table.querySelectorAll("th button");
      const before = column(4);
      buttons[4].click();
      const falling = column(4);
      buttons[4].click();
      const rising = column(4), said = buttons[4].closest("th").getAttribute("aria-sort");
      buttons[0].click();
      return { before, falling, rising, said, names: column(0), sorted: table.querySelectorAll("[aria-sort]").length };
    }"""
    answer = ask(tmp_path, render(realistic_report(groups=groups)), function)
    measured = sorted((float(v) for v in answer["before"] if v), reverse=True)
    assert answer["falling"][-1] == answer["rising"][-1] == ""
    assert [float(v) for v in answer["falling"][:-1]] == measured != [float(v) for v in answer["before"] if v]
    assert [float(v) for v in answer["rising"][:-1]] == measured[::-1]
    assert answer["said"] == "ascending"
    assert answer["names"] == sorted(answer["names"])
    assert answer["sorted"] == 1


def test_any_group_can_be_drawn_and_read(tmp_path):
    function = """() => {
      const select = document.getElementById("group"), chart = document.getElementById("chart");
      const shape = () => chart.querySelector("polyline.before").getAttribute("points");
      const text = () => document.getElementById("chart-detail").textContent;
      const worst = select.selectedOptions[0].textContent, first = shape();
      select.value = "3";
      select.dispatchEvent(new Event("change"));
      const second = shape(), whole = text();
      const box = chart.getBoundingClientRect();
      chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2 }));
      const middle = text(), cursor = chart.querySelector(".cursor").getAttribute("visibility");
      chart.dispatchEvent(new PointerEvent("pointerleave"));
      return { worst, changed: first !== second, whole, middle, after: text(), cursor, options: select.options.length,
        lines: chart.querySelectorAll("polyline").length };
    }"""
    report = realistic_report()
    answer = ask(tmp_path, render(report), function)
    assert answer["worst"] == report.worst_groups[0].name.removeprefix("model.")
    assert answer["options"] == len(report.groups)
    assert answer["lines"] == 2
    assert answer["changed"]
    assert re.match(r"Largest channel, times the median: before [\d.]+., after [\d.]+.$", answer["whole"])
    assert re.match(r"Channel at (4[5-9]|5[0-5]) % of the ranking, times the median: before ", answer["middle"])
    assert answer["cursor"] == "visible"
    assert answer["after"] == answer["whole"]


CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = c.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
  const poor = new Set();
  for (const e of document.querySelectorAll("main *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(rgb(e.closest("svg") ? style.fill : style.color).slice(0, 3)), light(ground(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.add(e.tagName + "." + e.getAttribute("class") + " " + e.textContent.slice(0, 30));
  }
  return { poor: [...poor], ground: getComputedStyle(document.body).backgroundColor };
}"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out(tmp_path, dark):
    html = render(realistic_report(passed=False))
    if dark:  # the dark rules, whatever the machine prefers
        assert "@media (prefers-color-scheme: dark)" in html
        html = html.replace("@media (prefers-color-scheme: dark)", "@media all")
    answer = ask(tmp_path, html, CONTRAST)
    assert answer["poor"] == []
    assert answer["ground"] == ("rgb(15, 18, 23)" if dark else "rgb(246, 247, 249)")


def test_the_picture_is_on_the_screen(tmp_path):
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    page.write_text(render(realistic_report()).replace("@media (prefers-color-scheme: dark)", "@media not all"), encoding="utf-8")
    browse(tmp_path, "--window-size=1000,1500", f"--screenshot={shot}", page.as_uri())
    rows = pixels(shot.read_bytes())
    assert (len(rows[0]), len(rows)) == (1000, 1500)
    count = {colour: sum(row.count(colour) for row in rows) for colour in ((33, 89, 209), (180, 83, 10), (222, 243, 229))}
    assert count[33, 89, 209] > 20_000  # bars
    assert count[180, 83, 10] > 200  # the line of the input
    assert count[222, 243, 229] > 1_000  # the verdict's ground
