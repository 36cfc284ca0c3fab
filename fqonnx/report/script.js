"use strict";

// Tables: a click on a column's button sorts by it; numbers first fall, names first rise, and what was not measured stays last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const column = head.cellIndex;
    const numeric = head.classList.contains("number");
    const current = head.getAttribute("aria-sort");
    const falling = current === null ? numeric : current === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true });
      return falling ? -order : order;
    });
    body.append(...rows);
  });
}

// The picture of any group: drawn as the page's own panels are, with a cursor that reads the values.
const profiles = JSON.parse(document.getElementById("profiles").textContent);
const select = document.getElementById("group");
if (select) {
  const NS = "http://www.w3.org/2000/svg";
  const chart = document.getElementById("chart");
  const detail = document.getElementById("chart-detail");
  const [height, left, top, bottom] = [250, 44, 12, 26];
  let width = 720;
  const make = (name, attributes, text) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const times = (v) => (v >= 99.5 ? Math.round(v) : v >= 9.95 ? v.toFixed(1) : v.toFixed(2)) + "×";
  let shown = null;
  let cursor = null;

  const x = (share) => left + share * (width - left - 12);
  const y = (value, domain) => {
    const [low, high] = domain.map(Math.log10);
    const v = Math.min(high, Math.max(low, Math.log10(Math.max(value, 1e-30))));
    return top + ((high - v) / (high - low)) * (height - top - bottom);
  };

  const draw = () => {
    shown = profiles[Number(select.value)];
    width = Math.max(280, chart.clientWidth); // one unit is one pixel: text keeps its size at every width
    chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const drawn = [shown.before, shown.after].filter(Boolean);
    const peak = Math.max(...drawn.map((p) => p[0]));
    const least = Math.min(...drawn.map((p) => p[p.length - 1]));
    const domain = [Math.min(0.5, Math.max(0.1, least)), Math.max(10, 10 ** Math.ceil(Math.log10(peak)))];
    const parts = [];
    for (let tick = 1; tick <= domain[1] * 1.001; tick *= 10) {
      const at = y(tick, domain);
      parts.push(make("line", { x1: left, x2: width - 12, y1: at, y2: at, class: tick === 1 ? "one" : "grid" }));
      parts.push(make("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, `${tick}×`));
    }
    parts.push(make("text", { x: left, y: height - 6 }, "largest channel"));
    parts.push(make("text", { x: width - 12, y: height - 6, "text-anchor": "end" }, "smallest"));
    for (const side of ["before", "after"]) {
      if (!shown[side]) continue;
      const points = shown[side].map((v, i, all) => `${x(i / Math.max(1, all.length - 1)).toFixed(1)},${y(v, domain).toFixed(1)}`);
      parts.push(make("polyline", { points: points.join(" "), class: side }));
    }
    cursor = make("line", { y1: top, y2: height - bottom, x1: left, x2: left, class: "cursor", visibility: "hidden" });
    parts.push(cursor);
    chart.replaceChildren(...parts);
    describe(null);
  };

  const describe = (share) => {
    const read = (p) => (p ? p[Math.round((share ?? 0) * (p.length - 1))] : null);
    const [b, a] = [read(shown.before), read(shown.after)];
    const place = share === null ? "Largest channel" : `Channel at ${(share * 100).toFixed(0)} % of the ranking`;
    const said = [document.createTextNode(`${place}, times the median: `)];
    const span = (name, text) => Object.assign(document.createElement("span"), { className: name, textContent: text });
    if (b !== null) said.push(span("is-before", `before ${times(b)}`), document.createTextNode(a === null ? "" : ", "));
    if (a !== null) said.push(span("is-after", `after ${times(a)}`));
    detail.replaceChildren(...said);
  };

  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    const share = Math.min(1, Math.max(0, (at - left) / (width - left - 12)));
    cursor.setAttribute("x1", x(share));
    cursor.setAttribute("x2", x(share));
    cursor.setAttribute("visibility", "visible");
    describe(share);
  });
  chart.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    describe(null);
  });
  select.addEventListener("change", draw);
  new ResizeObserver(() => chart.clientWidth && Math.abs(chart.clientWidth - width) > 1 && draw()).observe(chart);
  draw();
}
