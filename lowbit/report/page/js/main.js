// What happens when the page opens: the table first, for it is what most readers came for; then the plots.
function fromAddress() {
  const found = /^#case=(.+)$/.exec(location.hash);
  if (!found) return -1;
  try {
    return cases.id.indexOf(decodeURIComponent(found[1]));
  } catch (error) {
    if (error instanceof URIError) return -1; // a mangled link is no reason to show nothing
    throw error;
  }
}

function firstToShow() {
  const interesting = order(Array.from({ length: COUNT }, (_, i) => i)).find((i) => metricsWithPast(i).length);
  return interesting === undefined ? 0 : interesting;
}

async function copy(button) {
  const source = byId(button.dataset.copies);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch (error) {
    getSelection().selectAllChildren(source); // no clipboard in a file opened from disk, in some browsers
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

buildFilters();
buildTable();
show();
buildSkips();
buildHistory();
for (const button of document.querySelectorAll("button.copy")) button.addEventListener("click", () => copy(button));
addEventListener("hashchange", () => fromAddress() >= 0 && select(fromAddress()));
dark.addEventListener("change", () => {
  palette.clear();
  buildLegend();
  drawPareto();
  drawRoofline();
  drawHistory();
});
requestAnimationFrame(() => {
  buildCharts();
  const asked = fromAddress();
  if (COUNT) select(asked >= 0 ? asked : firstToShow(), { reveal: asked >= 0 });
  let width = innerWidth;
  addEventListener("resize", () => {
    for (const chart of charts.values()) chart.resize();
    if ((width < 480) !== (innerWidth < 480)) drawRoofline();
    width = innerWidth;
  });
  document.documentElement.dataset.ready = Math.round(performance.now()); // ms since the page was asked for
  setTimeout(fillRest, 30);
});
