// Probabilities of findings beside a report, as a table: conflicts first, then what is likely.

import { currentLanguage, el, t } from "./dom.js";

/** Name of a class in the language of the page. */
const nameOf = (key, { chinese }) => (currentLanguage() === "zh" ? chinese : key.replaceAll("_", " "));

/** A probability in per cent; what is not 0 or 1 is not shown as such. */
function percent(probability) {
  const value = 100 * probability;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  if (value < 100 && value > 99.9) return "> 99.9 %";
  return `${value.toFixed(1)} %`;
}

/** Whether both the report and the probability say that a class is absent. */
const quiet = ([, one]) =>
  !one.conflict && one.decision === "absent" && ["absent", "not_mentioned"].includes(one.in_report);

function row([key, one]) {
  const bar = el("span", { class: "probability-bar", "aria-hidden": "true" }, el("i"));
  bar.firstElementChild.style.setProperty("width", `${100 * one.probability}%`);
  return el(
    "tr",
    { class: one.conflict ? "conflict" : one.decision },
    el(
      "th",
      { scope: "row" },
      el("span", { class: "name" }, nameOf(key, one)),
      one.conflict ? el("strong", { class: "conflict-mark" }, t("findings.conflict")) : null,
    ),
    el("td", { class: "number" }, percent(one.probability), bar),
    el("td", {}, el("span", { class: `decision ${one.decision}` }, t(`findings.${one.decision}`))),
    el("td", {}, t(`findings.report.${one.in_report}`)),
  );
}

function table(entries, caption) {
  const head = ["findings.class", "findings.probability", "findings.decision", "findings.in_report"];
  return el(
    "div",
    { class: "findings-scroll", role: "group", tabindex: "0", "aria-label": caption },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...head.map((key) => el("th", { scope: "col" }, t(key))))),
      el("tbody", {}, ...entries.map(row)),
    ),
  );
}

/** Fills `box` with the `findings` of an answer, in the language of the page. */
export function showFindings(box, findings) {
  const entries = Object.entries(findings.classes);
  entries.sort(([, a], [, b]) => b.conflict - a.conflict || b.probability - a.probability);
  const shown = entries.filter((entry) => !quiet(entry));
  const rest = entries.filter(quiet);
  const error = Math.round(1000 * (findings.target_error ?? 0)) / 10;
  const note = findings.calibrated
    ? el("p", { class: "findings-note" }, t("findings.calibrated", { error }))
    : el(
        "p",
        { class: "findings-note uncalibrated" },
        el("strong", {}, t("findings.uncalibrated")),
        " ",
        el("span", { class: "detail", lang: "en" }, findings.uncalibrated_because ?? ""),
      );
  const title = t("findings.title");
  box.replaceChildren(el("h4", {}, title), note);
  if (shown.length > 0) box.append(table(shown, title));
  if (rest.length > 0) {
    const caption = t("findings.rest", { count: rest.length });
    box.append(el("details", {}, el("summary", {}, caption), table(rest, caption)));
  }
}

/** The conflicts of an answer in words; empty where there is none. */
export function conflictText(findings) {
  const names = Object.entries(findings.classes)
    .filter(([, one]) => one.conflict)
    .map(([key, one]) => nameOf(key, one));
  return names.length > 0 ? t("findings.announce", { names: names.join("、") }) : "";
}

/** The findings as lines of Markdown. */
export function findingsMarkdown(findings) {
  const head = ["findings.class", "findings.probability", "findings.decision", "findings.in_report"];
  const lines = [`## ${t("findings.title")}`, ""];
  if (!findings.calibrated) lines.push(`> ${t("findings.uncalibrated")}`, "");
  lines.push(`| ${head.map((key) => t(key)).join(" | ")} |`, "|---|---|---|---|");
  for (const [key, one] of Object.entries(findings.classes)) {
    const mark = one.conflict ? ` **${t("findings.conflict")}**` : "";
    const report = t(`findings.report.${one.in_report}`) + mark;
    lines.push(
      `| ${nameOf(key, one)} | ${percent(one.probability)} | ${t(`findings.${one.decision}`)} | ${report} |`,
    );
  }
  return [...lines, ""];
}
