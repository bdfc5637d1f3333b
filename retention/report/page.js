// What the page does: chooses points, draws them, finds facts. Sets text only, never markup from data.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const METHODS = ["matched", "regression", "unmatched"];
const METHOD_LOOK = { unmatched: ["#777777", "diamond"], matched: ["#D55E00", "circle"], regression: ["#0072B2", "square"] };
const GROUP_ORDER = ["edited", "intrinsic", "neighbor", "same_subject", "control"];

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
const share = (p) => `${p.value.toFixed(2)} [${p.low.toFixed(2)}, ${p.high.toFixed(2)}]`;
const between = (value, low, high) =>
  low === null ? `${signed(value)} [one run]` : `${signed(value)} [${signed(low)}, ${signed(high)}]`;
const plain = (name) => (data.groups.includes(name) || data.criteria.includes(name) ? name.replaceAll("_", " ") : name);

// ---------------------------------------------------------------------------------------------- looks

// On dark paper the darkest colours are lightened; hues and markers stay.
const LIGHTER = { "#0072B2": "#4FA8E0", "#D55E00": "#F0813A", "#777777": "#A9ADB5", "#009E73": "#2DBE95" };
const tint = (color) => (matchMedia("(prefers-color-scheme: dark)").matches ? (LIGHTER[color] ?? color) : color);
const tinted = (spec) => JSON.parse(JSON.stringify(spec), (_, value) => (typeof value === "string" ? tint(value) : value));

function look(name, values, byGroup) {
  const i = values.indexOf(name);
  const color = byGroup && data.colors[name] ? data.colors[name] : data.cycle[i % data.cycle.length];
  return { color: tint(color), shape: data.shapes[i % data.shapes.length], dash: data.dashes[Math.floor(byGroup ? i : i / data.cycle.length) % data.dashes.length] };
}

const OUTLINE = { circle: "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", square: "M-3.5,-3.5h7v7h-7z", diamond: "M0,-5L4,0L0,5L-4,0z",
  "triangle-up": "M0,-4.5L4.5,3.5L-4.5,3.5z", "triangle-down": "M0,4.5L4.5,-3.5L-4.5,-3.5z", cross: "M-1.5,-4h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z" };

function key(name, { color, shape, dash }) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [k, v] of Object.entries({ width: 30, height: 12, viewBox: "-15 -6 30 12", "aria-hidden": "true" })) svg.setAttribute(k, v);
  const part = (tag, attributes) => {
    const element = document.createElementNS(svg.namespaceURI, tag);
    for (const [k, v] of Object.entries(attributes)) element.setAttribute(k, v);
    svg.append(element);
  };
  if (dash) part("path", { d: "M-14,0H14", stroke: tint(color), "stroke-width": 2, "stroke-dasharray": dash[1] ? dash.join(" ") : "none" });
  part("path", { d: OUTLINE[shape], fill: tint(color) });
  return make("span", {}, svg, plain(name));
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return {
    background: null, font: of("--sans"), view: { stroke: null },
    axis: { labelColor: of("--soft"), titleColor: of("--soft"), gridColor: of("--line"), domainColor: of("--line"),
      tickColor: of("--line"), labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" },
    rule: { color: of("--ink") },
  };
}

async function draw(place, name, values, adapt = () => {}) {
  const spec = tinted(data.specs[name]);
  spec.datasets = { ...spec.datasets, data: values };
  spec.config = theme();
  adapt(spec);
  place.firstChild?.view?.finalize?.();
  const chart = make("div", { class: "chart", "aria-hidden": "true" });
  place.replaceChildren(chart);
  const { view } = await window.vegaEmbed(chart, spec, { actions: false, renderer: "svg", tooltip: { theme: "custom" } });
  chart.view = view;
}

// ---------------------------------------------------------------------------------------------- curves

const points = data.points[0].map((_, i) => ({
  cell: data.points[0][i], group: data.groups[data.points[1][i]], form: data.forms[data.points[2][i]],
  criterion: data.criteria[data.points[3][i]], of: data.points[4][i], step: data.points[5][i],
  value: data.points[6][i], low: data.points[7][i], high: data.points[8][i], n: data.points[9][i],
}));
const dims = [...document.querySelectorAll("select[data-dim]")];
let all = false; // whether more panels than fit at first are shown

function chosen() {
  const want = dims.filter((s) => s.value).map((s) => [data.varied.indexOf(s.dataset.dim), s.value]);
  return {
    cells: new Set(data.cells.map((_, i) => i).filter((i) => want.every(([at, value]) => data.cells[i][at] === value))),
    groups: [...document.querySelectorAll("input[name=group]:checked")].map((box) => box.value),
    criterion: $("criterion").value, form: $("form").value, of: Number($("of").value), line: $("line").value,
  };
}

const title = (cell, without = "") => data.cells[cell].filter((_, i) => data.varied[i] !== without && data.values[data.varied[i]].length > 1).join(" · ") || data.cells[cell].join(" · ");

function selected(want) {
  return points.filter((p) => want.cells.has(p.cell) && p.criterion === want.criterion && p.form === want.form && p.of === want.of && want.groups.includes(p.group));
}

function curves(want) {
  const at = data.varied.indexOf(want.line);
  const found = selected(want).filter((p) => p.step !== null);
  const names = want.line ? data.values[want.line] : [...new Set([...GROUP_ORDER.filter((g) => data.groups.includes(g)), ...data.groups])];
  const panels = new Map();
  // What was asked for and has no points is shown as empty, and says why.
  for (const cell of want.cells)
    for (const group of want.line ? want.groups : [""]) {
      const rest = want.line && data.varied.length === 1 ? "" : title(cell, want.line);
      const name = [rest, want.line ? plain(group) : ""].filter(Boolean).join(" · ");
      if (!panels.has(name)) panels.set(name, []);
      for (const p of found) if (p.cell === cell && (!want.line || p.group === group)) panels.get(name).push({ ...p, line: want.line ? data.cells[cell][at] : p.group, told: share(p) });
    }
  const there = names.filter((name) => found.some((p) => (want.line ? data.cells[p.cell][at] : p.group) === name));
  const looks = new Map(names.map((name) => [name, look(name, names, !want.line)]));
  $("legend").replaceChildren(...there.map((name) => key(name, looks.get(name))));
  const shown = [...panels].slice(0, all ? undefined : data.panels);
  const more = panels.size - shown.length;
  $("shown").replaceChildren(panels.size === 0 ? "No cell of the study is like that: choose fewer conditions." : more > 0 ? `${shown.length} of ${panels.size} panels. ` : "");
  if (more > 0) {
    const button = make("button", { type: "button" }, "Show all");
    button.addEventListener("click", () => { all = true; update(); });
    $("shown").append(button);
  }
  $("panels").style.setProperty("--panel", shown.length === 2 || shown.length === 4 ? "27rem" : "19rem");
  $("panels").replaceChildren(...shown.map(([name, values]) => panel(name, values, names, looks)));
  table(shown);
}

function panel(name, values, names, looks) {
  const holder = make("div", { role: "img", "aria-label": alternative(name, values) });
  const figure = make("figure", {}, make("figcaption", {}, name), holder);
  if (values.length === 0) {
    holder.removeAttribute("role");
    holder.append(make("p", { class: "note" }, "No such fact was right at step 0, or none was asked."));
    return figure;
  }
  const lines = names.filter((line) => values.some((v) => v.line === line));
  const scale = (what) => ({ domain: lines, range: lines.map((line) => looks.get(line)[what]) });
  queueMicrotask(() => draw(holder, "curve", values, (spec) => {
    if (lines.length > 4) spec.layer[0].mark.opacity = 0.05; // bands of many lines would hide them; the pointer tells them
    for (const layer of spec.layer) {
      const e = layer.encoding;
      if (e.color) e.color.scale = scale("color");
      if (e.shape) e.shape.scale = scale("shape");
      if (e.strokeDash) e.strokeDash.scale = scale("dash");
      const last = Math.max(...values.map((v) => v.step));
      e.x.axis.values = [-1, 0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000].filter((t) => t <= last && t >= Math.min(...values.map((v) => v.step)));
    }
  }));
  return figure;
}

function alternative(name, values) {
  const said = [...new Set(values.map((v) => v.line))].map((line) => {
    const own = values.filter((v) => v.line === line).sort((a, b) => a.step - b.step);
    const [first, last] = [own[0], own.at(-1)];
    return `${plain(line)}: ${first.value.toFixed(2)} at step ${first.step}, ${last.told} at step ${last.step}, n ${last.n}`;
  });
  return `Share right against fine-tuning steps, ${name}. ${said.join(". ") || "No points"}. All values are in the table below.`;
}

function table(shown) {
  const head = ["panel", "line", "step", "share [95 %]", "n"];
  const lines = shown.flatMap(([name, values]) => [...values].sort((a, b) => (a.line < b.line ? -1 : a.line > b.line ? 1 : a.step - b.step)).map((v) => [name, plain(v.line), v.step, v.told, v.n]));
  $("points").replaceChildren(make("table", {}, make("caption", {}, "Points of the curves shown"),
    make("thead", {}, make("tr", {}, ...head.map((h) => make("th", { scope: "col" }, h)))),
    make("tbody", {}, ...lines.map((line) => make("tr", {}, ...line.map((text, i) => (i < 2 ? make("th", { scope: "row" }, text) : make("td", {}, text))))))));
}

// ---------------------------------------------------------------------------------------------- difference and gain

function forest(want) {
  const values = data.fair.filter(([cell]) => want.cells.has(cell)).map(([cell, how, value, low, high, n]) => ({ cell: title(cell), how, value, low, high, told: `${between(value, low, high)} (${n})` }));
  $("forest").setAttribute("aria-label", `Share kept, edited minus intrinsic. ${values.map((v) => `${v.cell}, ${v.how}: ${v.told}`).join(". ") || "Nothing to compare"}.`);
  $("forest-legend").replaceChildren(...(values.length ? METHODS.map((how) => key(how, { color: METHOD_LOOK[how][0], shape: METHOD_LOOK[how][1] })) : []));
  if (values.length === 0) $("forest").replaceChildren(make("p", { class: "note" }, "Nothing to compare: the table below says why."));
  else draw($("forest"), "forest", values, (spec) => {
    const longest = Math.max(...values.map((v) => v.cell.length));
    $("forest").closest(".pair").classList.toggle("stacked", longest > 26); // long names want the whole width
    for (const layer of spec.layer) if (layer.encoding.y) layer.encoding.y.axis.labelLimit = Math.max(120, $("forest").clientWidth * 0.45);
    spec.height = (data.cells.length > 12 ? 32 : 44) * new Set(values.map((v) => v.cell)).size;
  });
}

const GAINS = { task_accuracy: "gain in task accuracy", task_loss: "drop of held-out loss, nats/token" };

function pareto(want) {
  const ends = selected({ ...want, of: 0, groups: ["edited", "intrinsic"] }).filter((p) => p.step === null && data.gains[p.cell]);
  const measures = Object.keys(GAINS).filter((m) => ends.some((p) => data.gains[p.cell][0] === m));
  $("pareto-legend").replaceChildren(...["edited", "intrinsic"].filter((g) => ends.some((p) => p.group === g)).map((g, i) => key(g, { color: data.colors[g], shape: data.shapes[i] })));
  $("pareto").replaceChildren(...(measures.length ? [] : [make("p", { class: "note" }, "No gain of a task was measured, or no fact was right at step 0.")]), ...measures.map((measure) => {
    const values = ends.filter((p) => data.gains[p.cell][0] === measure).map((p) => {
      const [, gain, gain_low, gain_high, n] = data.gains[p.cell];
      return { cell: title(p.cell), group: p.group, gain, gain_low: gain_low ?? gain, gain_high: gain_high ?? gain, gain_told: `${between(gain, gain_low, gain_high)} (${n} ${n === 1 ? "run" : "runs"})`, value: p.value, low: p.low, high: p.high, told: `${share(p)} (${p.n})` };
    });
    const holder = make("div", { role: "img", "aria-label": `Kept against ${GAINS[measure]}. ${values.map((v) => `${v.cell}, ${v.group}: kept ${v.told}, gain ${v.gain_told}`).join(". ")}.` });
    queueMicrotask(() => draw(holder, "pareto", values, (spec) => { for (const layer of spec.layer) layer.encoding.x.axis = { ...layer.encoding.x.axis, title: GAINS[measure] }; }));
    return holder;
  }));
}

function update() {
  const want = chosen();
  curves(want);
  forest(want);
  pareto(want);
}

// ---------------------------------------------------------------------------------------------- facts

const { facts, questions, runs, texts, criteria } = data.facts;
const asked = facts.map(() => []);
for (const question of questions) asked[question[0]].push(question);
const filled = (fact) => (fact[2] ? fact[2].replace("{}", fact[0] ?? "") : [fact[0], fact[1]].filter(Boolean).join(" · "));
const search = facts.map((fact, i) => [...fact, ...asked[i].flatMap((q) => [q[3], q[4], q[5]])].filter(Boolean).join(" ").toLowerCase());
const forgets = ([run, right]) => {
  const at = criteria.indexOf(data.criterion), from = runs[run][1].indexOf(0), last = runs[run][1].length - 1;
  return from >= 0 && right[from * criteria.length + at] === "1" && right[last * criteria.length + at] === "0";
};
const forgotten = facts.map((_, i) => asked[i].some((q) => q[6].some(forgets)));
const SHOWN = 60;
let current = -1;

function find() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = facts.map((_, i) => i).filter((i) => (!$("lost").checked || forgotten[i]) && words.every((word) => search[i].includes(word)));
  $("count").textContent = found.length > SHOWN ? `${found.length} facts, the first ${SHOWN} listed` : `${found.length} ${found.length === 1 ? "fact" : "facts"}`;
  $("matches").replaceChildren(...found.slice(0, SHOWN).map((i) => {
    const groups = [...new Set(asked[i].map((q) => plain(q[1])))].join(", ");
    const button = make("button", { type: "button", "aria-current": i === current ? "true" : null }, `${filled(facts[i])} `, make("small", {}, groups));
    button.addEventListener("click", () => {
      current = i;
      for (const other of $("matches").querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
      button.setAttribute("aria-current", "true");
      show(i);
    });
    return make("li", {}, button);
  }));
  return found;
}

function show(i) {
  const [subject, relation, , target, other] = facts[i];
  const pairs = [["subject", subject], ["relation", relation], ["true object", target], ["object written by the edit", other]].filter(([, value]) => value);
  const known = [...new Set(asked[i].flatMap((q) => q[6].map(([run]) => run)))].sort((a, b) => a - b);
  const pick = make("select", { id: "run" }, ...known.map((run) => make("option", { value: run }, runs[run][0])));
  const place = make("div");
  const fill = () => place.replaceChildren(...asked[i].map((question) => history(question, Number(pick.value))).filter(Boolean));
  pick.addEventListener("change", fill);
  const label = make("label", { class: "tick", for: "run" }, "run");
  $("fact").replaceChildren(make("h3", {}, filled(facts[i])), make("dl", {}, ...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])), label, " ", pick, place);
  fill();
  $("now").textContent = `Showing: ${filled(facts[i])}`;
}

function mark(right, step, criterion) {
  const at = step * criteria.length + criteria.indexOf(criterion);
  if (!"01".includes(right[at])) return make("td", {}, "not read");
  return right[at] === "1" ? make("td", { class: "yes" }, "✓ right") : make("td", { class: "no" }, "✗ wrong");
}

function history([, group, form, text, answer, foil, readings], run) {
  const found = readings.find(([number]) => number === run);
  if (!found) return null;
  const [, right, target, rival, rank, said] = found;
  const steps = runs[run][1];
  const spoken = said.some((t) => t !== null);
  const number = (x) => (x === null ? "-" : x.toFixed(2).replace("-", "−"));
  const head = ["step", plain($("criterion").value), ...(spoken ? ["the model says"] : []), "log p, answer", "log p, foil", "rank"];
  const lines = steps.map((step, i) => make("tr", {}, make("th", { scope: "row" }, step === -1 ? "−1, base" : step === 0 ? "0, edited" : step),
    mark(right, i, $("criterion").value), ...(spoken ? [make("td", { class: "wide" }, said[i] === null ? "-" : texts[said[i]])] : []),
    make("td", {}, number(target[i])), make("td", {}, number(rival[i])), make("td", {}, rank[i] ?? "-")));
  const values = steps.flatMap((step, i) => [["answer", target[i]], ["foil", rival[i]]].filter(([, v]) => v !== null).map(([line, value]) => ({ step, line, value })));
  const chart = make("div", { role: "img", "aria-label": "Log-probability of the answer and of its foil at each checkpoint; the values are in the table." });
  if (values.length) queueMicrotask(() => draw(chart, "fact", values));
  return make("div", {}, make("p", { class: "asked" }, `“${text ?? "text not stored"}”`),
    make("p", { class: "note" }, `${plain(group)}, ${form} · answer: ${answer ?? "-"}${foil ? ` · foil: ${foil}` : ""}`),
    make("p", { class: "legend" }, key("answer, nats", { color: "#D55E00", shape: "circle", dash: [1, 0] }), ...(foil ? [key("foil, nats", { color: "#777777", shape: "circle", dash: [4, 3] })] : [])), chart,
    make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Answers at every checkpoint" }, make("table", {},
      make("thead", {}, make("tr", {}, ...head.map((h) => make("th", { scope: "col" }, h)))), make("tbody", {}, ...lines))));
}

// ---------------------------------------------------------------------------------------------- start

// Many cells are easier to compare in few panels, with a line for each value of what varies most.
const busiest = data.varied.reduce((a, b) => (data.values[b].length > data.values[a].length ? b : a));
if (data.cells.length > data.panels) $("line").value = busiest;
$("choose").addEventListener("change", () => { update(); if (current >= 0) show(current); });
$("choose").addEventListener("submit", (event) => event.preventDefault());
$("search").addEventListener("input", find);
$("lost").addEventListener("change", find);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { update(); if (current >= 0) show(current); });
update();
const [first] = find();
if (first !== undefined) $("matches").querySelector("button").click();
document.documentElement.dataset.ready = "true";
