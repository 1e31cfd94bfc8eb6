// The groups of one training step.

function steps() {
  const run = STATE.run, all = [...STEPS[run].keys()].sort((a, b) => a - b);
  const runs = DATA.runs.length > 1 && choice("Run", "run", DATA.runs.map((each, k) => [k, each.name]), true);
  if (!all.length) return [el("div.bar-of-controls", runs), el("p", "There are no training rollouts.")];
  const passing = new Set(matches());
  const shown = all.filter((step) => [...STEPS[run].get(step).values()].some((rows) => rows.some((i) => passing.has(i))));
  const nearest = (wanted) => all.reduce((best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best));
  const step = nearest(STATE.step || all[0]);
  const go = (list, way) => () => {
    const next = way > 0 ? list.find((s) => s > step) : [...list].reverse().find((s) => s < step);
    if (next !== undefined) set({ step: next });
  };
  const slider = el("input", { type: "range", min: 0, max: all.length - 1, value: all.indexOf(step), "aria-label": "Training step", onchange: () => set({ step: all[slider.value] }), oninput: () => { label.textContent = `Step ${all[slider.value]}`; } });
  const label = el("b.number", `Step ${step}`);
  const groups = [...STEPS[run].get(step).entries()].filter(([, rows]) => rows.some((i) => passing.has(i)));
  return [
    el("div.bar-of-controls", runs,
      el("button", { onclick: go(shown, -1), id: "previous" }, "← Previous"), el("button", { onclick: go(shown, 1), id: "next" }, "Next →"),
      label, slider, colourChoice(), scale()),
    el("p.small.soft.number", stepFigures(run, step)),
    groups.map(([, rows]) => groupCard(rows)),
    groups.length < STEPS[run].get(step).size && el("p.soft", `${STEPS[run].get(step).size - groups.length} of this step's groups do not pass the filters.`),
  ];
}

function stepFigures(run, step) {
  const curves = DATA.runs[run].curves.grpo, k = (curves.step || []).indexOf(step);
  const of = [["reward/mean", "reward"], ["reward/correctness", "accuracy"], ["loss", "loss"], ["entropy", "entropy"], ["logp_gap/mean", "gap"], ["completion_length/mean", "tokens"], ["zero_signal_groups", "zero-signal groups"]];
  if (k < 0) return "No metrics of this step.";
  return of.filter(([name]) => typeof curves[name]?.[k] === "number").map(([name, label]) => `${label} ${short(curves[name][k])}`).join(" · ");
}

/** A prompt and its completions, the best paid first. */
function groupCard(rows) {
  const problem = problemOf(rows[0]), right = rows.filter((i) => has(i, RIGHT)).length;
  const sorted = [...rows].sort((a, b) => C.reward[b] - C.reward[a]);
  const alike = new Map(); // the same text at the same reward is drawn once
  for (const i of sorted) at(alike, `${C.reward[i]} ${C.text[i]}`, () => []).push(i);
  const equal = C.reward[sorted[0]] === C.reward[sorted[sorted.length - 1]];
  return el("section.group",
    el("p.prompt", { dir: "auto" }, problem.question),
    el("p.small.soft", "Answer: ", el("b", problem.answer), ` · ${[problem.difficulty, problem.domain].filter(Boolean).join(" · ").replace(/_/g, " ")} · ${right} of ${rows.length} right`, equal && " · equal rewards: no signal"),
    el("div.members", [...alike.values()].map((same) => member(same[0], same.length))));
}

/** A completion, and how often the group has it. */
function member(i, times) {
  const advantage = C.advantage[i], size = Math.min(50, 50 * Math.abs(advantage || 0) / 3);
  const clip = el("div.clip", rawText(i));
  clip.onclick = () => clip.classList.remove("clip", "long");
  if (C.text[i].length > 400 || C.text[i].split("\n").length > 10) clip.classList.add("long");
  const paid = DATA.components.map((name, k) => [name, C.components[i][k]]).filter(([, value]) => value).map(([name, value]) => `${name} ${number(value)}`).join(" · ");
  return el("div.member",
    el("div.figures", el("div", el("b", number(C.reward[i], 3)), " reward"),
      el("span.advantage", { title: "advantage, from −3 to +3" }, el(advantage >= 0 ? "i.up" : "i.down", { style: `width:${size}%` })),
      el("div", advantage === null ? "" : `advantage ${signed(advantage)}`), verdict(i), times > 1 && el("div", `${times} times`)),
    el("div", clip, el("div.facts", paid, paid && " · ", facts(i))));
}
