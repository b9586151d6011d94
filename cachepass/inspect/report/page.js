"use strict";

const at = (id) => document.getElementById(id);
document.documentElement.classList.add("js");

// ---- header ---------------------------------------------------------------------------------------------------------

const defaults = at("defaults");
if (defaults) {
  defaults.addEventListener("click", () => {
    const all = document.querySelector(".config").classList.toggle("all");
    defaults.setAttribute("aria-pressed", String(all));
    defaults.textContent = all ? "hide defaults" : "show defaults";
  });
}

const sections = [...document.querySelectorAll("main > section")];
const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.getAttribute("href").slice(1), a]));
const watched = new IntersectionObserver((entries) => {
  for (const entry of entries) links.get(entry.target.id).classList.toggle("now", entry.isIntersecting);
}, { rootMargin: "-45% 0px -50% 0px" });
for (const section of sections) watched.observe(section);

// ---- timeline -------------------------------------------------------------------------------------------------------

const run = at("run");
const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);

function point(cell) {
  for (const old of run.querySelectorAll(".at")) old.classList.remove("at");
  tip.hidden = !cell;
  if (!cell) return;
  cell.classList.add("at");
  const text = cell.getAttribute("aria-label");
  if (at("readout")) at("readout").textContent = text;
  tip.textContent = text;
  const box = cell.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left - 20), innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${left}px`;
  tip.style.top = `${box.top - tip.offsetHeight - 6}px`;
}

run.addEventListener("pointerover", (event) => point(event.target.closest("td[aria-label]")));
run.addEventListener("pointerleave", () => point(null));
run.addEventListener("blur", () => point(null));
run.addEventListener("keydown", (event) => {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  const rows = [...run.querySelectorAll("tr")].map((row) => [...row.querySelectorAll("td[aria-label]")]);
  const grid = rows.filter((row) => row.length);
  const now = run.querySelector(".at");
  let row = grid.findIndex((cells) => cells.includes(now));
  let column = row < 0 ? 0 : grid[row].indexOf(now) + move[1];
  row = row < 0 ? Math.min(1, grid.length - 1) : row + move[0];
  row = Math.min(Math.max(row, 0), grid.length - 1);
  column = Math.min(Math.max(column, 0), grid[row].length - 1);
  grid[row][column].scrollIntoView({ block: "nearest", inline: "nearest" });
  point(grid[row][column]);
});

// ---- modules --------------------------------------------------------------------------------------------------------

const tree = at("tree");
const items = [...tree.querySelectorAll("li")];
const folders = [...tree.querySelectorAll("details")];
const openAtFirst = new Map(folders.map((folder) => [folder, folder.open]));
const only = new Set();

function filterTree() {
  const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const filtering = words.length > 0 || only.size > 0;
  let shown = 0;
  for (const item of items) item.hidden = filtering;
  for (const item of items) {
    const fits = words.every((word) => item.dataset.text.includes(word)) && (!only.size || only.has(item.dataset.fate));
    if (!filtering || !fits) continue;
    shown += 1;
    for (let above = item; above && above !== tree; above = above.parentElement) {
      if (above.tagName === "LI") above.hidden = false;
      if (above.tagName === "DETAILS" && above.parentElement !== item) above.open = true;
    }
  }
  if (!filtering) for (const folder of folders) folder.open = openAtFirst.get(folder);
  at("shown").textContent = filtering ? `${shown} of ${items.length}` : "";
}

at("filter").addEventListener("input", filterTree);
at("expand").addEventListener("click", () => { for (const folder of folders) folder.open = true; });
at("collapse").addEventListener("click", () => { for (const folder of folders) folder.open = false; });
for (const chip of document.querySelectorAll("[data-only]")) {
  chip.addEventListener("click", () => {
    const fate = chip.dataset.only;
    const pressed = !only.delete(fate);
    if (pressed) only.add(fate);
    chip.setAttribute("aria-pressed", String(pressed));
    filterTree();
  });
}

// ---- graphs ---------------------------------------------------------------------------------------------------------

const data = JSON.parse(at("data").textContent);
const CONTEXT = 3; // unchanged lines shown around a change
const FOLDED = 8; // fewer than these are not worth a fold
const [EQUAL, CHANGED, REMOVED, ADDED, REPLACED] = [0, 1, 2, 3, 4];
let shown = null; // the comparison on show: rows, folds, hits

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function linesOf(name) {
  return data.graphs[name].map((number) => data.lines[number]);
}

/** Flat rows {kind, left, right} (line numbers from 0, -1: none), and the stretches of equal rows to fold. */
function compare(name) {
  const diff = data.diffs[name];
  const rows = [], folds = [];
  let removed = 0; // rows at the end with nothing on the right yet: what was added in their place stands beside them
  for (const [kind, left, right, count] of diff.rows) {
    const first = rows.length;
    for (let i = 0; i < count; i += 1) {
      if (kind === ADDED && i < removed) Object.assign(rows[first - removed + i], { kind: REPLACED, right: right + i });
      else rows.push({ kind, left: kind === ADDED ? -1 : left + i, right: kind === REMOVED ? -1 : right + i });
    }
    removed = kind === REMOVED ? count : 0;
    if (kind !== EQUAL) continue;
    const start = first + (first ? CONTEXT : 0);
    folds.push({ start, end: rows.length - CONTEXT, open: false, run: rows.length });
  }
  const last = folds[folds.length - 1];
  if (last && last.run === rows.length) last.end = rows.length;
  return { name, base: diff.base, before: linesOf(diff.base), after: linesOf(name), rows,
           folds: folds.filter((fold) => fold.end - fold.start >= FOLDED), drawn: new Map(), query: "", hits: [], hit: -1 };
}

/** The text of one side of a row: what differs from the other side in bold, search hits marked. */
function fill(cell, text, other) {
  cell.textContent = "";
  let start = 0, end = text.length;
  if (other !== undefined) {
    while (start < end && text[start] === other[start]) start += 1;
    let tail = other.length;
    while (end > start && tail > start && text[end - 1] === other[tail - 1]) { end -= 1; tail -= 1; }
  }
  const parts = other === undefined ? [[0, text.length, false]]
    : [[0, start, false], [start, end, true], [end, text.length, false]];
  const low = shown.query ? text.toLowerCase() : "";
  const spots = [];
  for (let i = shown.query ? low.indexOf(shown.query) : -1; i >= 0; i = low.indexOf(shown.query, i + shown.query.length)) {
    spots.push(i);
  }
  for (const [from, to, bold] of parts) {
    if (from === to) continue;
    const part = bold ? cell.appendChild(element("b")) : cell;
    let position = from;
    for (const spot of spots) {
      const [a, b] = [Math.max(spot, position), Math.min(spot + shown.query.length, to)];
      if (a >= b) continue;
      part.append(text.slice(position, a));
      part.append(element("mark", "", text.slice(a, b)));
      position = b;
    }
    part.append(text.slice(position, to));
  }
}

function fillRow(index) {
  const { kind, left, right } = shown.rows[index];
  const cells = shown.drawn.get(index).children;
  if (left >= 0) fill(cells[1], shown.before[left], kind === CHANGED ? shown.after[right] : undefined);
  if (right >= 0) fill(cells[3], shown.after[right], kind === CHANGED ? shown.before[left] : undefined);
}

function drawRow(index) {
  const { kind, left, right } = shown.rows[index];
  const row = element("tr", kind === EQUAL ? "same" : "");
  const [old, fresh] = kind === EQUAL ? ["", ""] : [left < 0 ? "void" : "old", right < 0 ? "void" : "new"];
  row.append(element("td", `n ${old}`, left < 0 ? "" : left + 1), element("td", old),
             element("td", `n ${fresh}`, right < 0 ? "" : right + 1), element("td", fresh));
  shown.drawn.set(index, row);
  fillRow(index);
  return row;
}

function drawFold(fold) {
  const row = element("tr", "fold"), cell = element("td");
  cell.colSpan = 4;
  const button = element("button", "", `${fold.end - fold.start} unchanged lines`);
  button.type = "button";
  button.addEventListener("click", () => unfold(fold));
  cell.append(button);
  row.append(cell);
  fold.row = row;
  return row;
}

function unfold(fold) {
  if (fold.open) return;
  const rows = document.createDocumentFragment();
  for (let i = fold.start; i < fold.end; i += 1) rows.append(drawRow(i));
  fold.open = true;
  fold.row.replaceWith(rows);
}

function draw(name) {
  const query = shown ? shown.query : "";
  shown = compare(name);
  const table = element("table"), head = element("tr"), body = element("tbody"), columns = element("colgroup");
  for (const className of ["n", "", "n", ""]) columns.append(element("col", className));
  for (const title of [shown.base, name]) {
    const cell = element("th", "", title);
    cell.colSpan = 2;
    head.append(cell);
  }
  const top = element("thead");
  top.append(head);
  let next = 0;
  for (const fold of [...shown.folds, null]) {
    const stop = fold ? fold.start : shown.rows.length;
    for (; next < stop; next += 1) body.append(drawRow(next));
    if (fold) { body.append(drawFold(fold)); next = fold.end; }
  }
  table.append(columns, top, body);
  at("diff").replaceChildren(table);
  at("diff").scrollTop = 0;
  const count = (side) => shown.rows.filter((row) => row.kind !== EQUAL && row[side] >= 0).length;
  at("changes").replaceChildren(element("b", "minus", `−${count("left")}`), " ",
                                element("b", "plus", `+${count("right")}`), " lines");
  search(query);
}

function search(query) {
  const touched = new Set(shown.hits);
  shown.query = query.toLowerCase();
  const fits = (line) => line.toLowerCase().includes(shown.query);
  shown.hits = shown.query ? shown.rows.flatMap(({ left, right }, index) =>
    (left >= 0 && fits(shown.before[left])) || (right >= 0 && fits(shown.after[right])) ? [index] : []) : [];
  for (const index of new Set([...touched, ...shown.hits])) if (shown.drawn.has(index)) fillRow(index);
  show(-1);
}

function show(hit) {
  for (const row of at("diff").querySelectorAll("tr.current")) row.classList.remove("current");
  shown.hit = hit;
  const count = shown.hits.length;
  at("next").disabled = at("previous").disabled = !count;
  at("found").textContent = !shown.query ? "" : !count ? "no match" : hit < 0 ? `${count} lines` : `${hit + 1} of ${count}`;
  if (hit < 0) return;
  const index = shown.hits[hit];
  const fold = shown.folds.find(({ start, end }) => start <= index && index < end);
  if (fold) unfold(fold);
  const row = shown.drawn.get(index);
  row.classList.add("current");
  // Only the graphs scroll: the search box stays where it is.
  const box = at("diff"), from = box.getBoundingClientRect(), spot = row.getBoundingClientRect();
  box.scrollTop += spot.top - from.top - (box.clientHeight - spot.height) / 2;
}

function move(by) {
  const count = shown.hits.length;
  if (count) show(shown.hit < 0 ? (by > 0 ? 0 : count - 1) : (shown.hit + by + count) % count);
}

for (const name of Object.keys(data.diffs)) {
  const option = element("option", "", name);
  option.value = name;
  at("phase").append(option);
}
at("phase").value = data.first;
at("phase").addEventListener("change", () => draw(at("phase").value));
let waiting = 0;
at("find").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => search(at("find").value), 120);
});
at("find").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  clearTimeout(waiting);
  if (at("find").value.toLowerCase() !== shown.query) search(at("find").value);
  move(event.shiftKey ? -1 : 1);
});
at("next").addEventListener("click", () => move(1));
at("previous").addEventListener("click", () => move(-1));
at("unfold").addEventListener("click", () => { for (const fold of shown.folds) unfold(fold); });
at("fold").addEventListener("click", () => draw(shown.name));

// Only when it comes near the screen: a page is read from the top.
new IntersectionObserver((entries, observer) => {
  if (!entries.some((entry) => entry.isIntersecting)) return;
  observer.disconnect();
  if (!shown) draw(data.first);
}, { rootMargin: "1200px" }).observe(at("graphs"));
addEventListener("beforeprint", () => { if (!shown) draw(data.first); });
