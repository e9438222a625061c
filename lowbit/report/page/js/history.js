// One case at a time: its nights with the changes that were found, its limits, all of its figures, its command.
const past = data.history;
const NAMES = { decode_tok_s: "decode tok/s", ttft_ms: "TTFT", vram_peak_mib: "peak VRAM", energy_j_per_tok: "energy", compile_s: "compile time", speed_ratio: "speed ratio" };

/** [nights] of a series; null where a night has no value. The inverse of page/series.py. */
function unpack([low, unit, text]) {
  const base = past.alphabet.length;
  const gap = past.alphabet[base - 1].repeat(2);
  const digit = new Map([...past.alphabet].map((character, i) => [character, i]));
  return Array.from({ length: text.length / 2 }, (_, i) => {
    const pair = text.slice(2 * i, 2 * i + 2);
    return pair === gap ? null : low + unit * (digit.get(pair[0]) * base + digit.get(pair[1]));
  });
}
const seriesOf = (metric, i) => (past.series?.[metric]?.[i] ? unpack(past.series[metric][i]) : null);
const metricsWithPast = (i) => Object.keys(past.series || {}).filter((name) => past.series[name][i]);
const changesOf = (i, metric) => (past.changes || []).map(change).filter((one) => one.case === i && one.metric === metric);

function change([index, metric, kind, first, end, before, after, worse, p, upgrades, date]) {
  return { case: index, metric, kind, first, end, before, after, worse, p, upgrades, date };
}
const sure = (p) => (p < 1e-4 ? "> 99.99 %" : `${(100 * (1 - p)).toFixed(2)} %`);
const relative = (one) => (one.before ? (one.after - one.before) / Math.abs(one.before) : null);
const toneOfChange = (one) => (one.worse === null ? "" : one.worse ? "worse" : "better");

function drawHistory() {
  const i = selected;
  const metric = byId("history-metric").value;
  const values = i === null ? null : seriesOf(metric, i);
  byId("case-changes").replaceChildren();
  byId("history-caption").textContent = "";
  if (!values) return leaveEmpty("plot-history", past.nights.length ? "No night has measured this case." : "No history: fewer than two nights of this device and model are kept.");
  const unit = unitOf(metric);
  const found = changesOf(i, metric);
  const judged = verdictsOf(i).find((one) => one.metric === metric);
  const centre = baseOf(metric, i);
  const lines = found.filter((one) => one.first >= 0).map((one) => ({
    xAxis: one.first, lineStyle: { color: color(one.worse === false ? "good" : "bad"), width: 1.5, type: "solid" },
    label: { formatter: `${one.kind} ${percent(relative(one))}`, color: color(one.worse === false ? "good" : "bad"), position: one.first > values.length / 2 ? "insideEndTop" : "insideEndBottom", rotate: 0, align: one.first > values.length / 2 ? "right" : "left", fontSize: 11 },
  }));
  if (!lines.length && judged?.since.length) {
    const first = past.nights.findIndex((night) => night.startsWith(judged.since[0].slice(0, 10)));
    const late = first > values.length / 2;
    if (first >= 0) lines.push({
      xAxis: first, lineStyle: { color: color(judged.status === "improvement" ? "good" : "bad"), width: 1.5, type: "dotted" },
      label: { formatter: "beyond the limit since", color: color("muted"), position: late ? "insideEndTop" : "insideEndBottom", rotate: 0, align: late ? "right" : "left", fontSize: 11 },
    });
  }
  const limits = centre !== null && judged?.limit ? [[{ yAxis: centre - judged.limit }, { yAxis: centre + judged.limit }]] : [];
  const reach = values.filter((value) => value !== null).concat(limits.length ? [centre - judged.limit, centre + judged.limit] : []);
  const pad = (Math.max(...reach) - Math.min(...reach) || Math.abs(reach[0]) * 0.01 || 1) * 0.12;
  const upgradeAt = new Map(past.upgrades.map(([night, names]) => [night, names]));
  const lowest = Math.max(0, Math.min(...reach) - pad);
  draw("plot-history", {
    grid: { left: 64, right: 26, top: 34, bottom: 34 },
    tooltip: tooltip({
      trigger: "axis",
      formatter: (points) => {
        const night = points[0].dataIndex;
        const upgrades = upgradeAt.get(night);
        return make("div", { className: "tip" }, make("b", null, `${past.nights[night].replace("T", " ")} UTC`), values[night] === null ? "not measured" : amount(values[night], unit), upgrades ? make("code", null, arrows(upgrades)) : null);
      },
    }),
    xAxis: { ...axis("", { type: "category", axisLabel: { color: color("muted"), hideOverlap: true } }), data: past.nights.map((night) => night.slice(5, 10)), boundaryGap: false, splitLine: { show: false } },
    yAxis: axis(unit, { type: "value", min: lowest, max: Math.max(...reach) + pad, nameLocation: "end", nameGap: 12, nameTextStyle: { color: color("muted"), align: "right" }, axisLabel: { color: color("muted"), showMinLabel: false, showMaxLabel: false, formatter: (value) => figure(value, unit) } }),
    series: [
      {
        type: "line", name: metric, data: values, symbol: "circle", symbolSize: values.length > 90 ? 3 : 5, connectNulls: false, lineStyle: { color: color("accent"), width: 1.3 }, itemStyle: { color: color("accent") },
        markLine: { symbol: "none", silent: true, data: [...lines, ...(centre === null ? [] : [{ yAxis: centre, lineStyle: { color: color("muted"), type: "dashed" }, label: { show: false } }])] },
        markArea: { silent: true, itemStyle: { color: color("good"), opacity: 0.09 }, data: limits },
      },
      { type: "scatter", name: "upgrades", symbol: "triangle", symbolSize: 9, itemStyle: { color: color("warn") }, data: past.upgrades.map(([night]) => [night, lowest]), tooltip: { show: false } },
    ],
  }, `${NAMES[metric] || metric} of ${shortName(cases.id[i])} over ${values.length} nights`);
  const notes = [`${values.filter((value) => value !== null).length} nights`];
  if (centre !== null) notes.push("dashed: the baseline");
  if (limits.length) notes.push("green band: within the limit");
  if (past.upgrades.length) notes.push("triangles: nights with another environment");
  if (past.dropped) notes.push(`${past.dropped} older nights are left out`);
  byId("history-caption").textContent = `${notes.join(" · ")}.`;
  byId("case-changes").replaceChildren(...found.map((one) => make("li", null, make("b", { className: toneOfChange(one) }, `${one.kind} of ${percent(relative(one))}`), ` since ${one.date} (${one.end - one.first} nights, sure to ${sure(one.p)}): ${moved(one.before, one.after, unit)}`, one.upgrades.length ? `; that night: ${arrows(one.upgrades)}` : "; nothing was upgraded that night")));
}

function drawCase(i) {
  byId("case").value = String(i);
  byId("case-name").textContent = `${cases.id[i]} – ${cases.state[i]}${cases.reason[i] ? `: ${cases.reason[i]}` : ""}`;
  byId("case-command").textContent = command(i);
  const names = metricsWithPast(i);
  const changed = names.find((name) => changesOf(i, name).length);
  const wanted = headlines[i] && names.includes(headlines[i].metric) ? headlines[i].metric : changed || names[0];
  fill(byId("history-metric"), names.map((name) => [name, NAMES[name] || name]), wanted);
  byId("history-metric").disabled = names.length < 2;
  byId("history-metric").parentElement.hidden = !names.length;
  drawHistory();
  drawFigures(i);
}

function drawFigures(i) {
  const judged = new Map(verdictsOf(i).map((one) => [one.metric, one]));
  const names = [...new Set([...Object.keys(values).filter((name) => valueOf(name, i) !== null), ...Object.keys(base).filter((name) => baseOf(name, i) !== null)])];
  const body = names.map((name) => {
    const one = judged.get(name) || { metric: name, status: "ungated", limit: null, spread: null, runs: 0 };
    const before = baseOf(name, i);
    const unit = unitOf(name);
    const text = [figure(before, unit), amount(one.now ?? valueOf(name, i), unit), null, limitText(one, before), spreadText(one, before), runsText(one)];
    const cells = text.map((value, at) => make("td", { className: "number" }, at === 2 ? make("span", { className: toneOf(one) }, percent(changeOf(name, i, one.now))) : value));
    return make("tr", null, make("td", { title: (data.metrics[name] || [])[2] || "" }, name), ...cells, make("td", null, one.status === "ungated" ? "not gated" : [one.status, one.reason].filter(Boolean).join(": ")));
  });
  const titles = ["metric", "base", "now", "change", "limit", "spread σ", "runs beyond", "verdict"];
  byId("case-table").tHead.replaceChildren(make("tr", null, ...titles.map((title, at) => make("th", { scope: "col", className: at && at < 7 ? "number" : "" }, make("span", null, title)))));
  byId("case-table").tBodies[0].replaceChildren(...body);
  byId("case-info").replaceChildren(...(cases.info[i] || []).flatMap(([name, text]) => [make("dt", null, name), make("dd", null, text)]));
}

const CHANGES = 25;
let showAllChanges = false;
/** All changes, the newest night first; what a night upgraded is told once, above its changes. */
function drawChanges() {
  const all = (past.changes || []).map(change);
  byId("changes-title").hidden = byId("changes").parentElement.hidden = !all.length;
  byId("changes-hint").textContent = all.length
    ? `${all.length} in ${past.nights.length} nights, the newest first. An isolated night is an outlier and no change.`
    : past.nights.length ? `No change in ${past.nights.length} nights${past.nights.length < 8 ? "; from 8 on they can be found" : ""}.` : "";
  const shown = showAllChanges ? all : all.slice(0, CHANGES);
  byId("changes-more").hidden = all.length <= CHANGES;
  byId("changes-more").textContent = showAllChanges ? `The newest ${CHANGES}` : `All ${all.length}`;
  const titles = ["case", "metric", "change", "before → after", "sure to"];
  byId("changes").tHead.replaceChildren(make("tr", null, ...titles.map((title, at) => make("th", { scope: "col", className: at > 1 ? "number" : "" }, make("span", null, title)))));
  const bodies = new Map();
  for (const one of shown) {
    if (!bodies.has(one.date)) bodies.set(one.date, [nightRow(one, titles.length)]);
    bodies.get(one.date).push(changeRow(one));
  }
  byId("changes").replaceChildren(byId("changes").tHead, ...[...bodies.values()].map((rows) => make("tbody", null, ...rows)));
}
function nightRow(one, width) {
  return make("tr", { className: "night" }, make("th", { scope: "rowgroup", colSpan: width }, one.date, make("span", { className: "sub" }, one.upgrades.length ? arrows(one.upgrades) : "nothing was upgraded that night")));
}
function changeRow(one) {
  const button = make("button", { type: "button", className: "case id" }, shortName(cases.id[one.case]));
  button.addEventListener("click", () => {
    select(one.case);
    byId("history-metric").value = one.metric;
    drawHistory();
  });
  const cells = [button, one.metric, make("span", { className: toneOfChange(one) }, `${one.kind} ${percent(relative(one))}`), moved(one.before, one.after, unitOf(one.metric)), sure(one.p)];
  return make("tr", null, ...cells.map((cell, at) => make("td", { className: at > 1 ? "number" : "" }, cell)));
}

function buildHistory() {
  const named = Array.from({ length: COUNT }, (_, i) => i);
  fill(byId("case"), named.map((i) => [String(i), shortName(cases.id[i])]), "");
  byId("case").addEventListener("change", (event) => select(Number(event.target.value), { reveal: false }));
  byId("history-metric").addEventListener("change", drawHistory);
  byId("changes-more").addEventListener("click", () => {
    showAllChanges = !showAllChanges;
    drawChanges();
  });
  listeners.push(drawCase);
  drawChanges();
}
