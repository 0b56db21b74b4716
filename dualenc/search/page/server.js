// Requests to the server, with the key if it asks for one.

import { $ } from "./dom.js";

let key = sessionStorage.getItem("key");
let prompting = null; // several requests wait for one prompt

/** A failure with a message for people, its kind as the server names it, and if the same request may succeed later. */
export class Failure extends Error {
  constructor(message, type = "", passing = false) {
    super(message);
    this.type = type;
    this.passing = passing;
  }
}

/** Send a request; ask for a key when the server refuses it, and throw a Failure when it cannot be answered. */
async function ask(path, body, signal) {
  for (;;) {
    const used = key;
    const response = await send(path, body, signal);
    if (response.ok) return response;
    if (response.status !== 401) throw await failure(response);
    if (key === used) await renewKey(used !== null);
  }
}

async function send(path, body, signal) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer. Is dualenc serve still running?", "gone", true);
  }
}

async function failure(response) {
  const { error } = await response.json().catch(() => ({}));
  const told = error?.message ?? `the server answered with status ${response.status}`;
  const message = response.status === 413 ? `the pictures cannot be sent: ${told}` : told;
  return new Failure(message[0].toUpperCase() + message.slice(1), error?.type, response.status >= 500);
}

/** Return the answer to a request; with a body it is a POST. */
export async function askJson(path, body, signal) {
  return (await ask(path, body, signal)).json();
}

function renewKey(refused) {
  prompting ??= new Promise((resolve, reject) => {
    sessionStorage.removeItem("key");
    $("refused").textContent = refused ? "The server refused this key." : "";
    $("key").value = "";
    $("locked").returnValue = "";
    $("locked").showModal();
    $("locked").addEventListener("close", () => {
      prompting = null;
      if ($("locked").returnValue === "send") {
        key = $("key").value;
        sessionStorage.setItem("key", key);
        resolve();
      } else {
        key = null;
        reject(new Failure("This server answers only with a key.", "key", true));
      }
    }, { once: true });
  });
  return prompting;
}

/** Show a picture of the server in an <img>; with a key it is fetched, because an <img> cannot send the header. */
export async function setPicture(img, path) {
  img.dataset.path = path;
  if (!key) {
    img.src = path;
    return;
  }
  try {
    const url = URL.createObjectURL(await (await ask(path)).blob());
    for (const event of ["load", "error"]) img.addEventListener(event, () => URL.revokeObjectURL(url), { once: true });
    if (img.dataset.path === path) img.src = url;
  } catch {
    img.removeAttribute("src"); // The alternative text is shown.
  }
}
