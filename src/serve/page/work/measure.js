// What is drawn over a film: a measured length, and the magnifier.

import { t } from "../dom.js";

/** Length between two points of a film, in words: millimetres where the file says its pixel spacing. */
export function lengthText(film, [from, to]) {
  const across = to.x - from.x;
  const down = to.y - from.y;
  if (!film.spacing) {
    return t("measure.pixels", { length: Math.hypot(across, down).toFixed(0) });
  }
  const [row, column] = film.spacing;
  const length = Math.hypot(across * column, down * row).toFixed(1);
  return t(film.spacing_in_body ? "measure.body" : "measure.detector", { length });
}

/** Draws a measured line; `place` turns a point of the film into one of the canvas. */
export function drawLine(context, film, line, place, ratio) {
  const [from, to] = line.map(place);
  context.save();
  context.lineWidth = 2 * ratio;
  context.strokeStyle = "#ffd54a";
  context.fillStyle = "#ffd54a";
  context.beginPath();
  context.moveTo(from.x, from.y);
  context.lineTo(to.x, to.y);
  context.stroke();
  for (const end of [from, to]) {
    context.beginPath();
    context.arc(end.x, end.y, 4 * ratio, 0, 2 * Math.PI);
    context.fill();
  }
  const text = lengthText(film, line);
  context.font = `${14 * ratio}px system-ui, sans-serif`;
  const width = context.measureText(text).width;
  const x = Math.min(Math.max(to.x + 8 * ratio, 0), Math.max(0, context.canvas.width - width - 8 * ratio));
  const y = Math.max(to.y - 8 * ratio, 18 * ratio);
  context.fillStyle = "rgb(0 0 0 / 70%)";
  context.fillRect(x - 4 * ratio, y - 15 * ratio, width + 8 * ratio, 20 * ratio);
  context.fillStyle = "#ffd54a";
  context.fillText(text, x, y);
  context.restore();
}

/** Draws the surroundings of a point of the canvas larger, in a circle; `paint` draws the film. */
export function drawMagnifier(context, at, ratio, paint) {
  const radius = 110 * ratio;
  const times = 2.5;
  context.save();
  context.beginPath();
  context.arc(at.x, at.y, radius, 0, 2 * Math.PI);
  context.clip();
  context.fillStyle = "#000";
  context.fillRect(at.x - radius, at.y - radius, 2 * radius, 2 * radius);
  context.translate(at.x, at.y);
  context.scale(times, times);
  context.translate(-at.x, -at.y);
  paint(context);
  context.restore();
  context.save();
  context.lineWidth = 2 * ratio;
  context.strokeStyle = "#7fd0e6";
  context.beginPath();
  context.arc(at.x, at.y, radius, 0, 2 * Math.PI);
  context.stroke();
  context.restore();
}
