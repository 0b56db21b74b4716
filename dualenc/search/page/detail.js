// The detail view of a hit: the whole picture or passage, all captions, the sample's fields.

import { $, element, number, score } from "./dom.js";
import { focusHit, isSelected, select, visible } from "./hits.js";
import { askJson, setPicture } from "./server.js";

let opened = null; // the hit that is shown

export async function openDetail(hit, kind) {
  opened = hit;
  const shown = visible();
  const place = shown.indexOf(hit);
  $("before").disabled = place <= 0;
  $("after").disabled = place === shown.length - 1;
  $("detail-title").textContent = hit.key;
  $("pick").checked = isSelected(hit);
  $("detail").querySelector("figure").hidden = kind === "texts";
  $("detail").dataset.kind = kind;
  showSample(hit, [hit.caption], {});
  if (kind === "images") {
    $("whole").removeAttribute("src");
    $("whole").alt = hit.caption || hit.key;
    setPicture($("whole"), `api/image/${hit.row}`);
  }
  if (!$("detail").open) $("detail").showModal();
  let sample;
  try {
    sample = await askJson(`api/sample/${hit.row}`);
  } catch (error) {
    sample = { captions: [hit.caption], fields: { error: error.message } };
  }
  if (opened === hit) showSample(hit, sample.captions, sample.fields);
}

function showSample(hit, captions, fields) {
  const known = { row: number(hit.row), source: hit.source };
  const facts = hit.score === undefined ? known : { score: score(hit.score), ...known };
  const written = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const shown = [written(captions), ...captions]; // A field that holds the captions says nothing new.
  const others = Object.entries(fields).filter(([, value]) => !shown.includes(written(value)));
  const pairs = [...Object.entries(facts), ...others];
  $("captions").replaceChildren(...captions.filter(Boolean).map((text) => element("li", text)));
  $("sample").replaceChildren(...pairs.flatMap(([name, value]) => [element("dt", name), element("dd", written(value))]));
}

/** Close the view and then do something with its hit. */
export function leaveDetail(then) {
  const hit = opened;
  $("detail").addEventListener("close", () => then(hit), { once: true });
  $("detail").close();
}

function step(by) {
  const shown = visible();
  const next = shown[shown.indexOf(opened) + by];
  if (next) openDetail(next, $("detail").dataset.kind);
}

$("whole").addEventListener("error", () => {
  const small = `api/thumbnail/${opened?.row}`; // A format that browsers do not show has a thumbnail that they do.
  if (opened && $("whole").dataset.path !== small) setPicture($("whole"), small);
});
$("detail").addEventListener("close", () => {
  focusHit(opened); // It may be another one than the one from which the view was opened.
  opened = null;
});
$("detail").addEventListener("click", (event) => {
  if (event.target === $("detail")) $("detail").close(); // The click was outside of the view.
});
$("detail").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
  if (event.key !== "Tab") return;
  const stops = [...$("detail").querySelectorAll("button, input")].filter((one) => !one.disabled);
  const [from, to] = event.shiftKey ? [stops[0], stops.at(-1)] : [stops.at(-1), stops[0]];
  if (document.activeElement !== from) return;
  event.preventDefault(); // The last stop is followed by the first one, not by the controls of the browser.
  to.focus();
});
$("before").addEventListener("click", () => step(-1));
$("after").addEventListener("click", () => step(1));
$("close").addEventListener("click", () => $("detail").close());
$("pick").addEventListener("change", () => select([opened], $("pick").checked));
