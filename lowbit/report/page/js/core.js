// The data, numbers as text, and the DOM: what the other files share. Text of the data reaches the page as text only.
const data = JSON.parse(document.getElementById("data").textContent);
const { cases, values, base, verdicts } = data;
const COUNT = cases.id.length;
const STATES = ["REGRESSED", "MISSING", "LOST", "failed", "new", "better", "void", "ok", "measured", "skipped"];
const TONE = { REGRESSED: "bad", MISSING: "bad", LOST: "bad", failed: "bad", new: "warn", void: "warn", better: "good", ok: "good" };
const HEADLINES = ["decode_tok_s", "ttft_ms", "kld", "ppl"];
const MEMORY = data.memory === "weights_mib" ? "weights" : "VRAM";

const byId = (id) => document.getElementById(id);

/** An element with properties and children; strings become text nodes, never markup. */
function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name in element && name !== "role") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const shortName = (id) => id.slice(id.lastIndexOf("::") + 2).replace(/^test_/, "");
const selection = (id) => id.slice(id.lastIndexOf("::") + 2);
const titleOf = (i) => [cases.format[i], cases.mode[i]].filter(Boolean).join(" · ");
const at = (column, i) => (column && column[i] !== undefined ? column[i] : null);
const valueOf = (name, i) => at(values[name], i);
const baseOf = (name, i) => at(base[name], i);

/** The command that measures this case alone. */
function command(i) {
  const name = selection(cases.id[i]);
  const quoted = /^[\w.[\]\-+:,= ]*$/.test(name) ? `"${name}"` : `'${name.replaceAll("'", "'\\''")}'`;
  return `${data.command} -k ${quoted}`;
}

/** Four significant digits at most, thousands whole with commas; small ones by their magnitude. */
function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  if (size >= 10) return value.toFixed(1);
  if (size >= 1) return value.toFixed(2);
  if (size >= 0.001) return value.toFixed(4).replace(/0+$/, "").replace(/\.$/, "");
  return size ? value.toExponential(1) : "0";
}
/** A number beside an axis: no zeros that say nothing. */
const tick = (value) => number(value).replace(".0e", "e").replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
/** A metric's value; a perplexity, which has no unit, with four decimals: a tenth of a percent of it fails. */
function figure(value, unit) {
  const size = Math.abs(value ?? 0);
  return unit === "" && size >= 1 && size < 1000 ? value.toFixed(4) : number(value);
}
const amount = (value, unit) => `${figure(value, unit)} ${unit}`.trim();
const moved = (before, after, unit) => `${figure(before, unit)} → ${amount(after, unit)}`;
const arrows = (lines) => lines.join(", ").replaceAll(" -> ", " → ");
const percent = (share, digits = 1) => (share === null ? "–" : `${share > 0 ? "+" : ""}${(100 * share).toFixed(digits)} %`);
const share = (value) => (value === null ? "–" : `${(100 * value).toFixed(0)} %`);
const unitOf = (name) => (data.metrics[name] || [""])[0];

/** The stored name of a family that this case has: kld → kld_embedded_512_8176tok. */
function stored(family, i) {
  return Object.keys(values).find((name) => (name === family || name.startsWith(`${family}_`)) && valueOf(name, i) !== null);
}

/** What lm-evaluation-harness says of this case: the first score that has a better and a worse. */
function evaluated(i) {
  return Object.keys(values).find((name) => name.startsWith("eval_") && valueOf(name, i) !== null && data.metrics[name][1] !== "neither");
}

/** A gated verdict of the data as an object. */
function verdict(row) {
  const [metric, status, limit, inUnits, spread, beyond, runs, reason, since, now] = row;
  return { metric, status, limit, inUnits, spread, beyond, runs, reason, since, now };
}
const verdictsOf = (i) => (verdicts[i] || []).map(verdict);

/** What stands for a case in the table: what failed, else what got better, else its headline metric. */
const headlines = Array.from({ length: COUNT }, (_, i) => {
  const judged = verdictsOf(i);
  for (const status of ["regression", "missing", "improvement"]) {
    const found = judged.find((one) => one.status === status);
    if (found) return found;
  }
  const name = HEADLINES.map((family) => stored(family, i)).find(Boolean) || evaluated(i);
  if (!name) return null;
  return judged.find((one) => one.metric === name) || { metric: name, status: "", limit: null, spread: null, runs: 0, beyond: 0, since: [], now: null };
});

function changeOf(metric, i, now) {
  const before = baseOf(metric, i);
  const after = now ?? valueOf(metric, i);
  return before && after !== null ? (after - before) / Math.abs(before) : null;
}

/** "worse", "better" or "" for a change of this metric, coloured only where the gate says so. */
const toneOf = (one) => ({ regression: "worse", missing: "worse", improvement: "better" })[one.status] || "";

function limitText(one, before) {
  if (one.limit === null) return "–";
  if (one.inUnits || !before) return `${number(one.limit)} ${unitOf(one.metric)}`.trim();
  const relative = one.limit / Math.abs(before);
  return `${(100 * relative).toFixed(relative < 0.01 ? 2 : 1)} %`;
}
const spreadText = (one, before) => (one.spread === null || !before ? "–" : `${((100 * one.spread) / Math.abs(before)).toFixed(2)} %`);

const runsText = (one) => (one?.runs && one.status !== "improvement" ? `${one.beyond} of ${one.runs}` : "–");

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, label]) => make("option", { value, selected: value === chosen }, label)));
}

// What is chosen, by whom it is told.
const listeners = [];
let selected = null;
function select(i, { reveal = true } = {}) {
  selected = i;
  for (const listener of listeners) listener(i);
  if (reveal) {
    history.replaceState(null, "", `#case=${encodeURIComponent(cases.id[i])}`);
    byId("history").scrollIntoView();
    byId("history-title").focus({ preventScroll: true });
  }
}
