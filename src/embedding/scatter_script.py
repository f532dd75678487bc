"""The script of the scatter plot: colour by any column, filter by words and by a column's value."""

CONTROLS = """\
<div class="controls">
<label>colour by <select name="color"></select></label>
<label>show <select name="column"></select></label> <select name="value" aria-label="value"></select>
<input type="search" placeholder="filter points" aria-label="filter points"><span class="count"></span>
</div>
"""

SCRIPT = """
addEventListener("DOMContentLoaded", () => {
  const MOST_COLORS = 20, ALL = "all";
  const PALETTE = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf",
    "#393b79", "#637939", "#8c6d31", "#843c39", "#7b4173", "#3182bd", "#e6550d", "#31a354", "#756bb1", "#969696",
    "#de9ed6"];
  const root = document.querySelector(".scatter"), box = root.querySelector(".plot");
  const points = JSON.parse(root.querySelector(".points").textContent);
  const named = (name) => root.querySelector(`[name=${name}]`);
  const color = named("color"), column = named("column"), value = named("value");
  const words = root.querySelector("input"), count = root.querySelector(".count");
  const names = Object.keys(points.columns), total = points.x.length;
  const shown = (v) => v === null || v === undefined ? "–" : String(v);
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const lines = (text) => (text.match(/[^]{1,90}/gu) || []).map(escaped).join("<br>");
  const about = (i) => [points.ids[i], ...names.map((name) => `${name}: ${shown(points.columns[name][i])}`)];
  const haystack = points.x.map((_, i) => [...about(i), points.texts[i] || ""].join("\\n").toLowerCase());
  const hover = points.x.map((_, i) => [...about(i), points.texts[i] || ""].map((part) => lines(part)).join("<br>"));
  const option = (text, key) => Object.assign(document.createElement("option"), { textContent: text, value: key });
  const byFrequency = (name) => {
    const counts = new Map();
    for (const v of points.columns[name]) counts.set(shown(v), (counts.get(shown(v)) || 0) + 1);
    return [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
  };
  const isNumeric = (name) => {
    const present = points.columns[name].filter((v) => v !== null && v !== undefined);
    return present.every((v) => typeof v === "number") && new Set(present).size > MOST_COLORS;
  };
  const trace = (rows, name, marker) => ({ type: "scatter", mode: "markers", name: escaped(name), hoverinfo: "text",
    x: rows.map((i) => points.x[i]), y: rows.map((i) => points.y[i]), hovertext: rows.map((i) => hover[i]),
    customdata: rows, marker: { size: 6, opacity: 0.75, ...marker } });
  const traces = (rows) => {
    const name = color.value;
    if (!name) return [trace(rows, "rows", {})];
    const values = points.columns[name];
    if (isNumeric(name)) {
      const without = rows.filter((i) => typeof values[i] !== "number");
      const has = rows.filter((i) => typeof values[i] === "number");
      const present = values.filter((v) => typeof v === "number");
      const ends = { cmin: present.reduce((a, b) => Math.min(a, b)), cmax: present.reduce((a, b) => Math.max(a, b)) };
      const colors = { color: has.map((i) => values[i]), colorscale: "Viridis", showscale: true, ...ends };
      const scale = trace(has, name, colors);
      return [scale, ...(without.length ? [trace(without, "–", { color: "#bbbbbb" })] : [])];
    }
    // A value keeps its colour whatever is filtered out.
    const ranked = byFrequency(name), own = new Map(ranked.slice(0, MOST_COLORS).map(([v], i) => [v, i]));
    const groups = new Map([...own.keys()].map((v) => [v, []])), rest = [];
    for (const i of rows) (groups.get(shown(values[i])) || rest).push(i);
    const drawn = [...groups].filter(([, members]) => members.length)
      .map(([v, members]) => trace(members, v, { color: PALETTE[own.get(v)] }));
    const n_others = ranked.length - own.size;
    return rest.length ? [trace(rest, `${n_others} other values`, { color: "#bbbbbb" }), ...drawn] : drawn;
  };
  const draw = () => {
    const asked = words.value.toLowerCase().split(/\\s+/).filter(Boolean);
    const anyValue = !column.value || value.value === ALL;
    const fits = (i) => (anyValue || shown(points.columns[column.value][i]) === value.value.slice(1))
      && asked.every((word) => haystack[i].includes(word));
    const rows = points.x.map((_, i) => i).filter(fits);
    count.textContent = rows.length === total ? `${total}` : `${rows.length} of ${total}`;
    const title = color.value ? escaped(color.value) : "";
    const layout = { ...box.layout, showlegend: true, legend: { ...box.layout.legend, title: { text: title } } };
    Plotly.react(box, traces(rows), layout, { responsive: true, displaylogo: false });
  };
  const offer = () => {
    // "=" before each value, so that none can be mistaken for `all`.
    const values = column.value ? byFrequency(column.value).map(([v, n]) => option(`${v} (${n})`, `=${v}`)) : [];
    value.replaceChildren(option(ALL, ALL), ...values);
    value.hidden = !column.value;
  };
  color.replaceChildren(option("nothing", ""), ...names.map((name) => option(name, name)));
  column.replaceChildren(option("all rows", ""), ...names.map((name) => option(`rows by ${name}`, name)));
  color.value = points.color_by || "";
  offer();
  column.addEventListener("change", () => { offer(); draw(); });
  for (const control of [color, value]) control.addEventListener("change", draw);
  words.addEventListener("input", draw);
  draw();
});
"""
