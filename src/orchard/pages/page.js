// Draws the charts of the page, and draws them again when a filter or the color scheme changes.
const page = JSON.parse(document.getElementById("page-data").textContent);
const filters = [...document.querySelectorAll("select[data-filter]")];
const views = new Map();
const MAX_ROWS = 500;

function chosen() {
  return Object.fromEntries(filters.map((s) => [s.dataset.filter, s.value]));
}

// A row without a field, such as a mean without a client, is of no client and always shown.
function rowsOf(chart) {
  const wanted = Object.entries(chosen()).filter(([, value]) => value !== "");
  return chart.rows.filter((row) =>
    wanted.every(([field, value]) => row[field] === undefined || row[field] === value));
}

function theme(width) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const [text, quiet, line] = [color("--text"), color("--quiet"), color("--line")];
  return {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: line },
    axis: { labelColor: text, titleColor: quiet, gridColor: line, domainColor: line, tickColor: line },
    axisY: { labelLimit: width / 3 },
    legend: {
      labelColor: text, titleColor: quiet, orient: "bottom", direction: "horizontal",
      columns: Math.max(1, Math.floor(width / 130)), labelLimit: Math.max(90, width / 3),
      symbolBaseFillColor: quiet, symbolBaseStrokeColor: quiet, gradientLength: Math.min(200, width / 2),
    },
    style: { "guide-label": { fontSize: 12 }, "guide-title": { fontSize: 12 } },
  };
}

function isShare() {
  const metric = chosen().metric ?? "";
  return metric !== "" && !metric.endsWith("loss");
}

async function draw(chart) {
  const element = document.getElementById(`chart-${chart.name}`);
  const rows = rowsOf(chart);
  views.get(chart.name)?.finalize();
  views.delete(chart.name);
  element.replaceChildren();
  if (rows.length === 0) {
    element.textContent = "Nothing of this was measured for what is chosen above.";
  } else {
    const spec = structuredClone(chart.spec);
    spec.datasets = { rows };
    if (chart.bands) spec.height *= new Set(rows.map((row) => row[chart.bands])).size;
    for (const param of spec.params ?? []) if (param.name === "isShare") param.value = isShare();
    const made = await vegaEmbed(element, spec, {
      actions: false, renderer: "svg", config: theme(element.clientWidth), tooltip: { theme: "custom" },
    });
    views.set(chart.name, made.view);
    element.querySelector("svg")?.setAttribute("aria-label", `${chart.title}. ${chart.about}`);
  }
  fillTable(chart, rows);
}

function fillTable(chart, rows) {
  const details = document.getElementById(`table-${chart.name}`);
  if (!details.open) return;
  const columns = chart.columns.filter((c) => rows.some((row) => row[c] !== undefined && row[c] !== null));
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const column of columns) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = column;
    head.append(cell);
  }
  const body = table.createTBody();
  for (const row of rows.slice(0, MAX_ROWS)) {
    const line = body.insertRow();
    for (const column of columns) {
      const cell = line.insertCell();
      const value = row[column] ?? "";
      cell.textContent = typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(6) : value;
      if (typeof value === "number") cell.className = "number";
    }
  }
  if (rows.length > MAX_ROWS) {
    table.createCaption().textContent = `The first ${MAX_ROWS} of ${rows.length} rows.`;
  }
  details.querySelector(".scroll").replaceChildren(table);
}

async function drawAll() {
  await Promise.all(page.charts.map(draw));
  document.documentElement.dataset.drawn = String(Number(document.documentElement.dataset.drawn ?? 0) + 1);
}

for (const select of filters) select.addEventListener("change", drawAll);
document.querySelector("form.filters")?.addEventListener("submit", (event) => event.preventDefault());
for (const chart of page.charts) {
  document.getElementById(`table-${chart.name}`)
    .addEventListener("toggle", () => fillTable(chart, rowsOf(chart)));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
drawAll();
