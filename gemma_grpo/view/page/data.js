"use strict";
// The data of the page, and what is read from it. Encodings: gemma_grpo/view/completions.py.

const DATA = JSON.parse(document.getElementById("data").textContent);
const C = DATA.completions;
const COUNT = C.run.length;
const TRAINING = DATA.stages.indexOf("training");
const REASONING = 1, ANSWER = 2, WELL_FORMED = 4, STOPPED = 8, RIGHT = 16, LENIENT_RIGHT = 32;

const has = (i, flag) => (C.flags[i] & flag) !== 0;
const problemOf = (i) => DATA.problems[C.prompt[i]];

// [run][problem] -> stage -> sample -> completion, of the held-out problems.
const HELD_OUT = DATA.runs.map(() => new Map());
// [run] -> step -> group -> completions, of training.
const STEPS = DATA.runs.map(() => new Map());
for (let i = 0; i < COUNT; i++) {
  const run = C.run[i];
  if (C.stage[i] === TRAINING) {
    const groups = at(STEPS[run], C.step[i], () => new Map());
    at(groups, C.group[i], () => []).push(i);
  } else {
    const stages = at(HELD_OUT[run], C.prompt[i], () => new Map());
    at(stages, C.stage[i], () => new Map()).set(C.sample[i], i);
  }
}
const HELD_OUT_PROBLEMS = [...new Set(HELD_OUT.flatMap((problems) => [...problems.keys()]))].sort((a, b) => a - b);

/** The value of a key in a Map, made where it is absent. */
function at(map, key, make) {
  if (!map.has(key)) map.set(key, make());
  return map.get(key);
}

/** The names of a run's evaluations that are on the page, in order. */
function stagesOf(run) {
  return DATA.runs[run].stages.map((stage) => stage.name).filter((name) => DATA.stages.includes(name));
}

/** Whether an evaluation is of a step of training. */
const isSnapshot = (name) => name.includes("-step-");

/** What a reader calls a stage: grpo-step-000020 is "grpo step 20". */
const titleOf = (name) => name.replace(/-step-0*(\d+)$/, " step $1");

/** Whether a run's greedy completion of a problem is right at a stage; null where there is none. */
function isRightAt(run, problem, stage) {
  const i = HELD_OUT[run].get(problem)?.get(DATA.stages.indexOf(stage))?.get(-1);
  return i === undefined ? null : has(i, RIGHT);
}

/** The tokens of a completion: [{start, end, logp, gap}], places in its text; empty if not kept. */
function tokensOf(i) {
  const characters = [...C.text[i]], tokens = [];
  const starts = [0]; // of each character, in the units that slice() counts
  for (const character of characters) starts.push(starts[starts.length - 1] + character.length);
  const lengths = [...C.lengths[i]], levels = [...C.logps[i]], gaps = [...C.gaps[i]];
  let place = 0;
  for (let t = 0; t < lengths.length; t++) {
    const end = Math.min(place + lengths[t].codePointAt(0) - 64, characters.length);
    const level = levels[t].codePointAt(0) - 64;
    const gap = gaps.length ? gaps[t].codePointAt(0) - 64 : null;
    tokens.push({
      start: starts[place], end: starts[end], logp: -((level / 24) ** 2),
      gap: gap === null ? null : gap === 0 ? 0 : (gap % 2 ? -1 : 1) * 10 ** ((gap >> 1) / 5 - 7),
    });
    place = end;
  }
  return tokens;
}

const isSpace = (character) => character !== "\ufeff" && /[\s\x1c-\x1f\x85]/.test(character);

/** The parts of a completion as the rewards read it: [{role, start, end, kind}]. */
function partsOf(i) {
  const text = C.text[i], parts = [];
  const blocks = [];
  for (const [role, bit] of [["reasoning", REASONING], ["answer", ANSWER]]) {
    const open = text.indexOf(`<${role}>`), close = text.indexOf(`</${role}>`);
    // The page has the beginning of a very long completion alone.
    if (has(i, bit) && open >= 0) blocks.push([role, open + role.length + 2, close < 0 ? text.length : close, role.length + 3]);
  }
  blocks.sort((a, b) => a[1] - b[1]);
  let place = 0;
  const outside = (end) => {
    if (text.slice(place, end).trim()) parts.push({ role: "outside", start: place, end });
  };
  for (const [role, open, close, tag] of blocks) {
    outside(open - (tag - 1));
    let [start, end] = [open, close];
    while (start < end && isSpace(text[start])) start++;
    while (end > start && isSpace(text[end - 1])) end--;
    if (role === "answer") parts.push({ role, start, end });
    else linesOf(text, start, end).forEach((line, number) => parts.push({ role, ...line, kind: C.lines[i][number] || "." }));
    place = close + tag;
  }
  outside(text.length);
  return parts;
}

/** The lines of a stretch of text, cut where Python's splitlines() cuts. */
function linesOf(text, start, end) {
  const lines = [], breaks = /\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]/g;
  breaks.lastIndex = start;
  for (let match; (match = breaks.exec(text)) && match.index < end; start = breaks.lastIndex) {
    lines.push({ start, end: match.index });
  }
  lines.push({ start, end });
  return lines;
}

/** Stretches of words in `after` that `before` has not, by the longest common subsequence. */
function newWords(before, after) {
  const words = (text) => [...text.matchAll(/\S+/g)].slice(0, 400).map((m) => ({ word: m[0], start: m.index, end: m.index + m[0].length }));
  const a = words(before), b = words(after);
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let x = a.length - 1; x >= 0; x--) {
    for (let y = b.length - 1; y >= 0; y--) {
      lengths[x][y] = a[x].word === b[y].word ? lengths[x + 1][y + 1] + 1 : Math.max(lengths[x + 1][y], lengths[x][y + 1]);
    }
  }
  const fresh = [];
  let x = 0, y = 0;
  while (y < b.length) {
    if (x < a.length && a[x].word === b[y].word) { x++; y++; }
    else if (x < a.length && lengths[x + 1][y] >= lengths[x][y + 1]) x++;
    else {
      const last = fresh[fresh.length - 1];
      if (last && /^[ \t]*$/.test(after.slice(last.end, b[y].start))) last.end = b[y].end;
      else fresh.push({ start: b[y].start, end: b[y].end });
      y++;
    }
  }
  return fresh;
}
