// All completions that pass the filters, a page at a time; the filters themselves.

const PAGE = 40;
const SORTS = {
  order: ["in order", null],
  unsure: ["least sure first", (i) => C.logp[i] ?? 9],
  low: ["lowest reward first", (i) => C.reward[i]],
  high: ["highest reward first", (i) => -C.reward[i]],
  long: ["longest first", (i) => -(C.tokens[i] ?? 0)],
  false: ["most false steps first", (i) => -(C.lines[i].split("f").length - 1)],
};

function list() {
  let found = matches();
  const key = SORTS[STATE.sort][1];
  if (key) found = [...found].sort((a, b) => key(a) - key(b) || a - b);
  const pages = Math.max(1, Math.ceil(found.length / PAGE)), page = Math.min(STATE.page, pages - 1);
  const turn = (to) => ({ onclick: () => { set({ page: to }); scrollTo(0, 0); }, disabled: to < 0 || to >= pages });
  const controls = () => el("div.bar-of-controls", el("button", turn(page - 1), "← Previous"), el("button", turn(page + 1), "Next →"),
    el("span.soft.number", `page ${page + 1} of ${pages.toLocaleString("en")}`));
  return [
    el("div.bar-of-controls", choice("Sort", "sort", Object.entries(SORTS).map(([name, [label]]) => [name, label]), true), colourChoice(), scale()),
    found.length ? found.slice(page * PAGE, (page + 1) * PAGE).map(listRow) : el("p", "No completion passes the filters."),
    pages > 1 && controls(),
  ];
}

function listRow(i) {
  const problem = problemOf(i), training = C.stage[i] === TRAINING;
  const where = training ? `step ${C.step[i]}` : titleOf(DATA.stages[C.stage[i]]) + (C.sample[i] < 0 ? ", greedy" : `, sample ${C.sample[i] + 1}`);
  const target = training ? { view: "steps", run: C.run[i], step: C.step[i] } : { view: "problems", problem: C.prompt[i], sample: C.sample[i] };
  const clip = el("div.clip", rawText(i, 1200));
  clip.onclick = () => clip.classList.remove("clip", "long");
  if (C.text[i].length > 1200 || C.text[i].split("\n").length > 10) clip.classList.add("long");
  return el("article.row",
    el("div", DATA.runs.length > 1 && el("div", runMark(C.run[i])), el("button.open", { onclick: () => set(target) }, where), el("div", verdict(i)),
      el("div.small.soft.number", `reward ${number(C.reward[i])}`), el("div.small.soft", (problem.difficulty || "") + (C.tokens[i] === null ? "" : ` · ${counted(C.tokens[i], "token")}`))),
    el("div", el("div.soft.small", { dir: "auto" }, problem.question, " ", el("b", problem.answer)), clip));
}

let lowered = null; // texts in lower case, made at the first search
let known = { key: null, found: [] };

/** The completions that pass the filters, in order. */
function matches() {
  const key = FILTERS.map((name) => STATE[name]).join("\u0000");
  if (known.key !== key) known = { key, found: filtered() };
  return known.found;
}

function filtered() {
  const S = STATE, tests = [];
  const flag = (field, bit) => S[field] !== "" && tests.push((i) => has(i, bit) === (S[field] === "yes"));
  if (S.runs !== "") tests.push((i) => C.run[i] === Number(S.runs));
  if (S.stage !== "") tests.push((i) => DATA.stages[C.stage[i]] === S.stage);
  if (S.kind !== "") tests.push((i) => (C.stage[i] === TRAINING ? "training" : C.sample[i] < 0 ? "greedy" : "sampled") === S.kind);
  if (S.from !== "") tests.push((i) => C.step[i] >= Number(S.from));
  if (S.to !== "") tests.push((i) => C.step[i] <= Number(S.to));
  if (S.difficulty !== "") tests.push((i) => problemOf(i).difficulty === S.difficulty);
  if (S.domain !== "") tests.push((i) => problemOf(i).domain === S.domain);
  flag("right", RIGHT);
  flag("format", WELL_FORMED);
  flag("ended", STOPPED);
  if (S.low !== "") tests.push((i) => C.reward[i] >= Number(S.low));
  if (S.high !== "") tests.push((i) => C.reward[i] <= Number(S.high));
  if (S.arithmetic !== "") tests.push((i) => C.lines[i].includes("f") === (S.arithmetic === "yes"));
  if (S.q !== "") {
    const wanted = S.q.toLowerCase();
    lowered ??= { texts: C.text.map((text) => text.toLowerCase()), questions: DATA.problems.map((p) => p.question.toLowerCase()) };
    tests.push((i) => lowered.texts[i].includes(wanted) || lowered.questions[C.prompt[i]].includes(wanted));
  }
  const found = [];
  for (let i = 0; i < COUNT; i++) if (tests.every((test) => test(i))) found.push(i);
  return found;
}

/** The filters' form, made once; its fields follow the state. */
function filterForm() {
  const named = (values) => [["", "any"], ...values.map((value) => [value, value.replace(/_/g, " ")])];
  const yes = (is, not) => [["", "any"], ["yes", is], ["no", not]];
  const seen = (field) => [...new Set(DATA.problems.map((problem) => problem[field]).filter(Boolean))];
  const typed = (label, field, attributes, wide) => {
    let waiting;
    const input = el("input", { name: field, value: STATE[field], ...attributes, oninput: () => { clearTimeout(waiting); waiting = setTimeout(() => set({ [field]: input.value, page: 0 }), 150); } });
    return el(wide ? "label.wide" : "label", label, input);
  };
  const pick = (label, field, pairs) => (pairs.length > 2 ? choice(label, field, pairs) : null);
  const steps = { type: "number", min: 0, step: 1 }, rewards = { type: "number", step: "any" };
  return [
    typed("Search in completions and questions", "q", { type: "search" }, true),
    DATA.runs.length > 1 && choice("Run", "runs", [["", "any"], ...DATA.runs.map((run, k) => [String(k), run.name])]),
    choice("Stage", "stage", [["", "any"], ...DATA.stages.map((name) => [name, titleOf(name)])]),
    choice("Kind", "kind", [["", "any"], ["greedy", "held out, greedy"], ["sampled", "held out, sampled"], ["training", "training"]]),
    typed("Step from", "from", steps), typed("to", "to", steps),
    pick("Difficulty", "difficulty", named(seen("difficulty"))), pick("Domain", "domain", named(seen("domain"))),
    choice("Answer", "right", yes("right", "wrong")), choice("Format", "format", yes("well formed", "not")),
    choice("End", "ended", yes("stopped itself", "cut off")), choice("Arithmetic", "arithmetic", yes("a false step", "no false step")),
    typed("Reward from", "low", rewards), typed("to", "high", rewards),
    el("button", { type: "button", onclick: (event) => { event.target.blur(); set(Object.fromEntries([...FILTERS.map((name) => [name, ""]), ["page", 0]])); } }, "Clear"),
  ];
}
