// A film with all its levels (12 or 16 bits) on a canvas: the file's own window, zoom, pan, turns.

import { drawLine, drawMagnifier } from "./measure.js";

const ZOOM_LEAST = 0.2;
const ZOOM_MOST = 32;

const clamp = (value, least, most) => Math.min(most, Math.max(least, value));

/** Reads the answer of `/v1/studies/{id}/films/{film}`. */
export async function readFilm(response) {
  const facts = JSON.parse(response.headers.get("x-film"));
  const bytes = await response.arrayBuffer();
  let numbers = new Uint16Array(bytes);
  if (new Uint8Array(new Uint16Array([1]).buffer)[0] !== 1) {
    const view = new DataView(bytes);
    numbers = Uint16Array.from(numbers, (_, index) => view.getUint16(2 * index, true));
  }
  return { ...facts, numbers };
}

export class GreyViewer {
  #canvas;
  #context;
  #changed;
  #film = null;
  /** The film after window and level, at its own size. */
  #shown = document.createElement("canvas");
  #pointers = new Map();
  #stale = { levels: false, frame: false };
  #hover = null;
  #line = null;

  /** What a drag does: `window`, `pan` or `measure`. */
  tool = "window";
  magnifies = false;
  view = { window: 1, level: 0, invert: false, zoom: 1, x: 0, y: 0, turn: 0 };

  /** `changed(byUser)` is called after each change of the view. */
  constructor(canvas, changed) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#changed = changed;
    new ResizeObserver(() => this.#fitCanvas()).observe(canvas);
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => this.#pointers.delete(event.pointerId));
    }
    canvas.addEventListener("pointerleave", () => this.#look(null));
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  }

  get film() {
    return this.#film;
  }

  /** Takes a film, shown with its own window. */
  show(film) {
    this.#film = film;
    this.#line = null;
    Object.assign(this.#shown, { width: film.width, height: film.height });
    this.reset();
  }

  /** The film as its file wants it, whole and centred. */
  reset() {
    if (this.#film === null) return;
    const { window, level, inverted } = this.#film;
    this.view = { window, level, invert: inverted, zoom: 1, x: 0, y: 0, turn: 0 };
    this.#line = null;
    this.#update(true);
  }

  /** Changes of the view that fit any film: levels by the film's own window, places by its size. */
  relative() {
    const { window, level, inverted } = this.#film;
    const view = this.view;
    return {
      width: view.window / window,
      shift: (view.level - level) / window,
      flipped: view.invert !== inverted,
      zoom: view.zoom,
      x: view.x,
      y: view.y,
      turn: view.turn,
    };
  }

  /** Takes over the changes of another viewer. */
  follow({ width, shift, flipped, zoom, x, y, turn }) {
    if (this.#film === null) return;
    const { window, level, inverted } = this.#film;
    const levels = { window: width * window, level: level + shift * window };
    this.view = { ...levels, invert: flipped !== inverted, zoom, x, y, turn };
    this.#update(true, false);
  }

  setLevels(levels) {
    Object.assign(this.view, levels);
    const range = this.#film ? this.#film.step * 65535 : 65535;
    this.view.window = clamp(this.view.window, this.#film?.step ?? 1, 2 * range);
    this.#update(true);
  }

  /** Changes window and level by parts of the film's own window. */
  stepLevels(width, level) {
    if (this.#film === null) return;
    const unit = this.#film.window / 100;
    this.setLevels({ window: this.view.window + width * unit, level: this.view.level + level * unit });
  }

  /** Turns the film clockwise by a quarter. */
  turn() {
    this.view.turn = (this.view.turn + 1) % 4;
    this.#update(false);
  }

  /** One pixel of the film on one of the screen. */
  trueSize() {
    this.view.zoom = 1 / (this.#fit() * (devicePixelRatio || 1));
    this.#update(false);
  }

  /** Multiplies the zoom; the point of the canvas at `x`, `y` (CSS pixels from its centre) stays where it is. */
  zoomBy(factor, x = 0, y = 0) {
    const zoom = clamp(this.view.zoom * factor, ZOOM_LEAST, ZOOM_MOST);
    const ratio = zoom / this.view.zoom;
    const { clientWidth, clientHeight } = this.#canvas;
    const from = [x / clientWidth, y / clientHeight];
    this.view.x = from[0] - (from[0] - this.view.x) * ratio;
    this.view.y = from[1] - (from[1] - this.view.y) * ratio;
    this.view.zoom = zoom;
    this.#update(false);
  }

  /** Moves the film by CSS pixels. */
  panBy(x, y) {
    this.view.x += x / Math.max(1, this.#canvas.clientWidth);
    this.view.y += y / Math.max(1, this.#canvas.clientHeight);
    this.#update(false);
  }

  setMagnifier(on) {
    this.magnifies = on;
    this.#frame();
  }

  /** CSS pixels of the canvas for one pixel of the film at zoom 1. */
  #fit() {
    const { clientWidth, clientHeight } = this.#canvas;
    const turned = this.view.turn % 2 === 1;
    const width = turned ? this.#shown.height : this.#shown.width;
    const height = turned ? this.#shown.width : this.#shown.height;
    return Math.min(clientWidth / width, clientHeight / height);
  }

  #update(levels, byUser = true) {
    this.view.x = clamp(this.view.x, -this.view.zoom, this.view.zoom);
    this.view.y = clamp(this.view.y, -this.view.zoom, this.view.zoom);
    this.#stale.levels ||= levels;
    this.#frame();
    this.#changed(byUser);
  }

  #frame() {
    if (this.#stale.frame) return;
    this.#stale.frame = true;
    requestAnimationFrame(() => this.#paint());
  }

  #fitCanvas() {
    const ratio = devicePixelRatio || 1;
    const width = Math.round(this.#canvas.clientWidth * ratio);
    const height = Math.round(this.#canvas.clientHeight * ratio);
    if (width === 0 || height === 0) return;
    if (this.#canvas.width !== width || this.#canvas.height !== height) {
      Object.assign(this.#canvas, { width, height });
      // A resized canvas is empty until it is painted, so not a frame later.
      this.#paint();
    }
  }

  #applyLevels() {
    const { first, step, numbers } = this.#film;
    const { window: width, level, invert } = this.view;
    const low = level - width / 2;
    const little = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;
    const words = new Uint32Array(65536);
    for (let number = 0; number < 65536; number += 1) {
      const share = clamp(((first + step * number - low) / width) * 255, 0, 255);
      const grey = Math.round(invert ? 255 - share : share);
      words[number] = little
        ? (0xff000000 | (grey * 0x010101)) >>> 0
        : ((grey * 0x01010100) | 0xff) >>> 0;
    }
    const context = this.#shown.getContext("2d");
    const image = context.createImageData(this.#shown.width, this.#shown.height);
    const out = new Uint32Array(image.data.buffer);
    for (let pixel = 0; pixel < out.length; pixel += 1) out[pixel] = words[numbers[pixel]];
    context.putImageData(image, 0, 0);
  }

  /** From pixels of the film to those of the canvas. */
  #matrix() {
    const ratio = this.#canvas.width / Math.max(1, this.#canvas.clientWidth);
    const scale = this.#fit() * this.view.zoom * ratio;
    return new DOMMatrix()
      .translate(
        this.#canvas.width * (0.5 + this.view.x),
        this.#canvas.height * (0.5 + this.view.y),
      )
      .rotate(90 * this.view.turn)
      .scale(scale)
      .translate(-this.#shown.width / 2, -this.#shown.height / 2);
  }

  #paint() {
    this.#stale.frame = false;
    if (this.#film === null) return;
    if (this.#stale.levels) this.#applyLevels();
    this.#stale.levels = false;
    const context = this.#context;
    const matrix = this.#matrix();
    const ratio = this.#canvas.width / Math.max(1, this.#canvas.clientWidth);
    const paint = (target) => {
      target.save();
      target.transform(matrix.a, matrix.b, matrix.c, matrix.d, matrix.e, matrix.f);
      // Larger than life, pixels are pixels.
      target.imageSmoothingEnabled = Math.hypot(matrix.a, matrix.b) < 2;
      target.imageSmoothingQuality = "high";
      target.drawImage(this.#shown, 0, 0);
      target.restore();
    };
    context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    paint(context);
    if (this.magnifies && this.#hover) {
      const at = { x: this.#hover.x * ratio, y: this.#hover.y * ratio };
      drawMagnifier(context, at, ratio, paint);
    }
    if (this.#line) {
      drawLine(context, this.#film, this.#line, (point) => matrix.transformPoint(point), ratio);
    }
  }

  /** The point of the film under a pointer. */
  #onFilm(event) {
    const ratio = this.#canvas.width / Math.max(1, this.#canvas.clientWidth);
    const box = this.#canvas.getBoundingClientRect();
    const point = new DOMPoint((event.clientX - box.x) * ratio, (event.clientY - box.y) * ratio);
    const { x, y } = this.#matrix().inverse().transformPoint(point);
    return { x: clamp(x, 0, this.#shown.width), y: clamp(y, 0, this.#shown.height) };
  }

  #look(point) {
    this.#hover = point;
    if (this.magnifies) this.#frame();
  }

  #down(event) {
    if (this.#film === null) return;
    this.#canvas.focus({ preventScroll: true });
    this.#canvas.setPointerCapture(event.pointerId);
    const other = event.button !== 0;
    this.#pointers.set(event.pointerId, { x: event.clientX, y: event.clientY, other });
    if (this.tool === "measure" && !other) {
      const point = this.#onFilm(event);
      this.#line = [point, point];
      this.#frame();
    }
  }

  #move(event) {
    const box = this.#canvas.getBoundingClientRect();
    this.#look({ x: event.clientX - box.x, y: event.clientY - box.y });
    const before = this.#pointers.get(event.pointerId);
    if (before === undefined) return;
    const now = { ...before, x: event.clientX, y: event.clientY };
    const step = [now.x - before.x, now.y - before.y];
    if (this.#pointers.size === 2) {
      const [[, other]] = [...this.#pointers].filter(([id]) => id !== event.pointerId);
      const apart = (point) => Math.hypot(point.x - other.x, point.y - other.y);
      this.panBy(step[0] / 2, step[1] / 2);
      this.zoomBy(apart(now) / Math.max(1, apart(before)));
    } else if (before.other || this.tool === "pan") {
      this.panBy(...step);
    } else if (this.tool === "measure") {
      this.#line = [this.#line[0], this.#onFilm(event)];
      this.#frame();
      this.#changed(false);
    } else {
      // Right widens the window, up makes the film brighter.
      this.stepLevels(step[0] / 2, step[1] / 4);
    }
    this.#pointers.set(event.pointerId, now);
  }

  /** The measured line, in pixels of the film, or `null`. */
  get line() {
    return this.#line;
  }

  #wheel(event) {
    if (this.#film === null) return;
    event.preventDefault();
    const box = this.#canvas.getBoundingClientRect();
    const lines = event.deltaMode === 1 ? 16 : 1;
    this.zoomBy(
      Math.exp(-event.deltaY * lines * 0.0015),
      event.clientX - box.x - box.width / 2,
      event.clientY - box.y - box.height / 2,
    );
  }
}
