// What stands in the tab "LLM metrics" of Locust's web UI. Asks ./twoclocks/live.json for what is new, once a second,
// while the tab is open; draws it as tables and SVG. All text goes in as text, never as HTML.

const TITLE = "LLM metrics", POLL_MS = 1000, SHOWN_S = 3600, HEIGHT = 150;
const LEFT = 58, RIGHT = 8, TOP = 8, BOTTOM = 20;
const SHOWN = { s: ["ms", 1e3, 3], share: ["%", 100, 2], requests: ["", 1, 0] }; // unit -> as shown, factor, digits

let told = null, rows = new Map(), cursor = null, timer = null, asking = false;
const [alarm, head, tables, plots, notes] = ["div", "div", "div", "div", "div"].map((tag) => make(tag));
const link = make("a", { href: "./twoclocks/requests.jsonl", download: "", hidden: "" }, "Download the raw records so far");
const box = make("div", { class: "twoclocks" }, alarm, head, link, tables, plots, notes);
tables.className = "tables";
plots.className = "charts";

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "rect", "text"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function number(value, unit) {
  if (value == null) return "–";
  const [, factor, digits] = SHOWN[unit] || ["", 1, 3];
  return (value * factor).toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

const unitOf = (unit) => (SHOWN[unit] || [unit])[0];

// where the tab is

function place() {
  const tab = [...document.querySelectorAll('[role="tab"]')].find((one) => one.textContent.trim() === TITLE);
  const panel = tab && tab.getAttribute("aria-selected") === "true" ? tab.closest(".MuiContainer-root") : null;
  if (!panel) box.remove();
  else if (box.parentElement !== panel) panel.append(box);
  const [red, green, blue] = getComputedStyle(document.body).backgroundColor.match(/[\d.]+/g) || [255, 255, 255];
  box.classList.toggle("dark", 0.3 * red + 0.6 * green + 0.1 * blue < 128);
  if (panel && timer === null) poll();
}

async function poll() {
  clearTimeout(timer);
  timer = null;
  if (!box.isConnected || asking) return;
  asking = true;
  let wait = POLL_MS;
  try {
    if (!document.hidden) wait = await ask();
  } catch (error) {
    trouble(`Locust does not answer (${error.message}); what stands below is the last that it told.`);
  } finally {
    asking = false;
  }
  timer = setTimeout(poll, wait);
}

async function ask() {
  const query = told ? `?run=${encodeURIComponent(told.run)}&since=${told.seq}` : "";
  const response = await fetch(`./twoclocks/live.json${query}`);
  if (!response.ok || !response.headers.get("content-type").startsWith("application/json"))
    throw new Error(response.redirected ? "log in again" : `HTTP ${response.status}`);
  const answer = await response.json();
  trouble(answer.error);
  if (!answer.run) {
    told = null;
    link.hidden = true;
    for (const part of [tables, plots, notes]) part.replaceChildren();
    head.replaceChildren(answer.error ? "" : "No run has begun yet.");
    return POLL_MS;
  }
  if (told?.run !== answer.run) {
    [rows, cursor] = [new Map(), null];
    notes.replaceChildren(remarks(answer));
  }
  const { at, ...columns } = answer.seconds;
  at.forEach((second, i) => {
    rows.set(second, Object.fromEntries(Object.entries(columns).map(([name, values]) => [name, values[i]])));
  });
  const newest = Math.max(...rows.keys());
  for (const second of rows.keys()) if (second <= newest - SHOWN_S) rows.delete(second);
  told = answer;
  link.hidden = false;
  head.replaceChildren(...heading());
  const scrolled = [...tables.children].map((one) => one.scrollLeft);
  tables.replaceChildren(latencies(), totals());
  [...tables.children].forEach((one, i) => (one.scrollLeft = scrolled[i] || 0));
  draw();
  return answer.bytes_behind > 1e6 ? 100 : POLL_MS;
}

function trouble(text) {
  alarm.replaceChildren(...(text ? [make("p", { class: "trouble", role: "alert" }, text)] : []));
}

// what is in it

function heading() {
  const { target, state, window: span, at } = told;
  const who = [target.name, target.server, target.server_version, target.model, target.url];
  const since = span.started_at === null ? at : (span.ended_at ?? at) - span.started_at;
  const parts = [
    make("h2", {}, `${told.run}: ${state}`),
    make("p", { class: "dim" }, [...new Set(who.filter(Boolean))].join(", ")),
    make("p", {}, `${since.toFixed(0)} s ${span.started_at === null ? "since the run began" : "in the measuring window"}`),
  ];
  if (told.bytes_behind > 1e6)
    parts.push(make("p", { class: "trouble" }, `Reading the run so far: ${(told.bytes_behind / 1e6).toFixed(0)} MB to go.`));
  for (const { kind, count, example } of told.errors)
    parts.push(make("p", { class: "trouble" }, `${count} × ${kind}${example ? `: ${example}` : ""}`));
  return parts.concat(told.notes.map((note) => make("p", { class: "trouble" }, note)));
}

function latencies() {
  const heads = ["", "unit", "n", "mean", "p50", "p95", "p99", "max"];
  const lines = Object.entries(told.figures).filter(([, figure]) => "n" in figure).map(([name, figure]) =>
    make("tr", { "data-figure": name, title: figure.definition },
      make("td", {}, figure.label), make("td", {}, unitOf(figure.unit)), make("td", {}, number(figure.n, "requests")),
      ...heads.slice(3).map((head) => make("td", { "data-value": figure[head] ?? "" }, number(figure[head], figure.unit)))));
  return make("div", { class: "wide" }, make("table", {},
    make("caption", {}, "As the client saw it, since the measuring window began"),
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))), make("tbody", {}, ...lines)));
}

function totals() {
  const rare = ["cancelled", "hung_up", "gave_up"];
  const lines = Object.entries(told.figures).filter(([name, figure]) => figure.value || ("value" in figure && !rare.includes(name))).map(([name, figure]) =>
    make("tr", { "data-figure": name, title: figure.definition || "" }, make("td", {}, figure.label),
      make("td", { "data-value": figure.value ?? "" }, `${number(figure.value, figure.unit)} ${figure.unit === "share" ? "%" : ""}`)));
  return make("div", { class: "wide" }, make("table", {}, make("tbody", {}, ...lines)));
}

function remarks(answer) {
  const details = make("details", {}, make("summary", {}, "What the figures mean"));
  const list = make("dl");
  for (const { label, definition } of Object.values(answer.figures))
    if (definition) list.append(make("dt", {}, label), make("dd", {}, definition));
  const text = "Curves of TTFT, ITL, TPOT, requests/s and goodput: of the requests that ended in the last 10 s before each "
    + "second. Tokens stand in the second in which they arrived and are known when their answer has ended: the shaded seconds "
    + "still fill up. Running, waiting and KV cache: the server's own words, at each scrape of its /metrics. Seconds since "
    + "the run began; dashed verticals: begin and end of the measuring window. The newest hour is drawn.";
  details.append(make("p", {}, text), list);
  return details;
}

// charts

function draw() {
  const focused = [...plots.querySelectorAll("svg[tabindex]")].indexOf(document.activeElement);
  plots.replaceChildren(...charts());
  if (focused >= 0) plots.querySelectorAll("svg[tabindex]")[focused]?.focus({ preventScroll: true });
}

function charts() {
  const seconds = [...rows.keys()].sort((a, b) => a - b);
  const span = seconds.length ? [seconds[0], Math.max(seconds.at(-1) + 1, seconds[0] + 10)] : [0, 10];
  const known = told.charts
    .map((chart) => ({ ...chart, lines: chart.lines.filter(({ column }) => seconds.some((one) => rows.get(one)[column] != null)) }))
    .filter((chart) => chart.lines.length);
  const abreast = Math.max(1, Math.min(known.length, Math.floor((box.clientWidth + 24) / 544))); // as live.css has it
  const width = Math.max(280, (box.clientWidth - 24 * (abreast - 1)) / abreast);
  return known.map((chart) => figure(chart, seconds, span, width));
}

function figure(chart, seconds, [from, until], width) {
  const [unit, factor] = SHOWN[chart.unit] || [chart.unit, 1];
  const lines = chart.lines;
  const highest = Math.max(...seconds.flatMap((second) => lines.map(({ column }) => rows.get(second)[column] ?? 0)));
  const step = nice((highest * factor || 1) / 3);
  const top = (step * Math.ceil((highest * factor || 1) / step)) / factor;
  const x = (second) => LEFT + ((second - from) / (until - from)) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - TOP - BOTTOM);
  const svg = make("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", tabindex: 0,
    "aria-label": `${chart.title} over time; arrow keys move the cursor` });
  for (let value = 0; value <= top * factor * 1.0001; value += step)
    svg.append(make("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value / factor), y2: y(value / factor) }),
      make("text", { x: LEFT - 6, y: y(value / factor) + 4, "text-anchor": "end" }, value.toLocaleString("en-US")));
  const tick = nice((until - from) / (width / 90), [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1200]);
  for (let second = Math.ceil(from / tick) * tick; second <= until; second += tick)
    svg.append(make("text", { x: x(second), y: HEIGHT - 4, "text-anchor": x(second) > width - 30 ? "end" : "middle" }, `${second} s`));
  if (chart.lines[0].column === "output_throughput" && told.filling_from !== null && told.filling_from < until) {
    const begin = x(Math.max(told.filling_from, from));
    svg.append(make("rect", { class: "shade", x: begin, width: width - RIGHT - begin, y: TOP, height: HEIGHT - TOP - BOTTOM }));
  }
  for (const edge of [told.window.started_at, told.window.ended_at])
    if (edge !== null && edge >= from && edge <= until)
      svg.append(make("line", { class: "edge", x1: x(edge), x2: x(edge), y1: TOP, y2: HEIGHT - BOTTOM }));
  lines.forEach(({ column }, i) => svg.append(make("path", { class: `line-${i + 1}`, d: path(column, seconds, x, y) })));
  if (cursor !== null && cursor >= from)
    svg.append(make("line", { class: "cursor", x1: x(cursor + 0.5), x2: x(cursor + 0.5), y1: TOP, y2: HEIGHT - BOTTOM }));
  const move = (second) => {
    cursor = second === null ? null : Math.min(Math.max(Math.round(second), from), until - 1);
    draw();
  };
  svg.addEventListener("pointermove", (event) => {
    const share = (event.offsetX * (width / svg.clientWidth) - LEFT) / (width - LEFT - RIGHT);
    const second = Math.floor(from + share * (until - from));
    if (second !== cursor && share >= 0 && share <= 1) move(second);
  });
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) move((cursor ?? seconds.at(-1)) + by), event.preventDefault();
    if (event.key === "Escape") move(null);
  });
  return make("figure", { "data-chart": chart.lines[0].column }, caption(chart, seconds, unit), svg);
}

function caption({ title, unit: raw, lines }, seconds, unit) {
  const whole = (column, second) => column !== "output_throughput" || told.filling_from === null || second + 1 <= told.filling_from;
  const newest = (column) => seconds.findLast((second) => rows.get(second)[column] != null && whole(column, second));
  return make("figcaption", {}, make("b", {}, title + (cursor === null ? "" : ` at ${cursor} s`)),
    ...lines.map(({ column, label }, i) => {
      const key = make("svg", { width: 26, height: 8, viewBox: "0 0 26 8", "aria-hidden": "true" },
        make("path", { class: `line-${i + 1}`, d: "M1 4H25" }));
      const value = rows.get(cursor ?? newest(column))?.[column];
      return make("span", {}, key, ` ${lines.length > 1 ? `${label} ` : ""}${number(value, raw)} ${unit}`);
    }));
}

// a line breaks where nothing was told for long: ten seconds, or more than usual for what is scraped more rarely
function path(column, seconds, x, y) {
  const known = seconds.filter((second) => rows.get(second)[column] != null);
  const gaps = known.slice(1).map((second, i) => second - known[i]).sort((a, b) => a - b);
  const longest = Math.max(10, 2.5 * (gaps[gaps.length >> 1] || 0));
  return known.map((second, i) => {
    const jump = i === 0 || second - known[i - 1] > longest;
    return `${jump ? "M" : "L"}${x(second + 0.5).toFixed(1)} ${y(rows.get(second)[column]).toFixed(1)}${jump ? "h0" : ""}`;
  }).join("");
}

function nice(least, steps = null) {
  if (steps) return steps.find((step) => step >= least) || Math.ceil(least / 3600) * 3600;
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 2.5, 5, 10].find((step) => step * power >= least * 0.9999);
}

let due = null;
new MutationObserver(() => {
  due ??= setTimeout(() => { due = null; place(); }, 50);
}).observe(document.body, { subtree: true, childList: true, attributes: true, attributeFilter: ["aria-selected"] });
window.addEventListener("resize", () => told && box.isConnected && draw());
place();
