// The list of hits: cards, arrow keys, the cut-off by score, the selection.

import { $, copy, count, number, score } from "./dom.js";
import { setPicture } from "./server.js";

const MOVES = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"];
const SLIDER = 200; // steps of the cut-off

export const actions = { open: null, like: null }; // what the buttons of a hit do, set by app.js
export let hits = []; // in descending order of score; `item` is the element of each
const selection = new Map(); // keys of the selected hits by row
let current = null; // the hit that Tab reaches

// Thumbnails are asked for when they come near the window.
const near = new IntersectionObserver((entries) => {
  for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
    near.unobserve(target);
    setPicture(target, `api/thumbnail/${target.dataset.row}`);
  }
}, { rootMargin: "600px" });

export const visible = () => hits.filter((hit) => !hit.item.hidden);

export function clearHits() {
  near.disconnect();
  hits = [];
  current = null;
  $("hits").replaceChildren();
  $("cut").hidden = $("all").hidden = true;
}

/** Append hits that are not shown yet; return the first of them. */
export function addHits(given, kind) {
  const known = new Set(hits.map((hit) => hit.row));
  const added = given.filter((hit) => !known.has(hit.row));
  for (const hit of added) hit.item = card(hit, kind);
  hits.push(...added);
  $("hits").classList.toggle("passages", kind === "texts");
  $("hits").append(...added.map((hit) => hit.item));
  if (!current) setCurrent(hits[0]);
  return added[0];
}

function card(hit, kind) {
  const item = copy("hit");
  const [open, img, text, value, like, pick] = [".open", "img", ".text", ".score", ".like", ".pick input"].map((name) =>
    item.querySelector(name));
  const name = hit.caption || hit.key;
  if (kind === "texts") {
    item.querySelector(".frame").remove();
    text.textContent = name;
  } else {
    img.alt = name;
    img.dataset.row = hit.row;
    near.observe(img);
    text.textContent = hit.caption;
    text.setAttribute("aria-hidden", "true"); // The picture's alternative text says the same.
  }
  if (hit.score !== undefined) {
    value.textContent = score(hit.score);
    value.id = `score-${hit.row}`;
    open.setAttribute("aria-describedby", value.id);
  }
  like.setAttribute("aria-label", `More like this: ${name}`);
  pick.setAttribute("aria-label", `Select ${hit.key}`);
  pick.checked = selection.has(hit.row);
  for (const control of [open, like, pick]) control.tabIndex = -1;
  open.addEventListener("click", () => actions.open(hit));
  like.addEventListener("click", () => actions.like(hit));
  pick.addEventListener("change", () => select([hit], pick.checked));
  item.addEventListener("focusin", () => setCurrent(hit));
  return item;
}

// ------------------------------------------------------------------------------------------------- the keyboard

/** Let Tab reach the controls of one hit; the arrow keys choose which. */
function setCurrent(hit) {
  for (const [one, index] of [[current, -1], [hit, 0]]) {
    for (const control of one?.item.querySelectorAll("button, input") ?? []) control.tabIndex = index;
  }
  current = hit;
}

export function focusHit(hit) {
  const opener = hit?.item.querySelector(".open");
  opener?.focus();
  opener?.scrollIntoView({ block: "nearest" });
}

/** Return the hit in a direction: the next one in reading order, or the closest one of the next row. */
function neighbor(hit, direction) {
  const shown = visible();
  const place = shown.indexOf(hit);
  if (direction === "Home") return shown[0];
  if (direction === "End") return shown.at(-1);
  if (direction === "ArrowLeft") return shown[place - 1];
  if (direction === "ArrowRight") return shown[place + 1];
  const from = hit.item.getBoundingClientRect();
  const sign = direction === "ArrowDown" ? 1 : -1;
  const beyond = shown.map((other) => {
    const box = other.item.getBoundingClientRect();
    return { other, rows: (box.top - from.top) * sign, columns: Math.abs(box.left - from.left) };
  }).filter(({ rows }) => rows > 1);
  return beyond.sort((a, b) => Math.round(a.rows - b.rows) || a.columns - b.columns)[0]?.other;
}

$("hits").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !current) return;
  if (MOVES.includes(event.key)) {
    event.preventDefault();
    const next = neighbor(current, event.key);
    if (next) focusHit(next);
    else if (event.key === "ArrowUp") $("typed").focus();
  } else if (event.key.toLowerCase() === "x") {
    select([current], !selection.has(current.row));
  }
});

// -------------------------------------------------------------------------------------------------- the cut-off

/** Let the slider reach from the lowest to the highest score of the hits. */
export function showSlider(min) {
  const scores = hits.map((hit) => hit.score);
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  $("cut").hidden = hits.length < 2 || low === high;
  if ($("cut").hidden) return;
  for (const [name, value] of [["min", low], ["max", high], ["step", (high - low) / SLIDER]]) $("slider")[name] = value;
  $("slider").value = min ?? low;
}

/** Hide the hits below a score, or none; return how many are shown. */
export function cut(min) {
  for (const hit of hits) hit.item.hidden = min !== null && hit.score < min;
  const shown = visible();
  if (current?.item.hidden) setCurrent(shown[0]);
  $("value").textContent = min === null ? "none" : score(min);
  $("slider").setAttribute("aria-valuetext", `${$("value").textContent}, ${count(shown.length, "hit", "hits")} shown`);
  $("all").hidden = !shown.length;
  return shown.length;
}

// ------------------------------------------------------------------------------------------------ the selection

export const isSelected = (hit) => selection.has(hit.row);

export function select(chosen, on) {
  for (const hit of chosen) {
    if (on) selection.set(hit.row, hit.key);
    else selection.delete(hit.row);
  }
  for (const hit of hits) hit.item.querySelector(".pick input").checked = isSelected(hit);
  document.body.classList.toggle("selecting", selection.size > 0);
  $("selection").hidden = !selection.size;
  $("selection").querySelector("p").textContent = `${number(selection.size)} selected`;
}

/** Save the keys, one a line, as `data.select` reads them. */
function download() {
  const lines = [...new Set(selection.values())].map((key) => `${key}\n`);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(lines, { type: "text/plain" }));
  link.download = "selection.txt";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

$("all").addEventListener("click", () => select(visible(), true));
$("download").addEventListener("click", download);
$("forget").addEventListener("click", () => {
  selection.clear();
  select([], false);
  $("typed").focus();
});
