// The search page: it turns what is typed, dropped or clicked into a query, and the query into hits.

import { $, copy, count, element, number, score } from "./dom.js";
import { leaveDetail, openDetail } from "./detail.js";
import { actions, addHits, clearHits, cut, focusHit, hits, showSlider, visible } from "./hits.js";
import { EMPTY, asks, fromAddress, keepPictures, parse, pictures, toAddress, typedFor } from "./query.js";
import { Failure, askJson, setPicture } from "./server.js";

const PAGE = 60; // hits asked for at first, and added by each "Show more"
const DISTINCT = 0.95; // cosine from which two hits are near-duplicates
const GLIMPSE = 24; // samples shown before the first search
const EXAMPLES = 8; // captions to try

let about = null; // what the server says of the collection
let query = EMPTY; // the query whose hits are shown
let answered = null; // the last answer of the server and the k that was asked for
let running = null; // the AbortController of the search in progress
let retry = null; // what the button of the message does

// ------------------------------------------------------------------------------------------------- from query to hits

/** Make a changed query the page's address and show it; the one before is a step back. */
function go(changes) {
  const next = { ...query, min: null, ...changes };
  next.pictures = next.pictures.filter((id) => pictures.has(id)); // Those given before the page was loaded are lost.
  history.pushState({ pictures: next.pictures }, "", toAddress(next));
  show(next);
}

function show(next) {
  query = next;
  $("typed").value = query.text;
  $("where").value = query.where;
  $("distinct").checked = query.distinct;
  document.title = [query.text, about.name].filter(Boolean).join(" \u2013 ");
  showChips();
  $("examples").hidden = asks(query) || !about.examples.length;
  running?.abort();
  clearMessage();
  clearHits();
  $("more").hidden = true;
  if (asks(query)) search(PAGE);
  else welcome();
}

async function search(k) {
  const { texts, minus } = parse(query.text);
  clearMessage();
  if (query.pictures.some((id) => !pictures.has(id))) {
    report(new Failure("The picture of this query was given before the page was loaded. Add it again."));
  } else if (!texts.length && !query.rows.length && !query.pictures.length) {
    report(new Failure("Add something to look for: words to leave out find nothing alone."));
  } else {
    const images = query.pictures.map((id) => pictures.get(id).uri);
    const { rows, where, distinct } = query;
    await load("Searching\u2026", () => search(k), async (signal) => {
      const body = { texts, images, rows, minus, k, where: where || null, distinct: distinct ? DISTINCT : null };
      const answer = await askJson("api/search", body, signal);
      return () => showHits(answer, k);
    });
  }
}

/** Show samples from all over the collection. */
async function welcome() {
  await load("Loading\u2026", welcome, async (signal) => {
    const shown = Math.min(about.rows, GLIMPSE);
    const rows = Array.from({ length: shown }, (_, i) => Math.floor((i * about.rows) / shown));
    const answers = await Promise.allSettled(rows.map((row) => askJson(`api/sample/${row}`, undefined, signal)));
    const found = answers.filter(({ status }) => status === "fulfilled").map(({ value }) => value);
    if (shown && !found.length) throw answers[0].reason;
    return () => {
      addHits(found.map((sample) => ({ ...sample, caption: sample.captions[0] ?? "" })), about.kind);
      $("count").textContent = found.length ? `${number(found.length)} of the ${collection()}` : "This collection is empty.";
    };
  });
}

/** Do work on the server that gives way to newer work; `work` returns a function that shows its outcome. */
async function load(status, again, work) {
  const mine = (running = new AbortController());
  $("results").setAttribute("aria-busy", "true");
  if (!hits.length) $("count").textContent = status;
  let outcome;
  try {
    outcome = await work(mine.signal);
  } catch (error) {
    outcome = () => report(error, error.passing && again);
  }
  if (mine !== running) return;
  $("results").setAttribute("aria-busy", "false");
  outcome();
}

function showHits(answer, k) {
  const more = hits.length > 0;
  answered = { ...answer, k };
  const first = addHits(answer.hits, about.kind);
  showSlider(query.min);
  showCut();
  if (more) focusHit(first);
}

/** Hide the hits below the cut-off and say how many are shown. */
function showCut() {
  const shown = cut(query.min);
  const all = count(hits.length, "hit", "hits");
  $("count").textContent = shown < hits.length ? `${number(shown)} of ${all} shown` : `${all} of ${collection()} in ${time()}`;
  const limit = Math.min(about.max_k, about.rows);
  $("more").hidden = shown < hits.length || hits.length < answered.k || answered.k >= limit;
  clearMessage();
  if (!hits.length && query.where) {
    report(new Failure(`No hit under the condition ${query.where}.`), () => go({ where: "" }), "Search without it");
  } else if (!hits.length) {
    report(new Failure(about.rows ? "No hits." : "This collection is empty."));
  } else if (!shown) {
    report(new Failure(`No hit has a score of ${score(query.min)} or more.`), () => setCut(null), "Show all");
  }
}

function setCut(min) {
  query = { ...query, min };
  history.replaceState(history.state, "", toAddress(query));
  if (min === null) $("slider").value = $("slider").min;
  showCut();
}

function collection() {
  return about.kind === "texts" ? count(about.rows, "passage", "passages") : count(about.rows, "picture", "pictures");
}

function time() {
  const milliseconds = answered.seconds * 1000;
  return `${milliseconds < 10 ? milliseconds.toFixed(1) : number(Math.round(milliseconds))} ms`;
}

// ---------------------------------------------------------------------------------------------------------- messages

/** Show why there are no hits, by the field of the condition if that is the reason, with a way out. */
function report(error, again, label = "Try again") {
  const condition = error.type === "where";
  $("where-error").textContent = condition ? error.message : "";
  $("where").setAttribute("aria-invalid", String(condition));
  $("message").hidden = condition;
  $("message").querySelector("p").textContent = condition ? "" : error.message;
  $("message").querySelector("button").textContent = label;
  $("message").querySelector("button").hidden = !again;
  retry = again;
  $("results").setAttribute("aria-busy", "false");
  if (!hits.length) $("count").textContent = "";
}

function clearMessage() {
  $("message").hidden = true;
  $("message").querySelector("p").textContent = "";
  $("where-error").textContent = "";
  $("where").setAttribute("aria-invalid", "false");
}

$("message").querySelector("button").addEventListener("click", () => retry());

// ------------------------------------------------------------------------------------------------------ the query's box

function showChips() {
  const without = (list, one) => list.filter((other) => other !== one);
  const rows = query.rows.map((row) => chip(`like row ${number(row)}`, () => go({ rows: without(query.rows, row) }), (img) => {
    if (about.kind === "images") setPicture(img, `api/thumbnail/${row}`);
    else img.remove();
  }));
  const given = query.pictures.filter((id) => pictures.has(id)).map((id) => {
    const { name, uri } = pictures.get(id);
    return chip(name, () => go({ pictures: without(query.pictures, id) }), (img) => (img.src = uri));
  });
  $("chips").replaceChildren(...rows, ...given);
  $("chips").hidden = !$("chips").children.length;
  showClear();
}

function chip(name, remove, setImage) {
  const item = copy("chip");
  item.querySelector("span").textContent = name;
  item.querySelector("button").setAttribute("aria-label", `Remove ${name}`);
  item.querySelector("button").addEventListener("click", () => {
    $("typed").focus();
    remove();
  });
  setImage(item.querySelector("img"));
  return item;
}

function showClear() {
  $("clear").hidden = !$("typed").value && $("chips").hidden;
}

/** Add pictures of this machine to the query. */
async function addPictures(files) {
  try {
    const ids = await keepPictures(files);
    go({ ...typed(), pictures: [...query.pictures, ...ids] });
  } catch (error) {
    report(error);
  }
}

/** Return what the fields hold, which may not have been searched for yet. */
function typed() {
  return { text: $("typed").value.trim(), where: $("where").value.trim(), distinct: $("distinct").checked };
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (about) go(typed());
});
$("distinct").addEventListener("change", () => go(typed()));
$("typed").addEventListener("input", showClear);
$("typed").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowDown" || !visible().length) return;
  event.preventDefault();
  focusHit(visible()[0]);
});
$("clear").addEventListener("click", () => {
  $("typed").focus();
  go({ text: "", rows: [], pictures: [] });
});
$("home").addEventListener("click", (event) => {
  event.preventDefault();
  if (about) go(EMPTY);
});
document.addEventListener("keydown", (event) => {
  const writing = event.target.matches("input:not([type=checkbox], [type=range])");
  if (event.key !== "/" || writing || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  $("typed").focus();
  $("typed").select();
});

// ----------------------------------------------------------------------------------------- pictures: chosen, pasted, dropped

let depth = 0; // elements that a drag has entered and not left

const takesFiles = (data) => about?.image_queries && data.types.includes("Files");

function endDrag() {
  depth = 0;
  document.body.classList.remove("dropping");
}

$("add").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  const files = [...$("file").files];
  $("file").value = ""; // The same file can be chosen again.
  if (files.length) addPictures(files);
});
document.addEventListener("paste", (event) => {
  if (!takesFiles(event.clipboardData)) return;
  event.preventDefault();
  addPictures([...event.clipboardData.files]);
});
for (const [name, by] of [["dragenter", 1], ["dragleave", -1]]) {
  document.addEventListener(name, (event) => {
    if (!takesFiles(event.dataTransfer)) return;
    depth += by;
    document.body.classList.toggle("dropping", depth > 0);
  });
}
document.addEventListener("dragover", (event) => {
  if (takesFiles(event.dataTransfer)) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  endDrag();
  if (!takesFiles(event.dataTransfer)) return;
  event.preventDefault();
  addPictures([...event.dataTransfer.files]);
});

// ---------------------------------------------------------------------------------------------------- the other controls

function moreLike(hit) {
  $("typed").focus();
  scrollTo({ top: 0 });
  go({ text: "", rows: [hit.row], pictures: [] });
}

actions.open = (hit) => openDetail(hit, about.kind);
actions.like = moreLike;
$("like").addEventListener("click", () => leaveDetail(moreLike));
$("with").addEventListener("click", () => leaveDetail((hit) => {
  $("typed").focus();
  scrollTo({ top: 0 });
  go({ ...typed(), rows: [...new Set([...query.rows, hit.row])] });
}));
$("slider").addEventListener("input", () => {
  const value = Number($("slider").value);
  setCut(value <= Number($("slider").min) ? null : value);
});
$("more").addEventListener("click", () => search(Math.min(answered.k + PAGE, about.max_k)));
addEventListener("popstate", () => {
  if ($("detail").open) leaveDetail(() => show(fromAddress()));
  else if (about) show(fromAddress());
});

// --------------------------------------------------------------------------------------------------------------- the start

function showAbout() {
  about.image_queries ??= about.kind === "images";
  $("home").textContent = about.name;
  $("size").textContent = collection();
  document.body.classList.toggle("texts", about.kind === "texts");
  $("model").textContent = `Model ${about.model}, fingerprint ${about.fingerprint}`;
  $("add").hidden = $("hint").hidden = !about.image_queries;
  $("condition").hidden = !about.fields.length;
  $("fields").replaceChildren(...about.fields.map(({ name }) => Object.assign(document.createElement("option"), { value: name })));
  const [field] = about.fields;
  if (field) $("where").placeholder = field.type === "number" ? `${field.name} >= 200` : `${field.name} == "\u2026"`;
  $("examples").querySelector("ul").replaceChildren(...about.examples.slice(0, EXAMPLES).map((text) => {
    const item = document.createElement("li");
    const button = Object.assign(element("button", text), { type: "button", className: "example" });
    button.addEventListener("click", () => go({ ...typed(), text: typedFor(text) }));
    item.append(button);
    return item;
  }));
}

async function start() {
  clearMessage();
  $("count").textContent = "Loading\u2026";
  try {
    about = await askJson("api/about");
  } catch (error) {
    report(error, error.passing && start);
    return;
  }
  showAbout();
  show(fromAddress());
}

start();
