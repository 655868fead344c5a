// One answer: its request, its text as it comes, and what can be done with it afterwards.

import { ApiError, chat } from "./api.js";
import { announce, button, el, hush, say, t } from "./dom.js";
import { copy, download, ended, filmLabel, plain, remarkText } from "./export.js";
import { conflictText, showFindings } from "./findings.js";

/** A browser opens six connections to a server of HTTP/1.1; two are left for the rest of the page. */
const AT_ONCE = 4;

/** A server that has no room at the moment is tried again so often. */
const MOST_RETRIES = 6;

/** What passes by itself, with what is said while it is waited for. */
const PASSING = { busy: "run.queued", crowded: "run.crowded", stopping: "run.stopping" };

let running = 0;
const line = [];

async function takePlace(signal) {
  if (running >= AT_ONCE) {
    await new Promise((resolve) => {
      line.push(resolve);
      signal.addEventListener("abort", resolve, { once: true });
    });
  }
  running += 1;
}

function leavePlace() {
  running -= 1;
  line.shift()?.();
}

/** Waits, or until `signal` is aborted. */
function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

/** Where the last whole sentence of `text` behind `from` ends. */
function sentenceEnd(text, from) {
  let end = from;
  for (const match of text.slice(from).matchAll(/[。！？；\n]|[.!?;](?=\s)/g)) {
    end = from + match.index + match[0].length;
  }
  return end;
}

export class Run {
  #stopper = null;
  #hurry = null;
  #parts = {};
  #heard = 0;
  #frame = null;

  /**
   * `films` are the `Film`s asked about; `settings` is `{ question, model, maxTokens, temperature,
   * seed, hashNames, findings }`; `on` has `ended(run)`, `lost()`, `print(run)` and `remove(run)`.
   */
  constructor(films, settings, on) {
    this.films = films;
    this.settings = settings;
    this.on = on;
    this.name = films.map((film) => filmLabel(film, films.length === 1)).join("、");
    this.record = null;
    this.element = this.#view();
  }

  get active() {
    return this.#stopper !== null;
  }

  /** Asks, and again while the server has no room; resolves when the answer is whole, stopped or failed. */
  async start() {
    if (this.active) return;
    this.#stopper = new AbortController();
    const { signal } = this.#stopper;
    Object.assign(this, {
      report: "",
      reasoning: "",
      finish: null,
      stopReason: null,
      remarks: [],
      findings: null,
      usage: null,
      firstText: null,
      record: null,
    });
    this.#heard = 0;
    this.#begin();
    let placed = false;
    try {
      await takePlace(signal);
      placed = true;
      if (signal.aborted) throw new ApiError("cancelled");
      this.facts = await Promise.all(this.films.map((film) => film.facts(this.settings.hashNames)));
      const images = await Promise.all(this.films.map((film) => film.original()));
      await this.#ask(images, signal);
      this.#end(this.finish);
    } catch (cause) {
      this.#fail(cause instanceof ApiError ? cause : new ApiError("page", { message: String(cause) }));
    } finally {
      this.#stopper = null;
      if (placed) leavePlace();
      this.#settle();
      this.on.ended(this);
    }
  }

  /** Ends it; what has come stays. The server frees its place when the connection closes. */
  stop() {
    this.#stopper?.abort();
  }

  async #ask(images, signal) {
    for (let attempt = 1; ; attempt += 1) {
      try {
        this.#status("run.sent");
        this.started = performance.now();
        for await (const event of chat({ ...this.settings, images }, signal)) this.#take(event);
        this.seconds = (performance.now() - this.started) / 1000;
        return;
      } catch (cause) {
        const begun = this.report !== "" || this.reasoning !== "";
        if (!(cause.kind in PASSING) || begun || attempt > MOST_RETRIES) throw cause;
        await this.#queue(PASSING[cause.kind], attempt, cause.retryAfter, signal);
        if (signal.aborted) throw new ApiError("cancelled");
      }
    }
  }

  /** Counts down to the next try; the user may take it at once. */
  async #queue(key, attempt, retryAfter, signal) {
    const hurry = new AbortController();
    this.#hurry = hurry;
    this.#parts.now.hidden = false;
    // Doubling and a little chance: clients refused together do not come back together.
    const wait = Math.max(retryAfter, 2 ** attempt) * (1 + Math.random() / 4);
    announce(t(key, { seconds: Math.ceil(wait), attempt, most: MOST_RETRIES }));
    for (let left = Math.ceil(wait); left > 0 && !hurry.signal.aborted && !signal.aborted; left -= 1) {
      this.#status(key, { seconds: left, attempt, most: MOST_RETRIES });
      await pause(1000, AbortSignal.any ? AbortSignal.any([hurry.signal, signal]) : signal);
    }
    this.#parts.now.hidden = true;
  }

  #take({ content, reasoning, remarks, findings, finish, stop, usage }) {
    if (content || reasoning) this.firstText ??= (performance.now() - this.started) / 1000;
    if (reasoning) {
      if (this.reasoning === "") this.#status("run.thinking_now");
      this.reasoning += reasoning;
    }
    if (content) {
      if (this.report === "") this.#answerBegins();
      this.report += content;
      const end = sentenceEnd(this.report, this.#heard);
      if (end > this.#heard) {
        announce(this.report.slice(this.#heard, end).trim());
        this.#heard = end;
      }
    }
    if (remarks) this.#remark(remarks);
    if (findings) {
      this.findings = findings;
      announce(conflictText(findings));
    }
    if (finish) {
      this.finish = finish;
      this.stopReason = stop;
    }
    if (usage) this.usage = usage;
    // The page is drawn once a frame, however fast the tokens come.
    this.#frame ??= requestAnimationFrame(() => this.#draw());
  }

  /** Shows what the server says of the films, above the report; it comes with the first and the last event. */
  #remark(all) {
    // What is said of findings is in their table.
    const remarks = all.filter(({ code }) => !code.startsWith("finding"));
    if (this.remarks.length > 0 || remarks.length === 0) return;
    this.remarks = remarks;
    const { remarks: list } = this.#parts;
    const films = this.films;
    const line = (remark) => {
      const key = `remark.${remark.code}`;
      const words = t(key) === key ? el("span", { lang: "en" }, remark.text) : el("span", { t: key });
      const film = films.length > 1 ? films[(remark.image ?? 0) - 1] : null;
      const name = film ? say(el("strong"), "film.number", { number: film.number }) : null;
      return el("li", { "data-remark": remark.code }, name, name && " ", words);
    };
    list.replaceChildren(...remarks.map(line));
    list.hidden = remarks.length === 0;
    announce(remarks.map((remark) => remarkText(remark, films)).join(" "));
  }

  #draw() {
    this.#frame = null;
    const { thinking, thoughts, text } = this.#parts;
    thinking.hidden = this.reasoning.trim() === "";
    const atEnd = thoughts.scrollTop + thoughts.clientHeight > thoughts.scrollHeight - 24;
    thoughts.textContent = this.reasoning.trim();
    if (atEnd && this.active) thoughts.scrollTop = thoughts.scrollHeight;
    text.textContent = this.report.trim();
    text.hidden = text.textContent === "";
    this.showFindings();
  }

  /** The table of findings, anew when the language has changed. */
  showFindings() {
    const { findings } = this.#parts;
    findings.hidden = !this.findings;
    if (this.findings) showFindings(findings, this.findings);
  }

  #begin() {
    const { text, error, retry, stop, done, facts, thinking } = this.#parts;
    this.element.classList.add("active");
    this.element.classList.remove("failed");
    text.setAttribute("aria-busy", "true");
    for (const part of [error, retry, done, facts, this.#parts.remarks]) part.hidden = true;
    stop.hidden = false;
    thinking.open = true;
    this.#draw();
    this.#status("run.waiting");
    announce(t("run.announce_start", { name: this.name }));
  }

  #answerBegins() {
    // The reasoning folds when the answer starts, unless the reader is in it.
    const { thinking } = this.#parts;
    if (!thinking.contains(document.activeElement)) thinking.open = false;
    this.#status("run.writing");
  }

  #end(reason) {
    const end = reason === "stop" ? t("run.announce_end", { name: this.name }) : t(...ended(reason, this.stopReason));
    announce(`${this.report.slice(this.#heard).trim()} ${end}`);
    if (reason === "stop") hush(this.#parts.status);
    else this.#status(...ended(reason, this.stopReason));
    this.#keep(reason);
  }

  #fail(cause) {
    const cancelled = cause.kind === "cancelled";
    if (cause.kind === "network" || cause.kind === "broken") this.on.lost();
    if (cancelled) this.#status("run.stopped");
    else hush(this.#parts.status);
    announce(cancelled ? t("run.stopped") : `${t("error.heading")} ${t(`error.${cause.kind}`)}`);
    const { error } = this.#parts;
    error.hidden = cancelled;
    this.element.classList.toggle("failed", !cancelled);
    error.replaceChildren(el("p", { t: `error.${cause.kind}` }));
    const cut = !cancelled && this.report.trim() !== "";
    if (cut && cause.kind !== "broken") error.append(el("p", { t: "error.incomplete" }));
    const bytes = this.films.reduce((sum, film) => sum + film.file.size, 0);
    if (cause.kind === "network" && bytes > 8 * 1024 * 1024)
      error.append(el("p", { t: "error.maybe_large" }));
    const said = [cause.status || "", cause.message].filter(Boolean).join(" · ");
    if (said !== "") error.append(el("p", { class: "detail", lang: "en" }, said));
    if (this.report.trim() !== "") this.#keep(cancelled ? "cancelled" : "broken");
  }

  #keep(reason) {
    const { question, model, maxTokens, temperature, seed } = this.settings;
    this.record = {
      id: `${Date.now()}-${Math.random().toString(36).slice(2, 8)}`,
      created: Date.now(),
      films: this.facts,
      thumbnails: this.films.map((film) => film.thumbnail),
      question,
      model,
      parameters: { max_tokens: maxTokens, temperature, seed },
      report: this.report,
      reasoning: this.reasoning,
      finish_reason: reason,
      stop_reason: this.stopReason,
      remarks: this.remarks,
      findings: this.findings,
      usage: this.usage,
      seconds: this.seconds ?? null,
    };
  }

  /** The card at rest, however the answer ended. */
  #settle() {
    const { text, stop, now, retry, done, facts } = this.#parts;
    cancelAnimationFrame(this.#frame);
    this.#draw();
    this.element.classList.remove("active");
    text.removeAttribute("aria-busy");
    stop.hidden = true;
    now.hidden = true;
    const whole = this.record !== null && this.finish !== null;
    done.hidden = this.report.trim() === "";
    retry.hidden = whole;
    if (whole) {
      facts.hidden = false;
      const { prompt_tokens: read = 0, completion_tokens: written = 0 } = this.usage ?? {};
      say(facts, this.usage ? "run.facts" : "run.facts_short", {
        model: this.settings.model || "–",
        read,
        written,
        first: (this.firstText ?? 0).toFixed(1),
        seconds: this.seconds.toFixed(1),
        rate: (written / Math.max(0.001, this.seconds)).toFixed(1),
      });
    }
  }

  #status(key, values = {}) {
    say(this.#parts.status, key, values);
  }

  #view() {
    const parts = this.#parts;
    parts.status = el("p", { class: "run-status" });
    parts.stop = button("stop", "run.stop", () => this.stop(), { wide: true });
    parts.now = button("again", "run.now", () => this.#hurry?.abort(), { wide: true, hidden: true });
    parts.thoughts = el("div", {
      class: "thoughts",
      tabindex: "0",
      role: "region",
      "t-aria-label": "run.thinking",
    });
    parts.thinking = el(
      "details",
      { class: "thinking", hidden: true },
      el("summary", { t: "run.thinking" }),
      parts.thoughts,
    );
    parts.remarks = el("ul", { class: "remarks", "t-aria-label": "run.remarks", hidden: true });
    parts.text = el("div", { class: "report-text", lang: "zh-CN" });
    parts.findings = el("div", { class: "findings", hidden: true });
    parts.error = el("div", { class: "error", hidden: true });
    parts.retry = button("again", "run.retry", () => this.start(), { wide: true, hidden: true });
    const copied = async () => {
      const [key] = await Promise.allSettled([copy(plain(this.record))]);
      const told = key.status === "fulfilled" ? "run.copied" : "run.not_copied";
      say(parts.told, told);
      announce(t(told));
      setTimeout(() => hush(parts.told), 3000);
    };
    parts.told = el("span", { class: "told", "aria-hidden": "true" });
    parts.done = el(
      "div",
      { class: "run-actions", role: "group", "t-aria-label": "run.actions", hidden: true },
      button("copy", "run.copy", copied, { wide: true }),
      button("print", "run.print", () => this.on.print(this), { wide: true }),
      button("down", "run.markdown", () => download(this.record, "md"), { wide: true }),
      button("down", "run.json", () => download(this.record, "json"), { wide: true }),
      parts.told,
    );
    parts.facts = el("p", { class: "run-facts", hidden: true });
    const drop = button("close", "run.remove", () => (this.stop(), this.on.remove(this)));
    const question = el("h3", { class: "run-question" }, this.settings.question);
    // A joint report says of which films it speaks, in the model's order.
    const films =
      this.films.length > 1
        ? el("ol", { class: "run-films" }, ...this.films.map((film) => film.reference()))
        : null;
    return el(
      "section",
      { class: "run" },
      el("header", { class: "run-head" }, question, drop),
      films,
      el("div", { class: "run-now" }, parts.status, parts.now, parts.stop),
      // What is wrong with a report is read before it, however long it is.
      parts.error,
      parts.retry,
      parts.remarks,
      parts.thinking,
      parts.text,
      parts.findings,
      parts.done,
      parts.facts,
    );
  }
}
