// The overview: the stages' figures with their intervals, curves, time, settings.

function overview() {
  const several = DATA.runs.length > 1;
  return [
    several && el("p", DATA.runs.map((_, run) => runMark(run))),
    el("h2", "Before and after, on held-out problems"),
    el("div.scroll", figuresTable()),
    DATA.runs.flatMap((run, k) => pairedLines(run, k)),
    el("h2", "During training"),
    el("p.soft.small", "Points are training steps, lines their mean over the last twentieth of the run. Click a GRPO curve for that step's completions."),
    el("div.panels", CURVES.map(curvePanel)),
    el("details.settings", el("summary", "All metrics: what they mean, what is healthy, what to do"), el("div.scroll", metricsTable())),
    el("h2", "Time"),
    DATA.runs.map((run, k) => [several && el("p", runMark(k)), timeBars(run)]),
    el("h2", "Settings"),
    DATA.runs.map((run) => el("details.settings", el("summary", `${run.name}: ${run.weights || "weights unknown"}, ${run.device || "device unknown"}`), el("pre", run.config || "no config.yaml"))),
  ];
}

function figuresTable() {
  const head = ["stage", "accuracy and 95 % interval, 0 to 100 %", "", "lenient", "pass@k", "format", "cut off", "trace", "true steps", "reward", "tokens", "problems"];
  const rows = DATA.runs.flatMap((run, k) => wholeStages(run).map((stage) => el("tr",
    el("td", DATA.runs.length > 1 && runMark(k), titleOf(stage.name)),
    el("td.chart", interval(stage, k)),
    el("td", percent(stage.accuracy)),
    el("td", { title: "accuracy, where a lenient parser finds the answer in the text" }, percent(stage.lenient_accuracy)),
    el("td", stage.k ? { title: `k = ${stage.k} samples a problem` } : {}, percent(stage.pass_at_k)),
    el("td", percent(stage.format_rate)),
    el("td", percent(stage.truncation_rate)),
    el("td", number(stage.trace_score, 3)),
    el("td", { title: "of the lines of reasoning with an equation, those that are true" }, percent(stage.true_steps)),
    el("td", number(stage.reward, 3)),
    el("td", number(stage.completion_length, 1)),
    el("td", stage.n === undefined ? "–" : stage.n))));
  return el("table", el("thead", el("tr", head.map((name) => el("th", name)))), el("tbody", rows));
}

/** A run's evaluations but for the snapshots of a few problems. */
function wholeStages(run) {
  const most = Math.max(...run.stages.map((stage) => stage.n || 0));
  return run.stages.filter((stage) => !isSnapshot(stage.name) || stage.n === most);
}

/** A dot for the accuracy and a line for its interval, on an axis from 0 to 100 %. */
function interval(stage, run) {
  const x = (share) => 6 + 208 * share, node = svg("svg", { width: 220, height: 22, viewBox: "0 0 220 22", role: "img" });
  for (const share of [0, 0.5, 1]) node.append(svg("line", { class: "grid", x1: x(share), x2: x(share), y1: 2, y2: 20 }));
  if (!stage.accuracy_ci95) return node;
  const [low, high] = stage.accuracy_ci95, colour = `stroke:var(--run-${run % 6});fill:var(--run-${run % 6})`;
  node.append(svg("title", {}, `${percent(stage.accuracy)} (${percent(low)} to ${percent(high)})`),
    svg("line", { class: "whisker", style: colour, x1: x(low), x2: x(high), y1: 11, y2: 11 }),
    svg("circle", { class: "dot", style: colour, cx: x(stage.accuracy), cy: 11, r: 4 }));
  return node;
}

function pairedLines(run, k) {
  return Object.entries(run.paired).map(([name, pair]) => {
    const [after, before] = name.split("_vs_");
    const open = (way) => el("a", { href: "#" + fragment({ ...STATE, view: "problems", before, after, run: k, seek: way }) }, `${pair[way]} ${way}`);
    return el("p.small.number", DATA.runs.length > 1 && runMark(k), `${titleOf(after)} against ${titleOf(before)}, the same ${pair.n} problems: `,
      el("b", `${signed(100 * pair.difference, 1)} points`), ` (95 % interval ${signed(100 * pair.ci95[0], 1)} to ${signed(100 * pair.ci95[1], 1)}); `,
      open("gained"), ", ", open("lost"), `; exact McNemar p = ${pair.p_value.toPrecision(2)}`);
  });
}

// Metrics of metrics.jsonl: [stage, metric, title, axis].
const CURVES = [
  ["sft", "loss", "SFT loss", "nats a token"],
  ["grpo", "reward/mean", "Reward", "mean of completions"],
  ["grpo", "reward/correctness", "Accuracy in training", "share of completions"],
  ["grpo", "evaluation/accuracy", "Accuracy, held out", "snapshots, greedy"],
  ["grpo", "reward/trace", "Trace score", "mean"],
  ["grpo", "reward/format", "Format", "share well formed"],
  ["grpo", "loss", "GRPO loss", "about 0 on policy"],
  ["grpo", "entropy", "Entropy", "nats a token"],
  ["grpo", "completion_length/mean", "Completion length", "tokens"],
  ["grpo", "zero_signal_groups", "Zero-signal groups", "rewards all equal"],
  ["grpo", "logp_gap/mean", "Sampler–trainer gap", "mean |difference|, nats"],
  ["grpo", "grad_norm", "Gradient norm", "before clipping"],
];

function curvePanel([stage, metric, title, axis]) {
  const series = DATA.runs.map((run) => pointsOf(run.curves[stage], metric));
  const all = series.flat();
  if (!all.length) return null;
  const read = el("span.read", axis), panel = el("div.panel", el("h3", el("span", title), read));
  const W = 320, H = 150, left = 44, right = 8, top = 8, bottom = 26;
  const xs = [1, Math.max(2, ...all.map((point) => point[0]))], [low, high, ticks] = nice(all.map((point) => point[1]));
  const x = (step) => left + (W - left - right) * (step - xs[0]) / (xs[1] - xs[0]);
  const y = (value) => top + (H - top - bottom) * (high - value) / (high - low || 1);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `${title} over the steps` });
  for (const tick of ticks) picture.append(svg("line", { class: "grid", x1: left, x2: W - right, y1: y(tick), y2: y(tick) }), svg("text", { x: left - 5, y: y(tick) + 3.5, "text-anchor": "end" }, short(tick)));
  for (const step of [xs[0], Math.round((xs[0] + xs[1]) / 2), xs[1]]) picture.append(svg("text", { x: x(step), y: H - 13, "text-anchor": step === xs[1] ? "end" : "middle" }, step));
  picture.append(svg("text", { x: (left + W - right) / 2, y: H - 2, "text-anchor": "middle" }, stage === "sft" ? "SFT step" : "GRPO step"));
  series.forEach((points, run) => {
    const colour = `var(--run-${run % 6})`, window = Math.max(1, Math.floor(points.length / 20));
    for (const [step, value] of points) picture.append(svg("circle", { cx: x(step), cy: y(value), r: window > 1 ? 1.2 : 2.2, style: `fill:${colour};opacity:${window > 1 ? 0.4 : 1}` }));
    const path = runningMean(points, window).map(([step, value], k) => `${k ? "L" : "M"}${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("");
    picture.append(svg("path", { d: path, style: `fill:none;stroke:${colour};stroke-width:1.6` }));
  });
  const nearest = (event) => {
    const box = picture.getBoundingClientRect();
    return Math.round(xs[0] + ((event.clientX - box.left) / box.width * W - left) / (W - left - right) * (xs[1] - xs[0]));
  };
  picture.onmousemove = (event) => {
    const step = nearest(event), values = series.map((points) => points.find((point) => point[0] === step)?.[1]);
    read.textContent = values.some((value) => value !== undefined) ? `step ${step}: ${values.map((value) => (value === undefined ? "–" : short(value))).join(", ")}` : axis;
  };
  picture.onmouseleave = () => { read.textContent = axis; };
  if (stage === "grpo") picture.onclick = (event) => set({ view: "steps", step: nearest(event) });
  panel.append(picture);
  fill(panel, [metricNote(metric)]);
  return panel;
}

/** What a metric means, what is healthy, and what to do, behind a click. */
function metricNote(metric) {
  const note = DATA.metrics[metric];
  if (!note) return null;
  const [meaning, healthy, fix] = note;
  return el("details.note", el("summary", "What is healthy?"), el("p", meaning), el("p", el("b", "Healthy: "), healthy, "."), fix && el("p", el("b", "Else: "), fix));
}

function metricsTable() {
  const rows = Object.entries(DATA.metrics).map(([name, [meaning, healthy, fix]]) => el("tr", el("td", el("code", name)), el("td", meaning), el("td", healthy), el("td", fix)));
  return el("table.metrics", el("thead", el("tr", ["metric", "what it is", "healthy", "else"].map((name) => el("th", name)))), el("tbody", rows));
}

function pointsOf(curves, metric) {
  const steps = curves.step || [], values = curves[metric] || [];
  return steps.map((step, k) => [step, values[k]]).filter((point) => typeof point[1] === "number");
}

function runningMean(points, window) {
  let sum = 0;
  return points.map(([step, value], k) => {
    sum += value - (k >= window ? points[k - window][1] : 0);
    return [step, sum / Math.min(k + 1, window)];
  });
}

/** [low, high, ticks] of an axis that holds the values. */
function nice(values) {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === 0 && high === 0) high = 1;
  if (low === high) { low -= Math.abs(low) / 2 || 0.5; high += Math.abs(high) / 2 || 0.5; }
  const raw = (high - low) / 3, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * unit >= raw) * unit;
  const first = Math.floor(low / step), last = Math.ceil(high / step), ticks = [];
  for (let k = first; k <= last; k++) ticks.push(k * step);
  return [first * step, last * step, ticks];
}

function short(value) {
  const size = Math.abs(value);
  const text = size && (size < 0.001 || size >= 1e5) ? value.toExponential(0) : String(+value.toPrecision(3));
  return text.replace("-", "−");
}

function timeBars(run) {
  const { compile, ...parts } = run.seconds;
  const all = Object.values(parts).reduce((sum, value) => sum + value, 0);
  if (!all) return el("p.soft", "No times on file.");
  const label = (seconds) => (seconds < 100 ? `${number(seconds, 1)} s` : `${number(seconds / 60, 1)} min`);
  return [
    el("div.time", Object.entries(parts).flatMap(([name, seconds]) => [el("span", name.replace("_", " ")), el("i", { style: `width:${100 * seconds / all}%` }), el("span.number", label(seconds))])),
    el("p.small.soft", `${label(all)} in all` + (compile ? `, of which ${label(compile)} compiled programs.` : ".")),
  ];
}
