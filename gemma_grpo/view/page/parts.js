// Elements that several views share. Text of the model only ever becomes a text node.

/** An element: el("p.soft", {title: "x", onclick}, "text", child, [children]). */
function el(name, ...rest) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  fill(node, rest);
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function fill(node, parts) {
  for (const part of parts.flat(Infinity)) {
    if (part === null || part === undefined || part === false) continue;
    if (part instanceof Node || typeof part !== "object") node.append(part);
    else for (const [name, value] of Object.entries(part)) {
      if (typeof value === "function") node[name] = value;
      else if (/^on/i.test(name)) continue; // no handler from a run's files
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
  }
}

function number(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  const text = value.toFixed(digits);
  return Number(text) === 0 ? (0).toFixed(digits) : text.replace("-", "−"); // no minus zero
}
const signed = (value, digits = 2) => (value > 0 ? "+" : "") + number(value, digits);
const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1) + " %");
const counted = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

/** A select of [value, label] pairs that sets a field of the state. */
function choice(label, field, pairs, inline = false) {
  const select = el("select", { name: field, onchange: () => set({ [field]: select.value }) },
    pairs.map(([value, text]) => el("option", { value, selected: String(STATE[field]) === String(value) }, text)));
  return el(inline ? "label.inline" : "label", label, select);
}

function verdict(i) {
  if (has(i, RIGHT)) return el("span.verdict.right", "✓ right");
  const why = !has(i, STOPPED) ? "cut off" : !has(i, ANSWER) ? "no answer block" : "wrong";
  return el("span.verdict.wrong", "✗ " + why, has(i, LENIENT_RIGHT) && { title: "A lenient parser finds the right answer in the text." }, has(i, LENIENT_RIGHT) && ", right in prose");
}

const BACKGROUNDS = {
  none: null,
  logp: (token) => `rgba(var(--surprise), ${Math.min(0.85, 0.32 * Math.sqrt(-token.logp)).toFixed(2)})`,
  gap: (token) => token.gap ? `rgba(var(--gap), ${Math.min(0.85, Math.max(0, (7 + Math.log10(Math.abs(token.gap))) / 7)).toFixed(2)})` : "",
  advantage: (token, advantage) => `rgba(var(${advantage >= 0 ? "--good" : "--bad"}), ${Math.min(0.6, Math.abs(advantage) / 3.5).toFixed(2)})`,
};

/** What the colours of tokens mean. */
function scale() {
  const shown = (tokens, labels) => el("span.scale", tokens.map((token, k) => el("span", { style: "background:" + BACKGROUNDS[STATE.colour](token, token.advantage) }, labels[k])));
  if (STATE.colour === "logp") return shown([0.99, 0.5, 0.1, 0.01].map((p) => ({ logp: Math.log(p) })), ["p 0.99", "0.5", "0.1", "0.01"]);
  if (STATE.colour === "gap") return shown([1e-6, 1e-4, 1e-2, 1e-1].map((gap) => ({ gap })), ["|gap| 1e−6", "1e−4", "0.01", "0.1 nats"]);
  if (STATE.colour === "advantage") return shown([-2, -1, 1, 2].map((advantage) => ({ advantage })), ["−2", "−1", "+1", "+2"]);
  return null;
}

const colourChoice = () => choice("Colour tokens by", "colour", [["none", "nothing"], ["logp", "log-prob"], ["gap", "sampler–trainer gap"], ["advantage", "advantage"]], true);

/** Appends text[start:end], stretches of `marks` wrapped by `wrap(mark)`. */
function paint(node, text, start, end, marks, wrap) {
  let place = start;
  for (const mark of marks) {
    const from = Math.max(mark.start, place), to = Math.min(mark.end, end);
    if (from >= to) continue;
    if (from > place) node.append(text.slice(place, from));
    const wrapped = wrap(mark);
    wrapped.append(text.slice(from, to));
    node.append(wrapped);
    place = to;
  }
  if (place < end) node.append(text.slice(place, end));
  return node;
}

const LONG = 3000; // characters of a completion that are drawn at once

/** A completion's raw text, its tokens coloured as the state says. */
function rawText(i, limit = LONG) {
  const text = C.text[i], end = Math.min(text.length, limit);
  const node = el("div.text", { dir: "auto" });
  const colour = BACKGROUNDS[STATE.colour];
  const tokens = colour ? tokensOf(i) : [];
  paint(node, text, 0, end, tokens, (token) => el("span.token", {
    style: "background:" + colour(token, C.advantage[i] || 0),
    title: `log-prob ${number(token.logp, 2)} (p ${number(Math.exp(token.logp), 2)})` + (token.gap === null ? "" : `, trainer − sampler ${token.gap.toExponential(0)}`),
  }));
  if (colour && !tokens.length) node.append(el("div.small.soft", "No token log-probs on file."));
  return [node, rest(i, end)];
}

/** The button that shows what is left of a long text, and what the page has not. */
function rest(i, shown) {
  const text = C.text[i], nodes = [];
  if (shown < text.length) {
    const button = el("button.small", { onclick: () => button.replaceWith(el("div.text", { dir: "auto" }, text.slice(shown))) },
      `Show ${(text.length - shown).toLocaleString("en")} more characters`);
    nodes.push(button);
  }
  if (C.cut[i]) nodes.push(el("p.small.soft", `${C.cut[i].toLocaleString("en")} more characters are in the run's files.`));
  return nodes;
}

const KINDS = {
  e: ["✓", "A true equation on this problem's numbers: a step."],
  i: ["○", "True, but not a new step on this problem's numbers."],
  f: ["✗", "The arithmetic is false."],
  s: ["–", "A sentence about this problem."],
  ".": ["", ""],
};

/** A completion as reasoning, line by line, and answer; words that `before` has not are marked. */
function parsedText(i, before) {
  const parts = partsOf(i), text = C.text[i], nodes = [];
  const marks = before === null ? [] : newWords(C.text[before], text);
  const painted = (node, part) => paint(node, text, part.start, Math.min(part.end, LONG), marks, () => el("mark"));
  let role = "";
  for (const part of parts) {
    if (part.start >= LONG) break;
    if (part.role !== role) nodes.push(el("div.part", part.role === "outside" && parts.length > 1 ? "outside the format" : part.role === "outside" ? "no block that can be read" : part.role));
    role = part.role;
    if (role === "reasoning") {
      const [sign, title] = KINDS[part.kind];
      nodes.push(el("div.text.step." + (part.kind === "." ? "other" : part.kind), { title: title || null }, el("i", sign), painted(el("span", { dir: "auto" }), part)));
    } else {
      const kind = role === "outside" ? ".outside" : has(i, RIGHT) ? ".answer.right" : ".answer.wrong";
      nodes.push(painted(el("div.text" + kind, { dir: "auto" }), part));
    }
  }
  if (!parts.length) nodes.push(el("div.soft", "(nothing)"));
  return [nodes, rest(i, Math.min(text.length, LONG))];
}

/** A bar for each reward component. */
function bars(i) {
  return el("div.bars", DATA.components.map((name, k) => {
    const value = C.components[i][k];
    if (value === null) return null;
    const width = 100 * Math.min(1, Math.abs(value));
    return [el("span", name), el("span.track", el(name === "verbosity" || value < 0 ? "i.penalty" : "i", { style: `width:${width}%` })), el("span.number", number(value))];
  }));
}

function facts(i) {
  const said = [];
  if (C.tokens[i] !== null) said.push(counted(C.tokens[i], "token"));
  if (C.logp[i] !== null) said.push(`mean log-prob ${number(C.logp[i], 3)}`);
  if (!has(i, STOPPED)) said.push("cut off at the budget");
  if (!has(i, WELL_FORMED)) said.push("not well formed");
  return said.join(" · ");
}

const runMark = (run) => el("span.run", el("i", { style: `background:var(--run-${run % 6})` }), DATA.runs[run].name);
