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
input { font: inherit; padding: .25rem .5rem; margin-bottom: .5rem; }
"""

TABLE_SCRIPT = """
for (const box of document.querySelectorAll(".table")) {
  const body = box.querySelector("tbody"), input = box.querySelector("input"), count = box.querySelector(".count");
  const heads = [...box.querySelectorAll("thead th")], rows = [...body.rows];
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\\s+/);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = shown === rows.length ? rows.length : `${shown} of ${rows.length}`;
  });
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const key = (row) => row.cells[column].textContent;
    const isNumber = (row) => row.cells[column].className === "number";
    rows.sort((a, b) => direction * (isNumber(a) && isNumber(b)
      ? Number(key(a)) - Number(key(b)) : isNumber(b) - isNumber(a) || key(a).localeCompare(key(b))));
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
