"use strict";
// Draws the charts that the element #data describes (see charts.py), in the colours of the style sheet.
const page = document.documentElement;
page.dataset.errors = "0";
window.addEventListener("error", () => { page.dataset.errors = String(Number(page.dataset.errors) + 1); });

const data = JSON.parse(document.getElementById("data").textContent);
const drawn = new Map(); // element -> chart of the library
const logarithmic = new Map(); // id of a chart -> whether its y axis is logarithmic
let axis = "step";

const AXES = { step: "steps", tokens: "tokens", flops: "FLOPs", hours: "hours" };
const DASHES = ["solid", "dashed", "dotted", [8, 3, 2, 3]];
const colour = (name) => getComputedStyle(page).getPropertyValue("--" + name).trim();
const isDark = () => (page.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function short(value) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const size = Math.abs(value);
  for (const [unit, name] of [[1e24, "Y"], [1e21, "Z"], [1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return trimmed(value / unit) + name;
  }
  if (size >= 0.001 || size === 0) return trimmed(value);
  return value.toExponential(2);
}
const trimmed = (value) => String(Number(value.toPrecision(4)));
const percent = (value) => (value === null ? "–" : trimmed(100 * value) + " %");

// where a step is on the present axis
function placeOf(run, step) {
  const steps = data.runs[run].steps.step, there = data.runs[run].steps[axis];
  if (!there || !steps.length) return null;
  let low = 0, high = steps.length - 1;
  if (step >= steps[high]) return there[high];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  const before = low ? [steps[low - 1], there[low - 1]] : [0, 0];
  return before[1] + (there[low] - before[1]) * (step - before[0]) / Math.max(1e-9, steps[low] - before[0]);
}

function pointsOf(line) {
  const where = data.runs[line.run][line.x][axis] || [];
  return line.at.map((index, i) => [where[index], line.y[i]]);
}

function common() {
  const text = { color: colour("text") };
  return {
    animation: false,
    backgroundColor: "transparent",
    textStyle: text,
    aria: { enabled: false }, // the page says it in its own words
    tooltip: { confine: true, renderMode: "richText", backgroundColor: colour("back"), borderColor: colour("rule"), textStyle: text },
  };
}

function scale(more) {
  const faint = { color: colour("faint") };
  return Object.assign({
    axisLabel: faint, nameTextStyle: faint, axisLine: { lineStyle: faint },
    splitLine: { lineStyle: { color: colour("rule"), opacity: 0.6 } },
  }, more);
}

function lines(chart) {
  const form = chart.percent ? percent : short, log = logarithmic.get(chart.id);
  const several = data.runs.length > 1;
  let own = -1;
  const series = chart.lines.map((line) => {
    if (!line.faint) own += 1;
    const index = several && !line.own ? line.run : Math.max(0, own);
    const ink = line.faint ? colour("c0") : colour("c" + (index % 8));
    return {
      type: "line", name: line.name, data: pointsOf(line), showSymbol: Boolean(line.points), symbolSize: 5,
      sampling: "none", connectNulls: false, silent: Boolean(line.faint), z: line.faint ? 1 : 2,
      itemStyle: { color: ink },
      lineStyle: {
        color: ink, width: line.faint ? 0.8 : 1.6, opacity: line.faint ? 0.35 : 1,
        type: line.dashed ? "dashed" : DASHES[Math.floor(index / 8) % 4],
      },
    };
  });
  const marks = [];
  if (["loss", "grad_norm"].includes(chart.id) && !several) {
    for (const mark of data.runs[0].marks) {
      const place = placeOf(0, mark.step);
      if (place !== null) marks.push({ xAxis: place, name: mark.text });
    }
  }
  if (marks.length && series.length) {
    series[series.length - 1].markLine = {
      symbol: "none", silent: false, data: marks,
      label: { show: marks.length <= 8, formatter: (at) => at.name, color: colour("faint"), position: "insideEndTop" },
      lineStyle: { color: colour("faint"), width: 1, type: "dotted" },
      tooltip: { show: true, trigger: "item", formatter: (at) => at.name },
    };
  }
  const tall = chart.lines.length > 1 ? 56 : 34;
  return Object.assign(common(), {
    grid: { left: 12, right: 24, top: tall, bottom: 28, containLabel: true },
    legend: { show: chart.lines.length > 1, type: "scroll", top: 0, left: 0, right: 90, textStyle: { color: colour("text") },
      pageTextStyle: { color: colour("text") }, data: chart.lines.filter((line) => !line.faint).map((line) => line.name) },
    toolbox: { top: -4, right: 0, itemSize: 13, iconStyle: { borderColor: colour("faint") },
      feature: { dataZoom: { filterMode: "none" }, restore: {}, saveAsImage: { name: chart.id, backgroundColor: colour("back") } } },
    dataZoom: [{ type: "inside", filterMode: "none", zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false, moveOnMouseMove: "ctrl" }],
    xAxis: scale({ type: "value", name: AXES[axis], nameLocation: "middle", nameGap: 26, min: "dataMin", max: "dataMax", axisLabel: { color: colour("faint"), formatter: short, hideOverlap: true } }),
    yAxis: scale({ type: log ? "log" : "value", scale: !chart.percent, name: chart.unit || "", axisLabel: { color: colour("faint"), formatter: form } }),
    tooltip: Object.assign(common().tooltip, {
      trigger: "axis", axisPointer: { type: "line" },
      formatter: (items) => [AXES[axis] + " " + short(items[0].value[0])].concat(
        items.filter((item) => item.value[1] !== null).map((item) => item.seriesName + "  " + form(item.value[1]))).join("\n"),
    }),
    series,
  });
}

function heat(chart) {
  const where = data.runs[chart.run].steps[axis] || [];
  const values = chart.cells.map((cell) => cell[2]);
  const power = (value) => short(Math.pow(10, value));
  return Object.assign(common(), {
    grid: { left: 12, right: 24, top: 12, bottom: 92, containLabel: true },
    xAxis: scale({ type: "category", name: AXES[axis], nameLocation: "middle", nameGap: 26, data: chart.columns.map((index) => short(where[index])), axisLabel: { color: colour("faint"), hideOverlap: true } }),
    yAxis: scale({ type: "category", data: chart.rows, inverse: true, axisLabel: { color: colour("faint"), fontSize: 11 } }),
    visualMap: {
      min: Math.min(...values), max: Math.max(Math.min(...values) + 0.01, Math.max(...values)), calculable: true, orient: "horizontal", left: "center", bottom: 0, precision: 2,
      formatter: power, textStyle: { color: colour("text") },
      inRange: { color: ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"] },
    },
    tooltip: Object.assign(common().tooltip, {
      formatter: (item) => chart.rows[item.value[1]] + "\n" + AXES[axis] + " " + short(where[chart.columns[item.value[0]]]) + "\n" + power(item.value[2]),
    }),
    series: [{ type: "heatmap", data: chart.cells, progressive: 0 }],
  });
}

function bars(chart) {
  const form = (value) => short(value) + " " + chart.unit;
  return Object.assign(common(), {
    grid: { left: 12, right: 70, top: 34, bottom: 8, containLabel: true },
    legend: { top: 0, left: 0, textStyle: { color: colour("text") } },
    xAxis: scale({ type: "value", name: chart.unit, axisLabel: { color: colour("faint"), formatter: short } }),
    yAxis: scale({ type: "category", data: chart.rows, inverse: true, axisLabel: { color: colour("text") } }),
    tooltip: Object.assign(common().tooltip, {
      trigger: "axis", axisPointer: { type: "shadow" },
      formatter: (items) => [chart.rows[items[0].dataIndex]].concat(items.map((item) => item.seriesName + "  " + (item.value === undefined || item.value === null ? "–" : form(item.value)))).join("\n"),
    }),
    series: chart.bars.map((bar, index) => ({
      type: "bar", name: bar.name, data: bar.values, itemStyle: { color: colour("c" + index) }, barMaxWidth: 12,
      label: { show: true, position: "right", color: colour("text"), fontSize: 10, formatter: (item) => (item.value === null ? "" : short(item.value)) },
    })),
  });
}

const OPTIONS = { lines, heat, bars };

function draw(element) {
  if (!element.offsetWidth) return; // in a closed part of the page
  const chart = data.charts[element.dataset.chart];
  let own = drawn.get(element);
  if (!own) {
    own = echarts.init(element, null, { renderer: "canvas" });
    drawn.set(element, own);
    page.dataset.charts = String(drawn.size);
  }
  own.setOption(OPTIONS[chart.kind](chart), { notMerge: true });
}

function drawAll(again) {
  document.querySelectorAll("[data-chart]").forEach((element) => {
    if (again || !drawn.has(element)) draw(element);
  });
}

document.querySelectorAll("[data-chart]").forEach((element) => {
  const chart = data.charts[element.dataset.chart];
  if (chart.kind !== "lines") return;
  logarithmic.set(chart.id, Boolean(chart.log));
  if (!chart.lines.every((line) => line.y.every((value) => value === null || value > 0))) {
    logarithmic.set(chart.id, false);
    return;
  }
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "log";
  button.title = "logarithmic scale";
  button.setAttribute("aria-label", "Logarithmic scale: " + chart.title);
  button.setAttribute("aria-pressed", String(logarithmic.get(chart.id)));
  button.addEventListener("click", () => {
    logarithmic.set(chart.id, !logarithmic.get(chart.id));
    button.setAttribute("aria-pressed", String(logarithmic.get(chart.id)));
    draw(element);
  });
  element.closest("figure").querySelector("figcaption").prepend(button);
});
document.querySelectorAll("input[name=axis]").forEach((input) => {
  input.addEventListener("change", () => { axis = input.value; drawAll(true); });
});
document.getElementById("theme").addEventListener("click", () => {
  page.dataset.theme = isDark() ? "light" : "dark";
  drawAll(true);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll(true));
document.querySelectorAll("details").forEach((part) => part.addEventListener("toggle", () => drawAll(false)));
window.addEventListener("resize", () => drawn.forEach((chart) => chart.resize()));
page.dataset.charts = "0";
drawAll(false);
