// The films of a study beside those of an earlier one: two panes, one toolbar, linked where it is wanted.

import { ApiError, send } from "../api.js";
import { el, say, t } from "../dom.js";
import { GreyViewer, readFilm } from "./grey.js";
import { dateText } from "./list.js";

/** One film at a time of one study. */
class Pane {
  #study;
  #role;
  #asked = 0;

  constructor(study, role, changed) {
    this.#study = study;
    this.#role = role;
    this.canvas = el("canvas", { tabindex: "0", role: "img" });
    this.message = el("p", { class: "pane-message", role: "status" });
    this.facts = el("div", { class: "pane-facts", "aria-hidden": "true" });
    this.reading = el("div", { class: "pane-reading", "aria-hidden": "true" });
    this.select = el("select", { "t-aria-label": "pane.film" });
    for (const [index, film] of study.films.entries()) {
      const label = [`${index + 1}`, film.view, dateText(film.date)].filter(Boolean).join(" · ");
      this.select.append(el("option", { value: film.id }, label));
    }
    this.select.addEventListener("change", () => this.load(this.select.value));
    this.viewer = new GreyViewer(this.canvas, (byUser) => {
      this.#told();
      changed(this, byUser);
    });
    const head = el("div", { class: "pane-head" }, el("strong", { t: `pane.${role}` }), this.select);
    const stage = el("div", { class: "pane-stage" }, this.canvas, this.facts, this.reading, this.message);
    this.element = el("div", { class: "pane-of-films" }, head, stage);
    // The frontal film first, as the model reads them.
    const first = study.films.find(({ view }) => ["PA", "AP"].includes(view)) ?? study.films[0];
    if (first) this.load(first.id);
  }

  /** Reads a film and shows it. */
  async load(id) {
    this.#asked += 1;
    const asked = this.#asked;
    this.select.value = id;
    const film = this.#study.films.find((one) => one.id === id);
    say(this.message, "pane.loading");
    try {
      const shown = await readFilm(await send(`/v1/studies/${this.#study.id}/films/${id}`));
      if (asked !== this.#asked) return;
      const view = film.view || shown.view;
      const date = dateText(film.date || this.#study.date) || t("pane.no_date");
      this.facts.textContent = [view, date].filter(Boolean).join("  ");
      say(this.canvas, "pane.canvas", { role: t(`pane.${this.#role}`), view, date }, "aria-label");
      if (film.kept_out) say(this.message, "pane.kept_out", { reason: film.kept_out });
      else this.message.textContent = "";
      this.viewer.show(shown);
    } catch (cause) {
      if (asked !== this.#asked) return;
      const reason = cause instanceof ApiError ? cause.message || cause.kind : String(cause.message);
      say(this.message, "pane.failed", { reason });
    }
  }

  #told() {
    const { view, film } = this.viewer;
    if (!film) return;
    const scale = Math.round(100 * view.zoom);
    this.reading.textContent = `W ${Math.round(view.window)}  L ${Math.round(view.level)}  ${scale}%`;
  }
}

export class Desk {
  #panes = [];
  #linked = true;
  #tool = "window";
  #active = 0;
  #buttons = {};

  /** `study` with its `films`, and `prior` of the same form or `null`. */
  constructor(study, prior) {
    this.bar = this.#toolbar(prior !== null);
    this.grid = el("div", { class: "panes" });
    this.element = el("section", { class: "desk-work", "t-aria-label": "desk" }, this.bar, this.grid);
    this.#add(study, "current");
    if (prior) this.#add(prior, "prior");
    this.#showTools();
  }

  #add(study, role) {
    const pane = new Pane(study, role, (from, byUser) => this.#follow(from, byUser));
    const index = this.#panes.push(pane) - 1;
    pane.canvas.addEventListener("focus", () => (this.#active = index));
    this.grid.append(pane.element);
    this.grid.classList.toggle("two", this.#panes.length > 1);
  }

  #follow(from, byUser) {
    if (!byUser || !this.#linked || !from.viewer.film) return;
    for (const pane of this.#panes) if (pane !== from) pane.viewer.follow(from.viewer.relative());
  }

  /** The viewer that was looked at last. */
  get viewer() {
    return this.#panes[this.#active]?.viewer ?? this.#panes[0].viewer;
  }

  #setTool(tool) {
    this.#tool = tool;
    this.#showTools();
  }

  #showTools() {
    for (const pane of this.#panes) {
      pane.viewer.tool = this.#tool;
      pane.canvas.dataset.tool = this.#tool;
    }
    for (const tool of ["window", "pan", "measure"]) {
      this.#buttons[tool].setAttribute("aria-pressed", String(tool === this.#tool));
    }
    this.#buttons.magnify.setAttribute("aria-pressed", String(this.viewer.magnifies));
    this.#buttons.link?.setAttribute("aria-pressed", String(this.#linked));
    this.#buttons.prior?.setAttribute("aria-pressed", String(!this.#panes[1].element.hidden));
  }

  #toggleLink() {
    this.#linked = !this.#linked;
    if (this.#linked) this.#follow(this.#panes[this.#active], true);
    this.#showTools();
  }

  #togglePrior() {
    const { element } = this.#panes[1];
    element.hidden = !element.hidden;
    if (element.hidden) this.#active = 0;
    this.grid.classList.toggle("two", !element.hidden);
    this.#showTools();
  }

  #magnify() {
    const on = !this.viewer.magnifies;
    for (const pane of this.#panes) pane.viewer.setMagnifier(on);
    this.#showTools();
  }

  #toolbar(hasPrior) {
    const tool = (name, key, letter, action) => {
      const button = el("button", { type: "button", class: "tool wide", onclick: action }, el("span", { t: key }));
      button.append(el("kbd", { "aria-hidden": "true" }, letter));
      button.setAttribute("aria-keyshortcuts", letter);
      this.#buttons[name] = button;
      return button;
    };
    return el(
      "div",
      { class: "work-tools", role: "toolbar", "t-aria-label": "pane.tools" },
      tool("window", "tool.width", "W", () => this.#setTool("window")),
      tool("pan", "tool.pan", "H", () => this.#setTool("pan")),
      tool("measure", "tool.measure", "M", () => this.#setTool("measure")),
      tool("magnify", "tool.magnify", "G", () => this.#magnify()),
      tool("invert", "tool.invert", "I", () => this.viewer.setLevels({ invert: !this.viewer.view.invert })),
      tool("turn", "tool.turn", "R", () => this.viewer.turn()),
      tool("true", "tool.true_size", "1", () => this.viewer.trueSize()),
      tool("fit", "tool.fit", "0", () => this.viewer.reset()),
      hasPrior ? tool("link", "tool.link", "L", () => this.#toggleLink()) : null,
      hasPrior ? tool("prior", "tool.prior", "V", () => this.#togglePrior()) : null,
    );
  }

  /** A key that was pressed while the study is shown; whether it was one of the films'. */
  key(event) {
    const pan = event.shiftKey ? 100 : 25;
    const onFilm = event.target instanceof HTMLCanvasElement;
    const press = (name) => () => this.#buttons[name]?.click();
    const actions = {
      w: press("window"),
      h: press("pan"),
      m: press("measure"),
      g: press("magnify"),
      i: press("invert"),
      r: press("turn"),
      1: press("true"),
      0: press("fit"),
      l: press("link"),
      v: press("prior"),
      "+": () => this.viewer.zoomBy(1.25),
      "=": () => this.viewer.zoomBy(1.25),
      "-": () => this.viewer.zoomBy(0.8),
      "[": () => this.viewer.stepLevels(-5, 0),
      "]": () => this.viewer.stepLevels(5, 0),
      ",": () => this.viewer.stepLevels(0, -3),
      ".": () => this.viewer.stepLevels(0, 3),
    };
    const arrows = {
      ArrowLeft: () => this.viewer.panBy(-pan, 0),
      ArrowRight: () => this.viewer.panBy(pan, 0),
      ArrowUp: () => this.viewer.panBy(0, -pan),
      ArrowDown: () => this.viewer.panBy(0, pan),
    };
    const letter = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const action = actions[letter] ?? (onFilm ? arrows[event.key] : undefined);
    action?.();
    return action !== undefined;
  }
}
