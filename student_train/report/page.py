"""What the page of the report looks like, and what it does besides plotly: one legend, one x axis, a theme."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --back: #ffffff; --text: #1f2328; --faint: #646c76; --line: #d9dee4; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --text: #dfe3e8; --faint: #98a1ab; --line: #343a43; --card: #1c2128; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; margin: 0 auto; max-width: 1240px;
  padding: 1rem; color: var(--text); background: var(--back); }
h1 { font-size: 1.4rem; margin: .2rem 0 .6rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
h1, blockquote, .prompt, .bar button { overflow-wrap: anywhere; }
.note { color: var(--faint); margin: .2rem 0; }
.bar { position: sticky; top: 0; z-index: 9; display: flex; flex-wrap: wrap; gap: .4rem; align-items: center;
  background: var(--back); padding: .5rem 0; border-bottom: 1px solid var(--line); max-height: 40vh; overflow-y: auto; }
.bar button, .bar select { font: inherit; font-size: .9rem; color: var(--text); background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; padding: .2rem .6rem; cursor: pointer; max-width: 100%; }
.bar button[aria-pressed=false] { color: var(--faint); text-decoration: line-through; }
.bar button[aria-pressed=false] svg { opacity: .25; }
.bar label { margin-left: auto; color: var(--faint); font-size: .9rem; }
.key { width: 26px; height: 10px; margin-right: .45em; vertical-align: middle; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td, th { overflow-wrap: break-word; max-width: 16rem; min-width: 5rem; }
th { font-weight: 600; vertical-align: bottom; }
td:first-child, th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--back); }
td.figure { white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 1.1rem 1.4rem; }
figure { margin: 0; min-width: 0; position: relative; }
figcaption { position: absolute; z-index: 2; top: 2px; left: 0; pointer-events: none; font-weight: 600;
  font-size: .95rem; }
.plot { height: 290px; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem;
  margin: .7rem 0; }
.sample .prompt { margin: 0 0 .4rem; white-space: pre-wrap; }
.sample h3 { font-size: .9rem; margin: .6rem 0 .1rem; }
.sample h3 small { font-weight: 400; color: var(--faint); }
/* A student that has learnt little may write line breaks only: such a text must not fill the page. */
blockquote { margin: 0; padding-left: .8rem; border-left: 3px solid var(--line); white-space: pre-wrap;
  max-height: 12em; overflow-y: auto; }
details { margin: .5rem 0; } summary { cursor: pointer; }
[hidden] { display: none !important; }
@media (max-width: 600px) {
  .bar { flex-wrap: nowrap; overflow-x: auto; }
  .bar button, .bar label { flex: none; }
  .bar button { max-width: 14rem; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
  figcaption { font-size: .85rem; line-height: 1.8; }
  .bar label { order: -1; margin: 0; }
  td:first-child, th:first-child { max-width: 8.5rem; }
}
"""

# Charts are redrawn in place when the theme changes. A finger on a chart scrolls the page; it zooms by buttons.
SCRIPT = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const titles = JSON.parse(document.getElementById("axes").textContent);
const divs = charts.map((chart, number) => document.getElementById("chart-" + number));
const isDark = matchMedia("(prefers-color-scheme: dark)");
const byFinger = matchMedia("(pointer: coarse)").matches;
function theme() {
  const style = getComputedStyle(document.documentElement);
  const of = name => style.getPropertyValue(name).trim();
  return {
    "font.color": of("--text"), "font.size": 12, "font.family": "system-ui, sans-serif",
    "xaxis.gridcolor": of("--line"), "yaxis.gridcolor": of("--line"),
    "xaxis.linecolor": of("--line"), "yaxis.linecolor": of("--line"),
    "hoverlabel.bgcolor": of("--card"), "hoverlabel.bordercolor": of("--line"), "hoverlabel.font.color": of("--text"),
    "modebar.bgcolor": of("--back"), "modebar.color": of("--faint"), "modebar.activecolor": of("--text"),
  };
}
const tools = ["zoomIn2d", "zoomOut2d", "resetScale2d"];
const config = {
  responsive: true, displaylogo: false, displayModeBar: byFinger ? true : "hover",
  modeBarButtons: [byFinger ? tools : ["toImage", "zoom2d", "pan2d", ...tools]],
};
charts.forEach((chart, number) => {
  const layout = {...chart.figure.layout, dragmode: byFinger ? false : "zoom"};
  Plotly.newPlot(divs[number], chart.figure.data, layout, config);
  Plotly.relayout(divs[number], theme());
});
isDark.addEventListener("change", () => divs.forEach(div => Plotly.relayout(div, theme())));

const buttons = [...document.querySelectorAll("button.run")];
const isOn = run => buttons[run].getAttribute("aria-pressed") === "true";
function show(wanted) {
  buttons.forEach((button, run) => button.setAttribute("aria-pressed", wanted(run)));
  document.querySelectorAll("[data-run]").forEach(part => { part.hidden = !isOn(Number(part.dataset.run)); });
  divs.forEach((div, number) => {
    const visible = charts[number].figure.data.map(trace => isOn(trace.meta.run));
    Plotly.restyle(div, {visible}, visible.map((_, trace) => trace));
  });
}
buttons.forEach((button, run) => {
  button.addEventListener("click", () => show(other => other === run ? !isOn(other) : isOn(other)));
  // The two clicks before it have switched the run off and on again.
  button.addEventListener("dblclick", () => {
    const alone = buttons.every((_, other) => isOn(other) === (other === run));
    show(other => alone || other === run);
  });
});
document.getElementById("axis").addEventListener("change", event => {
  const axis = event.target.value;
  divs.forEach((div, number) => {
    const x = charts[number].x[axis];
    Plotly.update(div, {x}, {"xaxis.title.text": titles[axis], "xaxis.autorange": true, "yaxis.autorange": true},
      x.map((_, trace) => trace));
  });
});
"""
