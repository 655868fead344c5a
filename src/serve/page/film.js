// A film: the file as chosen, what it is, how it is shown, and its card on the desk.

import { ApiError, preview } from "./api.js";
import { button, el, icon, say, sizeText } from "./dom.js";
import { Viewer } from "./viewer.js";

/** Kinds of files by their first bytes; a browser decodes the first four itself, the server shows the others. */
const KINDS = {
  png: { mime: "image/png", label: "PNG", native: true },
  jpeg: { mime: "image/jpeg", label: "JPEG", native: true },
  webp: { mime: "image/webp", label: "WebP", native: true },
  bmp: { mime: "image/bmp", label: "BMP", native: true },
  tiff: { mime: "image/tiff", label: "TIFF", native: false },
  dicom: { mime: "application/dicom", label: "DICOM", native: false },
  gif: { mime: "image/gif", label: "GIF", native: false },
  jpeg2000: { mime: "image/jp2", label: "JPEG 2000", native: false },
  jpegls: { mime: "image/jls", label: "JPEG-LS", native: false },
  pnm: { mime: "image/x-portable-anymap", label: "PNM", native: false },
  nifti: { mime: "application/octet-stream", label: "NIfTI", native: false },
  nrrd: { mime: "application/octet-stream", label: "NRRD", native: false },
};

/** The kind of a file, told by its bytes; old DICOM files without a mark, and packed ones, by their name. */
async function kindOf(file) {
  const bytes = new Uint8Array(await file.slice(0, 348).arrayBuffer());
  const has = (at, ...values) => values.every((value, index) => bytes[at + index] === value);
  if (has(0, 0x89, 0x50, 0x4e, 0x47)) return "png";
  if (has(0, 0xff, 0xd8, 0xff, 0xf7)) return "jpegls";
  if (has(0, 0xff, 0xd8, 0xff)) return "jpeg";
  if (has(0, 0x52, 0x49, 0x46, 0x46) && has(8, 0x57, 0x45, 0x42, 0x50)) return "webp";
  if (has(128, 0x44, 0x49, 0x43, 0x4d)) return "dicom";
  if (has(0, 0x49, 0x49, 0x2a, 0) || has(0, 0x4d, 0x4d, 0, 0x2a)) return "tiff";
  if (/\.(dcm|dicom)$/i.test(file.name)) return "dicom";
  if (has(0, 0x49, 0x49, 0x2b, 0) || has(0, 0x4d, 0x4d, 0, 0x2b)) return "tiff";
  if (has(0, 0x42, 0x4d)) return "bmp";
  if (has(0, 0x47, 0x49, 0x46, 0x38)) return "gif";
  if (has(0, 0xff, 0x4f, 0xff, 0x51) || has(4, 0x6a, 0x50, 0x20, 0x20)) return "jpeg2000";
  if (bytes[0] === 0x50 && bytes[1] >= 0x31 && bytes[1] <= 0x36) return "pnm";
  if (has(0, 0x4e, 0x52, 0x52, 0x44)) return "nrrd";
  if (has(344, 0x6e, 0x2b, 0x31) || has(4, 0x6e, 0x2b, 0x32)) return "nifti";
  if (has(0, 0x1f, 0x8b) && /\.nii\.gz$/i.test(file.name)) return "nifti";
  return null;
}

/** Bytes as a data: URL of a type. */
function dataUrl(blob, mime) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(new Blob([blob], { type: mime }));
  });
}

/** SHA-256 in hexadecimal; `null` where the page is not in a secure context. */
async function sha256(blob) {
  if (!globalThis.crypto?.subtle) return null;
  const digest = await crypto.subtle.digest("SHA-256", await blob.arrayBuffer());
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** What the server takes of one film; set when it is known. */
let most = {};

/** Sets the server's limits: `{ max_image_pixels, max_body_bytes }`, either may be absent. */
export function limitFilms(limits) {
  most = limits;
}

/** Bytes of a file that fit a body as base64, with a little left for the question. */
export const largestFile = (bodyBytes) => Math.floor(((bodyBytes - 65536) * 3) / 4);

export class Film {
  #viewer = null;
  #parts = {};

  /** `number` tells it from the others of the desk; `on` has `remove(film)` and `ask(film)`. */
  constructor(file, number, on) {
    this.number = number;
    this.file = file;
    this.name = file.name || `film-${number}`;
    this.kind = null;
    /** `reading`, `shown`, `tile` (cannot be shown but can be sent) or `unusable`. */
    this.state = "reading";
    this.width = null;
    this.height = null;
    this.thumbnail = null;
    /** A picture for print, as decoded, without window and level. */
    this.picture = null;
    this.element = this.#card(on);
  }

  /** Reads the file and shows it. */
  async read() {
    this.state = "reading";
    this.#message("film.reading");
    try {
      this.kind = await kindOf(this.file);
    } catch {
      return this.#unusable("film.unreadable");
    }
    if (this.file.size === 0) return this.#unusable("film.empty");
    if (this.kind === null) return this.#unusable("film.unknown");
    if (most.max_body_bytes && this.file.size > largestFile(most.max_body_bytes)) {
      return this.#unusable("film.too_large", "", { most: sizeText(largestFile(most.max_body_bytes)) });
    }
    this.#parts.kind.textContent = `${KINDS[this.kind].label} · ${sizeText(this.file.size)}`;
    if (KINDS[this.kind].native) {
      try {
        return await this.#show(this.file);
      } catch {
        // Some valid files are beyond a browser (a 12-bit JPEG); the server may know them.
      }
    }
    try {
      await this.#show(await preview(this.file, KINDS[this.kind].mime));
    } catch (cause) {
      if (!(cause instanceof ApiError)) return this.#unusable("film.broken");
      if (cause.kind === "missing" && !KINDS[this.kind].native) return this.#tile();
      if (cause.kind === "missing") return this.#unusable("film.broken");
      this.#unusable(cause.kind === "refused" ? "film.broken" : `error.${cause.kind}`, cause.message);
      // The file itself may be sound.
      if (cause.kind !== "refused") this.#parts.message.append(this.#retry());
    }
  }

  /** Whether the model can be asked about it. */
  get usable() {
    return this.state === "shown" || this.state === "tile";
  }

  /** The file, byte by byte, as the API takes it. */
  original() {
    return dataUrl(this.file, KINDS[this.kind].mime);
  }

  /** What a report says of its film; `hashed` puts a part of the file's hash in place of its name. */
  async facts(hashed = false) {
    const digest = await sha256(this.file).catch(() => null);
    return {
      number: this.number,
      name: hashed ? `film-${digest?.slice(0, 12) ?? this.number}` : this.name,
      type: KINDS[this.kind].mime,
      bytes: this.file.size,
      width: this.width,
      height: this.height,
      sha256: digest,
    };
  }

  /** The film as a joint report names it. */
  reference() {
    const item = el("li", { title: this.name });
    say(item, "film.numbered", { number: this.number, name: this.name });
    return item;
  }

  async #show(blob) {
    const bitmap = await createImageBitmap(blob);
    const pixels = bitmap.width * bitmap.height;
    // A preview is smaller than its film.
    if (blob === this.file && most.max_image_pixels && pixels > most.max_image_pixels) {
      const values = { width: bitmap.width, height: bitmap.height, most: most.max_image_pixels / 1e6 };
      bitmap.close();
      return this.#unusable("film.too_many_pixels", "", values);
    }
    this.width = bitmap.width;
    this.height = bitmap.height;
    this.thumbnail = Viewer.thumbnail(bitmap);
    this.picture = Viewer.thumbnail(bitmap, 1024);
    this.state = "shown";
    this.#parts.size.textContent = `${bitmap.width} × ${bitmap.height}`;
    this.#parts.stage.replaceChildren(this.#parts.canvas, this.#parts.corners);
    this.#parts.tools.hidden = false;
    this.#viewer ??= new Viewer(this.#parts.canvas, (view) => this.#readings(view));
    this.#viewer.show(bitmap);
    bitmap.close();
  }

  #tile() {
    this.state = "tile";
    this.#message("film.no_preview", "", "file");
    this.#parts.stage.classList.add("tile");
  }

  #unusable(key, detail = "", values = {}) {
    this.state = "unusable";
    this.#message(key, detail, "file", values);
    this.element.classList.add("unusable");
  }

  #message(key, detail = "", picture = null, values = {}) {
    const { message, stage } = this.#parts;
    message.replaceChildren(...(picture ? [icon(picture)] : []), say(el("p"), key, values));
    if (detail !== "") message.append(el("p", { class: "detail", lang: "en" }, detail));
    stage.replaceChildren(message, this.#parts.corners);
  }

  #retry() {
    const again = async () => {
      this.element.classList.remove("unusable");
      await this.read();
      this.element.dispatchEvent(new Event("film-read", { bubbles: true }));
    };
    return button("again", "run.retry", again, { wide: true });
  }

  /** Numbers at the film's edge and positions of the controls, after each change. */
  #readings(view) {
    const { reading, windowInput, levelInput, invert, zoom, pan, level } = this.#parts;
    const numbers = { w: Math.round(view.window), l: Math.round(view.level) };
    const percent = Math.round(view.zoom * 100);
    reading.textContent = `W ${numbers.w}  L ${numbers.l}  ${percent}%`;
    windowInput.value = view.window;
    levelInput.value = view.level;
    windowInput.nextElementSibling.textContent = numbers.w;
    levelInput.nextElementSibling.textContent = numbers.l;
    zoom.textContent = `${percent}%`;
    invert.setAttribute("aria-pressed", String(view.invert));
    pan.setAttribute("aria-pressed", String(this.#viewer?.tool === "pan"));
    level.setAttribute("aria-pressed", String(this.#viewer?.tool !== "pan"));
  }

  #card(on) {
    const parts = this.#parts;
    const name = this.name;
    const forKeys = { tabindex: "0", role: "application", "aria-describedby": "film-keys" };
    parts.canvas = el("canvas", { ...forKeys, "data-keep": "" });
    say(parts.canvas, "film.canvas", { name }, "aria-label");
    parts.message = el("div", { class: "stage-message", role: "status" });
    parts.kind = el("span");
    parts.size = el("span");
    parts.reading = el("span", { class: "reading" });
    parts.corners = el(
      "div",
      { class: "corners", "aria-hidden": "true" },
      el("span", { class: "corner-name" }, name),
      el("span", { class: "corner-facts" }, parts.kind, parts.size),
      parts.reading,
    );
    parts.stage = el("div", { class: "stage" });
    parts.tools = this.#toolbar();
    parts.tools.hidden = true;

    const ask = el("button", { type: "button", class: "plain ask-one", onclick: () => on.ask(this) });
    say(ask, "film.ask");
    const remove = el(
      "button",
      { type: "button", class: "tool", onclick: () => on.remove(this) },
      icon("close"),
    );
    say(remove, "film.remove", { name }, "aria-label");
    say(remove, "film.remove", { name }, "title");

    this.badge = el("span", { class: "film-number", hidden: true });
    say(this.badge, "film.number", { number: this.number });
    this.title = el("h2", { class: "film-name", title: name }, name);
    this.reports = el("div", { class: "runs" });
    this.empty = el("p", { class: "no-report", t: "report.none" });
    const film = el("div", { class: "film" }, parts.stage, parts.tools);
    const head = el("header", { class: "film-head" }, this.badge, this.title, ask, remove);
    const pane = el("div", { class: "pane" }, this.empty, this.reports);
    const inner = el("div", { class: "card-inner" }, head, film, pane);
    const card = el("article", { class: "card", tabindex: "-1" }, inner);
    say(card, "film.card", { name }, "aria-label");
    return card;
  }

  #toolbar() {
    const parts = this.#parts;
    const viewer = () => this.#viewer;
    parts.level = button("window", "tool.window", () => viewer().setTool("window"));
    parts.pan = button("pan", "tool.pan", () => viewer().setTool("pan"));
    parts.invert = button("invert", "tool.invert", () =>
      viewer().setLevels({ invert: !viewer().view.invert }),
    );
    parts.zoom = el("output", { class: "zoom" }, "100%");
    parts.windowInput = el("input", { type: "range", min: 2, max: 510, step: 1 });
    parts.levelInput = el("input", { type: "range", min: 0, max: 255, step: 1 });
    const slide = (input, level, key) => {
      const set = () => viewer().setLevels({ [level]: Number(input.value) });
      input.addEventListener("input", set);
      return el("label", { class: "slide" }, el("span", { t: key }), input, el("output"));
    };
    const enlarge = async () => {
      if (document.fullscreenElement) await document.exitFullscreen();
      else await parts.stage.parentElement.requestFullscreen().catch(() => {});
    };
    const bar = el(
      "div",
      { class: "film-tools", role: "group" },
      el("div", { class: "set" }, parts.level, parts.pan, parts.invert),
      slide(parts.windowInput, "window", "tool.width"),
      slide(parts.levelInput, "level", "tool.level"),
      el(
        "div",
        { class: "set" },
        button("minus", "tool.smaller", () => viewer().zoomBy(0.8)),
        parts.zoom,
        button("plus", "tool.larger", () => viewer().zoomBy(1.25)),
        button("reset", "tool.reset", () => viewer().reset()),
        document.fullscreenEnabled ? button("full", "tool.full", enlarge) : null,
      ),
      el("p", { class: "view-note", t: "film.view_only" }),
    );
    say(bar, "film.tools", { name: this.name }, "aria-label");
    return bar;
  }

  /** With one film the main button asks about it, and a button of its own would be the same. */
  setAlone(alone) {
    this.badge.hidden = alone;
    this.element.querySelector(".ask-one").hidden = alone || !this.usable;
  }
}
