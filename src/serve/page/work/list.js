// The worklist: search, states, pages, and a table that is worked with keys.

import { ApiError, send } from "../api.js";
import { announce, currentLanguage, el, hush, say, t, timeText } from "../dom.js";

const LINES = 50;
const REFRESH_MILLISECONDS = 5000;
const SEARCH_MILLISECONDS = 250;

const $ = (id) => document.getElementById(id);

/** Filters of the list: name of the text, states. */
const FILTERS = [
  ["list.all", []],
  ["state.received", ["received", "complete"]],
  ["state.drafted", ["drafted"]],
  ["state.signed", ["signed"]],
  ["state.sent", ["sent"]],
  ["state.failed", ["failed"]],
];

/** Sends JSON and gives the answer's. */
export async function post(path, body) {
  const options = { method: "POST", headers: { "content-type": "application/json" } };
  return (await send(path, { ...options, body: JSON.stringify(body) })).json();
}

/** Offers the body of a response as a file. */
export async function save(response, name) {
  const url = URL.createObjectURL(await response.blob());
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** `20260131…` as a date; what is none, as it is. */
export function dateText(text) {
  return /^\d{8}/.test(text) ? `${text.slice(0, 4)}-${text.slice(4, 6)}-${text.slice(6, 8)}` : text;
}

export class List {
  #filter = FILTERS[0][1];
  #offset = 0;
  #page = { studies: [], total: 0, counts: {} };
  #chosen = 0;
  #timer = null;
  #asked = 0;
  #open;

  /** `open(id)` shows a study. */
  constructor(open) {
    this.#open = open;
    $("search-form").addEventListener("submit", (event) => event.preventDefault());
    let typing = null;
    $("search").addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(() => this.#first(), SEARCH_MILLISECONDS);
    });
    $("urgent").addEventListener("change", () => this.#first());
    $("back").addEventListener("click", () => this.#turn(-1));
    $("on").addEventListener("click", () => this.#turn(1));
    $("csv").addEventListener("click", () => this.#csv());
    for (const [key, states] of FILTERS) {
      const choose = () => {
        this.#filter = states;
        this.#first();
      };
      const count = el("span", { class: "count" });
      const chip = el("button", { type: "button", class: "chip", onclick: choose }, el("span", { t: key }), count);
      $("states").append(chip);
    }
  }

  /** Shows the list and keeps it fresh. */
  async show() {
    $("list").hidden = false;
    await this.load();
    this.#timer ??= setInterval(() => document.hidden || this.load(), REFRESH_MILLISECONDS);
  }

  hide() {
    $("list").hidden = true;
    clearInterval(this.#timer);
    this.#timer = null;
  }

  /** The study after one, as the list has it. */
  after(id, step = 1) {
    const at = this.#page.studies.findIndex((study) => study.id === id);
    return at === -1 ? null : (this.#page.studies[at + step]?.id ?? null);
  }

  #query() {
    const order = $("urgent").checked ? "urgent" : "newest";
    return { search: $("search").value.trim(), state: this.#filter, order };
  }

  async #first() {
    this.#offset = 0;
    this.#chosen = 0;
    await this.load();
  }

  async #turn(step) {
    this.#offset = Math.max(0, this.#offset + step * LINES);
    this.#chosen = 0;
    await this.load();
    announce($("range").textContent);
  }

  async load() {
    this.#asked += 1;
    const asked = this.#asked;
    try {
      const page = await post("/v1/worklist", { ...this.#query(), offset: this.#offset, limit: LINES });
      // An answer that was overtaken shows what was typed before.
      if (asked !== this.#asked) return;
      this.#page = page;
      hush($("list-error"));
    } catch (cause) {
      if (!(cause instanceof ApiError)) throw cause;
      say($("list-error"), "error.work", { reason: cause.message || cause.kind });
      return;
    }
    this.draw();
  }

  async #csv() {
    const body = JSON.stringify(this.#query());
    const options = { method: "POST", headers: { "content-type": "application/json" }, body };
    try {
      await save(await send("/v1/worklist.csv", options), "studies.csv");
    } catch (cause) {
      say($("list-error"), "error.work", { reason: cause.message || cause.kind });
    }
  }

  /** Draws what was loaded last, in the language of the page. */
  draw() {
    const { studies, total, counts } = this.#page;
    const sum = (states) => states.reduce((all, state) => all + (counts[state] ?? 0), 0);
    for (const [index, chip] of [...$("states").children].entries()) {
      const states = FILTERS[index][1];
      chip.lastElementChild.textContent = sum(states.length > 0 ? states : Object.keys(counts));
      chip.setAttribute("aria-pressed", String(states === this.#filter));
    }
    this.#chosen = Math.min(this.#chosen, Math.max(0, studies.length - 1));
    const focused = $("rows").contains(document.activeElement);
    $("rows").replaceChildren(...studies.map((study, index) => this.#row(study, index)));
    $("none").hidden = studies.length > 0;
    const values = { from: total ? this.#offset + 1 : 0, to: this.#offset + studies.length, total };
    say($("range"), "list.range", values);
    $("back").disabled = this.#offset === 0;
    $("on").disabled = this.#offset + LINES >= total;
    if (focused) this.#mark(this.#chosen, true);
  }

  #row(study, index) {
    const { patient, urgent_finding: finding } = study;
    const name = patient.name || patient.id || t("list.no_name");
    const label = currentLanguage() === "zh" ? finding?.chinese : finding?.key.replaceAll("_", " ");
    const bar = el("span", { class: "urgency", "aria-hidden": "true" }, el("i"));
    bar.firstElementChild.style.setProperty("width", `${100 * study.urgency}%`);
    const open = el("button", { type: "button", class: "row-open", onclick: () => this.#open(study.id) }, name);
    say(open, "list.open", { name }, "aria-label");
    const row = el(
      "tr",
      { class: index === this.#chosen ? "chosen" : null },
      el("td", {}, el("span", { class: `state ${study.state}` }, t(`state.${study.state}`))),
      el("td", { class: "urgent-cell" }, ...(finding ? [bar, `${label} ${Math.round(100 * study.urgency)} %`] : ["–"])),
      el("td", {}, open, el("span", { class: "sub" }, [patient.id, patient.sex, patient.age].filter(Boolean).join(" · "))),
      el("td", {}, study.description || study.accession || "–"),
      el("td", {}, dateText(study.date) || timeText(study.received_at)),
      el("td", { class: "number" }, String(study.films)),
      el("td", {}, study.signed_by ?? study.edited_by ?? "–"),
    );
    row.addEventListener("click", (event) => {
      if (event.target.closest("button") === null) this.#open(study.id);
    });
    open.addEventListener("focus", () => this.#mark(index, false));
    return row;
  }

  #mark(index, focus) {
    this.#chosen = index;
    for (const [at, row] of [...$("rows").children].entries()) row.classList.toggle("chosen", at === index);
    const row = $("rows").children[index];
    if (focus) row?.querySelector("button").focus();
    row?.scrollIntoView({ block: "nearest" });
  }

  /** A key that was pressed while the list is shown; whether it was one of its own. */
  key(event) {
    const last = this.#page.studies.length - 1;
    const actions = {
      j: () => this.#mark(Math.min(last, this.#chosen + 1), true),
      k: () => this.#mark(Math.max(0, this.#chosen - 1), true),
      "/": () => $("search").focus(),
      u: () => $("urgent").click(),
    };
    actions.ArrowDown = actions.j;
    actions.ArrowUp = actions.k;
    const action = actions[event.key];
    if (action === undefined || last < 0) return event.key === "/" && ($("search").focus(), true);
    action();
    return true;
  }
}
