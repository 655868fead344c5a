// A film on a canvas: window and level, inversion, zoom and pan. For looking only: what is sent to
// the model is the file as it was chosen.

const FINGERS = matchMedia("(pointer: coarse)").matches;

/** Longest side that is kept for looking, in pixels; phones have less memory. */
const LONGEST_SIDE = FINGERS ? 2048 : 4096;

const ZOOM_MOST = 16;
const WINDOW_LEAST = 2;
const WINDOW_MOST = 510;

const clamp = (value, least, most) => Math.min(most, Math.max(least, value));

/** The window that shows the film as it is: grey 0 to 255. */
const PLAIN = { window: 255, level: 127.5, invert: false };

export class Viewer {
  #canvas;
  #context;
  #changed;
  /** Values as decoded: one byte a pixel of a grey film, four of a coloured one. */
  #pixels = null;
  #grey = true;
  /** The film after window and level, at its own size. */
  #shown = document.createElement("canvas");
  #pointers = new Map();
  #stale = { levels: false, frame: false };

  /** What a left drag does: `window` or `pan`. A finger on a film scrolls the page, as elsewhere. */
  tool = FINGERS ? "pan" : "window";
  view = { ...PLAIN, zoom: 1, x: 0, y: 0 };

  /** `changed` is called after each change of `view`. */
  constructor(canvas, changed) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#changed = changed;
    new ResizeObserver(() => this.#fitCanvas()).observe(canvas);
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#up(event));
    canvas.addEventListener("pointercancel", (event) => this.#up(event));
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("dblclick", () => this.reset());
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    this.#touch();
  }

  /** Takes a decoded film; `source` may be closed afterwards. */
  show(source) {
    const shrink = Math.min(1, LONGEST_SIDE / Math.max(source.width, source.height));
    const width = Math.max(1, Math.round(source.width * shrink));
    const height = Math.max(1, Math.round(source.height * shrink));
    Object.assign(this.#shown, { width, height });
    const context = this.#shown.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    // Transparent places would show the stage; paper is white.
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    context.drawImage(source, 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    this.#grey = true;
    for (let at = 0; at < data.length && this.#grey; at += 4) {
      this.#grey = data[at] === data[at + 1] && data[at] === data[at + 2];
    }
    this.#pixels = data;
    if (this.#grey) {
      this.#pixels = new Uint8Array(width * height);
      for (let pixel = 0; pixel < this.#pixels.length; pixel += 1) {
        this.#pixels[pixel] = data[pixel * 4];
      }
    }
    this.reset();
  }

  /** A small JPEG of the film as decoded, as a data: URL. */
  static thumbnail(source, side = 160) {
    const shrink = Math.min(1, side / Math.max(source.width, source.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(source.width * shrink));
    canvas.height = Math.max(1, Math.round(source.height * shrink));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(source, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.82);
  }

  /** Film as chosen, whole and centred. */
  reset() {
    this.view = { ...PLAIN, zoom: 1, x: 0, y: 0 };
    this.#update(true);
  }

  /** Changes `window`, `level` or `invert`; grey values 0 to 255. */
  setLevels(levels) {
    Object.assign(this.view, levels);
    this.view.window = clamp(this.view.window, WINDOW_LEAST, WINDOW_MOST);
    this.view.level = clamp(this.view.level, 0, 255);
    this.#update(true);
  }

  /** Multiplies the zoom; the point of the canvas at `x`, `y` (CSS pixels) stays where it is. */
  zoomBy(factor, x = this.#canvas.clientWidth / 2, y = this.#canvas.clientHeight / 2) {
    const zoom = clamp(this.view.zoom * factor, 1, ZOOM_MOST);
    const ratio = zoom / this.view.zoom;
    const fromCentre = [x - this.#canvas.clientWidth / 2, y - this.#canvas.clientHeight / 2];
    this.view.x = fromCentre[0] - (fromCentre[0] - this.view.x) * ratio;
    this.view.y = fromCentre[1] - (fromCentre[1] - this.view.y) * ratio;
    this.view.zoom = zoom;
    this.#update(false);
  }

  /** Moves the film by CSS pixels. */
  panBy(x, y) {
    this.view.x += x;
    this.view.y += y;
    this.#update(false);
  }

  /** Chooses what a drag does. */
  setTool(tool) {
    this.tool = tool;
    this.#touch();
    this.#changed(this.view);
  }

  /** CSS pixels of the canvas for one pixel of the film at zoom 1. */
  #fit() {
    const { clientWidth, clientHeight } = this.#canvas;
    return Math.min(clientWidth / this.#shown.width, clientHeight / this.#shown.height);
  }

  #update(levels) {
    // The film may be moved until its edge meets the middle of the stage.
    const scale = this.#fit() * this.view.zoom;
    const reach = this.view.zoom > 1 ? 0.5 : 0;
    this.view.x = clamp(this.view.x, -reach * scale * this.#shown.width, reach * scale * this.#shown.width);
    this.view.y = clamp(this.view.y, -reach * scale * this.#shown.height, reach * scale * this.#shown.height);
    this.#stale.levels ||= levels;
    if (!this.#stale.frame) {
      this.#stale.frame = true;
      requestAnimationFrame(() => this.#paint());
    }
    this.#touch();
    this.#changed(this.view);
  }

  /** On a phone a finger on a film at rest scrolls the page; it is ours when there is work for it. */
  #touch() {
    const scrolls = this.tool === "pan" && this.view.zoom === 1;
    this.#canvas.style.touchAction = scrolls ? "pan-y" : "none";
    this.#canvas.style.cursor = this.tool === "pan" ? "grab" : "ns-resize";
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
      this.#changed(this.view);
    }
  }

  #applyLevels() {
    const { window: width, level, invert } = this.view;
    const low = level - width / 2;
    const table = new Uint8ClampedArray(256);
    for (let value = 0; value < 256; value += 1) {
      const grey = ((value - low) / width) * 255;
      table[value] = invert ? 255 - clamp(grey, 0, 255) : grey;
    }
    const context = this.#shown.getContext("2d");
    const image = context.createImageData(this.#shown.width, this.#shown.height);
    if (this.#grey) {
      // Whole pixels at once: four bytes that are equal, or 255, read the same in any byte order
      // but for alpha, which is the last byte in memory.
      const little = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;
      const words = Uint32Array.from(table, (grey) =>
        little ? (0xff000000 | (grey * 0x010101)) >>> 0 : ((grey * 0x01010100) | 0xff) >>> 0,
      );
      const out = new Uint32Array(image.data.buffer);
      for (let pixel = 0; pixel < out.length; pixel += 1) out[pixel] = words[this.#pixels[pixel]];
    } else {
      for (let at = 0; at < image.data.length; at += 4) {
        image.data[at] = table[this.#pixels[at]];
        image.data[at + 1] = table[this.#pixels[at + 1]];
        image.data[at + 2] = table[this.#pixels[at + 2]];
        image.data[at + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
  }

  #paint() {
    this.#stale.frame = false;
    if (this.#pixels === null) return;
    if (this.#stale.levels) this.#applyLevels();
    this.#stale.levels = false;
    const ratio = this.#canvas.width / Math.max(1, this.#canvas.clientWidth);
    const scale = this.#fit() * this.view.zoom * ratio;
    const width = this.#shown.width * scale;
    const height = this.#shown.height * scale;
    this.#context.imageSmoothingQuality = "high";
    this.#context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    this.#context.drawImage(
      this.#shown,
      (this.#canvas.width - width) / 2 + this.view.x * ratio,
      (this.#canvas.height - height) / 2 + this.view.y * ratio,
      width,
      height,
    );
  }

  #down(event) {
    if (this.#pixels === null) return;
    this.#canvas.focus({ preventScroll: true });
    this.#canvas.setPointerCapture(event.pointerId);
    // Right and middle button do what the chosen tool does not.
    const other = event.button !== 0;
    this.#pointers.set(event.pointerId, { x: event.clientX, y: event.clientY, other });
  }

  #move(event) {
    const before = this.#pointers.get(event.pointerId);
    if (before === undefined) return;
    const now = { ...before, x: event.clientX, y: event.clientY };
    const step = [now.x - before.x, now.y - before.y];
    if (this.#pointers.size === 2) {
      const [other] = [...this.#pointers].filter(([id]) => id !== event.pointerId);
      const apart = (point) => Math.hypot(point.x - other[1].x, point.y - other[1].y);
      const box = this.#canvas.getBoundingClientRect();
      const middle = [(now.x + other[1].x) / 2 - box.x, (now.y + other[1].y) / 2 - box.y];
      this.panBy(step[0] / 2, step[1] / 2);
      this.zoomBy(apart(now) / Math.max(1, apart(before)), ...middle);
    } else if ((this.tool === "pan") !== before.other) {
      this.panBy(...step);
    } else {
      // Right widens the window, up makes the film brighter.
      this.setLevels({ window: this.view.window + step[0], level: this.view.level + step[1] / 2 });
    }
    this.#pointers.set(event.pointerId, now);
  }

  #up(event) {
    this.#pointers.delete(event.pointerId);
  }

  #wheel(event) {
    // A film that cannot get smaller lets the page scroll on.
    if (this.#pixels === null || (this.view.zoom === 1 && event.deltaY > 0)) return;
    event.preventDefault();
    const box = this.#canvas.getBoundingClientRect();
    const lines = event.deltaMode === 1 ? 16 : 1;
    this.zoomBy(Math.exp(-event.deltaY * lines * 0.0015), event.clientX - box.x, event.clientY - box.y);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || this.#pixels === null) return;
    const step = event.shiftKey ? 100 : 25;
    const { window: width, level, invert } = this.view;
    const actions = {
      ArrowLeft: () => this.panBy(-step, 0),
      ArrowRight: () => this.panBy(step, 0),
      ArrowUp: () => this.panBy(0, -step),
      ArrowDown: () => this.panBy(0, step),
      "+": () => this.zoomBy(1.25),
      "=": () => this.zoomBy(1.25),
      "-": () => this.zoomBy(0.8),
      0: () => this.reset(),
      i: () => this.setLevels({ invert: !invert }),
      "[": () => this.setLevels({ window: width - 10 }),
      "]": () => this.setLevels({ window: width + 10 }),
      ",": () => this.setLevels({ level: level - 5 }),
      ".": () => this.setLevels({ level: level + 5 }),
    };
    const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    // The arrows of a film at rest are left to the page, which scrolls.
    if (action === undefined || (event.key.startsWith("Arrow") && this.view.zoom === 1)) return;
    event.preventDefault();
    action();
  }
}
