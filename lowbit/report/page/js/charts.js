// Pareto plots and roofline. ECharts draws them as SVG; colours come from the style sheet, so that dark mode is one place.
const LIBRARY = {
  torch: ["#5f6b7a", "#aab4c0", "circle"], torchao: ["#0b6fb8", "#5cb0f2", "rect"], gemlite: ["#c8500a", "#ff9352", "triangle"],
  bitsandbytes: ["#0a8a63", "#43cc9f", "diamond"], hqq: ["#b3478f", "#ea86c8", "roundRect"], lowbit: ["#6a3fd1", "#a98bff", "pin"],
  reference: ["#8a6d00", "#dcb93a", "arrow"],
};
const OTHERS = [["#3f7f8c", "#7cc4d2", "circle"], ["#8c3f3f", "#e08f8f", "rect"], ["#4f6b12", "#a9c95a", "triangle"], ["#7a4a1e", "#d6a16c", "diamond"]];
const libraries = [...new Set(cases.library)].filter(Boolean).sort();
const dark = matchMedia("(prefers-color-scheme: dark)");
const hidden = new Set();
const palette = new Map(); // asking the style sheet anew for every label would cost a layout each time
function color(name) {
  if (!palette.has(name)) palette.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return palette.get(name);
}
const styleOf = (library) => LIBRARY[library] || OTHERS[libraries.indexOf(library) % OTHERS.length];
const paintOf = (library) => styleOf(library)[dark.matches ? 1 : 0];

const charts = new Map();
/** Draw into the element with this id; the chart is made when it is first drawn. */
function draw(id, option, label, onClick) {
  const box = byId(id);
  box.setAttribute("aria-label", label);
  box.classList.remove("empty");
  let chart = charts.get(id);
  if (!chart) {
    box.textContent = "";
    chart = echarts.init(box, null, { renderer: "svg" });
    charts.set(id, chart);
    if (onClick) chart.on("click", onClick);
  }
  chart.setOption({ animation: false, textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: color("muted") }, ...option }, { notMerge: true });
}
function leaveEmpty(id, why) {
  charts.get(id)?.dispose();
  charts.delete(id);
  byId(id).classList.add("empty");
  byId(id).textContent = why;
}

function axis(name, extra) {
  return {
    name, nameLocation: "middle", nameGap: 28, nameTextStyle: { color: color("muted") }, scale: true,
    axisLine: { lineStyle: { color: color("line") } }, axisLabel: { color: color("muted"), hideOverlap: true, formatter: tick },
    axisTick: { show: false }, splitLine: { lineStyle: { color: color("grid") } }, minorSplitLine: { show: false }, ...extra,
  };
}
const upright = (name, extra) => axis(name, { nameGap: 44, ...extra });
const tooltip = (extra) => ({
  confine: true, backgroundColor: color("panel"), borderColor: color("line"), textStyle: { color: color("text"), fontSize: 13 },
  extraCssText: "white-space:normal;", ...extra,
});

/** The hover of a case: figures and the command that measures it again, as DOM, so that no text becomes markup. */
function tip(i) {
  const facts = [
    [valueOf("decode_tok_s", i), "tok/s"], [valueOf("ttft_ms", i), "ms TTFT"], [cases.memory[i], `MiB ${MEMORY}`],
  ].filter(([value]) => value !== null).map(([value, unit]) => `${number(value)} ${unit}`);
  if (cases.kld[i] !== null) facts.push(`KL ${number(cases.kld[i])}${data.embedded ? " (embedded model)" : ""}`);
  if (cases.ppl[i] !== null) facts.push(`ppl ${number(cases.ppl[i])}`);
  if (valueOf("mbu", i) !== null) facts.push(`MBU ${share(valueOf("mbu", i))}`);
  const state = TONE[cases.state[i]] === "bad" ? `${cases.state[i]} · ` : "";
  return make("div", { className: "tip" }, make("b", null, `${state}${titleOf(i)} · ${cases.workload[i] || ""}`), facts.join(" · "), make("code", null, command(i)));
}

const workloads = (kind) => [...new Set(cases.workload.filter((name, i) => name && cases.kind[i] === kind && valueOf("decode_tok_s", i) !== null))];
const decoded = (workload) => Array.from({ length: COUNT }, (_, i) => i).filter((i) => cases.kind[i] === "decode" && cases.workload[i] === workload && valueOf("decode_tok_s", i) !== null);

/** Point area ~ memory, between 6 and 26 pixels across. */
function sizes(points) {
  const known = points.map((i) => cases.memory[i]).filter((value) => value !== null);
  const most = Math.max(...known, 1);
  return (i) => (cases.memory[i] === null ? 8 : Math.max(6, 26 * Math.sqrt(cases.memory[i] / most)));
}

/** Points that no other beats in both: fastest for their x or less, from left to right. */
function frontier(points, x) {
  const kept = [];
  let best = -Infinity;
  for (const i of [...points].sort((a, b) => x(a) - x(b) || valueOf("decode_tok_s", b) - valueOf("decode_tok_s", a))) {
    if (valueOf("decode_tok_s", i) > best) {
      kept.push(i);
      best = valueOf("decode_tok_s", i);
    }
  }
  return kept;
}

/** Of the frontier's points those whose names do not lie on each other's; ``across``: 0 at the left edge, 1 at the right. */
function named(edge, across) {
  const top = Math.max(...edge.map((i) => valueOf("decode_tok_s", i)));
  const apart = 115 / Math.max(byId("plot-quality").clientWidth - 80, 200);
  const kept = [];
  for (const i of [...edge].reverse()) {
    const [x, y] = [across(i), valueOf("decode_tok_s", i) / top];
    if (kept.every((other) => Math.abs(other.x - x) > apart || Math.abs(other.y - y) > 0.055)) kept.push({ i, x, y });
  }
  return new Set(kept.map((one) => one.i));
}

/** Round numbers about these values, with room for the points' own size; ``from``: where the axis has to begin. */
function roomy(all, from = null) {
  const [low, high] = [from ?? Math.min(...all), Math.max(...all)];
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / 6));
  const interval = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= span / 6);
  const down = (value) => interval * Math.floor(value / interval);
  return { min: from ?? Math.max(0, down(low - 0.06 * span)), max: -down(-(high + 0.06 * span)), interval };
}

function paretoSeries(points, x, place, across, right) {
  const size = sizes(points);
  const edge = frontier(points, x);
  const onEdge = named(edge, across);
  const label = (i) => ({
    show: true, position: "top", distance: 3, fontSize: 11, color: color("text"), textBorderColor: color("panel"), textBorderWidth: 3,
    formatter: () => cases.format[i].replace(/-[^-]*$/, ""),
  });
  const groups = libraries.filter((name) => points.some((i) => cases.library[i] === name)).map((name) => ({
    type: "scatter", name, symbol: styleOf(name)[2], z: 3, labelLayout: { hideOverlap: true },
    itemStyle: { color: paintOf(name), opacity: 0.82, borderColor: color("panel"), borderWidth: 1 },
    emphasis: { itemStyle: { opacity: 1, borderColor: color("text") } },
    data: points.filter((i) => cases.library[i] === name).map((i) => ({
      value: [place(i), valueOf("decode_tok_s", i)], case: i, symbolSize: size(i),
      label: onEdge.has(i) ? label(i) : { show: false },
      itemStyle: cases.state[i] === "REGRESSED" ? { borderColor: color("bad"), borderWidth: 2.5, opacity: 1 } : undefined,
    })),
  }));
  const line = {
    type: "line", name: "frontier", step: "end", symbol: "none", silent: true, z: 2, lineStyle: { color: color("accent"), width: 1.5, type: "dashed" },
    data: [...edge.map((i) => [place(i), valueOf("decode_tok_s", i)]), [right, valueOf("decode_tok_s", edge.at(-1))]], tooltip: { show: false },
  };
  return [line, ...groups];
}
const GRID = { left: 58, right: 22, top: 24, bottom: 46 };
const caseTip = () => tooltip({ trigger: "item", formatter: (point) => (point.data?.case === undefined ? "" : tip(point.data.case)) });
const choose = (event) => event.data?.case !== undefined && select(event.data.case);

/** Where a case lies across the axis of these values, 0 to 1. */
function between(all, place) {
  const [low, high] = [Math.min(...all), Math.max(...all)];
  return (i) => (place(i) - low) / (high - low || 1);
}

const upTo = (points) => ({ type: "value", ...roomy(points.map((i) => valueOf("decode_tok_s", i)), 0) });

function drawPareto() {
  const points = decoded(byId("pareto-workload").value).filter((i) => !hidden.has(cases.library[i]));
  drawQuality(points);
  const measured = points.filter((i) => cases.memory[i] !== null);
  if (!measured.length) return leaveEmpty("plot-memory", "No decode case with its memory in this workload.");
  const memory = (i) => cases.memory[i];
  const reach = roomy(measured.map(memory));
  draw("plot-memory", {
    grid: GRID, tooltip: caseTip(), yAxis: upright("decode, tok/s", upTo(measured)), xAxis: axis(`${MEMORY}, MiB`, { type: "value", ...reach }),
    series: paretoSeries(measured, memory, memory, between(measured.map(memory), memory), reach.max),
  }, `Scatter plot: decode speed against ${MEMORY} of ${measured.length} cases`, choose);
}

function drawQuality(points) {
  const name = byId("pareto-quality").value;
  const column = cases[name];
  const scored = points.filter((i) => column[i] !== null);
  byId("quality-name").textContent = name === "kld" ? (data.embedded ? "KL divergence (embedded model)" : "KL divergence") : "perplexity";
  if (!scored.length) return leaveEmpty("plot-quality", "No decode case of this workload has a quality: test_quality gives it.");
  let place = (i) => column[i];
  let reach = roomy(scored.map((i) => column[i]));
  let x = axis("perplexity", { type: "value", ...reach });
  if (name === "kld") {
    // A logarithm has no zero: bf16 itself stands a decade left of the smallest divergence, labelled 0.
    const positive = scored.map((i) => column[i]).filter((value) => value > 0);
    const zero = 10 ** (Math.floor(Math.log10(positive.length ? Math.min(...positive) : 1e-3)) - 1);
    const top = 10 ** Math.ceil(Math.log10(positive.length ? Math.max(...positive) * 1.05 : 1));
    place = (i) => (column[i] > 0 ? column[i] : zero);
    const hasZero = scored.some((i) => !(column[i] > 0));
    reach = { min: hasZero ? zero / 2 : zero * 10, max: top };
    x = axis("KL divergence from bf16, nat (log)", {
      type: "log", ...reach,
      axisLabel: { color: color("muted"), hideOverlap: true, formatter: (value) => (value < zero * 0.99 ? "" : value <= zero * 1.01 && hasZero ? "0" : tick(value)) },
    });
  }
  const along = name === "kld" ? (i) => Math.log10(place(i)) : place;
  const across = between(scored.map(along), along);
  draw("plot-quality", { grid: GRID, tooltip: caseTip(), yAxis: upright("decode, tok/s", upTo(scored)), xAxis: x, series: paretoSeries(scored, (i) => column[i], place, across, reach.max) },
    `Scatter plot: decode speed against ${byId("quality-name").textContent} of ${scored.length} cases`, choose);
}

/** Bytes that one decoded step reads: MBU is defined by them, so it gives them back. */
function bytesPerStep(i) {
  const [mbu, speed, ceiling] = [valueOf("mbu", i), valueOf("decode_tok_s", i), data.ceilings.read_gb_s];
  return mbu && speed && ceiling ? (mbu * ceiling * 1e9 * cases.batch[i]) / speed : null;
}

/** As the terminal's table shortens names. */
const brief = (text) => text.replace("bitsandbytes", "bnb").replace("max-autotune-no-cudagraphs", "max-auto-no-cg").replace("max-autotune", "max-auto");

let showAllTimes = false;
const isNarrow = () => byId("plot-time").clientWidth < 480;
function drawRoofline() {
  const ceiling = data.ceilings.read_gb_s;
  const points = decoded(byId("roofline-workload").value).filter((i) => bytesPerStep(i) !== null && !hidden.has(cases.library[i]));
  if (!ceiling || !points.length) {
    byId("time-more").hidden = true;
    leaveEmpty("plot-time", "No decode case with an MBU in this workload.");
    return leaveEmpty("plot-roofline", ceiling ? "No decode case with an MBU in this workload." : "The run keeps no measured ceiling of this device.");
  }
  const bytes = points.map(bytesPerStep);
  const steps = (i) => valueOf("decode_tok_s", i) / cases.batch[i];
  const [low, high] = [Math.min(...bytes) * 0.7, Math.max(...bytes) * 1.4];
  const octaves = { type: "log", logBase: 2, axisLabel: { color: color("muted"), hideOverlap: true, showMinLabel: false, showMaxLabel: false, formatter: tick } };
  const roof = (part) => ({
    type: "line", name: `MBU ${share(part)}`, symbol: "none", silent: true, z: 1, tooltip: { show: false },
    lineStyle: { color: color(part === 1 ? "accent" : "muted"), width: part === 1 ? 2 : 1, type: part === 1 ? "solid" : "dotted" },
    endLabel: { show: true, formatter: share(part), color: color("muted"), fontSize: 11 },
    data: [low, high].map((size) => [size / 1e9, (part * ceiling * 1e9) / size]),
  });
  const groups = libraries.filter((name) => points.some((i) => cases.library[i] === name)).map((name) => ({
    type: "scatter", name, symbol: styleOf(name)[2], symbolSize: 11, z: 3, itemStyle: { color: paintOf(name), opacity: 0.85, borderColor: color("panel"), borderWidth: 1 },
    data: points.filter((i) => cases.library[i] === name).map((i) => ({ value: [bytesPerStep(i) / 1e9, steps(i)], case: i })),
  }));
  draw("plot-roofline", {
    grid: { ...GRID, right: 46 }, tooltip: caseTip(),
    xAxis: axis("read per step, GB (log)", { ...octaves, min: low / 1e9, max: high / 1e9 }),
    yAxis: upright("steps per second (log)", { ...octaves, min: Math.min(...points.map(steps)) / 1.5, max: (1.15 * ceiling * 1e9) / low }), series: [roof(1), roof(0.5), roof(0.25), ...groups],
  }, `Roofline of ${points.length} cases under ${number(ceiling)} GB/s`, choose);
  drawTimes(points, ceiling);
}

/** Milliseconds of one step: reading weights and KV cache as fast as the ceiling allows, and all that is left. */
function parts(i, ceiling) {
  const read = bytesPerStep(i);
  const kv = Math.min(cases.kv[i] ?? 0, read);
  const total = (1e3 * cases.batch[i]) / valueOf("decode_tok_s", i);
  const ms = (bytes) => (1e3 * bytes) / (ceiling * 1e9);
  return { total, read, kv, weights: ms(read - kv), cache: ms(kv), rest: Math.max(0, total - ms(read)) };
}
function timeTip(i, ceiling) {
  const one = parts(i, ceiling);
  const cache = one.kv ? `, ${number(one.cache)} ms to read ${number(one.kv / 1e9)} GB of KV cache` : "";
  const words = `${number(one.total)} ms per step: ${number(one.weights)} ms to read ${number((one.read - one.kv) / 1e9)} GB of weights at the ceiling${cache}, ${number(one.rest)} ms for all else: kernels below the ceiling, launches, attention, sampling`;
  return make("div", { className: "tip" }, make("b", null, titleOf(i)), words, make("code", null, command(i)));
}

function drawTimes(points, ceiling) {
  const narrow = isNarrow();
  const most = narrow ? 12 : 20;
  const sorted = points.sort((a, b) => valueOf("decode_tok_s", b) - valueOf("decode_tok_s", a));
  const shown = (showAllTimes ? sorted : sorted.slice(0, most)).reverse();
  byId("time-more").hidden = sorted.length <= most;
  byId("time-more").textContent = showAllTimes ? `the ${most} fastest` : `all ${sorted.length}`;
  byId("plot-time").style.height = `${Math.max(200, 62 + (narrow ? 32 : 18) * shown.length)}px`;
  byId("plot-roofline").style.height = narrow ? "" : `${Math.min(440, Math.max(340, 62 + 18 * shown.length))}px`;
  for (const id of ["plot-time", "plot-roofline"]) charts.get(id)?.resize();
  const bar = (name, paint, height, label) => ({
    type: "bar", stack: "step", name, itemStyle: { color: paint }, barMaxWidth: 13, label,
    data: shown.map((i) => ({ value: height(parts(i, ceiling)), case: i })),
  });
  const cached = shown.some((i) => cases.kv[i] > 0.005 * bytesPerStep(i)); // less can't be seen
  const label = narrow ? (name) => name.replace(" · ", "\n") : (name) => name;
  draw("plot-time", {
    grid: { left: narrow ? 150 : 236, right: 44, top: narrow && cached ? 52 : 34, bottom: 24 },
    legend: { top: 0, left: 0, itemWidth: 12, itemHeight: 10, textStyle: { color: color("muted") }, selectedMode: false },
    tooltip: tooltip({ trigger: "item", formatter: (point) => timeTip(point.data.case, ceiling) }),
    xAxis: axis("", { type: "value", min: 0 }),
    yAxis: { type: "category", data: shown.map((i) => brief(titleOf(i))), axisTick: { show: false }, axisLine: { lineStyle: { color: color("line") } }, axisLabel: { color: color("text"), fontSize: narrow ? 10 : 11, lineHeight: 13, width: narrow ? 142 : 228, overflow: "truncate", interval: 0, formatter: label } },
    series: [
      bar("weights at the ceiling", color("reading"), (one) => one.weights),
      ...(cached ? [bar("KV cache at the ceiling", color("cache"), (one) => one.cache)] : []),
      bar("all else", color("rest"), (one) => one.rest, { show: true, position: "right", color: color("muted"), fontSize: 10, formatter: (point) => share(valueOf("mbu", point.data.case)) }),
    ],
  }, `Bars: milliseconds per decoded step of ${shown.length} cases, reading weights and KV cache against all else`, choose);
}

/** The libraries with their colours; a click leaves one out. Above the Pareto plots and above the roofline. */
function buildLegend() {
  for (const id of ["legend", "legend-roofline"]) byId(id).replaceChildren(...legendItems(id));
}

function legendItems(id) {
  const shapes = { circle: "M6 1a5 5 0 100 10A5 5 0 006 1z", rect: "M1 1h10v10H1z", triangle: "M6 1l5.5 10H.5z", diamond: "M6 0l5 6-5 6-5-6z", roundRect: "M3 1h6a2 2 0 012 2v6a2 2 0 01-2 2H3a2 2 0 01-2-2V3a2 2 0 012-2z", pin: "M6 12C2 7 2 6 2 4a4 4 0 018 0c0 2 0 3-4 8z", arrow: "M6 0l5 12-5-3-5 3z" };
  const shown = libraries.filter((name) => cases.kind.some((kind, i) => kind === "decode" && cases.library[i] === name && valueOf("decode_tok_s", i) !== null));
  return shown.map((name) => {
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    mark.setAttribute("viewBox", "0 0 12 12");
    mark.setAttribute("aria-hidden", "true");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", shapes[styleOf(name)[2]] || shapes.circle);
    path.setAttribute("fill", paintOf(name));
    mark.append(path);
    const button = make("button", { type: "button", "aria-pressed": String(!hidden.has(name)) }, mark, name);
    button.addEventListener("click", () => {
      if (!hidden.delete(name)) hidden.add(name);
      buildLegend();
      byId(id).querySelectorAll("button")[shown.indexOf(name)].focus();
      drawPareto();
      drawRoofline();
    });
    return make("li", null, button);
  });
}

function buildCharts() {
  for (const element of document.querySelectorAll(".memory-name")) element.textContent = MEMORY === "VRAM" ? "VRAM" : "weights' size";
  const names = workloads("decode");
  const preferred = names.includes("b1_c0") ? "b1_c0" : names[0];
  for (const [id, redraw] of [["pareto-workload", drawPareto], ["roofline-workload", drawRoofline]]) {
    fill(byId(id), names.map((name) => [name, name]), preferred);
    byId(id).addEventListener("change", redraw);
  }
  const qualities = [["kld", "KL divergence"], ["ppl", "perplexity"]].filter(([name]) => cases[name].some((value, i) => value !== null && cases.kind[i] === "decode"));
  fill(byId("pareto-quality"), qualities.length ? qualities : [["kld", "KL divergence"]], "kld");
  byId("quality-choice").hidden = qualities.length < 2;
  byId("pareto-quality").addEventListener("change", drawPareto);
  byId("time-more").addEventListener("click", () => {
    showAllTimes = !showAllTimes;
    drawRoofline();
  });
  const { read_gb_s: read, matmul_tflop_s: product } = data.ceilings;
  byId("roofline-hint").textContent = read
    ? `Measured on this ${data.cpu ? "CPU" : "card"} before the cases: ${number(read)} GB/s read${product ? `, ${number(product)} TFLOP/s in bf16 products` : ""}. A decoded step reads every weight and the KV cache once; MBU is the share of that bandwidth it reaches: the solid line is all of it, the dotted ones a half and a quarter. The figure behind each bar is its MBU.`
    : "The run keeps no measured ceiling of this device.";
  buildLegend();
  drawPareto();
  drawRoofline();
}
