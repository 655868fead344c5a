// One study: head, films beside the prior's, report.

import { ApiError, send } from "../api.js";
import { el, say, t } from "../dom.js";
import { Desk } from "./desk.js";
import { dateText } from "./list.js";
import { ReportPanel } from "./report.js";

const REFRESH_MILLISECONDS = 1500;

export class StudyView {
  #place;
  #account;
  #exports;
  #on;
  #id = null;
  #study = null;
  #desk = null;
  #panel = null;
  #timer = null;

  /** `place` is filled; `on` has `back()` and `next(step)`. */
  constructor(place, account, exports, on) {
    this.#place = place;
    this.#account = account;
    this.#exports = exports;
    this.#on = on;
  }

  /** Whether leaving loses something. */
  get unsaved() {
    return this.#panel?.unsaved ?? false;
  }

  get id() {
    return this.#id;
  }

  /** Opens a study. */
  async open(id) {
    this.close();
    this.#id = id;
    this.#place.hidden = false;
    await this.#load();
    this.#place.querySelector("h2")?.focus();
  }

  close() {
    clearTimeout(this.#timer);
    this.#id = null;
    this.#study = null;
    this.#panel = null;
    this.#place.hidden = true;
    this.#place.replaceChildren();
  }

  async #load() {
    const id = this.#id;
    try {
      const study = await (await send(`/v1/studies/${id}`)).json();
      if (id !== this.#id) return;
      const films = (one) => one?.films.map((film) => film.id).join();
      const same = films(this.#study) === films(study) && this.#desk !== null;
      this.#study = study;
      this.#draw(same);
    } catch (cause) {
      if (!(cause instanceof ApiError)) throw cause;
      const reason = cause.message || cause.kind;
      this.#place.replaceChildren(this.#head(), say(el("p", { class: "form-error", role: "alert" }), "error.work", { reason }));
    }
  }

  /** A study without a draft is looked at again until there is one. */
  #wait() {
    clearTimeout(this.#timer);
    if (["received", "complete"].includes(this.#study.state)) {
      this.#timer = setTimeout(() => this.#load(), REFRESH_MILLISECONDS);
    }
  }

  #draw(sameFilms) {
    const prior = this.#study.priors.find((one) => one.films.length > 0) ?? null;
    // Films that are on the desk already keep their window and zoom.
    if (!sameFilms || !this.#desk.element.isConnected) this.#desk = new Desk(this.#study, prior);
    this.#panel = new ReportPanel(this.#study, this.#account, this.#exports, { changed: () => this.#load() });
    const grid = el("div", { class: "study-grid" }, this.#desk.element, this.#panel.element);
    this.#place.replaceChildren(this.#head(), grid);
    this.#wait();
  }

  /** Draws the texts again, in the language of the page. */
  redraw() {
    if (this.#study === null) return;
    this.#place.querySelector(".study-head")?.replaceWith(this.#head());
    this.#panel.draw();
  }

  #head() {
    const back = el("button", { type: "button", class: "plain", t: "study.back", onclick: () => this.#on.back() });
    const next = el("button", { type: "button", class: "plain", t: "study.next", onclick: () => this.#on.next(1) });
    const study = this.#study;
    if (study === null) return el("header", { class: "study-head" }, back);
    const { patient } = study;
    const facts = [patient.id, patient.sex, patient.age, dateText(patient.birth_date), study.accession, dateText(study.date), study.description];
    const state = el("span", { class: `state ${study.state}` }, t(`state.${study.state}`));
    return el(
      "header",
      { class: "study-head" },
      back,
      el("h2", { tabindex: "-1" }, patient.name || patient.id || t("list.no_name")),
      state,
      el("p", { class: "study-facts" }, facts.filter(Boolean).join(" · ")),
      study.indication ? el("p", { class: "study-facts" }, study.indication) : null,
      next,
    );
  }

  /** A key that was pressed while the study is shown; whether it was one of its own. */
  key(event) {
    const actions = {
      e: () => this.#panel?.edit(),
      s: () => this.#panel?.sign(),
      n: () => this.#on.next(1),
      p: () => this.#on.next(-1),
      Escape: () => this.#on.back(),
    };
    const action = actions[event.key];
    if (action) action();
    return action !== undefined || (this.#desk?.key(event) ?? false);
  }

  /** Ctrl+S and Ctrl+Enter, in the editor as well. */
  command(key) {
    if (key === "s") this.#panel?.save();
    else this.#panel?.sign();
  }
}
