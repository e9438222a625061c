// How near to the memory's bandwidth a decoded step comes, and where its time goes.
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
  if (byId("roofline").hidden) return;
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
  const least = Math.min(...points.map(steps)) / 1.5;
  const octaves = { type: "log", logBase: 2, axisLabel: { color: color("muted"), hideOverlap: true, showMinLabel: false, showMaxLabel: false, formatter: tick } };
  const roof = (part) => ({
    type: "line", name: `MBU ${share(part)}`, symbol: "none", silent: true, z: 1, tooltip: { show: false },
    lineStyle: { color: color(part === 1 ? "accent" : "muted"), width: part === 1 ? 2 : 1, type: part === 1 ? "solid" : "dotted" },
    endLabel: { show: (part * ceiling * 1e9) / high > least, formatter: share(part), color: color("muted"), fontSize: 11 }, // else it leaves by the bottom
    data: [low, high].map((size) => [size / 1e9, (part * ceiling * 1e9) / size]),
  });
  const groups = libraries.filter((name) => points.some((i) => cases.library[i] === name)).map((name) => ({
    type: "scatter", name, symbol: styleOf(name)[2], symbolSize: 11, z: 3, itemStyle: { color: paintOf(name), opacity: 0.85, borderColor: color("panel"), borderWidth: 1 },
    data: points.filter((i) => cases.library[i] === name).map((i) => ({ value: [bytesPerStep(i) / 1e9, steps(i)], case: i })),
  }));
  draw("plot-roofline", {
    grid: { ...GRID, right: 46 }, tooltip: caseTip(),
    xAxis: axis("read per step, GB (log)", { ...octaves, min: low / 1e9, max: high / 1e9 }),
    yAxis: upright("steps per second (log)", { ...octaves, min: least, max: (1.15 * ceiling * 1e9) / low }), series: [roof(1), roof(0.5), roof(0.25), ...groups],
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
    grid: { left: narrow ? 150 : 268, right: 44, top: narrow && cached ? 52 : 34, bottom: 24 },
    legend: { top: 0, left: 0, itemWidth: 12, itemHeight: 10, textStyle: { color: color("muted") }, selectedMode: false },
    tooltip: tooltip({ trigger: "item", formatter: (point) => timeTip(point.data.case, ceiling) }),
    xAxis: axis("", { type: "value", min: 0 }),
    yAxis: { type: "category", data: shown.map((i) => brief(titleOf(i))), axisTick: { show: false }, axisLine: { lineStyle: { color: color("line") } }, axisLabel: { color: color("text"), fontSize: narrow ? 10 : 11, lineHeight: 13, width: narrow ? 142 : 260, overflow: "truncate", interval: 0, formatter: label } },
    series: [
      bar("weights at the ceiling", color("reading"), (one) => one.weights),
      ...(cached ? [bar("KV cache at the ceiling", color("cache"), (one) => one.cache)] : []),
      bar("all else", color("rest"), (one) => one.rest, { show: true, position: "right", color: color("muted"), fontSize: 10, formatter: (point) => share(valueOf("mbu", point.data.case)) }),
    ],
  }, `Bars: milliseconds per decoded step of ${shown.length} cases, reading weights and KV cache against all else`, choose);
}
