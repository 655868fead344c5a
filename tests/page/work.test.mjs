// The pages for work with studies in Chromium, against the real server with a store of its own.

import assert from "node:assert/strict";
import { execFileSync, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { after, before, test } from "node:test";

import { FILM, ROOT, accessible, page, picture, reopen } from "./harness.mjs";

const PROGRAM = process.env.XRAY_SERVER ?? `${ROOT}target/release/xray-qwen3vl`;
const folder = mkdtempSync(join(tmpdir(), "work-"));
const store = join(folder, "store");
const keys = {};
let server, address;

const account = (name, role) =>
  execFileSync(PROGRAM, ["store", "key", "add", "--store", store, "--name", name, "--role", role], {
    encoding: "utf8",
    stdio: ["ignore", "pipe", "ignore"],
  }).trim();

async function post(path, body, key = keys.signer) {
  const headers = { authorization: `Bearer ${key}`, "content-type": "application/json" };
  const response = await fetch(address + path, { method: "POST", headers, body: JSON.stringify(body) });
  assert.ok(response.ok, `${path}: ${response.status}`);
  return response.json();
}

const base64 = (path) => readFileSync(path).toString("base64");
const DICOM = `${ROOT}tests/fixtures/dicom/gray_12u_1.dcm`;

/** A patient with a prior study; returns the id of the current one. */
async function patient(id, name) {
  const about = { patient: { id, name, sex: "M", age: "041Y", birth_date: "19850203" }, description: "胸部正位" };
  const film = (date) => ({ file: base64(FILM), view: "PA", date });
  const prior = await post("/v1/studies", { ...about, accession: `${id}-1`, date: "20250110", films: [film("20250110")] });
  await drafted(prior.id);
  const films = [film("20260131"), { file: base64(DICOM), view: "LAT", date: "20260131" }];
  const current = await post("/v1/studies", { ...about, accession: `${id}-2`, date: "20260131", indication: "咳嗽一周", films });
  await drafted(current.id);
  return current.id;
}

async function drafted(id) {
  const headers = { authorization: `Bearer ${keys.signer}` };
  for (;;) {
    const study = await (await fetch(`${address}/v1/studies/${id}`, { headers })).json();
    if (!["received", "complete"].includes(study.state)) return assert.equal(study.state, "drafted", study.failure);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

before(async () => {
  keys.signer = account("李医生", "signer");
  keys.reader = account("王护士", "reader");
  const args = ["serve", "--device", "cpu", "--port", "0", "--store", store, "--max-pixels", "65536", "--max-new-tokens", "120"];
  server = spawn(PROGRAM, args, { stdio: ["ignore", "ignore", "pipe"] });
  for await (const line of createInterface({ input: server.stderr })) {
    address = line.match(/` at (http:\S+),/)?.[1];
    if (address) break;
  }
  server.stderr.resume();
  assert.ok(address, "the server did not start");
  await patient("P-100", "张三丰");
  await patient("P-200", "王小明");
});
after(() => {
  server?.kill();
  rmSync(folder, { recursive: true, force: true });
});

/** Opens the worklist with a key. */
async function work(key, language = "zh") {
  await page.goto(`${address}/worklist`);
  await page.waitForSelector("#key-dialog[open]");
  await page.fill("#key", key);
  await page.keyboard.press("Enter");
  await page.waitForSelector("#rows tr");
  if (language === "en") await page.click("#language");
}

async function openStudy(search) {
  await page.fill("#search", search);
  await page.waitForFunction(() => document.querySelectorAll("#rows tr").length === 1);
  await page.locator("#rows .row-open").first().click();
  await page.waitForSelector(".pane-reading:not(:empty)");
  // Both films, where there are two.
  await page.waitForFunction(() => [...document.querySelectorAll(".pane-reading")].every((box) => box.textContent !== ""));
}

test("a study goes from the list to a signed report with the keyboard", async () => {
  await work(keys.signer);
  assert.match(await page.innerText("#who"), /李医生/);
  await picture("work-list-zh-desktop");
  await accessible("the worklist");
  await page.keyboard.press("/");
  await page.keyboard.type("p-100-2");
  await page.waitForFunction(() => document.querySelectorAll("#rows tr").length === 1);
  await page.keyboard.press("Escape");
  await page.keyboard.press("j");
  await page.keyboard.press("Enter");
  await page.waitForSelector(".panes.two");
  await page.waitForFunction(() => [...document.querySelectorAll(".pane-reading")].every((box) => box.textContent !== ""));
  assert.match(await page.innerText(".study-head"), /张三丰/);
  assert.ok(!page.url().includes("100"), "an address has data of a patient");
  await picture("work-study-zh-desktop");
  await accessible("a study");

  // The prior follows window and zoom while the sides are linked.
  const readings = () => page.locator(".pane-reading").allInnerTexts();
  await page.keyboard.press("]");
  await page.keyboard.press("+");
  const linked = await readings();
  assert.equal(linked[0], linked[1]);
  assert.match(linked[0], /125%/);
  await page.keyboard.press("l");
  await page.keyboard.press("+");
  const apart = await readings();
  assert.notEqual(apart[0], apart[1]);
  await page.keyboard.press("0");
  await page.keyboard.press("v");
  await page.waitForSelector(".panes:not(.two)");

  await page.keyboard.press("e");
  const box = page.locator(".report-edit");
  await box.fill("双肺纹理清晰。右侧少量气胸。");
  await picture("work-edit-zh-desktop");
  await page.keyboard.press("Control+s");
  await page.waitForSelector(".changes");
  assert.match(await page.innerText(".standing"), /李医生/);
  assert.ok((await page.locator('mark[data-finding="pneumothorax"]').count()) > 0);
  await page.keyboard.press("s");
  await page.waitForSelector("dialog[open] .sign-changes");
  await picture("work-sign-zh-desktop");
  await accessible("the signature");
  await page.keyboard.press("Enter");
  await page.waitForSelector(".standing.signed");
  assert.match(await page.innerText(".standing.signed"), /李医生/);
  await picture("work-signed-zh-desktop");
  const [download] = await Promise.all([page.waitForEvent("download"), page.click(".exports button")]);
  assert.match(download.suggestedFilename(), /^report-[0-9a-f]{32}\.docx$/);
  await page.keyboard.press("?");
  await page.waitForSelector("#help-dialog[open]");
  await accessible("the help");
  await page.keyboard.press("Escape");
  await page.keyboard.press("Escape");
  await page.waitForSelector("#list:not([hidden])");
});

test("all levels of a DICOM film, its window, a length, turns", async () => {
  await work(keys.signer, "en");
  await openStudy("p-200-2");
  await page.locator(".pane-head select").first().selectOption({ index: 1 });
  await page.waitForFunction(() => document.querySelector(".pane-facts").textContent.startsWith("LAT"));
  const levels = async () => Number((await page.locator(".pane-reading").first().innerText()).match(/W (\d+)/)[1]);
  assert.ok((await levels()) > 255, "the film's own window has more than 8 bits");
  const grey = () =>
    page.evaluate(async () => {
      await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
      const canvas = document.querySelector(".pane-stage canvas");
      const { data } = canvas.getContext("2d").getImageData(canvas.width / 2 - 40, canvas.height / 2 - 40, 80, 80);
      return data.reduce((sum, value, at) => (at % 4 === 0 ? sum + value : sum), 0) / (data.length / 4);
    });
  const before = await grey();
  await page.keyboard.press("i");
  assert.ok(Math.abs((await grey()) + before - 255) < 3, "inverted");
  await page.keyboard.press("i");
  await page.keyboard.press("r");
  await page.keyboard.press("m");
  const canvas = await page.locator(".pane-stage canvas").first().boundingBox();
  const [x, y] = [canvas.x + canvas.width / 2, canvas.y + canvas.height / 2];
  await page.mouse.move(x - 60, y - 40);
  await page.mouse.down();
  await page.mouse.move(x + 60, y + 40);
  await page.mouse.up();
  await page.keyboard.press("g");
  await page.mouse.move(x + 20, y + 10);
  await picture("work-measure-en-desktop");
  await accessible("a study in English");
});

test("a reader sees and does not change; a further question is answered for a signer", async () => {
  await work(keys.reader, "en");
  await openStudy("p-200-2");
  assert.equal(await page.locator(".report-actions").count(), 0);
  await page.keyboard.press("e");
  await page.keyboard.press("s");
  assert.equal(await page.locator(".report-edit, dialog[open]").count(), 0);
  await picture("work-reader-en-desktop");
  await page.evaluate(() => sessionStorage.clear());
  await work(keys.signer, "zh");
  await openStudy("p-200-2");
  const further = page.locator("details.fold").last();
  await further.locator("summary").click();
  await further.locator("input").fill("有胸腔积液吗？");
  await page.keyboard.press("Enter");
  await page.waitForSelector(".turns .answer");
});

test("on a tablet, in both languages", async () => {
  for (const [language, size] of [
    ["zh", { width: 1180, height: 820 }],
    ["en", { width: 820, height: 1180 }],
  ]) {
    await reopen({ viewport: size, hasTouch: true });
    await page.evaluate(() => localStorage.clear());
    await work(keys.signer, language);
    await picture(`work-list-${language}-tablet`);
    await openStudy("p-200-2");
    await picture(`work-study-${language}-tablet`);
    await accessible(`a study on a tablet, ${language}`);
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    assert.ok(wide <= 0, `${wide} pixels too wide`);
  }
});
