// The state, which is the link's fragment, and the page drawn from it.

const FILTERS = ["q", "runs", "stage", "kind", "from", "to", "difficulty", "domain", "right", "format", "ended", "arithmetic", "low", "high"];
const DEFAULTS = { view: "overview", problem: HELD_OUT_PROBLEMS[0] ?? 0, sample: -1, run: 0, step: 0, before: "", after: "", seek: "", colour: "none", sort: "order", page: 0, ...Object.fromEntries(FILTERS.map((name) => [name, ""])) };
const VIEWS = { overview: ["Overview", overview], problems: ["Problems", problems], steps: ["Steps", steps], list: ["Completions", list] };
const STATE = { ...DEFAULTS };

function fragment(state) {
  const said = Object.entries(state).filter(([name, value]) => String(value) !== String(DEFAULTS[name]));
  return new URLSearchParams(said).toString();
}

/** Takes the state from a link; what is no state of this page is left at its default. */
function readFragment(link = location.hash) {
  Object.assign(STATE, DEFAULTS);
  for (const [name, text] of new URLSearchParams(link.slice(1))) {
    if (!(name in DEFAULTS)) continue;
    const value = typeof DEFAULTS[name] === "number" ? Number(text) : text;
    if (!Number.isNaN(value)) STATE[name] = value;
  }
  if (!Object.hasOwn(VIEWS, STATE.view)) STATE.view = DEFAULTS.view;
  if (!Object.hasOwn(SORTS, STATE.sort)) STATE.sort = DEFAULTS.sort;
  if (!Object.hasOwn(BACKGROUNDS, STATE.colour)) STATE.colour = DEFAULTS.colour;
  if (!(STATE.run in DATA.runs)) STATE.run = 0;
  STATE.page = Math.max(0, Math.floor(STATE.page));
}

/** Changes fields of the state, the link with them, and draws the page. */
function set(change) {
  for (const [name, value] of Object.entries(change)) STATE[name] = typeof DEFAULTS[name] === "number" ? Number(value) : value;
  if (FILTERS.some((name) => name in change)) STATE.page = 0;
  const link = "#" + fragment(STATE);
  try {
    if ("view" in change) history.pushState(null, "", link);
    else history.replaceState(null, "", link);
  } catch { /* A frame without an address of its own, as in some notebooks. */ }
  draw();
  if ("view" in change) scrollTo(0, 0);
}

function draw() {
  if (STATE.seek) seek();
  const tabs = Object.entries(VIEWS).map(([view, [label]]) => el("button", { "aria-current": STATE.view === view ? "page" : null, onclick: () => set({ view }) }, label));
  document.getElementById("tabs").replaceChildren(...tabs);
  const filters = document.getElementById("filters");
  filters.hidden = STATE.view === "overview";
  const form = document.getElementById("filter-form");
  if (!form.contains(document.activeElement) || !form.children.length) {
    form.replaceChildren();
    fill(form, filterForm());
  }
  const active = FILTERS.filter((name) => STATE[name] !== "").length;
  document.getElementById("filter-summary").textContent = `Filters${active ? ` (${active})` : ""}: ${matches().length.toLocaleString("en")} of ${counted(COUNT, "completion")}`;
  const view = document.getElementById("view");
  view.replaceChildren();
  fill(view, [VIEWS[STATE.view][1]()]);
  const map = view.querySelector(".map"), current = map?.querySelector("[aria-current]");
  if (current) map.scrollTop = current.offsetTop - map.offsetTop - map.clientHeight / 2;
}

/** Goes to the first problem that was gained, or lost, between the two stages. */
function seek() {
  const way = STATE.seek, [before, after] = stagePair();
  STATE.seek = "";
  const first = HELD_OUT_PROBLEMS.find((problem) => changeOf(problem, before, after) === way);
  if (first !== undefined) STATE.problem = first;
}

document.title = `${DATA.runs.map((run) => run.name).join(", ")} · gemma_grpo`;
document.getElementById("title").textContent = DATA.runs.map((run) => run.name).join(", ");
fill(document.getElementById("notes"), DATA.runs.flatMap((run) => run.notes.map((note) => el("p", DATA.runs.length > 1 && `${run.name}: `, note))));
document.getElementById("notes").append(el("p", "The address holds what is shown: a copied link opens it again. Keys: ← → move, r random, g gained, l lost."));
document.getElementById("filter-form").onsubmit = (event) => event.preventDefault();
// In a notebook's frame a link to a fragment would leave the page.
addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (!link || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  readFragment(link.getAttribute("href"));
  set({ view: STATE.view });
});
addEventListener("hashchange", () => { readFragment(); draw(); });
addEventListener("popstate", () => { readFragment(); draw(); });
addEventListener("keydown", (event) => {
  if (event.target.closest("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const name = { ArrowLeft: "previous", ArrowRight: "next", r: "random", g: "gained", l: "lost" }[event.key];
  document.getElementById(name)?.click();
});
readFragment();
document.getElementById("filters").open = FILTERS.some((name) => STATE[name] !== "");
draw();
