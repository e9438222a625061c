// The table of all cases: sorted by its headings, filtered by words and choices; what changed stands on top.
const JUDGED = Object.keys(base).length > 0; // by a baseline; without one there is no change and no limit to show
const COLUMNS = [
  { id: "state", title: "state", key: (i) => STATES.indexOf(cases.state[i]), cell: stateCell, first: "ascending" },
  { id: "case", title: "case", key: (i) => shortName(cases.id[i]), cell: caseCell, first: "ascending" },
  ...(JUDGED ? judgedColumns() : []),
  plain("decode", "tok/s", "decode_tok_s"),
  plain("TTFT", "ms", "ttft_ms"),
  { id: "memory", title: MEMORY, unit: "MiB", key: (i) => cases.memory[i], text: (i) => number(cases.memory[i]) },
  { id: "kld", title: "KL", unit: data.embedded ? "embedded" : "nat", key: (i) => cases.kld[i], text: (i) => number(cases.kld[i]) },
  { id: "ppl", title: "ppl", key: (i) => cases.ppl[i], text: (i) => figure(cases.ppl[i], "") },
  { id: "mbu", title: "MBU", key: (i) => valueOf("mbu", i), text: (i) => share(valueOf("mbu", i)) },
  plain("energy", "J/tok", "energy_j_per_tok"),
  plain("compile", "s", "compile_s"),
].filter(({ first, key }) => first || cases.id.some((_, i) => key(i) !== null)); // a CPU has no energy, dummy weights no ppl

function judgedColumns() {
  return [
    { id: "change", title: "change", key: (i) => (headlines[i] ? changeOf(headlines[i].metric, i, headlines[i].now) : null), cell: changeCell },
    { id: "metric", title: "base → now", key: (i) => headlines[i]?.metric ?? "", cell: movedCell, first: "ascending" },
    { id: "limit", title: "limit", key: (i) => relativeTo(headlines[i], i, "limit"), text: (i) => headlines[i] && limitText(headlines[i], baseOf(headlines[i].metric, i)) },
    { id: "spread", title: "spread", unit: "σ", key: (i) => relativeTo(headlines[i], i, "spread"), text: (i) => headlines[i] && spreadText(headlines[i], baseOf(headlines[i].metric, i)) },
    { id: "runs", title: "runs", unit: "beyond", key: (i) => headlines[i]?.beyond ?? null, text: (i) => runsText(headlines[i]) },
  ];
}
function plain(title, unit, name) {
  return { id: name, title, unit, key: (i) => valueOf(name, i), text: (i) => number(valueOf(name, i)) };
}
function relativeTo(one, i, field) {
  const before = one && baseOf(one.metric, i);
  return one && one[field] !== null && before ? one[field] / Math.abs(before) : null;
}
function stateCell(i) {
  const state = cases.state[i];
  return [make("span", { className: `state ${TONE[state] || ""}` }, state)];
}
function caseCell(i) {
  const parts = [cases.mode[i], cases.workload[i]].filter(Boolean).join(" · ");
  const button = make("button", { type: "button", className: "case id", title: cases.id[i] }, cases.format[i] ? `${cases.kind[i]} ${cases.format[i]}` : shortName(cases.id[i]));
  button.addEventListener("click", () => select(i));
  const reason = cases.state[i] !== "ok" && cases.reason[i] ? make("span", { className: "sub" }, cases.reason[i].split("\n")[0].slice(0, 200)) : null;
  return [button, parts ? make("span", { className: "sub" }, parts) : null, reason];
}
function movedCell(i) {
  const one = headlines[i];
  if (!one) return ["–"];
  const now = one.now ?? valueOf(one.metric, i);
  const before = baseOf(one.metric, i);
  const unit = unitOf(one.metric);
  const text = before === null ? amount(now, unit) : moved(before, now, unit);
  const since = one.since.length ? make("span", { className: "sub" }, `since ${one.since[0]}`) : null;
  return [text, make("span", { className: "sub" }, one.metric), since];
}
function changeCell(i) {
  const one = headlines[i];
  const change = one ? changeOf(one.metric, i, one.now) : null;
  return [make("span", { className: one ? toneOf(one) : "" }, percent(change))];
}

const sorting = { column: "state", direction: "ascending" };
const rows = new Map();

function buildTable() {
  const head = make("tr");
  for (const column of COLUMNS) {
    const isNumber = !column.first;
    const button = make("button", { type: "button" }, column.title, column.unit ? make("small", null, column.unit) : null);
    button.addEventListener("click", () => sortBy(column));
    const cell = make("th", { scope: "col", className: isNumber ? "number" : "" }, button);
    cell.dataset.column = column.id;
    head.append(cell);
  }
  byId("table").tHead.append(head);
  listeners.push((chosen) => rows.forEach((row, i) => row.classList.toggle("selected", i === chosen)));
}

/** A case's row, made when it is first shown. */
function rowOf(i) {
  if (!rows.has(i)) {
    const row = make("tr", { className: i === selected ? "selected" : "" });
    row.dataset.case = i;
    for (const column of COLUMNS) {
      const content = column.cell ? column.cell(i) : [column.text(i) || "–"];
      row.append(make("td", { className: !column.first ? "number" : "" }, ...content));
    }
    rows.set(i, row);
  }
  return rows.get(i);
}

const AT_ONCE = 60; // more than a screen
let waiting = []; // the rows below these; they follow when the browser has drawn the first
/** All of these cases as the table's rows, in two steps: 500 laid out at once would hold the page up. */
function fillTable(indices) {
  byId("table").tBodies[0].replaceChildren(...indices.slice(0, AT_ONCE).map(rowOf));
  waiting = indices.slice(AT_ONCE);
  if (document.documentElement.dataset.ready) setTimeout(fillRest, 30);
}
function fillRest() {
  byId("table").tBodies[0].append(...waiting.map(rowOf));
  waiting = [];
}

function sortBy(column) {
  const first = column.first || "descending";
  const other = first === "ascending" ? "descending" : "ascending";
  sorting.direction = sorting.column === column.id && sorting.direction === first ? other : first;
  sorting.column = column.id;
  show();
}

/** Missing values are last whatever the direction; ties stand by state, then as the run had them. */
function order(indices) {
  const { key } = COLUMNS.find((column) => column.id === sorting.column);
  const sign = sorting.direction === "ascending" ? 1 : -1;
  const keys = new Map(indices.map((i) => [i, key(i)]));
  return indices.sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    if (x === null || y === null) return (x === null) - (y === null) || a - b;
    const compared = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
    return sign * compared || worth(b) - worth(a) || a - b;
  });
}
/** How far a case's headline is beyond its limit: the worst of one state first. */
function worth(i) {
  const one = headlines[i];
  const change = one ? changeOf(one.metric, i, one.now) : null;
  return STATES.indexOf(cases.state[i]) < 6 && change !== null ? Math.abs(change) : valueOf("decode_tok_s", i) || 0;
}

const FILTERS = { state: "state", kind: "kind", library: "library", mode: "mode" };
function buildFilters() {
  for (const [name, column] of Object.entries(FILTERS)) {
    const present = [...new Set(cases[column])].filter(Boolean);
    if (name === "state") present.sort((a, b) => STATES.indexOf(a) - STATES.indexOf(b));
    const counted = present.map((value) => [value, `${value} (${cases[column].filter((other) => other === value).length})`]);
    fill(byId(`filter-${name}`), [["", "all"], ...counted], "");
    byId(`filter-${name}`).addEventListener("change", show);
  }
  byId("filter-text").addEventListener("input", show);
  byId("filter-clear").addEventListener("click", () => {
    byId("filter-text").value = "";
    for (const name of Object.keys(FILTERS)) byId(`filter-${name}`).value = "";
    show();
  });
}
const haystacks = cases.id.map((id, i) => `${id} ${cases.state[i]} ${cases.reason[i] || ""} ${cases.dtype[i] || ""}`.toLowerCase());

function show() {
  const words = byId("filter-text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = Object.entries(FILTERS).map(([name, column]) => [column, byId(`filter-${name}`).value]).filter(([, value]) => value);
  const kept = [];
  for (let i = 0; i < COUNT; i++) {
    if (words.every((word) => haystacks[i].includes(word)) && chosen.every(([column, value]) => cases[column][i] === value)) kept.push(i);
  }
  fillTable(order(kept));
  for (const cell of byId("table").tHead.rows[0].cells) {
    if (cell.dataset.column === sorting.column) cell.setAttribute("aria-sort", sorting.direction);
    else cell.removeAttribute("aria-sort");
  }
  byId("count").textContent = kept.length === COUNT ? `${COUNT} cases` : `${kept.length} of ${COUNT} cases`;
}

const FEW_FORMATS = 8; // more are folded
function buildSkips() {
  const reasons = new Map();
  for (let i = 0; i < COUNT; i++) {
    if (cases.state[i] !== "skipped") continue;
    const reason = cases.reason[i] || "no reason given";
    reasons.set(reason, [...(reasons.get(reason) || []), i]);
  }
  if (!reasons.size) return;
  const items = [...reasons].sort((a, b) => b[1].length - a[1].length).map(([reason, found]) => {
    const formats = [...new Set(found.map((i) => cases.format[i] || shortName(cases.id[i])))];
    const counted = [make("b", null, `${found.length} × `), reason];
    if (formats.length <= FEW_FORMATS) return make("li", null, ...counted, make("span", { className: "sub" }, `: ${formats.join(", ")}`));
    return make("li", null, make("details", null, make("summary", null, ...counted, `: ${formats.length} formats`), formats.join(", ")));
  });
  byId("skips").append(make("b", null, "Skipped, by reason"), make("ul", null, ...items));
}
