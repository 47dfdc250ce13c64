"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const MOST_TASKS = 12;
  // Told apart also by people who see fewer colours; lighter on dark.
  const PALETTE = {
    light: ["#2463b4", "#d1690e", "#118a5e", "#a6429b", "#9a7400", "#c23b3b", "#1f8a98", "#6b4fbb"],
    dark: ["#6ea8ff", "#ff9f4a", "#4fd1a1", "#e38ae0", "#e6c34a", "#ff8080", "#5ad1de", "#b39dff"],
  };
  const BOUNDS = { light: "#7a7e86", dark: "#9ca1aa" };
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const charts = [];
  let printing = false;

  // -- elements ------------------------------------------------------------------------------

  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (key === "style") node.style.cssText = value;
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
    }
    node.append(...children.filter((c) => c !== null && c !== undefined));
    return node;
  }

  function card(title, how, ...children) {
    return el("div", { class: "card" }, el("h3", {}, title), how ? el("p", { class: "how" }, how) : null, ...children);
  }

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const theme = () => (dark.matches && !printing ? "dark" : "light");

  // -- tables --------------------------------------------------------------------------------

  // columns: {name, title, left}; rows: arrays of {text, value, class, style}
  function table(columns, rows, rowClasses = []) {
    const body = el("tbody");
    const lines = rows.map((cells, r) => {
      const line = el("tr", { class: rowClasses[r] || "" });
      cells.forEach((cell, c) => {
        line.append(el("td", {
          class: `${columns[c].left ? "left " : ""}${cell.class || ""}`,
          style: cell.style || "",
        }, cell.text,
          cell.aside ? el("span", { class: "aside" }, ` ${cell.aside}`) : null));
      });
      return { line, cells };
    });
    body.append(...lines.map((l) => l.line));
    const heads = columns.map((column, c) => {
      const head = el("th", { class: column.left ? "left" : "", scope: "col", title: column.title || null });
      const sort = () => {
        const up = head.getAttribute("aria-sort") === "descending";
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (l) => (l.cells[c].value === undefined ? l.cells[c].text : l.cells[c].value);
        lines.sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === null || y === null) return (x === null) - (y === null);
          const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
          return up ? order : -order;
        });
        body.append(...lines.map((l) => l.line));
      };
      head.append(el("button", { onclick: sort, type: "button" }, column.name));
      return head;
    });
    return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body));
  }

  // -- charts --------------------------------------------------------------------------------

  // Plotly takes some HTML and templates in texts; names from runs are neither.
  function mark(text) {
    const plain = { "&": "&amp;", "<": "&lt;", ">": "&gt;", "%": "&#37;" };
    return text.replace(/[&<>%]/g, (c) => plain[c]);
  }

  function axis(title, more = {}) {
    return {
      title: { text: title, font: { size: 12 }, standoff: 8 }, gridcolor: css("--line"), zeroline: false,
      linecolor: css("--line"), tickfont: { size: 11 }, fixedrange: true, automargin: true, ...more,
    };
  }

  function layout(more = {}) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
      font: { color: css("--ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      margin: { l: 50, r: 12, t: 8, b: 40 }, hovermode: "closest",
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } }, ...more,
    };
  }

  // make() gives {traces, layout}; it is called again where colours or visible rows change.
  function chart(height, make, caption = null, minWidth = null) {
    const plot = el("div", { class: "plot", style: `height:${height}px${minWidth ? `;min-width:${minWidth}px` : ""}` });
    charts.push({ plot, make });
    return el("figure", {}, caption ? el("figcaption", {}, caption) : null, minWidth ? el("div", { class: "scroll" }, plot) : plot);
  }

  function draw({ plot, make }) {
    const made = make();
    return Plotly.react(plot, made.traces, made.layout, { displayModeBar: false, responsive: true, scrollZoom: false });
  }

  function faded(colour, alpha) {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  }

  function colour(row) {
    const palette = PALETTE[theme()];
    return row.bound ? BOUNDS[theme()] : palette[row.place % palette.length];
  }

  function line(row, x, spread, unit) {
    const known = x.map((_, i) => i).filter((i) => spread.mean[i] !== null);
    const xs = known.map((i) => x[i]);
    const ys = known.map((i) => spread.mean[i]);
    const stds = known.map((i) => spread.std[i]);
    const traces = [];
    if (stds.some((s) => s !== null)) {
      const up = ys.map((y, i) => y + (stds[i] || 0));
      const down = ys.map((y, i) => y - (stds[i] || 0));
      traces.push({
        x: [...xs, ...xs.slice().reverse()], y: [...up, ...down.reverse()], fill: "toself", mode: "lines",
        fillcolor: faded(colour(row), 0.16), line: { width: 0 }, hoverinfo: "skip", name: `${mark(row.label)} band`,
      });
    }
    traces.push({
      x: xs, y: ys, mode: xs.length > 1 ? "lines+markers" : "markers", name: mark(row.label),
      line: { color: colour(row), width: 2, dash: row.dash }, marker: { size: 4.5, color: colour(row) },
      customdata: stds.map((s) => (s === null ? "" : ` ± ${s.toFixed(1)}`)),
      hovertemplate: `${mark(row.label)}: %{y:.1f}%{customdata}${unit}<extra></extra>`,
    });
    return traces;
  }

  function lines(block, height, caption, pick, yTitle, unit, more = {}) {
    return chart(height, () => {
      const traces = block.visible().flatMap((row) => {
        const found = pick(row);
        return found ? line(row, found.x, found.spread, unit) : [];
      });
      return {
        traces,
        layout: layout({
          xaxis: axis("tasks learned", { dtick: block.tasks.length > 12 ? undefined : 1, range: [0.6, block.tasks.length + 0.4], ...more.x }),
          yaxis: axis(yTitle, more.y || {}),
        }),
      };
    }, caption);
  }

  function heatmap(caption, make, height) {
    return chart(height, () => {
      const found = make();
      return {
        traces: [{
          type: "heatmap", z: found.z, x: found.x.map(mark), y: found.y.map(mark), zmin: found.range[0], zmax: found.range[1],
          colorscale: "Viridis", xgap: 1, ygap: 1, hoverongaps: false, hovertemplate: found.hover,
          customdata: found.customdata, texttemplate: found.text ? "%{z:.0f}" : "", textfont: { size: 10 },
          colorbar: { thickness: 9, len: 1, outlinewidth: 0, tickfont: { size: 10 }, ticksuffix: " %" },
        }],
        layout: layout({
          xaxis: axis(found.xTitle, { showgrid: false, tickangle: found.x.join("").length > 24 ? -90 : 0, type: "category" }),
          yaxis: axis(found.yTitle, { showgrid: false, autorange: "reversed", type: "category" }),
          margin: { l: 34 + 6.2 * Math.max(...found.y.map((t) => t.length)), r: 0, t: 6, b: 40 },
        }),
      };
    }, caption);
  }

  // -- sections ------------------------------------------------------------------------------

  const metric = (key) => data.metrics.find((m) => m.key === key);
  const swatch = (row) => ({ class: "swatch", style: `--colour:${colour(row)}` });

  function results(block) {
    const columns = [
      { name: "strategy", left: true }, { name: "n", title: "seeds" },
      ...block.metrics.map((k) => ({ name: metric(k).name, title: metric(k).meaning })),
      ...(block.tested ? [{ name: "p", title: "against the best row; see below" }] : []),
    ];
    const rows = block.rows.map((row) => [
      { text: row.label + row.flag, aside: row.aside, ...swatch(row) }, { text: String(row.n), value: row.n },
      ...block.metrics.map((k) => ({ text: row.values[k].text, value: row.values[k].mean, class: row.values[k].best ? "best" : "" })),
      ...(block.tested ? [{ text: row.p, value: row.p === "best" ? 2 : parseFloat(row.p.replace("< ", "")) || null }] : []),
    ]);
    const meanings = block.metrics.map((k) => el("li", {}, el("b", {}, metric(k).name), ` ${metric(k).meaning}`));
    return card("Results", "Percent. The best of each column, bounds aside, is green. A click on a heading sorts.",
      table(columns, rows, block.rows.map((r) => (r.bound ? "bound" : ""))),
      el("ul", { class: "remarks" }, ...block.remarks.map((r) => el("li", {}, r))),
      el("details", { style: "margin-top:8px" }, el("summary", {}, "What the columns mean"), el("ul", { class: "remarks" }, ...meanings)));
  }

  function published(block) {
    const found = block.rows.filter((row) => row.reference);
    if (!found.length) return null;
    const rows = found.flatMap((row) => Object.entries(row.reference.metrics).map(([key, theirs]) => {
      const ours = row.values[key];
      const apart = ours && ours.mean !== null ? ours.mean - theirs.mean : null;
      return [
        { text: row.label, ...swatch(row) }, { text: metric(key).name },
        { text: ours ? ours.text : "-", value: ours ? ours.mean : null },
        { text: theirs.std === null ? theirs.mean.toFixed(2) : `${theirs.mean.toFixed(2)} ± ${theirs.std.toFixed(2)}`, value: theirs.mean },
        { text: apart === null ? "-" : `${apart > 0 ? "+" : ""}${apart.toFixed(2)}`, value: apart },
        { text: row.reference.seeds ? String(row.reference.seeds) : "-" }, { text: row.reference.source },
      ];
    }));
    const columns = ["strategy", "metric", "ours", "published", "difference", "their seeds", "source"];
    return card("Published numbers", "As the experiment's configuration quotes them, in the same setting.",
      table(columns.map((name) => ({ name, left: name === "strategy" || name === "source" })), rows));
  }

  function plane(block) {
    return card("Stability against plasticity",
      "Right: new tasks are learned better. Up: old tasks are kept better. Bars are one standard deviation over seeds.",
      chart(330, () => ({
        traces: block.visible().filter((r) => r.values.learning_accuracy && r.values.bwt).map((row) => ({
          x: [row.values.learning_accuracy.mean], y: [row.values.bwt.mean], name: mark(row.label), mode: "markers+text",
          text: [mark(row.label)], textposition: "top center", textfont: { size: 12, color: colour(row) }, cliponaxis: false,
          marker: { size: 12, color: colour(row), symbol: row.bound ? "diamond" : "circle" },
          error_x: { array: [row.values.learning_accuracy.std || 0], color: colour(row), thickness: 1.2, width: 3 },
          error_y: { array: [row.values.bwt.std || 0], color: colour(row), thickness: 1.2, width: 3 },
          hovertemplate: `${mark(row.label)}<br>LA ${row.values.learning_accuracy.text}<br>BWT ${row.values.bwt.text}<extra></extra>`,
        })),
        layout: layout({
          xaxis: axis("plasticity: learning accuracy (%)"), yaxis: axis("stability: backward transfer (points)"),
          margin: { l: 56, r: 30, t: 26, b: 44 },
        }),
      })));
  }

  function mean(block) {
    const x = block.tasks.map((_, i) => i + 1);
    return card("Mean accuracy over the tasks seen", "After every task; bands are one standard deviation over seeds.",
      lines(block, 330, null, (row) => ({ x, spread: row.seen }), "accuracy (%)", " %"));
  }

  // Of many, the last and others at equal distances before it.
  function some(count, most) {
    const stride = Math.ceil(count / most);
    return [...Array(count).keys()].filter((i) => (count - 1 - i) % stride === 0);
  }

  function overTime(block) {
    const T = block.tasks.length;
    const shown = some(T, MOST_TASKS);
    const ys = block.rows.flatMap((row) => shown.flatMap((j) => row.matrix.slice(j + 1).map((r) => r[j]))).filter((v) => v !== null);
    const low = Math.max(0, 10 * Math.floor((Math.min(...ys) - 4) / 10));
    const grid = el("div", { class: "grid small", style: "--cell:235px" }, ...shown.map((j) => lines(block, 190, block.tasks[j], (row) => ({
      x: row.matrix.slice(j + 1).map((_, i) => j + 1 + i),
      spread: { mean: row.matrix.slice(j + 1).map((r) => r[j]), std: row.matrix_std.slice(j + 1).map((r) => r[j]) },
    }), "accuracy (%)", " %", { y: { range: [low, 102] } })));
    const left = shown.length < T ? ` ${shown.length} of ${T} tasks are shown.` : "";
    const made = card("Each task from when it was learned", `A line that falls forgets.${left}`, grid);
    made.classList.add("long");
    return made;
  }

  function forgetting(block) {
    const T = block.tasks.length - 1;
    if (T < 1) return null;
    const width = Math.max(320, T * (block.rows.length * 9 + 14) + 70);
    return card("Forgetting of each task at the end", "Best accuracy since a task was learned minus accuracy at the end, in points; less is better.",
      chart(300, () => ({
        traces: block.visible().map((row) => ({
          type: "bar", name: mark(row.label), x: block.tasks.slice(0, T).map(mark), y: row.forgetting.mean, 
          marker: { color: colour(row), opacity: row.bound ? 0.6 : 1, pattern: { shape: row.dash === "dot" ? "/" : "", size: 5 } },
          error_y: { array: row.forgetting.std.map((s) => s || 0), visible: row.n > 1, thickness: 1, width: 2, color: css("--soft") },
          hovertemplate: `${mark(row.label)}, %{x}: %{y:.1f} points<extra></extra>`,
        })),
        layout: layout({ barmode: "group", bargap: 0.25, xaxis: axis("task", { type: "category" }), yaxis: axis("points forgotten") }),
      }), null, width));
  }

  function matrices(block) {
    const T = block.tasks.length;
    const after = ["before", ...block.tasks.map((_, i) => String(i + 1))];
    const rows = block.rows.map((row) => heatmap(row.label, () => {
      const first = row.matrix[0].some((v) => v !== null) ? 0 : 1;
      return {
        z: row.matrix.slice(first), x: block.tasks, y: after.slice(first), range: [0, 100], text: T <= 10,
        xTitle: "evaluated on", yTitle: "tasks learned",
        customdata: row.matrix_std.slice(first).map((r) => r.map((s) => (s === null ? "" : ` ± ${s.toFixed(1)}`))),
        hover: "after %{y} tasks, %{x}: %{z:.1f}%{customdata} %<extra></extra>",
      };
    }, 320));
    const made = card("Accuracy matrices", "Accuracy on every task (columns) after every task (rows), mean over seeds. Below the diagonal lies the past.",
      el("div", { class: "grid", style: "--cell:330px" }, ...rows));
    made.classList.add("long");
    return made;
  }

  function confusions(block) {
    const told = block.rows.filter((row) => row.confusion);
    if (!told.length) return null;
    const rows = told.map((row) => heatmap(row.label, () => ({
      z: row.confusion, x: block.tasks, y: block.tasks, range: [0, 100], text: block.tasks.length <= 10,
      xTitle: "taken for", yTitle: "task", customdata: row.confusion.map((r) => r.map(() => "")),
      hover: "%{y} taken for %{x}: %{z:.1f} %<extra></extra>",
    }), 320));
    const made = card("Confusion by task", "Share of a task's samples (rows) whose answer is a class of another task (columns), at the end, mean over seeds. A dark last column is recency bias.",
      el("div", { class: "grid", style: "--cell:330px" }, ...rows));
    made.classList.add("long");
    return made;
  }

  function inGeneral(block) {
    const told = block.rows.filter((row) => row.general);
    if (!told.length) return null;
    const rows = told.map((row) => heatmap(row.label, () => ({
      z: row.general.scores, x: row.general.tasks, y: row.general.learned, range: [0, 100], text: row.general.tasks.length <= 10,
      xTitle: "task of the harness", yTitle: "tasks learned", customdata: row.general.scores.map((r) => r.map(() => "")),
      hover: "%{y}, %{x}: %{z:.1f} %<extra></extra>",
    }), 320));
    const made = card("In general", "Scores on tasks that the stream does not teach (columns) after every task (rows), mean over seeds; the last row is the change since before the first task, in points.",
      el("div", { class: "grid", style: "--cell:330px" }, ...rows));
    made.classList.add("long");
    return made;
  }

  function layerNames(block, quantity) {
    return [...new Set(block.rows.flatMap((row) => Object.keys(row.layers[quantity] || {})))];
  }

  function perLayer(block, quantity, title, how, yTitle, factor, y) {
    const names = layerNames(block, quantity);
    if (!names.length) return null;
    const x = block.tasks.map((_, i) => i + 1);
    const scaled = (v) => (v === null ? null : v * factor);
    const shown = some(names.length, MOST_TASKS).map((i) => names[i]);
    const left = shown.length < names.length ? ` ${shown.length} of ${names.length} layers are shown.` : "";
    return card(title, how + left, el("div", { class: "grid small", style: "--cell:300px" }, ...shown.map((name) => lines(block, 210, name, (row) => {
      const found = (row.layers[quantity] || {})[name];
      return found ? { x, spread: { mean: found.mean.map(scaled), std: found.std.map(scaled) } } : null;
    }, yTitle, factor === 100 ? " %" : "", { y }))));
  }

  function alignment(block, quantity, title, how) {
    const found = block.rows.filter((row) => row.layers[quantity]);
    if (!found.length) return null;
    const all = found.flatMap((row) => Object.values(row.layers[quantity]).flatMap((l) => l.mean)).filter((v) => v !== null);
    const most = Math.max(1e-6, ...all) * 100;
    const grid = el("div", { class: "grid", style: "--cell:330px" }, ...found.map((row) => {
      const names = Object.keys(row.layers[quantity]);
      return heatmap(row.label, () => ({
        z: names.map((name) => row.layers[quantity][name].mean.map((v) => (v === null ? null : 100 * v))),
        x: block.tasks.map((_, i) => String(i + 1)), y: names, range: [0, most], text: false,
        xTitle: "task being learned", yTitle: "layer", hover: "%{y}, task %{x}: %{z:.2f} %<extra></extra>",
      }), 90 + 26 * Math.min(names.length, 14) + 20);
    }));
    return card(title, how, grid);
  }

  function costs(block) {
    const columns = [{ name: "strategy", left: true }, ...data.costs.map((c) => ({ name: c.name }))];
    const rows = block.rows.map((row) => [
      { text: row.label, ...swatch(row) }, ...data.costs.map((c) => ({ text: row.costs[c.key].text, value: row.costs[c.key].value })),
    ]);
    return card("Cost", "Mean over seeds. Samples count passes that training and the strategy asked for, evaluation aside.",
      table(columns, rows, block.rows.map((r) => (r.bound ? "bound" : ""))),
      block.warnings.length ? el("ul", { class: "warnings" }, el("li", {}, el("b", {}, "Rows differ by more than 10 % in")), ...block.warnings.map((w) => el("li", {}, w))) : null);
  }

  function settings(block) {
    if (!block.differences.length) return null;
    const columns = [{ name: "setting", left: true }, ...block.rows.map((r) => ({ name: r.label, left: true }))];
    const rows = block.differences.map((d) => {
      const counts = {};
      d.values.forEach((v) => { counts[v] = (counts[v] || 0) + 1; });
      const usual = Object.keys(counts).sort((a, b) => counts[b] - counts[a])[0];
      return [{ text: d.key }, ...d.values.map((v) => ({ text: v, class: v !== usual && v !== "" ? "differs" : "" }))];
    });
    const commands = block.rows.filter((r) => r.command).map((r) => el("li", {}, el("code", {}, r.command)));
    const made = card("How the rows differ", "Settings that are not the same everywhere; empty where a strategy has no such setting.",
      table(columns, rows), commands.length ? el("details", { style: "margin-top:8px" }, el("summary", {}, "Commands, one seed each"), el("ul", { class: "remarks" }, ...commands)) : null);
    made.classList.add("long");
    return made;
  }

  function legend(block) {
    const buttons = block.rows.map((row) => {
      const button = el("button", {
        type: "button", "aria-pressed": "true", title: "show or hide in the charts",
        onclick: () => {
          row.hidden = !row.hidden;
          button.setAttribute("aria-pressed", String(!row.hidden));
          drawAll(block);
        },
      }, el("i", { class: row.dash, style: `border-color:${colour(row)}` }), row.label);
      return button;
    });
    return el("div", { class: "legend" }, ...buttons);
  }

  function section(block, index) {
    let place = 0;
    block.rows.forEach((row) => {
      row.place = row.bound ? 0 : place++;
      row.dash = row.bound ? (row.bound === "lower" ? "dash" : "dot") : DASHES[Math.floor(row.place / 8) % 4];
      row.hidden = false;
    });
    block.visible = () => block.rows.filter((row) => !row.hidden);
    const from = charts.length;
    const parts = [
      results(block), differences(block), published(block),
      el("div", { class: "two" }, plane(block), mean(block)),
      forgetting(block), overTime(block), matrices(block), confusions(block), inGeneral(block),
      perLayer(block, "rank", "Rank of what each strategy protects", "Directions per layer, for strategies that keep a basis.", "rank", 1, { rangemode: "tozero" }),
      perLayer(block, "capacity_left", "Capacity left", "Share of each layer's input directions that are still free.", "free (%)", 100, { range: [0, 102] }),
      perLayer(block, "input_rank", "Rank of old inputs", "Measured alike for every strategy: directions that hold the old tasks' input energy.", "rank", 1, { rangemode: "tozero" }),
      alignment(block, "raw_share", "What gradients want: share inside the old subspace", "Share of the loss gradient, before a task's first step, that lies in old tasks' input directions."),
      alignment(block, "applied_share", "What updates did: share inside the old subspace", "The same for the weight change over the whole task. Dark: old directions were left alone."),
      costs(block), settings(block),
    ];
    const made = el("section", { class: "block", id: `block-${index}` },
      el("h2", {}, block.title, el("span", { class: "tag" }, block.known), el("span", { class: "tag" }, `${block.tasks.length} tasks`)),
      legend(block), ...parts.filter(Boolean));
    charts.slice(from).forEach((c) => { c.block = block; });
    return made;
  }

  // A table that came as text: {header, rows}, and which rows are bounds.
  function texts({ header, rows, bounds = [] }) {
    const columns = header.map((name, c) => ({ name, left: c === 0 }));
    const number = (text) => { const found = parseFloat(text.replace(/^> /, "")); return Number.isNaN(found) ? null : found; };
    const cells = rows.map((row) => row.map((text, c) => ({ text, value: c ? number(text) : undefined })));
    return table(columns, cells, rows.map((_, r) => (bounds[r] ? "bound" : "")));
  }

  function together(found) {
    return el("section", { class: "block" },
      el("h2", {}, found.title, el("span", { class: "tag" }, found.known)),
      card(found.card, found.about, texts(found)));
  }

  function differences(block) {
    return block.evidence ? card("How sure the differences are", block.evidence.about, texts(block.evidence)) : null;
  }

  function searches() {
    if (!data.searches.length) return null;
    const columns = [{ name: "strategy", left: true }, { name: "stream", left: true }, { name: "validation ACC (%)" }, { name: "run", left: true }];
    return el("section", { class: "block" }, el("h2", {}, "Search trials"), card("Never compared with the rows above",
      "Scored on validation data of the first tasks; they could not read test data.",
      table(columns, data.searches.map((s) => [{ text: s.strategy }, { text: s.stream }, { text: s.acc === null ? "-" : s.acc.toFixed(1), value: s.acc }, { text: s.directory }]))));
  }

  // -- the page ------------------------------------------------------------------------------

  function drawAll(block = null) {
    const wanted = charts.filter((c) => !block || c.block === block);
    // One after another, so that the page can be read while the rest is drawn.
    return wanted.reduce((before, one) => before.then(() => draw(one)), Promise.resolve());
  }

  function build() {
    const app = document.getElementById("app");
    charts.length = 0;
    const plural = data.runs === 1 ? "run" : "runs";
    const links = data.blocks.length > 1
      ? el("nav", {}, ...data.blocks.map((b, i) => el("a", { href: `#block-${i}` }, `${b.title} · ${b.known}`))) : null;
    app.replaceChildren(
      el("header", {}, el("h1", {}, "What was learned, kept and forgotten"),
        el("p", {}, `${data.runs} ${plural} from ${data.paths.join(", ")} · ${data.made} · cl_bench ${data.version}`), links),
      ...data.together.map(together),
      ...data.blocks.map(section),
      ...[searches()].filter(Boolean),
      el("footer", {}, ...data.left_out.map((l) => el("div", {}, `Left out: ${l}`)),
        el("div", {}, "Charts: plotly.js, MIT licence. Everything on this page is in this file.")));
    return drawAll().then(() => { document.documentElement.dataset.ready = "1"; });
  }

  dark.addEventListener("change", build);
  window.addEventListener("beforeprint", () => {
    printing = true;
    document.documentElement.classList.add("printing");
    document.getElementById("app").style.width = "690px";
    build();
    charts.forEach((c) => Plotly.Plots.resize(c.plot));
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    document.documentElement.classList.remove("printing");
    document.getElementById("app").style.width = "";
    build();
  });
  build();
})();
