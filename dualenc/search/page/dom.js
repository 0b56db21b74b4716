// Elements and how values are written. What comes from the collection is set as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** Make an element with a text. */
export function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

/** Copy the first element of a <template>. */
export function copy(id) {
  return $(id).content.cloneNode(true).firstElementChild;
}

export const number = (value) => value.toLocaleString("en-US");

export const score = (value) => value.toFixed(3).replace("-", "\u2212");

export const count = (value, one, many) => `${number(value)} ${value === 1 ? one : many}`;
