// The report of a study: read with marked words, edited, compared, signed, asked about, exported.

import { ApiError, send } from "../api.js";
import { announce, currentLanguage, el, hush, say, t, timeText } from "../dom.js";
import { showFindings } from "../findings.js";
import { changesElement } from "./changes.js";
import { post, save } from "./list.js";
import { TEMPLATES } from "./words.js";

const KEPT_TEMPLATES = "xray-templates";

function keptTemplates() {
  try {
    return JSON.parse(localStorage.getItem(KEPT_TEMPLATES) ?? "[]");
  } catch {
    return [];
  }
}

const nameOf = ({ chinese, finding }) => (currentLanguage() === "zh" ? chinese : finding.replaceAll("_", " "));

export class ReportPanel {
  #study;
  #on;
  #parts = {};
  #editing = false;
  #turns = [];

  /** `study` as the server gives it; `account`; `on.changed()` is called after the study was changed. */
  constructor(study, account, exports, on) {
    this.#study = study;
    this.#on = on;
    this.may = (scope) => account.scopes.includes(scope);
    this.account = account;
    this.exports = exports;
    this.element = el("section", { class: "report-panel", "t-aria-label": "report.title" });
    this.draw();
  }

  /** Whether there is something that is not saved. */
  get unsaved() {
    return this.#editing && this.#parts.box.value.trim() !== this.#study.text.trim();
  }

  /** Draws everything, in the language of the page. */
  draw() {
    const study = this.#study;
    const typed = this.#parts.box?.isConnected ? this.#parts.box.value : null;
    this.#parts.error = el("p", { class: "form-error", role: "alert" });
    this.#parts.told = el("span", { class: "told", role: "status" });
    this.element.replaceChildren(
      el("h2", { t: "report.title" }),
      this.#standing(),
      this.#parts.error,
      this.#editing ? this.#editor(typed) : this.#reader(),
      this.#actions(),
      ...this.#remarks(),
      ...this.#changes(),
      ...this.#findings(),
      ...this.#prior(),
      ...this.#further(),
      this.#out(),
    );
    if (study.state === "failed") say(this.#parts.error, "study.failed", { reason: study.failure });
  }

  #standing() {
    const { state, edited, signed } = this.#study;
    const last = signed.at(-1);
    if (last) {
      const told = say(el("p", { class: "standing signed" }), "report.signed_by", { by: last.by, at: timeText(last.at) });
      if (signed.length > 1) told.append(` ${t("report.version", { number: signed.length })}`);
      return told;
    }
    if (["received", "complete"].includes(state)) return el("p", { class: "standing", t: "study.waiting" });
    if (edited) {
      return say(el("p", { class: "standing" }), "report.edited_by", { by: edited.by, at: timeText(edited.at) });
    }
    return el("p", { class: "standing", t: "report.draft_note" });
  }

  /** The text with its findings marked; a mark and its row of the table point at each other. */
  #reader() {
    const { text, mentions = [] } = this.#study;
    const box = el("div", { class: "report-read", lang: "zh-CN" });
    let at = 0;
    for (const mention of mentions) {
      if (mention.start < at) continue;
      const words = text.slice(mention.start, mention.end);
      const mark = el("mark", { class: mention.status, "data-finding": mention.finding, title: nameOf(mention) }, words);
      mark.addEventListener("mouseenter", () => this.#point(mention.finding, true));
      mark.addEventListener("mouseleave", () => this.#point(mention.finding, false));
      box.append(text.slice(at, mention.start), mark);
      at = mention.end;
    }
    box.append(text.slice(at));
    return box;
  }

  #point(finding, on) {
    for (const element of this.element.querySelectorAll(`[data-finding="${CSS.escape(finding)}"]`)) {
      element.classList.toggle("pointed", on);
    }
  }

  #editor(typed) {
    const box = el("textarea", { class: "report-edit", rows: 12, lang: "zh-CN", "t-aria-label": "report.text", spellcheck: "false" });
    box.value = typed ?? this.#study.text;
    this.#parts.box = box;
    const select = el("select", { "t-aria-label": "report.template" }, el("option", { value: "", t: "report.template_none" }));
    for (const [name, text] of [...TEMPLATES[currentLanguage()], ...keptTemplates()]) {
      select.append(el("option", { value: text }, name));
    }
    select.addEventListener("change", () => {
      box.setRangeText(select.value, box.selectionStart, box.selectionEnd, "end");
      select.value = "";
      box.focus();
    });
    const name = el("input", { type: "text", maxlength: 40, "t-placeholder": "report.template_name", "t-aria-label": "report.template_name" });
    const keep = () => {
      if (name.value.trim() === "" || box.value.trim() === "") return name.focus();
      const all = keptTemplates().filter(([other]) => other !== name.value.trim());
      localStorage.setItem(KEPT_TEMPLATES, JSON.stringify([...all, [name.value.trim(), box.value]]));
      name.value = "";
      this.draw();
    };
    const kept = el("button", { type: "button", class: "plain", t: "report.template_keep", onclick: keep });
    return el("div", { class: "editor" }, box, el("div", { class: "templates" }, select, name, kept));
  }

  #actions() {
    const { state, signed } = this.#study;
    const box = el("div", { class: "report-actions" });
    const ready = ["drafted", "signed", "sent", "failed"].includes(state);
    if (!this.may("edit")) return el("p", { class: "hint", t: "report.no_scope" });
    if (!ready) return box;
    const button = (key, kind, action) => el("button", { type: "button", class: kind, t: key, onclick: action });
    if (this.#editing) {
      // A signed report is not edited in place: its amendment is signed at once.
      if (signed.length === 0) box.append(button("report.save", "secondary", () => this.save()));
      box.append(button("report.cancel", "plain", () => this.#stop()));
    } else {
      box.append(button(signed.length > 0 ? "report.amend" : "report.edit", "secondary", () => this.edit()));
    }
    const amends = signed.length === 0 || this.#editing;
    if (this.may("sign") && amends) box.prepend(button("report.sign", "primary", () => this.sign()));
    if (signed.length === 0) box.append(button("study.retry", "plain", () => this.#again()));
    box.append(this.#parts.told);
    return box;
  }

  #remarks() {
    const remarks = this.#study.draft?.remarks ?? [];
    if (remarks.length === 0) return [];
    const told = ({ code, text }) => {
      const known = t(`remark.${code}`);
      return el("li", {}, known === `remark.${code}` ? text : known);
    };
    return [el("ul", { class: "remarks", "t-aria-label": "report.remarks" }, ...remarks.map(told))];
  }

  #changes() {
    const { draft, signed, edited } = this.#study;
    const last = signed.at(-1) ?? edited;
    if (!draft || !last) return [];
    const title = el("summary", { t: "report.changes" });
    return [el("details", { class: "fold", open: true }, title, changesElement(draft.text, last.text))];
  }

  #findings() {
    const findings = this.#study.draft?.findings;
    if (!findings?.classes) return [];
    const box = el("div", { class: "findings" });
    showFindings(box, findings);
    // Under the panel's own heading.
    box.querySelector("h4")?.setAttribute("aria-level", "3");
    const names = new Map(Object.entries(findings.classes).map(([key, one]) => [one.chinese, key]));
    for (const row of box.querySelectorAll("tr")) {
      const name = row.querySelector(".name")?.textContent;
      const key = names.get(name) ?? name?.replaceAll(" ", "_");
      if (!key) continue;
      row.dataset.finding = key;
      row.addEventListener("mouseenter", () => this.#point(key, true));
      row.addEventListener("mouseleave", () => this.#point(key, false));
    }
    return [box];
  }

  #prior() {
    const [prior] = this.#study.priors;
    if (!prior?.text) return [];
    const text = el("p", { class: "report-read", lang: "zh-CN" }, prior.text);
    return [el("details", { class: "fold" }, el("summary", { t: "report.prior" }), text)];
  }

  #further() {
    if (!this.may("ask") || this.#study.films.length === 0) return [];
    const list = el("div", { class: "turns", "aria-live": "polite" });
    const show = () =>
      list.replaceChildren(...this.#turns.map((text, index) => el("p", { class: index % 2 ? "answer" : "question", lang: "zh-CN" }, text)));
    show();
    const box = el("input", { type: "text", maxlength: 4000, "t-placeholder": "ask.question", "t-aria-label": "ask.question" });
    const go = el("button", { type: "submit", class: "secondary", t: "ask.send" });
    const ask = async (event) => {
      event.preventDefault();
      const question = box.value.trim();
      if (question === "" || go.disabled) return;
      go.disabled = true;
      const waiting = el("p", { class: "hint", t: "ask.waiting" });
      list.append(el("p", { class: "question" }, question), waiting);
      try {
        const { text } = await post(`/v1/studies/${this.#study.id}/ask`, { question, before: this.#turns });
        this.#turns.push(question, text);
        box.value = "";
        show();
      } catch (cause) {
        show();
        this.#failed(cause);
      }
      go.disabled = false;
    };
    const form = el("form", { class: "ask-form", onsubmit: ask }, box, go);
    return [el("details", { class: "fold", open: this.#turns.length > 0 }, el("summary", { t: "ask.title" }), list, form)];
  }

  #out() {
    const of = (kind) => {
      const path = `/v1/studies/${this.#study.id}/report.${kind}`;
      const get = async () => {
        try {
          await save(await send(path), `report-${this.#study.id}.${kind}`);
        } catch (cause) {
          this.#failed(cause);
        }
      };
      return el("button", { type: "button", class: "tool wide", t: `export.${kind}`, onclick: get });
    };
    return el("div", { class: "exports", role: "group", "t-aria-label": "export.title_work" }, ...this.exports.map(of));
  }

  #failed(cause) {
    if (!(cause instanceof ApiError)) throw cause;
    if (cause.status === 409 && cause.message.includes("revision")) {
      say(this.#parts.error, "study.changed");
      const again = el("button", { type: "button", class: "plain", t: "study.reload", onclick: () => this.#on.changed() });
      this.#parts.error.append(" ", again);
      return;
    }
    say(this.#parts.error, "error.work", { reason: cause.message || cause.kind });
  }

  /** Opens the text for editing. */
  edit() {
    const { state } = this.#study;
    const ready = ["drafted", "signed", "sent", "failed"].includes(state);
    if (!this.may("edit") || this.#editing || !ready) return;
    this.#editing = true;
    this.draw();
    this.#parts.box.focus();
  }

  #stop() {
    this.#editing = false;
    this.draw();
  }

  async #again() {
    try {
      await post(`/v1/studies/${this.#study.id}/draft`, {});
      await this.#on.changed();
    } catch (cause) {
      this.#failed(cause);
    }
  }

  /** Keeps the text, unsigned. */
  async save() {
    if (!this.#editing || this.#study.signed.length > 0) return;
    hush(this.#parts.error);
    const body = { text: this.#parts.box.value, revision: this.#study.revision };
    try {
      await post(`/v1/studies/${this.#study.id}/report`, body);
      this.#editing = false;
      announce(t("report.saved"));
      await this.#on.changed();
    } catch (cause) {
      this.#failed(cause);
    }
  }

  /** Asks for the signature and sends it. */
  sign() {
    const { signed, draft } = this.#study;
    const text = this.#editing ? this.#parts.box.value : this.#study.text;
    if (!this.may("sign") || text.trim() === "" || (signed.length > 0 && !this.#editing)) return;
    const named = this.account.name !== null;
    const name = el("input", { type: "text", id: "sign-name", maxlength: 100, required: true, autocomplete: "name" });
    const consent = el("input", { type: "checkbox" });
    const error = el("p", { class: "form-error", role: "alert" });
    const close = () => dialog.close();
    const send = async (event) => {
      event.preventDefault();
      const body = { text, revision: this.#study.revision, consent: consent.checked };
      if (!named) body.name = name.value.trim();
      try {
        await post(`/v1/studies/${this.#study.id}/sign`, body);
        this.#editing = false;
        dialog.close();
        announce(t("sign.done"));
        await this.#on.changed();
      } catch (cause) {
        if (!(cause instanceof ApiError)) throw cause;
        say(error, "error.work", { reason: cause.message || cause.kind });
      }
    };
    const who = named
      ? say(el("p"), "sign.as", { name: this.account.name })
      : el("div", {}, el("label", { for: "sign-name", t: "sign.name" }), name);
    const go = el("button", { type: "submit", class: "primary", t: "sign.go" });
    const form = el(
      "form",
      { onsubmit: send },
      el("h2", { id: "sign-title", t: "sign.title" }),
      el("p", { t: "sign.text" }),
      el("div", { class: "sign-changes" }, changesElement(draft?.text ?? "", text)),
      who,
      el("label", { class: "check-label" }, consent, el("span", { t: "sign.consent" })),
      error,
      el("div", { class: "dialog-end" }, el("button", { type: "button", class: "secondary", t: "cancel", onclick: close }), go),
    );
    const dialog = el("dialog", { "aria-labelledby": "sign-title", class: "wide" }, form);
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
    (named ? go : name).focus();
  }
}
