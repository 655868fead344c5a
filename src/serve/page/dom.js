// Language, small DOM helpers and the voice for screen readers. Text enters the page as text only,
// never as markup, so nothing a model or a file name says can become an element.

import { STRINGS } from "./strings.js";

const SVG = "http://www.w3.org/2000/svg";

let language = "zh";

/** Texts set by `say`: element → (slot → key and values), so that a change of language finds them. */
const spoken = new Map();

/** The language of the page: `zh` or `en`. */
export const currentLanguage = () => language;

/** The text of `key` with `{name}` replaced from `values`; a missing key shows itself. */
export function t(key, values = {}) {
  const text = STRINGS[language][key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

function put(element, slot, key, values) {
  const text = t(key, values);
  if (slot === "text") element.textContent = text;
  else element.setAttribute(slot, text);
}

/**
 * Puts a text into an element and keeps it right when the language changes. `slot` is `text` or the
 * name of an attribute.
 */
export function say(element, key, values = {}, slot = "text") {
  if (!spoken.has(element)) spoken.set(element, new Map());
  spoken.get(element).set(slot, { key, values });
  put(element, slot, key, values);
  return element;
}

/** Empties an element that `say` filled. */
export function hush(element) {
  spoken.delete(element);
  element.textContent = "";
}

/** Takes over the texts of the static page: `data-t="key"` and `data-t-ATTRIBUTE="key"`. */
export function adopt(root) {
  for (const element of root.querySelectorAll("*")) {
    for (const { name, value } of [...element.attributes]) {
      if (name === "data-t") say(element, value);
      else if (name.startsWith("data-t-")) say(element, value, {}, name.slice("data-t-".length));
    }
  }
}

/** Changes the language of everything that `say` and `adopt` know. */
export function setLanguage(next) {
  language = next in STRINGS ? next : "zh";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const [element, slots] of spoken) {
    // What left the page long ago need not be kept.
    if (!element.isConnected && !("keep" in element.dataset)) spoken.delete(element);
    else for (const [slot, { key, values }] of slots) put(element, slot, key, values);
  }
}

/**
 * Makes an element. `t` and `t-ATTRIBUTE` are keys of texts, `on…` are listeners, `true` sets an
 * empty attribute, `false` and `null` leave it out; everything else is an attribute.
 */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "t") say(element, value);
    else if (name.startsWith("t-")) say(element, value, {}, name.slice(2));
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Paths of the icons, drawn with a stroke on a 20 by 20 ground. */
const ICONS = {
  window: "M10 3a7 7 0 1 0 0 14a7 7 0 0 0 0-14zM10 3v14M10 6h4.5M10 10h6.8M10 14h4.5",
  pan: "M10 2.5v15M2.5 10h15M10 2.5L8 4.5M10 2.5l2 2M10 17.5l-2-2M10 17.5l2-2M2.5 10l2-2M2.5 10l2 2M17.5 10l-2-2M17.5 10l-2 2",
  invert: "M3.5 3.5h13v13h-13zM3.5 16.5l13-13M13 9v4M11 11h4M5.5 7h4",
  minus: "M4.5 10h11",
  plus: "M4.5 10h11M10 4.5v11",
  reset: "M4.6 7.5A6.3 6.3 0 1 1 3.8 11M4.2 3.5v4.2h4.2",
  full: "M3 7V3h4M13 3h4v4M17 13v4h-4M7 17H3v-4",
  close: "M5 5l10 10M15 5L5 15",
  copy: "M7 7h9v10H7zM4 13V3h9",
  print: "M6 8V3h8v5M6 14H3V8h14v6h-3M6 12h8v5H6z",
  down: "M10 3v9M6.5 8.7L10 12.2l3.5-3.5M4 16.5h12",
  again: "M15.4 7.5A6.3 6.3 0 1 0 16.2 11M15.8 3.5v4.2h-4.2",
  stop: "M5.5 5.5h9v9h-9z",
  trash: "M4 6h12M8 6V4h4v2M5.5 6l.7 10.5h7.6L14.5 6",
  file: "M5 2.5h7l3.5 3.5v11.5h-10.5zM12 2.5v3.5h3.5",
};

/** An icon, hidden from screen readers: the button around it carries the name. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon; its name is shown (`wide`) or only told to screen readers and on hover. */
export function button(name, key, onclick, { wide = false, ...attributes } = {}) {
  const children = wide ? [icon(name), el("span", { t: key })] : [icon(name)];
  const naming = wide ? {} : { "t-aria-label": key, "t-title": key };
  const kind = wide ? "tool wide" : "tool";
  return el("button", { type: "button", class: kind, ...naming, onclick, ...attributes }, ...children);
}

/** A file size for people. */
export function sizeText(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  if (bytes < 1024 * 1024) return `${(bytes / 1024).toFixed(0)} KB`;
  return `${(bytes / 1024 / 1024).toFixed(1)} MB`;
}

/** Date and time in the language of the page. */
export function timeText(milliseconds) {
  const form = { dateStyle: "medium", timeStyle: "short" };
  return new Intl.DateTimeFormat(language === "zh" ? "zh-CN" : "en-GB", form).format(milliseconds);
}

const QUIET_MILLISECONDS = 2500;
let waiting = [];
let timer = null;

function speak() {
  const region = document.getElementById("live");
  // A new paragraph for each, so that equal texts in a row are both read.
  region.replaceChildren(el("p", {}, waiting.join(" ")));
  waiting = [];
  timer = setTimeout(() => {
    timer = null;
    if (waiting.length > 0) speak();
  }, QUIET_MILLISECONDS);
}

/**
 * Tells screen readers a text, politely: what comes within 2.5 s of the last is gathered and read at
 * once, so that a streaming report is heard in sentences and not in pieces of words.
 */
export function announce(text) {
  waiting.push(text);
  if (timer === null) speak();
}
