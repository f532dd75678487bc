"""The fixed parts of a report: page, style, and the scripts for tables and plots."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
{scripts}
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --line: #d5d5d5; --soft: #f4f4f4; --text: #1b1b1b; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3d3d3d; --soft: #242424; --text: #e6e6e6; --page: #171717; }
}
body { margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: var(--text); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
pre { padding: 1rem; background: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td > div { max-width: 36rem; max-height: 9rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
thead th { position: sticky; top: 0; background: var(--soft); }
thead button { all: unset; cursor: pointer; font-weight: 600; }
thead button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
.scroll { max-height: 80vh; overflow: auto; }
.count { margin-left: .6rem; opacity: .7; }
.facts th { font-weight: 500; opacity: .8; }
.facts td { overflow-wrap: anywhere; }
input, select { font: inherit; padding: .25rem .5rem; margin-bottom: .5rem; max-width: 20rem; }
.filters label { display: inline-block; margin: .25rem 1.2rem .25rem 0; }
.filters input { width: 6rem; }
"""

TABLE_SCRIPT = """
const MOST_CATEGORIES = 40, LONGEST_CATEGORY = 80;
for (const box of document.querySelectorAll(".table")) {
  const body = box.querySelector("tbody"), input = box.querySelector("input"), count = box.querySelector(".count");
  const heads = [...box.querySelectorAll("thead th")], rows = [...body.rows];
  const cell = (row, column) => row.cells[column].textContent;
  const isNumber = (row, column) => row.cells[column].className === "number";
  const tests = new Map();
  const apply = () => {
    const words = input.value.toLowerCase().split(/\\s+/);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word)) || ![...tests.values()].every((test) => test(row));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = shown === rows.length ? rows.length : `${shown} of ${rows.length}`;
  };
  input.addEventListener("input", apply);

  const make = (parent, tag, properties) => parent.appendChild(Object.assign(document.createElement(tag), properties));
  const holder = document.createElement("details");
  const chooseCategory = (label, column, values) => {
    const select = make(label, "select", {});
    make(select, "option", { textContent: "all", value: "" });
    values.forEach((value, i) => make(select, "option", { textContent: value, value: String(i) }));
    select.addEventListener("change", () => {
      if (select.value === "") tests.delete(column);
      else tests.set(column, (row) => cell(row, column) === values[Number(select.value)]);
      apply();
    });
  };
  const chooseRange = (label, column) => {
    const ends = ["from", "to"].map((word) => make(label, "input", { type: "number", step: "any", placeholder: word }));
    const change = () => {
      const [low, high] = ends.map((end) => end.value);
      if (low === "" && high === "") tests.delete(column);
      else tests.set(column, (row) => isNumber(row, column)
        && (low === "" || Number(cell(row, column)) >= Number(low))
        && (high === "" || Number(cell(row, column)) <= Number(high)));
      apply();
    };
    ends.forEach((end) => end.addEventListener("input", change));
  };
  heads.forEach((head, column) => {
    const values = [...new Set(rows.map((row) => cell(row, column)))].sort();
    if (values.length < 2) return;
    const known = rows.filter((row) => cell(row, column) !== "–");
    const isRange = known.length && known.every((row) => isNumber(row, column));
    const isCategory = values.length <= MOST_CATEGORIES && values.every((value) => value.length <= LONGEST_CATEGORY);
    if (!isRange && !isCategory) return;
    const label = make(holder, "label", { textContent: head.textContent + " " });
    if (isRange) chooseRange(label, column);
    else chooseCategory(label, column, values);
  });
  if (holder.childElementCount) {
    holder.className = "filters";
    holder.prepend(Object.assign(document.createElement("summary"), { textContent: "filter by column" }));
    box.insertBefore(holder, box.querySelector(".scroll"));
  }

  heads.forEach((head, column) => head.addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    rows.sort((a, b) => direction * (isNumber(a, column) && isNumber(b, column)
      ? Number(cell(a, column)) - Number(cell(b, column))
      : isNumber(b, column) - isNumber(a, column) || cell(a, column).localeCompare(cell(b, column))));
    body.append(...rows);
  }));
}
"""

PLOT_SCRIPT = """
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
for (const box of document.querySelectorAll(".plot")) {
  const figure = JSON.parse(box.querySelector("script").textContent);
  const colors = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
  if (dark) colors.font = { ...figure.layout.font, color: "#e6e6e6" };
  Plotly.newPlot(box, figure.data, { ...figure.layout, ...colors }, { responsive: true, displaylogo: false });
}
"""
