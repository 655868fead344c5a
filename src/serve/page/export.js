// A finished report on its way out of the page: clipboard, Markdown, JSON, paper.
//
// A record is what these take and what the history keeps:
// { id, created, films: [facts], thumbnails, question, model, parameters, report, reasoning,
//   finish_reason, usage, seconds }.

import { el, t, timeText } from "./dom.js";

/** Key and values of the text for how an answer ended. */
export function ended(reason) {
  const known = ["stop", "length", "cancelled", "broken"];
  return known.includes(reason) ? [`finish.${reason}`, {}] : ["finish.other", { reason }];
}

/** The report alone; one that is not whole says so, wherever it is pasted. */
export function plain({ report, finish_reason: reason }) {
  return reason === "stop" ? report.trim() : `${report.trim()}\n\n[${t(...ended(reason))}]`;
}

/** The record as Markdown. */
export function markdown(record) {
  const films = record.films.map(({ name, width, height }) =>
    width ? `${name} (${width} × ${height})` : name,
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
    `- ${t("export.ended")}: ${t(...ended(record.finish_reason))}`,
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
  const names = record.films.map((film) => film.name).join("; ");
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
      fact("export.ended", t(...ended(record.finish_reason))),
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
