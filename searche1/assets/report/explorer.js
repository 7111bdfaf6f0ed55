"use strict";
// The trajectory explorer of a report. Pieces of data are unpacked when they are looked at; see report/pack.py.

const $ = (id) => document.getElementById(id);
const PAGE = 100;
const cache = new Map();

/** The JSON of a piece, or null if the page has none of that name. */
function piece(name) {
  if (!cache.has(name)) cache.set(name, unpack(name));
  return cache.get(name);
}

async function unpack(name) {
  const element = $("piece-" + name);
  if (!element) return null;
  const bytes = Uint8Array.from(atob(element.textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function el(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// -- the list -------------------------------------------------------------------------------------

let index;
let byQuestion; // trajectories of each question, in order
const state = { mode: "trajectories", found: [], page: 0, chosen: -1, beside: -1, tokens: false, after: false };

function times(number, what) {
  return `${number.toLocaleString("en")} ${what}${number === 1 ? "" : what.endsWith("h") ? "es" : "s"}`;
}

/** Other trajectories of a question, those of other stages first. */
function siblingsOf(i) {
  const others = byQuestion.get(index.question[i]).filter((other) => other !== i);
  const isHere = (other) => index.where[other] === index.where[i];
  return [...others.filter((other) => !isHere(other)), ...others.filter(isHere)];
}

function outcomeOf(i) {
  return index.status[i] === "e" ? "fault" : index.reward[i] > 0 ? "right" : "wrong";
}
const MARKS = { right: "\u2713", wrong: "\u2717", fault: "!" };

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => el("option", { value, textContent: text })));
}

function fillFilters() {
  const wheres = [...new Set(index.where)].sort((a, b) => a - b);
  options($("where"), [["", "every stage"], ...wheres.map((w) => [w, index.wheres[w].title])]);
  const sources = [...new Set(index.questions.map((q) => q[1]))].sort();
  options($("source"), [["", "every source"], ...sources.map((s) => [s, s])]);
  options($("outcome"), [["", "right and wrong"], ["right", "right"], ["wrong", "wrong"], ["fault", "faults"]]);
  const most = index.searches.reduce((a, b) => Math.max(a, b), 0);
  options($("searches"), [["", "any searches"], ...Array.from({ length: most + 1 }, (_, n) => [n, times(n, "search")])]);
  options($("order"), [["", "in order"], ["long", "longest first"], ["short", "shortest first"], ["many", "most searches first"]]);
  $("mode").disabled = index.pairs.length === 0;
}

function filter() {
  const where = $("where").value, source = $("source").value, outcome = $("outcome").value;
  const searches = $("searches").value, words = $("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const texts = new Map();
  const matches = (q) => {
    if (!texts.has(q)) {
      const [key, from, text, answers] = index.questions[q];
      const all = (key + " " + text + " " + answers.join(" ")).toLowerCase();
      texts.set(q, (!source || from === source) && words.every((word) => all.includes(word)));
    }
    return texts.get(q);
  };
  if (state.mode === "pairs") {
    const stage = where && index.wheres[where].stage;
    state.found = index.pairs.map((_, p) => p).filter((p) => {
      const [of, q, , student] = index.pairs[p];
      return (!stage || of === stage) && matches(q) && (!outcome || outcomeOf(student) === outcome)
        && (searches === "" || index.searches[student] === Number(searches));
    });
    const length = (p) => index.tokens[index.pairs[p][3]];
    sortBy(length, (p) => index.searches[index.pairs[p][3]]);
  } else {
    state.found = [];
    for (let i = 0; i < index.where.length; i++) {
      if ((where === "" || index.where[i] === Number(where)) && (!outcome || outcomeOf(i) === outcome)
        && (searches === "" || index.searches[i] === Number(searches)) && matches(index.question[i])) state.found.push(i);
    }
    sortBy((i) => index.tokens[i], (i) => index.searches[i]);
  }
  state.page = 0;
  showList();
}

function sortBy(length, searches) {
  const order = $("order").value;
  if (order === "long") state.found.sort((a, b) => length(b) - length(a));
  if (order === "short") state.found.sort((a, b) => length(a) - length(b));
  if (order === "many") state.found.sort((a, b) => searches(b) - searches(a));
}

function showList() {
  const list = $("list");
  const shown = state.found.slice(state.page * PAGE, (state.page + 1) * PAGE);
  list.replaceChildren(...shown.map(item));
  list.scrollTop = 0;
  const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
  $("count").textContent = state.found.length.toLocaleString("en") + " " + state.mode + (pages > 1 ? `, page ${state.page + 1} of ${pages}` : "");
  $("previous").disabled = state.page === 0;
  $("next").disabled = state.page >= pages - 1;
}

function item(number) {
  const isPair = state.mode === "pairs";
  const i = isPair ? index.pairs[number][3] : number;
  const outcome = outcomeOf(i);
  const facts = isPair
    ? `${index.pairs[number][0]}, distance ${index.pairs[number][4].toFixed(2)}, reference ${times(index.searches[index.pairs[number][2]], "search")}`
    : index.wheres[index.where[i]].title;
  const made = el("div", { className: "item" },
    el("span", { className: "mark " + outcome, textContent: MARKS[outcome] }),
    index.questions[index.question[i]][2],
    el("small", { textContent: `${facts} \u00b7 ${times(index.searches[i], "search")} \u00b7 ${times(index.tokens[i], "token")}` }));
  made.setAttribute("role", "option");
  made.setAttribute("aria-selected", String(number === state.chosen));
  made.dataset.number = number;
  made.onclick = () => choose(number);
  return made;
}

// -- one trajectory -------------------------------------------------------------------------------

async function load(i) {
  const number = Math.floor(i / index.chunk), place = i % index.chunk;
  const [spans, error] = (await piece("text-" + number))[place];
  const tokens = await piece("tokens-" + number);
  return { spans, error, tokens: tokens && tokens[place] };
}

async function observation(numbers) {
  const pieces = [...new Set(numbers.map((n) => Math.floor(n / index.lines)))];
  const loaded = new Map(await Promise.all(pieces.map(async (p) => [p, await piece("lines-" + p)])));
  return numbers.map((n) => loaded.get(Math.floor(n / index.lines))[n % index.lines]).join("\n");
}

const ACTION = /(<(search|answer)>[^]*?<\/\2>)/;

/** The span's nodes: of what the policy wrote only the action is coloured, or all of it if there is none. */
function coloured(kind, text) {
  if (kind === "information") return [el("span", { className: "information", textContent: text })];
  if (kind === "invalid" || kind === "error") return [el("span", { className: "invalid", textContent: text })];
  const parts = text.split(ACTION);
  const nodes = [];
  for (let n = 0; n < parts.length; n += 3) {
    nodes.push(document.createTextNode(parts[n]));
    if (n + 1 < parts.length) nodes.push(el("span", { className: parts[n + 2], textContent: parts[n + 1] }));
  }
  return nodes;
}

/** Policy tokens as nodes; `heat` gives strength in [0, 1] and a title for the token at a place of the response. */
function tokenNodes([ids, surprise], vocabulary, first, heat) {
  return ids.map((id, n) => {
    const [strength, title] = heat(first + n, surprise[n]);
    const node = el("span", { className: "token", title, textContent: vocabulary[id] });
    if (strength > 0.02) node.style.background = `color-mix(in srgb, var(--heat) ${Math.round(100 * strength)}%, transparent)`;
    return node;
  });
}

function byProbability(_, surprise) {
  const p = Math.exp(-surprise / 32);
  return [1 - p, surprise === 255 ? "p < 0.0004" : `p = ${p.toFixed(3)}, ln p = ${(-surprise / 32).toFixed(2)}`];
}

function byKL(values) {
  const top = Math.max(0.25, ...values.map((v) => v / 1000));
  return (place, surprise) => {
    const kl = values[place] / 1000;
    return [Math.min(1, kl / top), `KL ${kl.toFixed(3)}, p = ${Math.exp(-surprise / 32).toFixed(3)}`];
  };
}

async function column(i, title, heat) {
  const { spans, error, tokens } = await load(i);
  const outcome = outcomeOf(i);
  const made = el("div", { className: "column" });
  made.append(el("h3", {}, el("span", { className: "mark " + outcome, textContent: MARKS[outcome] }), title));
  made.append(el("p", { className: "quiet", textContent: `${outcome}, ${times(index.searches[i], "search")}, ${times(index.tokens[i], "token")}` }));
  const withTokens = (state.tokens || heat) && tokens;
  const vocabulary = withTokens ? await piece("vocabulary") : null;
  const text = el("pre");
  let turn = 0, first = 0;
  for (const [number, content, isCut] of spans) {
    const kind = index.kinds[number];
    const isPolicy = kind !== "information" && kind !== "error";
    if (isPolicy && withTokens) {
      text.append(...tokenNodes(tokens[turn], vocabulary, first, heat || byProbability));
      first += tokens[turn][0].length;
    } else {
      text.append(...coloured(kind, Array.isArray(content) ? await observation(content) : content));
    }
    if (isPolicy) turn++;
    if (isCut) text.append(el("span", { className: "cut", textContent: " [cut at a token limit]" }));
  }
  made.append(text);
  if (error) made.append(el("p", { className: "quiet", textContent: error }));
  if ((state.tokens || heat) && !tokens) made.append(el("p", { className: "quiet", textContent: "The tokens of this trajectory are not in the page." }));
  return made;
}

function button(textContent, isPressed, onclick) {
  const made = el("button", { type: "button", textContent, onclick });
  made.setAttribute("aria-pressed", String(isPressed));
  return made;
}

function scale(left, right) {
  const steps = [0.1, 0.3, 0.5, 0.7, 0.9].map((s) => {
    const made = el("span");
    made.style.background = `color-mix(in srgb, var(--heat) ${100 * s}%, transparent)`;
    return made;
  });
  return el("span", { className: "quiet" }, left + " ", el("span", { className: "scale" }, ...steps), " " + right);
}

function heading(question) {
  const [key, , text, answers] = index.questions[question];
  return [el("h3", { textContent: text }), el("p", { className: "quiet", textContent: `accepted: ${answers.join("; ")} (${key})` })];
}

let drawing = 0;

async function showDetail() {
  const turn = ++drawing;
  const nodes = state.mode === "pairs" ? await pairNodes() : await trajectoryNodes();
  if (turn !== drawing) return; // somebody has moved on meanwhile
  $("detail").replaceChildren(...nodes);
  $("detail").dataset.shown = state.mode + state.chosen;
}

async function trajectoryNodes() {
  const i = state.chosen, question = index.question[i];
  const siblings = siblingsOf(i);
  const chips = siblings.map((other) => {
    const where = index.wheres[index.where[other]].title;
    return button(`${MARKS[outcomeOf(other)]} ${where}`, other === state.beside, () => {
      state.beside = state.beside === other ? -1 : other;
      showDetail();
    });
  });
  const columns = [await column(i, index.wheres[index.where[i]].title)];
  if (state.beside >= 0) columns.push(await column(state.beside, index.wheres[index.where[state.beside]].title));
  const toggles = el("p", { id: "toggles" }, button("tokens", state.tokens, toggleTokens));
  if (state.tokens) toggles.append(" ", scale("sure", "unlikely"));
  const rest = chips.length > 40 ? [el("span", { className: "quiet", textContent: `and ${chips.length - 40} more` })] : [];
  return [
    ...heading(question), toggles,
    ...(chips.length ? [el("p", { className: "quiet", textContent: "The same question beside it:" }), el("div", { className: "chips" }, ...chips.slice(0, 40), ...rest)] : []),
    el("div", { className: "columns" + (columns.length > 1 ? " two" : "") }, ...columns),
  ];
}

async function pairNodes() {
  const [stage, question, reference, student, distance, hasKL] = index.pairs[state.chosen];
  const kls = hasKL ? (await piece("kl"))[state.chosen] : null;
  const values = kls && kls[state.after ? 1 : 0];
  const toggles = el("p", { id: "toggles" });
  if (kls) {
    const mean = (list) => (list.reduce((a, b) => a + b, 0) / list.length / 1000).toFixed(3);
    toggles.append(
      button(`before the round: KL ${mean(kls[0])}`, !state.after, () => { state.after = false; showDetail(); }), " ",
      button(`after: KL ${mean(kls[1])}`, state.after, () => { state.after = true; showDetail(); }), " ",
      scale("as the teacher", "unlike it"));
  } else {
    toggles.append(button("tokens", state.tokens, toggleTokens), " ",
      el("span", { className: "quiet", textContent: "KL per token is recorded for the first pairs of a round." }));
  }
  const columns = [
    await column(reference, "reference: the cheapest right one"),
    await column(student, "student: what it is taught on", values && byKL(values)),
  ];
  return [...heading(question), el("p", { className: "quiet", textContent: `${stage}, distance ${distance.toFixed(3)}` }), toggles,
    el("div", { className: "columns two" }, ...columns)];
}

function choose(number) {
  state.chosen = number;
  state.beside = -1;
  for (const node of $("list").children) {
    const isChosen = Number(node.dataset.number) === number;
    node.setAttribute("aria-selected", String(isChosen));
    if (isChosen) showInList(node);
  }
  history.replaceState(null, "", `#${state.mode}-${number}`);
  return showDetail();
}

/** Scrolls the list, and never the page. */
function showInList(node) {
  const list = $("list"), top = node.offsetTop - list.offsetTop;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + node.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + node.offsetHeight - list.clientHeight;
}

function toggleTokens() {
  state.tokens = !state.tokens;
  showDetail();
}

// -- moving about ---------------------------------------------------------------------------------

function move(step) {
  const at = state.found.indexOf(state.chosen);
  const next = at < 0 ? state.page * PAGE : Math.min(state.found.length - 1, Math.max(0, at + step));
  if (!(next in state.found)) return;
  turnTo(Math.floor(next / PAGE));
  choose(state.found[next]);
}

function turnTo(page) {
  const last = Math.max(0, Math.ceil(state.found.length / PAGE) - 1);
  const wanted = Math.min(last, Math.max(0, page));
  if (wanted !== state.page) {
    state.page = wanted;
    showList();
  }
}

function setMode(mode) {
  state.mode = $("mode").value = mode;
  state.chosen = state.beside = -1;
  $("detail").replaceChildren();
  filter();
}

function compareNext() {
  if (state.mode === "pairs" || state.chosen < 0) return;
  const siblings = siblingsOf(state.chosen);
  const at = siblings.indexOf(state.beside);
  state.beside = at + 1 < siblings.length ? siblings[at + 1] : -1;
  showDetail();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isTyping = event.target.matches("input, select");
  if (event.key === "Escape") {
    $("help").hidden = true;
    event.target.blur();
  }
  if (isTyping) return;
  const keys = {
    j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
    n: () => turnTo(state.page + 1), p: () => turnTo(state.page - 1), "/": () => $("text").focus(),
    t: toggleTokens, c: compareNext, m: () => index.pairs.length && setMode(state.mode === "pairs" ? "trajectories" : "pairs"),
    b: () => { state.after = !state.after; if (state.mode === "pairs" && state.chosen >= 0) showDetail(); },
    "?": () => { $("help").hidden = !$("help").hidden; },
  };
  const isInList = document.activeElement === $("list");
  if (!(event.key in keys) || (event.key.startsWith("Arrow") && !isInList)) return;
  if ("tb".includes(event.key) && state.chosen < 0) return;
  event.preventDefault();
  keys[event.key]();
}

function isDark() {
  const chosen = document.documentElement.style.colorScheme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function setTheme(theme) {
  document.documentElement.style.colorScheme = theme;
}

async function start() {
  $("theme").onclick = () => setTheme(isDark() ? "light" : "dark");
  index = await piece("index");
  byQuestion = new Map();
  index.question.forEach((q, i) => byQuestion.has(q) ? byQuestion.get(q).push(i) : byQuestion.set(q, [i]));
  fillFilters();
  const form = $("filters");
  form.onsubmit = (event) => event.preventDefault();
  form.onchange = (event) => event.target === $("mode") ? setMode($("mode").value) : filter();
  form.onreset = () => setTimeout(() => setMode("trajectories"));
  $("text").oninput = filter;
  $("previous").onclick = () => turnTo(state.page - 1);
  $("next").onclick = () => turnTo(state.page + 1);
  $("help").onclick = () => { $("help").hidden = true; };
  document.addEventListener("keydown", onKey);
  const [, mode, number] = location.hash.match(/^#(trajectories|pairs)-(\d+)$/) || [];
  if (mode === "pairs" && index.pairs.length) setMode("pairs"); else filter();
  const wanted = mode ? Number(number) : state.found[0];
  if (state.found.includes(wanted)) {
    turnTo(Math.floor(state.found.indexOf(wanted) / PAGE));
    await choose(wanted);
  }
  document.documentElement.dataset.ready = "yes";
}

start();
