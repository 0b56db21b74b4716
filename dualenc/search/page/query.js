// A query: what was typed, what it means, and the address of the page that holds it.

import { Failure } from "./server.js";

export const EMPTY = Object.freeze({ text: "", rows: [], pictures: [], where: "", distinct: false, min: null });

// Pictures given to this page, by id: {name, uri}. An address cannot hold them; the browser's history holds their ids.
export const pictures = new Map();

/** Split what was typed, such as `a dog + "on - off" -cat -"two words"`, into texts to combine and to leave out. */
export function parse(typed) {
  const texts = [];
  const minus = [];
  let words = [];
  const end = () => {
    if (words.length) texts.push(words.join(" "));
    words = [];
  };
  for (const [token, dash, quoted] of typed.matchAll(/(?<!\S)(-?)"([^"]+)"(?!\S)|\S+/g)) {
    const plain = quoted === undefined;
    if (token === "+") end();
    else if (dash || (plain && token.length > 1 && token[0] === "-")) minus.push(plain ? token.slice(1) : quoted);
    else words.push(plain ? token : quoted);
  }
  end();
  return { texts, minus };
}

/** Return what to type for a text of the collection: in quotes if `parse` would read signs in it. */
export function typedFor(text) {
  const words = text.trim().split(/\s+/).join(" ");
  const { texts, minus } = parse(words);
  return !minus.length && texts.length === 1 && texts[0] === words ? words : `"${words.replaceAll('"', "'")}"`;
}

/** Return whether a query asks for anything. */
export const asks = ({ text, rows, pictures: given }) => Boolean(text || rows.length || given.length);

/** Read the query of the page's address and of the browser's history. */
export function fromAddress() {
  const given = new URLSearchParams(location.search);
  const min = given.has("min") ? Number(given.get("min")) : NaN;
  return {
    text: given.get("q") ?? "",
    rows: given.getAll("row").map(Number).filter((row) => Number.isInteger(row) && row >= 0),
    pictures: history.state?.pictures ?? [],
    where: given.get("where") ?? "",
    distinct: given.get("distinct") === "1",
    min: Number.isFinite(min) ? min : null,
  };
}

/** Write a query as an address of the page. */
export function toAddress({ text, rows, where, distinct, min }) {
  const given = new URLSearchParams();
  if (text) given.set("q", text);
  for (const row of rows) given.append("row", row);
  if (where) given.set("where", where);
  if (distinct) given.set("distinct", "1");
  if (min !== null) given.set("min", min.toFixed(4));
  return given.size ? `?${given}` : location.pathname;
}

/** Keep picture files of this machine for queries and return their ids. */
export async function keepPictures(files) {
  const wrong = files.find((file) => !file.type.startsWith("image/"));
  if (wrong) throw new Failure(`${wrong.name} is not a picture.`);
  return Promise.all(files.map(async (file, i) => {
    const id = `${performance.timeOrigin}/${pictures.size}/${i}`; // Ids of an earlier load of the page differ.
    const uri = await dataUri(file);
    pictures.set(id, { name: file.name || "picture", uri });
    return id;
  }));
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Failure(`${file.name} cannot be read.`)));
    reader.readAsDataURL(file);
  });
}
