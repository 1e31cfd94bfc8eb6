// One held-out problem through all stages, and the map of all problems.

function problems() {
  const stages = [...new Set(DATA.runs.flatMap((_, run) => stagesOf(run)))];
  const shown = problemsShown();
  if (!HELD_OUT_PROBLEMS.length) return el("p", "There are no held-out completions yet.");
  const [before, after] = stagePair();
  const found = new Set(shown);
  const problem = HELD_OUT_PROBLEMS.includes(STATE.problem) ? STATE.problem : (shown[0] ?? HELD_OUT_PROBLEMS[0]);
  const of = (change) => shown.filter((p) => changeOf(p, before, after) === change);
  const gained = of("gained"), lost = of("lost");
  const place = shown.indexOf(problem);
  const go = (list, step) => () => {
    if (!list.length) return;
    const next = step > 0 ? list.find((p) => p > problem) ?? list[0] : [...list].reverse().find((p) => p < problem) ?? list[list.length - 1];
    set({ problem: next, sample: -1 });
  };
  return [
    el("div.bar-of-controls",
      el("button", { onclick: go(shown, -1), id: "previous" }, "← Previous"),
      el("button", { onclick: go(shown, 1), id: "next" }, "Next →"),
      el("button", { onclick: () => shown.length && set({ problem: shown[Math.floor(Math.random() * shown.length)], sample: -1 }), id: "random" }, "Random"),
      el("button", { onclick: go(gained, 1), disabled: !gained.length, id: "gained" }, `Gained (${gained.length})`),
      el("button", { onclick: go(lost, 1), disabled: !lost.length, id: "lost" }, `Lost (${lost.length})`),
      choice("from", "before", stages.map((name) => [name, titleOf(name)]), true),
      choice("to", "after", stages.map((name) => [name, titleOf(name)]), true),
      DATA.runs.length > 1 && choice("of", "run", DATA.runs.map((run, k) => [k, run.name]), true),
      colourChoice(), scale()),
    problemMap(problem, found, before, after),
    el("p.question", { dir: "auto" }, DATA.problems[problem].question),
    el("p.small.soft", "Answer: ", el("b", DATA.problems[problem].answer), ` · ${[DATA.problems[problem].difficulty, DATA.problems[problem].domain].filter(Boolean).join(" · ").replace(/_/g, " ")}`,
      ` · ${place < 0 ? "outside the filters" : `${place + 1} of ${counted(shown.length, "problem")}`}`),
    DATA.runs.map((_, run) => stageCards(run, problem)),
    el("p.small.soft", "✓ true step · ✗ false arithmetic · ○ true, but no new step · – sentence about the problem. Highlighted: words that the stage before did not say."),
  ];
}

/** The problems of which a held-out completion passes the filters. */
function problemsShown() {
  const passing = new Set(matches().filter((i) => C.stage[i] !== TRAINING).map((i) => C.prompt[i]));
  return HELD_OUT_PROBLEMS.filter((problem) => passing.has(problem));
}

/** The two stages that gained and lost compare: as chosen, else the last and the stage before it. */
function stagePair() {
  const names = stagesOf(STATE.run);
  const after = names.includes(STATE.after) ? STATE.after : names[names.length - 1];
  const earlier = names.slice(0, names.indexOf(after)).filter((name) => !isSnapshot(name));
  const before = names.includes(STATE.before) ? STATE.before : (earlier[earlier.length - 1] ?? names[0]);
  STATE.before = before;
  STATE.after = after;
  return [before, after];
}

function changeOf(problem, before, after) {
  const [was, is] = [isRightAt(STATE.run, problem, before), isRightAt(STATE.run, problem, after)];
  if (was === null || is === null) return "none";
  return is ? (was ? "kept" : "gained") : was ? "lost" : "never";
}

const MOST_CELLS = 1500;

/** A cell for each problem: gained, lost, right both times, or wrong both times. */
function problemMap(current, found, before, after) {
  const keys = [["gained", "gained"], ["lost", "lost"], ["kept", "right both times"], ["never", "wrong both times"]];
  const cells = HELD_OUT_PROBLEMS.slice(0, MOST_CELLS).map((problem) => {
    const change = changeOf(problem, before, after);
    return el(`button.${change}${found.has(problem) ? "" : ".dim"}`, {
      title: DATA.problems[problem].question.slice(0, 120), "aria-label": `problem ${problem}, ${change}`, "aria-current": problem === current ? "true" : null,
      onclick: () => set({ problem, sample: -1 }),
    });
  });
  return [el("div.map", cells), el("div", keys.map(([name, label]) => el("span.key", el("i." + name), label)),
    HELD_OUT_PROBLEMS.length > MOST_CELLS && el("span.small.soft", `the first ${MOST_CELLS} problems`))];
}

/** A run's completions of a problem, a card for each stage. */
function stageCards(run, problem) {
  const held = HELD_OUT[run].get(problem);
  if (!held) return DATA.runs.length > 1 ? el("p.soft", runMark(run), "was not measured on this problem.") : null;
  let before = null;
  const cards = stagesOf(run).filter((name) => held.has(DATA.stages.indexOf(name))).map((name) => {
    const samples = held.get(DATA.stages.indexOf(name));
    const i = samples.get(STATE.sample) ?? samples.values().next().value;
    const card = stageCard(name, samples, i, before);
    before = i;
    return card;
  });
  return [DATA.runs.length > 1 && el("h3", runMark(run)), el("div.cards", cards)];
}

function stageCard(name, samples, i, before) {
  const pills = [...samples.keys()].sort((a, b) => a - b).map((sample) => el("button." + (has(samples.get(sample), RIGHT) ? "right" : "wrong"), {
    "aria-pressed": samples.get(sample) === i ? "true" : "false", title: sample < 0 ? "the greedy completion" : `sample ${sample + 1}`,
    onclick: () => set({ sample }),
  }, sample < 0 ? "greedy" : String(sample + 1)));
  return el("section.card", { "data-stage": name },
    el("header", el("b", titleOf(name)), verdict(i)),
    el("div.pills", pills),
    STATE.colour === "none" ? parsedText(i, before) : rawText(i),
    bars(i),
    el("div.facts", `reward ${number(C.reward[i])} · `, facts(i)));
}
