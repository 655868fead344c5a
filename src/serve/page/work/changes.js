// What was added to a text and what was removed from it.

import { el, t } from "../dom.js";

/** Longest texts that are compared letter by letter, in tokens; longer ones line by line. */
const MOST_TOKENS = 3000;

/** Words of Latin letters, numbers, spaces, and every other letter by itself. */
const tokens = (text) => text.match(/[\p{Script=Latin}\p{M}'’-]+|\d+(?:[.,]\d+)*|\s+|./gsu) ?? [];

/** Pieces of both lists in order: `{ kind: "same" | "added" | "removed", text }`. */
function compare(before, after) {
  // Lengths of the longest common part of both ends, by dynamic programming.
  const width = after.length + 1;
  const lengths = new Uint16Array((before.length + 1) * width);
  for (let i = before.length - 1; i >= 0; i -= 1) {
    for (let j = after.length - 1; j >= 0; j -= 1) {
      lengths[i * width + j] =
        before[i] === after[j]
          ? lengths[(i + 1) * width + j + 1] + 1
          : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const pieces = [];
  const add = (kind, text) => {
    const last = pieces.at(-1);
    if (last?.kind === kind) last.text += text;
    else pieces.push({ kind, text });
  };
  let i = 0;
  let j = 0;
  while (i < before.length || j < after.length) {
    if (i < before.length && j < after.length && before[i] === after[j]) {
      add("same", before[i]);
      i += 1;
      j += 1;
    } else if (
      j === after.length ||
      (i < before.length && lengths[(i + 1) * width + j] >= lengths[i * width + j + 1])
    ) {
      add("removed", before[i]);
      i += 1;
    } else {
      add("added", after[j]);
      j += 1;
    }
  }
  return pieces;
}

/** The pieces of two texts. */
export function changes(before, after) {
  let [one, other] = [tokens(before), tokens(after)];
  if (one.length > MOST_TOKENS || other.length > MOST_TOKENS) {
    [one, other] = [before.split(/(?<=\n)/), after.split(/(?<=\n)/)];
  }
  return compare(one, other);
}

/** The changes as an element, or a sentence that there are none. */
export function changesElement(before, after) {
  const pieces = changes(before.trim(), after.trim());
  if (pieces.every(({ kind }) => kind === "same")) return el("p", { class: "hint", t: "report.same" });
  const tags = { same: "span", added: "ins", removed: "del" };
  const told = ({ kind, text }) =>
    kind === "same"
      ? text
      : el(tags[kind], {}, el("span", { class: "visually-hidden" }, `${t(`report.${kind}`)} `), text);
  return el("p", { class: "changes" }, ...pieces.map(told));
}
