// A fresh mock server and a fresh page in Chromium for each test, and what tests do with them.
//
// CHROMIUM names another browser than /usr/bin/chromium, SCREENSHOTS a folder for pictures.

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { mkdir, readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { after, afterEach, before, beforeEach } from "node:test";
import { fileURLToPath } from "node:url";

import { startMock } from "./mock.mjs";

const require = createRequire(import.meta.url);
const { chromium } = require("playwright-core");
const AXE = await readFile(require.resolve("axe-core/axe.min.js"), "utf8");

const BROWSER = process.env.CHROMIUM ?? "/usr/bin/chromium";
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
export const ROOT = fileURLToPath(new URL("../../", import.meta.url));
export const FILM = `${ROOT}data/sample/demo.png`;
export const film = async (name) => ({ name, mimeType: "image/png", buffer: await readFile(FILM) });
export const DICOM = {
  name: "IM0001",
  mimeType: "",
  buffer: Buffer.concat([Buffer.alloc(128), Buffer.from("DICM"), Buffer.from([2, 0, 0, 0])]),
};
export const BROKEN = {
  name: "broken.png",
  mimeType: "image/png",
  buffer: Buffer.from("89504e470d0a1a0a0000", "hex"),
};

/** Of the test that runs. */
export let mock, page;

let browser, problems;

before(async () => {
  assert.ok(existsSync(BROWSER), `no browser at ${BROWSER}; hint: install chromium or set CHROMIUM`);
  browser = await chromium.launch({ executablePath: BROWSER, args: FLAGS });
});
after(() => browser?.close());
beforeEach(async () => {
  mock = await startMock();
  page = await open();
});
afterEach(async () => {
  await page.context().close();
  await mock.close();
  assert.deepEqual(problems, [], "errors of the page, the policy's among them");
});

async function open(options = {}) {
  const size = { viewport: { width: 1440, height: 900 } };
  const context = await browser.newContext({ ...size, locale: "zh-CN", acceptDownloads: true, ...options });
  const fresh = await context.newPage();
  problems = [];
  fresh.on("pageerror", (cause) => problems.push(String(cause)));
  fresh.on("console", (message) => {
    // A status that is an error is logged by the browser itself; the tests cause those.
    const expected = /Failed to load resource/.test(message.text());
    if (message.type() === "error" && !expected) problems.push(message.text());
  });
  await fresh.goto(mock.url);
  await fresh.waitForSelector("#ready[data-state]");
  return fresh;
}

/** Puts another mock in the place of one that was closed. */
export async function restartMock() {
  mock = await startMock();
}

/** Another server's page in place of the mock's. */
export async function visit(address) {
  await page.goto(address);
  await page.waitForSelector("#ready[data-state]");
}

/** A page with other settings of the browser. */
export async function reopen(options) {
  await page.context().close();
  page = await open(options);
}

/** Chooses films and waits until each is shown or refused. */
export async function choose(...files) {
  await page.setInputFiles("#files", files);
  await page.waitForFunction(
    (count) => document.querySelectorAll(".film-tools:not([hidden]), .stage.tile, .unusable").length >= count,
    files.length,
  );
}

export const generate = () => page.click("#generate");
export const finished = (count = 1) =>
  page.waitForFunction((n) => document.querySelectorAll(".run-facts:not([hidden])").length >= n, count);
export const textOf = (selector) => page.locator(selector).first().innerText();

export async function picture(name) {
  if (!process.env.SCREENSHOTS) return;
  await mkdir(process.env.SCREENSHOTS, { recursive: true });
  await page.screenshot({ path: `${process.env.SCREENSHOTS}/${name}.png` });
}

/** Mean grey and number of the canvas's drawn pixels. */
export const brightness = () =>
  page.evaluate(async () => {
    await new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)));
    const canvas = document.querySelector(".stage canvas");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let sum = 0;
    let count = 0;
    for (let at = 0; at < data.length; at += 4) {
      if (data[at + 3] === 255) {
        sum += data[at];
        count += 1;
      }
    }
    return { mean: sum / count, count };
  });

/** Fails with everything that axe finds against WCAG 2.2 AA and its best practices. */
export async function accessible(where) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() =>
    globalThis.axe.run(document, {
      runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
    }),
  );
  const told = violations.flatMap(({ id, nodes }) =>
    nodes.map((node) => `${id}: ${node.html} ${node.failureSummary}`),
  );
  assert.deepEqual(told, [], where);
}
