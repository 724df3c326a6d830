// Draws the charts of a report from the numbers in #data, with Apache ECharts. No network, no eval, no HTML from data:
// every text of a run goes into a chart as text, or into the page by textContent.
(() => {
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"; // no double quotes: it stands in SVG attributes
const LOOKS = {
  light: { ink: "#1d1d1f", quiet: "#5d5d63", line: "#d9d9de", paper: "#ffffff", client: "#0072b2", server: "#d55e00",
    users: "#8c8c92", runs: ["#0072b2", "#d55e00", "#007a57", "#b5588f", "#8f6400", "#3d3d3d"] },
  dark: { ink: "#ececf0", quiet: "#a3a3ab", line: "#37383e", paper: "#17181b", client: "#6cb8ea", server: "#f2955b",
    users: "#8c8c92", runs: ["#6cb8ea", "#f2955b", "#4fd0a5", "#e3a0c8", "#e6b84a", "#c9c9cf"] },
};
const several = data.runs.length > 1;
const number = (value, unit = "ms") => {
  const text = Math.abs(value) < 100 ? value.toFixed(2) : Math.abs(value) < 10000 ? value.toFixed(1) : value.toFixed(0);
  const [whole, part] = text.split(".");
  return whole.replace(/\B(?=(\d{3})+$)/g, ",") + (part ? "." + part : "") + (unit ? " " + unit : "");
};
const axisNumber = (value) => String(Number(value.toPrecision(6))).replace(/^(-?\d+)/, (all) => all.replace(/\B(?=(\d{3})+$)/g, ","));
const short = (text, most = 44) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
const who = (run, side) => (several ? `${short(data.runs[run], 28)}, ${side}` : side);
const colourOf = (look, run, side) => (several ? look.runs[run % look.runs.length] : look[side]);

function axis(look, more) {
  return { axisLine: { lineStyle: { color: look.quiet } }, axisTick: { lineStyle: { color: look.quiet } },
    axisLabel: { color: look.quiet, hideOverlap: true, fontFamily: FONT }, splitLine: { lineStyle: { color: look.line } },
    nameTextStyle: { color: look.quiet, fontFamily: FONT }, ...more };
}
function base(look, more) {
  return { animation: false, backgroundColor: "transparent", textStyle: { fontFamily: FONT, color: look.ink },
    legend: { show: false }, ...more,
    tooltip: { renderMode: "richText", confine: true, backgroundColor: look.paper, borderColor: look.quiet,
      textStyle: { color: look.ink, fontSize: 12, fontFamily: FONT }, ...more.tooltip } };
}
// powers of ten alone would leave a short axis with one label; where it does not begin at 0 or a power, it begins anywhere
const msAxis = (look, log, low, high, name) => axis(look, { type: log ? "log" : "value", logBase: high / low < 300 ? 2 : 10, min: low, max: high, name,
  nameLocation: "middle", nameGap: 26, axisLabel: { color: look.quiet, hideOverlap: true, formatter: axisNumber, showMaxLabel: false, showMinLabel: !log && !low } });

// Each builder: (numbers, look) -> {option, legend: [{name, colour, shape}], height}
const BUILD = {
  violin(one, look) {
    const series = [], legend = [];
    for (const half of one.halves) {
      const sign = half.side === "client" ? 1 : -1, colour = colourOf(look, half.run, half.side);
      const name = who(half.run, half.side), dashed = several && sign < 0;
      const dots = half.points.map((ms, i) => [ms, sign * (0.15 + 0.5 * ((i * 0.618) % 1))]);
      // marks go outwards from the middle; the rarer, the shorter, so that their texts stand below each other, and right of
      // their line, so that the taller one of a smaller value does not run through them
      const marks = Object.entries(half.marks).filter(([key, ms]) => (key === "p50" || !several) && ms >= one.low && ms <= one.high)
        .map(([key, ms]) => {
          const reach = several ? 1.08 + 0.16 * half.run : { p50: 1.08, p95: 0.66, p99: 0.36 }[key];
          return [{ coord: [ms, 0], lineStyle: { width: key === "p50" ? 2 : 1, type: "solid", color: key === "p50" ? look.ink : colour },
            label: { show: true, position: "end", distance: key === "p50" ? 2 : [-12, 3], align: key === "p50" ? "center" : "left",
              color: look.ink, fontSize: 11, fontWeight: key === "p50" ? "bold" : "normal",
              formatter: (key === "p50" ? "" : key + " ") + number(ms, "") } }, { coord: [ms, sign * reach] }];
        });
      series.push({ name, type: dots.length ? "scatter" : "line", data: dots.length ? dots : half.outline.map(([ms, width]) => [ms, sign * width]),
        symbol: dots.length ? "circle" : "none", symbolSize: 6, itemStyle: { color: colour, opacity: 0.75 },
        lineStyle: { color: colour, width: 1.5, type: dashed ? "dashed" : "solid" },
        areaStyle: { color: colour, opacity: several ? 0.16 : 0.4, origin: 0 },
        markLine: { silent: true, symbol: "none", data: marks, label: { fontFamily: FONT } } });
      legend.push({ name, colour, shape: dashed ? "dashed" : "area", more: `n = ${half.n.toLocaleString("en")}` });
    }
    const reach = several ? 1.3 + 0.16 * data.runs.length : 1.35;
    const beyond = one.halves.filter((half) => half.beyond).map((half) => `${who(half.run, half.side)}: ${half.beyond} beyond, up to ${number(half.worst)}`);
    const notes = one.silent.concat(beyond);
    return { height: 250, legend, notes, option: base(look, {
      grid: { left: 28, right: several ? 28 : 72, top: 12, bottom: 44 }, tooltip: { show: false },
      xAxis: msAxis(look, one.log, one.low, one.high, one.log ? "ms, logarithmic" : one.low > 0 ? "ms, not from 0" : "ms"),
      yAxis: { type: "value", min: -reach, max: reach, show: false }, series }) };
  },

  ecdf(one, look) {
    const xs = one.curves.flatMap((curve) => [curve.points[0][0], curve.points[curve.points.length - 1][0]]).filter((x) => x > 0);
    const low = Math.min(...xs), high = Math.max(...xs), log = xs.length > 0 && high / low > 20;
    const series = one.curves.map((curve) => ({ name: who(curve.run, curve.side) + (curve.told_by ? ` (${curve.told_by})` : ""),
      type: "line", step: "end", symbol: "none", data: log ? curve.points.filter(([x]) => x > 0) : curve.points,
      lineStyle: { color: colourOf(look, curve.run, curve.side), width: 2, type: curve.side === "server" ? "dashed" : "solid" },
      itemStyle: { color: colourOf(look, curve.run, curve.side) } }));
    const legend = series.map((each) => ({ name: each.name, colour: each.itemStyle.color, shape: each.lineStyle.type }));
    if (one.slo !== null && one.slo >= low / 1.2 && one.slo <= high * 1.2)
      series[0].markLine = { silent: true, symbol: "none", lineStyle: { color: look.ink, type: "dotted", width: 1.5 },
        label: { formatter: "SLO", position: "insideEndTop", color: look.ink, fontFamily: FONT }, data: [{ xAxis: one.slo }] };
    return { height: 260, legend, option: base(look, {
      grid: { left: 44, right: 18, top: 14, bottom: 44 },
      tooltip: { trigger: "axis", axisPointer: { type: "cross", label: { show: false } },
        formatter: (points) => `${number(points[0].axisValue)}\n` + points.map((p) => `${p.seriesName}: ${p.value[1].toFixed(2)} %`).join("\n") },
      xAxis: msAxis(look, log, log ? low / 1.1 : undefined, log ? high * 1.1 : undefined, log ? "ms, logarithmic" : "ms"),
      yAxis: axis(look, { type: "value", min: 0, max: 100, axisLabel: { color: look.quiet, formatter: "{value} %" } }), series }) };
  },

  timeline(one, look) {
    const top = 26, each = 124, gap = 50, rows = one.panels.length;
    const series = [], legend = [];
    one.panels.forEach((panel, at) => panel.lines.forEach((line, i) => {
      const colour = look[line.side], name = `${at}.${line.label}`;
      series.push({ name, type: "line", xAxisIndex: at, yAxisIndex: at, data: line.points,
        step: line.look === "steps" || line.look === "area" ? "end" : false,
        symbol: line.look === "points" ? "circle" : "none", symbolSize: 6,
        itemStyle: { color: line.dashed ? look.paper : colour, borderColor: colour, borderWidth: 1.5 },
        lineStyle: { color: colour, width: line.look === "points" || line.look === "area" ? 0 : 1.8, type: line.dashed ? "dashed" : "solid" },
        areaStyle: line.look === "area" ? { color: colour, opacity: 0.25 } : undefined,
        markArea: i === 0 && one.window[0] !== null && one.window[1] !== null
          ? { silent: true, itemStyle: { color: look.quiet, opacity: 0.07 }, data: [[{ xAxis: one.window[0] }, { xAxis: one.window[1] }]] } : undefined });
      if (line.named) legend.push({ name, text: line.label, group: panel.title, colour,
        shape: line.look === "area" ? "area" : line.look === "points" ? (line.dashed ? "ring" : "point") : line.dashed ? "dashed" : "solid" });
    }));
    const last = Math.max(0, ...one.panels.flatMap((panel) => panel.lines.map((line) => line.points.length ? line.points[line.points.length - 1][0] : 0)));
    const indexes = one.panels.map((_, at) => at);
    return { height: top + rows * (each + gap) + 50, legend, zoom: true, option: base(look, {
      title: one.panels.map((panel, at) => ({ text: `${panel.title} (${panel.unit})`, left: 0, top: at * (each + gap),
        textStyle: { color: look.ink, fontSize: 12.5, fontFamily: FONT } })),
      grid: one.panels.map((_, at) => ({ left: 56, right: 14, top: top + at * (each + gap), height: each, outerBoundsMode: "none" })),
      axisPointer: { link: [{ xAxisIndex: "all" }] },
      tooltip: { trigger: "axis", formatter: (points) => `${number(points[0].axisValue, "s")}\n` +
        points.map((p) => `${p.seriesName.slice(p.seriesName.indexOf(".") + 1)}: ${number(p.value[1], one.panels[p.axisIndex].unit)}`).join("\n") },
      xAxis: indexes.map((at) => axis(look, { type: "value", gridIndex: at, min: 0, max: last, splitLine: { show: false },
        name: at === rows - 1 ? "seconds since the run's start" : "", nameLocation: "middle", nameGap: 24,
        axisLabel: { show: true, color: look.quiet, hideOverlap: true, showMaxLabel: false, formatter: axisNumber } })),
      yAxis: one.panels.map((_, at) => axis(look, { type: "value", gridIndex: at, min: 0, splitNumber: 3, axisLabel: { color: look.quiet, formatter: axisNumber } })),
      dataZoom: [{ type: "slider", xAxisIndex: indexes, height: 18, bottom: 2, left: 56, right: 14, showDetail: false, showDataShadow: false,
          borderColor: look.line, fillerColor: look.quiet + "33", handleStyle: { color: look.quiet }, moveHandleStyle: { color: look.quiet } },
        { type: "inside", xAxisIndex: indexes, zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false, moveOnMouseMove: true }], series }) };
  },

  waterfall(one, look) {
    const dark = look === LOOKS.dark;
    const STYLES = { late: [dark ? "#d0d0d6" : "#3d3d3d", 0], connect: ["#8c8c8c", "lines"], send: [dark ? "#5f5f68" : "#c4c4c4", 0],
      "template+tokenize": ["#F0E442", 0], tokenize: ["#F0E442", 0], queue: ["#D55E00", 0], prefill: ["#E69F00", "lines"] };
    const HOPS = [["#009E73", "rows"], ["#66C2A5", 0], ["#00543d", "lines"]];
    const hops = one.bars.map((bar) => bar.name).filter((name) => name.startsWith("to "));
    const DECALS = { lines: { symbol: "rect", dashArrayX: [1, 0], dashArrayY: [2, 5], rotation: -Math.PI / 4, color: "rgba(255,255,255,.55)" },
      rows: { symbol: "rect", dashArrayX: [1, 0], dashArrayY: [2, 6], color: "rgba(255,255,255,.55)" },
      dots: { symbol: "circle", symbolSize: 0.7, dashArrayX: [[8, 8], [0, 8, 8, 0]], dashArrayY: [6, 0], color: "rgba(255,255,255,.7)" } };
    const style = (name) => hops.includes(name) ? HOPS[hops.indexOf(name) % 3] : STYLES[name] || (name.includes("http") ? ["#56B4E9", 0] : ["#CC79A7", "dots"]);
    const width = Math.max(1e-9, ...one.stacks.map((stack) => Object.values(stack.bars).reduce((sum, ms) => sum + Math.abs(ms), 0)));
    const names = one.stacks.map((stack) => (stack.name === "mean" ? (one.how.startsWith("means") ? "mean over\nthe window" : "mean request") : `request at ${stack.name}`)
      + `\n${number(stack.total)}`);
    const legend = [];
    const series = one.bars.map((bar) => {
      const [colour, decal] = style(bar.name);
      legend.push({ name: bar.label, colour, shape: "area", decal });
      return { name: bar.label, type: "bar", stack: "all", barWidth: 30, data: one.stacks.map((stack) => ({ value: stack.bars[bar.name], label: { show: Math.abs(stack.bars[bar.name]) >= 0.09 * width } })),
        itemStyle: { color: colour, decal: decal ? DECALS[decal] : { symbol: "none" }, borderColor: look.paper, borderWidth: 1 },
        label: { fontSize: 11, color: "#1d1d1f", textBorderWidth: 0, backgroundColor: "rgba(255,255,255,.88)", padding: [2, 4], borderRadius: 3,
          formatter: (p) => number(p.value, "") } };
    });
    return { height: 76 + 54 * one.stacks.length, legend, option: base(look, {
      grid: { left: 104, right: 16, top: 6, bottom: 44 },
      tooltip: { trigger: "item", formatter: (p) => `${p.seriesName}\n${p.name.replace("\n", ": ")}\n${number(p.value)}` },
      xAxis: axis(look, { type: "value", name: "ms since the request was meant to go out", nameLocation: "middle", nameGap: 26, axisLabel: { color: look.quiet, hideOverlap: true, formatter: axisNumber } }),
      yAxis: axis(look, { type: "category", data: names, inverse: true, axisTick: { show: false }, axisLabel: { color: look.ink, fontSize: 12, lineHeight: 16 } }), series }) };
  },

  answer(one, look) {
    const last = one.points[one.points.length - 1], first = one.points[0];
    const series = [{ name: "tokens that had come", type: "line", step: "end", data: [[0, 0], ...one.points], symbol: "circle", symbolSize: 4,
      lineStyle: { color: look.client, width: 1.8 }, itemStyle: { color: look.client } }];
    const legend = [{ name: "tokens that had come", colour: look.client, shape: "solid" }];
    if (one.pace) {
      // who has read all that is there waits for the next chunk: a level stretch of the line
      const read = [];
      let free = first[0], before = 0;
      for (const [ms, tokens] of one.points) {
        if (ms > free || !read.length) { free = Math.max(free, ms); read.push([free, before]); }
        free += (tokens - before) / one.pace * 1e3;
        before = tokens;
        read.push([free, before]);
      }
      series.push({ name: "what a reader at 5 words/s has read", type: "line", symbol: "none", data: read,
        lineStyle: { color: look.users, type: "dashed", width: 1.8 }, itemStyle: { color: look.users } });
      legend.push({ name: "what a reader at 5 words/s has read", colour: look.users, shape: "dashed" });
    }
    return { height: 280, legend, zoom: true, option: base(look, {
      grid: { left: 48, right: 18, top: 30, bottom: 66 },
      tooltip: { trigger: "axis", formatter: (points) => `${number(points[0].axisValue)} after it was sent\n` + points.map((p) => `${p.seriesName}: ${axisNumber(p.value[1])}`).join("\n") },
      dataZoom: [{ type: "slider", height: 18, bottom: 2, left: 48, right: 18, showDetail: false, showDataShadow: false, borderColor: look.line, fillerColor: look.quiet + "33", handleStyle: { color: look.quiet }, moveHandleStyle: { color: look.quiet } },
        { type: "inside", zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false }],
      xAxis: axis(look, { type: "value", min: 0, max: Math.ceil(1.05 * last[0]), name: "ms since the request was sent", nameLocation: "middle", nameGap: 26, axisLabel: { color: look.quiet, hideOverlap: true, showMaxLabel: false, formatter: axisNumber } }),
      yAxis: axis(look, { type: "value", min: 0, name: "tokens", nameGap: 10, axisLabel: { color: look.quiet, formatter: axisNumber } }), series }) };
  },
};

const charts = [];
const el = (name, text, more = {}) => Object.assign(document.createElement(name), text === undefined ? more : { textContent: text, ...more });
const lookNow = () => (prefersDark.matches && !printing ? LOOKS.dark : LOOKS.light);
let printing = false;

function mount(figure) {
  const numbers = data[figure.dataset.chart][figure.dataset.at];
  const legend = el("div", undefined, { className: "legend" }), place = el("div", undefined, { className: "plot", tabIndex: 0 });
  const notes = el("p", undefined, { className: "quiet notes" }), tools = el("div", undefined, { className: "tools" });
  place.setAttribute("role", "img");
  place.setAttribute("aria-label", figure.dataset.label || "");
  const caption = figure.querySelector("figcaption");
  for (const part of [legend, place, notes, tools]) figure.insertBefore(part, caption);
  const one = { figure, place, legend, notes, numbers, hidden: new Set(), kind: figure.dataset.chart, at: -1 };
  for (const type of ["SVG", "PNG"]) tools.append(el("button", type, { type: "button", title: `Save this chart as ${type}`, onclick: () => save(one, type) }));
  place.addEventListener("keydown", (event) => key(one, event));
  charts.push(one);
  draw(one);
  return one;
}

function draw(one) {
  const built = BUILD[one.kind](one.numbers, lookNow());
  one.built = built;
  one.place.style.height = built.height + "px";
  one.chart = one.chart || echarts.init(one.place, null, { renderer: "svg" });
  one.chart.resize();
  one.chart.setOption(chosen(one, built.option), true);
  one.notes.textContent = (built.notes || []).join("; ");
  one.notes.hidden = !one.notes.textContent;
  one.legend.replaceChildren();
  let group;
  for (const each of built.legend) {
    if (each.group && each.group !== group) one.legend.append(el("span", (group = each.group) + ":", { className: "group" }));
    const button = el("button", undefined, { type: "button", title: "Show or hide" });
    button.setAttribute("aria-pressed", String(!one.hidden.has(each.name)));
    button.append(swatch(each), el("span", (each.text || each.name) + (each.more ? ` (${each.more})` : "")));
    button.onclick = () => { one.hidden.has(each.name) ? one.hidden.delete(each.name) : one.hidden.add(each.name); draw(one); };
    one.legend.append(button);
  }
}
const chosen = (one, option) => ({ ...option, legend: { ...option.legend, selected: Object.fromEntries([...one.hidden].map((name) => [name, false])) } });

function swatch({ colour, shape, decal }) {
  const box = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const add = (name, attributes) => { const part = document.createElementNS(box.namespaceURI, name); for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value); box.append(part); };
  for (const [key, value] of Object.entries({ width: 22, height: 12, "aria-hidden": "true" })) box.setAttribute(key, value);
  if (shape === "area") add("rect", { width: 22, height: 12, fill: colour, rx: 2, "fill-opacity": 0.85 });
  else if (shape === "point" || shape === "ring") add("circle", { cx: 11, cy: 6, r: 4, fill: shape === "ring" ? "none" : colour, stroke: colour, "stroke-width": 1.5 });
  else add("line", { x1: 0, x2: 22, y1: 6, y2: 6, stroke: colour, "stroke-width": 3, "stroke-dasharray": shape === "dashed" ? "6 4" : "" });
  if (decal) for (const x of [4, 11, 18]) add("line", { x1: x - 3, x2: x + 3, y1: decal === "lines" ? 12 : 6, y2: decal === "lines" ? 0 : 6, stroke: "#fff", "stroke-width": 1.5 });
  return box;
}

// Arrow keys move the pointer over a curve, + and - zoom, 0 shows all again, Escape hides the pointer.
function key(one, event) {
  const series = one.built.option.series, step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step) {
    const longest = series.reduce((best, each, at) => (each.data.length > series[best].data.length ? at : best), 0), count = series[longest].data.length;
    one.at = Math.min(count - 1, Math.max(0, one.at + step * (event.shiftKey ? Math.ceil(count / 20) : 1)));
    one.chart.dispatchAction({ type: "showTip", seriesIndex: longest, dataIndex: one.at });
  } else if (event.key === "Escape") one.chart.dispatchAction({ type: "hideTip" });
  else if (one.built.zoom && "+-0".includes(event.key)) {
    const { start, end } = one.chart.getOption().dataZoom[0], middle = (start + end) / 2;
    const half = event.key === "0" ? 50 : Math.min(50, (end - start) / 2 * (event.key === "+" ? 0.6 : 1 / 0.6));
    const from = Math.min(Math.max(0, middle - half), 100 - 2 * half);
    one.chart.dispatchAction({ type: "dataZoom", start: event.key === "0" ? 0 : from, end: event.key === "0" ? 100 : from + 2 * half });
  } else return;
  event.preventDefault();
}

// A picture for a paper: light, with its title and legend, 960 wide; PNG three times as fine.
function picture(one, type) {
  const built = BUILD[one.kind](one.numbers, LOOKS.light), names = built.legend.filter((each) => !one.hidden.has(each.name));
  let row = 0, x = 0;
  const texts = names.map((each) => (each.group ? each.group + ": " : "") + (each.text || each.name) + (each.more ? ` (${each.more})` : ""));
  const marks = texts.map((text, i) => {
    const long = 40 + 6.6 * text.length;
    if (x && x + long > 940) { row += 1; x = 0; }
    const place = { x, y: 30 + 20 * row };
    x += long;
    const { colour, shape } = names[i];
    return { type: "group", left: place.x + 8, top: place.y, children: [
      shape === "area" ? { type: "rect", shape: { x: 0, y: 1, width: 22, height: 11 }, style: { fill: colour, opacity: 0.85 } }
        : shape === "point" || shape === "ring" ? { type: "circle", shape: { cx: 11, cy: 6, r: 4 }, style: { fill: shape === "ring" ? "#ffffff" : colour, stroke: colour } }
        : { type: "line", shape: { x1: 0, y1: 7, x2: 22, y2: 7 }, style: { stroke: colour, lineWidth: 3, lineDash: shape === "dashed" ? [6, 4] : null } },
      { type: "text", style: { x: 28, y: 1, text, fill: "#1d1d1f", font: `12px ${FONT}` } }] };
  });
  const above = 30 + 20 * (row + 1) + 10;
  const option = chosen(one, built.option), down = (part) => ({ ...part, top: (part.top || 0) + above });
  option.backgroundColor = "#ffffff";
  option.grid = Array.isArray(option.grid) ? option.grid.map(down) : down(option.grid);
  const titles = option.title ? [].concat(option.title).map(down) : [];
  option.title = [{ text: short(one.figure.dataset.title || "", 110), left: 8, top: 4, textStyle: { color: "#1d1d1f", fontSize: 15, fontFamily: FONT } }, ...titles];
  option.graphic = marks;
  option.dataZoom = (option.dataZoom || []).map((zoom, i) => ({ ...zoom, show: false, ...(one.chart ? (({ start, end }) => ({ start, end }))(one.chart.getOption().dataZoom[i]) : {}) }));
  const size = { width: 960, height: built.height + above };
  if (type === "SVG") {
    const chart = echarts.init(null, null, { renderer: "svg", ssr: true, ...size });
    chart.setOption(option);
    const text = chart.renderToSVGString();
    chart.dispose();
    return new Blob([text], { type: "image/svg+xml" });
  }
  const chart = echarts.init(document.createElement("div"), null, { renderer: "canvas", devicePixelRatio: 3, ...size });
  chart.setOption(option);
  const [, coded] = chart.getDataURL({ type: "png", pixelRatio: 3, backgroundColor: "#ffffff" }).split(",");
  chart.dispose();
  return new Blob([Uint8Array.from(atob(coded), (c) => c.charCodeAt(0))], { type: "image/png" });
}

function save(one, type) {
  const link = el("a", undefined, { href: URL.createObjectURL(picture(one, type)),
    download: (data.runs.join("-vs-") + "-" + (one.figure.dataset.file || one.kind)).replace(/[^\w.-]+/g, "_").slice(0, 120) + "." + type.toLowerCase() });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Tables whose columns sort: the headings become buttons.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    if (cell.classList.contains("unsorted")) return;
    const button = el("button", cell.textContent, { type: "button" });
    cell.replaceChildren(button);
    button.onclick = () => {
      const down = cell.getAttribute("aria-sort") !== "descending", value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const isNumber = [...body.rows].every((row) => value(row) === "" || isFinite(value(row)));
      const order = (a, b) => (isNumber ? (value(a) === "" ? -Infinity : +value(a)) - (value(b) === "" ? -Infinity : +value(b)) : value(a).localeCompare(value(b)));
      const rows = [...body.rows].sort((a, b) => (down ? order(b, a) : order(a, b)));
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...rows);
    };
  });
}

for (const figure of document.querySelectorAll("figure[data-chart]")) if (figure.dataset.at) mount(figure);

// The chunks of one request of the table of the worst
const answer = document.querySelector("figure[data-chart=answer]");
if (answer) {
  let shown;
  const show = (button) => {
    const [run, id] = [data.runs[parseInt(button.dataset.request)], button.dataset.request.replace(/^\d+\//, "")];
    const called = several ? `${id} of ${run}` : id;
    answer.dataset.at = button.dataset.request;
    answer.dataset.title = `Request ${called}: how its tokens came`;
    answer.dataset.file = `request-${id}`;
    answer.querySelector("figcaption b").textContent = called;
    for (const other of document.querySelectorAll("button[data-request]")) other.setAttribute("aria-pressed", String(other === button));
    if (shown) { shown.numbers = data.answer[answer.dataset.at]; shown.at = -1; draw(shown); } else shown = mount(answer);
  };
  const buttons = [...document.querySelectorAll("button[data-request]")].filter((button) => data.answer[button.dataset.request]?.points.length);
  for (const button of buttons) button.onclick = () => { show(button); answer.scrollIntoView({ block: "nearest" }); };
  if (buttons.length) show(buttons[0]); else answer.hidden = true;
}

const again = () => charts.forEach(draw);
prefersDark.addEventListener("change", again);
new ResizeObserver(() => charts.forEach((one) => one.chart.resize())).observe(document.body);
addEventListener("beforeprint", () => { printing = true; again(); });
addEventListener("afterprint", () => { printing = false; again(); });
matchMedia("print").addEventListener("change", (event) => { printing = event.matches; again(); });
document.documentElement.dataset.charts = String(charts.length);
globalThis.twoclocksPicture = (at, type) => picture(charts[at], type).text();
})();
