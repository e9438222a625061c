// What all plots share: colours, axes, hovers, the legend. ECharts draws them as SVG; colours come from the style sheet.
const LIBRARY = {
  torch: ["#5f6b7a", "#aab4c0", "circle"], torchao: ["#0b6fb8", "#5cb0f2", "rect"], gemlite: ["#c8500a", "#ff9352", "triangle"],
  bitsandbytes: ["#0a8a63", "#43cc9f", "diamond"], hqq: ["#b3478f", "#ea86c8", "roundRect"], lowbit: ["#6a3fd1", "#a98bff", "path://M0 1h12L6 11z"],
  reference: ["#8a6d00", "#dcb93a", "arrow"],
};
const OTHERS = [["#3f7f8c", "#7cc4d2", "circle"], ["#8c3f3f", "#e08f8f", "rect"], ["#4f6b12", "#a9c95a", "triangle"], ["#7a4a1e", "#d6a16c", "diamond"], ["#a3336b", "#f089b5", "roundRect"], ["#33508c", "#93abe6", "triangle"]];
const libraries = [...new Set(cases.library)].filter(Boolean).sort();
const dark = matchMedia("(prefers-color-scheme: dark)");
const hidden = new Set();
const palette = new Map(); // asking the style sheet anew for every label would cost a layout each time
function color(name) {
  if (!palette.has(name)) palette.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return palette.get(name);
}
const unnamed = libraries.filter((name) => !LIBRARY[name]);
const styleOf = (library) => LIBRARY[library] || OTHERS[unnamed.indexOf(library) % OTHERS.length];
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
  if (cases.ppl[i] !== null) facts.push(`ppl ${figure(cases.ppl[i], "")}`);
  if (valueOf("mbu", i) !== null) facts.push(`MBU ${share(valueOf("mbu", i))}`);
  const state = TONE[cases.state[i]] === "bad" ? `${cases.state[i]} · ` : "";
  return make("div", { className: "tip" }, make("b", null, `${state}${titleOf(i)} · ${cases.workload[i] || ""}`), facts.join(" · "), make("code", null, command(i)));
}

/** Each row at the shortest context that it was measured at, where those differ: all rows in one plot. */
const SHORT = "short context";
const short = new Set(data.short);
const decoded = (workload) => Array.from({ length: COUNT }, (_, i) => i).filter((i) => cases.kind[i] === "decode" && (workload === SHORT ? short.has(i) : cases.workload[i] === workload) && valueOf("decode_tok_s", i) !== null);
const workloads = [SHORT, ...data.workloads].filter((name) => decoded(name).length);

const GRID = { left: 58, right: 22, top: 24, bottom: 46 };
const caseTip = () => tooltip({ trigger: "item", formatter: (point) => (point.data?.case === undefined ? "" : tip(point.data.case)) });
const choose = (event) => event.data?.case !== undefined && select(event.data.case);


/** The libraries with their colours; a click leaves one out. Above the Pareto plots and above the roofline. */
function buildLegend() {
  for (const id of ["legend", "legend-roofline"]) byId(id).replaceChildren(...legendItems(id));
}

function legendItems(id) {
  const shapes = { circle: "M6 1a5 5 0 100 10A5 5 0 006 1z", rect: "M1 1h10v10H1z", triangle: "M6 1l5.5 10H.5z", diamond: "M6 0l5 6-5 6-5-6z", roundRect: "M3 1h6a2 2 0 012 2v6a2 2 0 01-2 2H3a2 2 0 01-2-2V3a2 2 0 012-2z" };
  const shown = libraries.filter((name) => cases.kind.some((kind, i) => kind === "decode" && cases.library[i] === name && valueOf("decode_tok_s", i) !== null));
  return shown.map((name) => {
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    mark.setAttribute("viewBox", "0 0 12 12");
    mark.setAttribute("aria-hidden", "true");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const symbol = styleOf(name)[2];
    path.setAttribute("d", symbol.startsWith("path://") ? symbol.slice(7) : shapes[symbol] || shapes.circle);
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
  if (!workloads.length) {
    for (const id of ["pareto", "roofline"]) byId(id).hidden = document.querySelector(`nav a[href="#${id}"]`).hidden = true;
    return;
  }
  for (const element of document.querySelectorAll(".memory-name")) element.textContent = MEMORY === "VRAM" ? "VRAM" : "weights' size";
  const preferred = workloads.includes(data.start) ? data.start : workloads[0];
  for (const [id, redraw] of [["pareto-workload", drawPareto], ["roofline-workload", drawRoofline]]) {
    fill(byId(id), workloads.map((name) => [name, name]), preferred);
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
