// A finished report on its way out of the page: clipboard, Markdown, JSON, paper.
//
// A record is what these take and what the history keeps:
// { id, created, films: [facts], thumbnails, question, model, parameters, report, reasoning,
//   finish_reason, stop_reason, remarks, findings, usage, seconds }.
//
// A film of it is { number, name, type, bytes, width, height, sha256 }; a remark { image, code, text }.

import { el, t, timeText } from "./dom.js";
import { findingsMarkdown } from "./findings.js";

/** Key and values of the text for how an answer ended; `stop` is the nearer reason, if there is one. */
export function ended(finish, stop = null) {
  const reason = stop ?? finish;
  const known = ["stop", "length", "repetition", "cancelled", "broken"];
  return known.includes(reason) ? [`finish.${reason}`, {}] : ["finish.other", { reason }];
}

const endOf = (record) => t(...ended(record.finish_reason, record.stop_reason));

/** Number and name of a film; the name alone where there is one film only. */
export function filmLabel({ number, name }, alone) {
  return alone ? name : t("film.numbered", { number: number ?? "–", name });
}

/** The films of a record, in the order in which the model saw them. */
const filmLabels = ({ films }) => films.map((film) => filmLabel(film, films.length === 1));

/** Key and values of the text of a remark, in the language of the page where it has words for it. */
export function remarkText({ image, code, text }, films) {
  const known = t(`remark.${code}`) !== `remark.${code}`;
  const words = known ? t(`remark.${code}`) : text;
  const film = films[(image ?? 0) - 1];
  return films.length > 1 && film
    ? t("remark.of_film", { film: t("film.number", { number: film.number ?? image }), words })
    : words;
}

const remarkTexts = ({ remarks = [], films }) => remarks.map((remark) => remarkText(remark, films));

/** The report alone, after what has to be known of it, wherever it is pasted. */
export function plain(record) {
  const notes = remarkTexts(record).map((text) => `[${text}]`);
  const whole = record.finish_reason === "stop";
  const end = whole ? [] : [`[${endOf(record)}]`];
  return [...notes, record.report.trim(), ...end].join("\n\n");
}

/** The record as Markdown. */
export function markdown(record) {
  const labels = filmLabels(record);
  const films = record.films.map(({ width, height }, index) =>
    width ? `${labels[index]} (${width} × ${height})` : labels[index],
  );
  const { max_tokens: length, temperature, seed } = record.parameters;
  const lines = [
    `# ${t("export.title")}`,
    "",
    `> ${t("notice.short")}`,
    "",
    `- ${t("export.film")}: ${films.join("; ")}`,
    `- ${t("export.time")}: ${timeText(record.created)}`,
    `- ${t("export.model")}: ${record.model}`,
    `- ${t("export.parameters")}: max_tokens ${length}, temperature ${temperature}, seed ${seed ?? "–"}`,
    `- ${t("export.ended")}: ${endOf(record)}`,
    ...remarkTexts(record).map((text) => `- ${t("export.remark")}: ${text}`),
    "",
    `## ${t("export.question")}`,
    "",
    record.question,
    "",
    `## ${t("export.report")}`,
    "",
    record.report.trim(),
    "",
  ];
  if (record.findings) lines.push(...findingsMarkdown(record.findings));
  if (record.reasoning.trim() !== "") {
    lines.push(`## ${t("run.thinking")}`, "", record.reasoning.trim(), "");
  }
  return lines.join("\n");
}

/** The record as JSON, without pictures. */
export function json(record) {
  const { thumbnails, id, created, ...rest } = record;
  const notice = t("notice.short");
  return JSON.stringify({ created: new Date(created).toISOString(), notice, ...rest }, null, 2);
}

/** Offers a text as a file. `ending` is `md` or `json`. */
export function download(record, ending) {
  const text = ending === "json" ? json(record) : markdown(record);
  const type = ending === "json" ? "application/json" : "text/markdown;charset=utf-8";
  const stem = record.films[0].name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N}._-]+/gu, "_");
  const stamp = new Date(record.created).toISOString().slice(0, 16).replace(/[-:]/g, "");
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: url, download: `report-${stem.slice(0, 60)}-${stamp}.${ending}` });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Puts a text on the clipboard, also where the page is not in a secure context. */
export async function copy(text) {
  if (navigator.clipboard?.writeText) return navigator.clipboard.writeText(text);
  const box = el("textarea", { class: "hidden-text", "aria-hidden": "true", tabindex: "-1" });
  box.value = text;
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  if (!done) throw new Error("the browser refused");
}

function fact(key, value) {
  return el("div", {}, el("dt", {}, t(key)), el("dd", {}, value));
}

/** One report on paper. `pictures` are data: URLs of the films as decoded. */
function sheet(record, pictures) {
  const names = filmLabels(record).join("; ");
  return el(
    "section",
    { class: "sheet" },
    el("h1", {}, t("export.title")),
    el("p", { class: "sheet-notice" }, t("notice.long")),
    el(
      "dl",
      {},
      fact("export.film", names),
      fact("export.time", timeText(record.created)),
      fact("export.model", record.model),
      fact("export.ended", endOf(record)),
      ...remarkTexts(record).map((text) => fact("export.remark", text)),
    ),
    el("div", { class: "sheet-films" }, ...pictures.map((src) => el("img", { src, alt: names }))),
    el("h2", {}, t("export.question")),
    el("p", { class: "sheet-text" }, record.question),
    el("h2", {}, t("export.report")),
    el("p", { class: "sheet-text sheet-report" }, record.report.trim()),
    el("p", { class: "sheet-sign" }, t("export.sign")),
  );
}

/** Fills the part of the page that is printed with `[record, pictures]` pairs. */
export async function fillPaper(pairs) {
  const paper = document.getElementById("paper");
  paper.replaceChildren(...pairs.map(([record, pictures]) => sheet(record, pictures)));
  await Promise.all([...paper.querySelectorAll("img")].map((image) => image.decode().catch(() => {})));
}
