// Decode speed against quality and against memory, with the frontier.
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
/** Where a case lies across the axis of these values, 0 to 1. */
function between(all, place) {
  const [low, high] = [Math.min(...all), Math.max(...all)];
  return (i) => (place(i) - low) / (high - low || 1);
}

const upTo = (points) => ({ type: "value", ...roomy(points.map((i) => valueOf("decode_tok_s", i)), 0) });

function drawPareto() {
  if (byId("pareto").hidden) return;
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

/** A logarithm has no zero: bf16 itself stands a decade left of the smallest divergence, labelled 0. */
function divergenceAxis(all) {
  const positive = all.filter((value) => value > 0);
  const zero = 10 ** (Math.floor(Math.log10(positive.length ? Math.min(...positive) : 1e-3)) - 1);
  const hasZero = positive.length < all.length;
  const formatter = (value) => (value < zero * 0.99 ? "" : value <= zero * 1.01 && hasZero ? "0" : tick(value));
  const x = axis("KL divergence from bf16, nat (log)", {
    type: "log", min: hasZero ? zero / 2 : zero * 10, max: 10 ** Math.ceil(Math.log10(positive.length ? Math.max(...positive) * 1.05 : 1)),
    axisLabel: { color: color("muted"), hideOverlap: true, formatter },
  });
  return { x, place: (value) => (value > 0 ? value : zero), isLog: true };
}
/** Linear, but for a format that has lost the language: its perplexity would press all others together. */
function perplexityAxis(all) {
  const [low, high] = [Math.min(...all), Math.max(...all)];
  if (high > 3 * low) {
    const logBase = high > 50 * low ? 10 : 2;
    return { x: axis("perplexity (log)", { type: "log", logBase, min: low / 1.15, max: high * 1.15, axisLabel: { color: color("muted"), hideOverlap: true, showMinLabel: false, showMaxLabel: false, formatter: tick } }), place: (value) => value, isLog: true };
  }
  const reach = roomy(all);
  const digits = Math.max(0, 1 - Math.floor(Math.log10(reach.interval)));
  return { x: axis("perplexity", { type: "value", ...reach, axisLabel: { color: color("muted"), hideOverlap: true, formatter: (value) => value.toFixed(digits) } }), place: (value) => value, isLog: false };
}

function drawQuality(points) {
  const name = byId("pareto-quality").value;
  const column = cases[name];
  const scored = points.filter((i) => column[i] !== null);
  byId("quality-name").textContent = name === "kld" ? (data.embedded ? "KL divergence (embedded model)" : "KL divergence") : "perplexity";
  const without = points.length - scored.length;
  const [borrowed, from] = data.scores;
  byId("quality-from").textContent = borrowed ? `, ${borrowed} of its formats scored in ${from}` : "";
  byId("quality-missing").textContent = scored.length && without ? `, without ${without} of ${points.length} cases that have none (test_quality gives it)` : "";
  if (!scored.length) return leaveEmpty("plot-quality", "No decode case of this workload has a quality: test_quality gives it.");
  const { x, place, isLog } = name === "kld" ? divergenceAxis(scored.map((i) => column[i])) : perplexityAxis(scored.map((i) => column[i]));
  const at = (i) => place(column[i]);
  const along = isLog ? (i) => Math.log10(at(i)) : at;
  const across = between(scored.map(along), along);
  draw("plot-quality", { grid: GRID, tooltip: caseTip(), yAxis: upright("decode, tok/s", upTo(scored)), xAxis: x, series: paretoSeries(scored, (i) => column[i], at, across, x.max) },
    `Scatter plot: decode speed against ${byId("quality-name").textContent} of ${scored.length} cases`, choose);
}
