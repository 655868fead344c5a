// The page in Chromium against the mock server: what a reader of films does, and what goes wrong.
//
// `cd tests/page && npm ci && npm test`; `harness.mjs` tells of the settings.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

import { BROKEN, DICOM, FILM, ROOT, accessible, brightness, choose, film, finished } from "./harness.mjs";
import { generate, mock, page, picture, reopen, restartMock, textOf } from "./harness.mjs";
import { REPORT, THOUGHTS } from "./mock.mjs";
import { PROMPTS, STRINGS } from "../../src/serve/page/strings.js";

/** Where texts are used by their keys. */
const FILES = ["index.html", "app.js", "film.js", "run.js", "export.js", "findings.js", "history.js"];

test("both languages have the same texts, and every text that is used", async () => {
  assert.deepEqual(Object.keys(STRINGS.en), Object.keys(STRINGS.zh));
  for (const key of Object.keys(STRINGS.zh)) {
    const places = (text) => [...text.matchAll(/\{\w+\}/g)].map(([place]) => place).sort();
    assert.deepEqual(places(STRINGS.en[key]), places(STRINGS.zh[key]), key);
  }
  const used = new Set();
  for (const name of FILES) {
    const source = await readFile(`${ROOT}src/serve/page/${name}`, "utf8");
    for (const [, key] of source.matchAll(/data-t(?:-[a-z-]+)?="([^"]+)"/g)) used.add(key);
    for (const [, key] of source.matchAll(/\bt\("([a-z_.]+)"/g)) used.add(key);
    for (const [, key] of source.matchAll(/\bt: "([a-z_.]+)"/g)) used.add(key);
    for (const [, key] of source.matchAll(/\bsay\([^,]+, "([a-z_.]+)"/g)) used.add(key);
  }
  assert.ok(used.size > 90, `${used.size} keys found`);
  assert.deepEqual(
    [...used].filter((key) => !(key in STRINGS.zh)),
    [],
  );
  // Keys put together from a state are beyond this search.
  const made = /^(error|findings|finish|ready|remark|theme)\./;
  const sources = await Promise.all(FILES.map((name) => readFile(`${ROOT}src/serve/page/${name}`, "utf8")));
  const unused = Object.keys(STRINGS.zh).filter(
    (key) => !made.test(key) && !sources.join("").includes(`"${key}"`),
  );
  assert.deepEqual(unused, []);
});

test("the questions are those of the published training", async () => {
  const source = await readFile(`${ROOT}src/dataset/convert/options.rs`, "utf8");
  const [, list] = source.match(/pub const PROMPTS: \[&str; 12\] = \[([^\]]*)\]/);
  assert.deepEqual(
    PROMPTS.map(([chinese]) => chinese),
    [...list.matchAll(/"([^"]+)"/g)].map(([, text]) => text),
  );
});

test("the help says how each model was loaded", async () => {
  const remark = "252 matrices are stored as 4-bit AWQ and dequantised while they are loaded, to 13.9 GB in 16 bits";
  mock.state.loadRemarks["xray-8b"] = [remark, "the adapter was trained in another layout"];
  await page.reload();
  await page.waitForSelector("#ready[data-state=ready]");
  await page.click("#open-help");
  await page.waitForSelector("#help-models-part:not([hidden])");
  const names = await page.locator("#help-models dt").allTextContents();
  assert.deepEqual(names, ["xray-8b", "xray-8b-thinking"]);
  const facts = await page.locator("#help-models dd").allTextContents();
  assert.deepEqual(facts, [remark, "the adapter was trained in another layout", "原样载入，无需说明。"]);
  await accessible("help-models");
  await picture("help-models");
});

test("a film is chosen, the report streams in, the thinking folds", async () => {
  mock.state.thinking = true;
  mock.state.delay = 8;
  await choose(await film("胸片 1.png"));
  await generate();
  await page.waitForSelector(".thinking[open]");
  await page.waitForFunction(() => document.querySelector(".report-text").textContent.length > 10);
  const early = await textOf(".report-text");
  assert.ok(early.length < REPORT.length, "shown before it is whole");
  assert.equal(await page.locator(".thinking").getAttribute("open"), null);
  assert.equal(await page.locator(".report-text").getAttribute("aria-busy"), "true");
  await finished();
  assert.equal(await page.locator(".report-text").textContent(), REPORT);
  assert.equal(await page.locator(".thoughts").textContent(), THOUGHTS);
  assert.equal(await page.locator(".report-text").getAttribute("aria-busy"), null);
  assert.match(await textOf(".run-facts"), /xray-8b · 输入 312 token/);
  await picture("report");

  const [body] = mock.state.asked;
  const [image, text] = body.messages[0].content;
  const sent = Buffer.from(image.image_url.url.replace("data:image/png;base64,", ""), "base64");
  assert.ok(sent.equals(await readFile(FILM)), "the file is sent byte by byte");
  assert.equal(text.text, PROMPTS[0][0]);
  assert.deepEqual([body.model, body.max_tokens, body.temperature, body.stream], ["xray-8b", 1024, 0, true]);
  assert.deepEqual(body.stream_options, { include_usage: true });
  assert.ok(!("seed" in body));
});

test("question, model, length, temperature and seed are sent and remembered", async () => {
  await page.selectOption("#model", "xray-8b-thinking");
  await page.selectOption("#preset", PROMPTS[6][0]);
  assert.equal(await page.inputValue("#question"), PROMPTS[6][0]);
  await page.fill("#question", "有无气胸？");
  assert.equal(await page.inputValue("#preset"), "");
  await page.fill("#length", "77");
  await page.fill("#temperature", "0.7");
  await page.fill("#seed", "42");
  await page.reload();
  await choose(FILM);
  await generate();
  await finished();
  const [body] = mock.state.asked;
  assert.equal(body.messages[0].content[1].text, "有无气胸？");
  assert.deepEqual(
    [body.model, body.max_tokens, body.temperature, body.seed],
    ["xray-8b-thinking", 77, 0.7, 42],
  );
});

test("what cannot be sent is told at its field", async () => {
  await generate();
  assert.equal(await textOf("#form-error"), STRINGS.zh["form.no_film"]);
  await choose(FILM);
  await page.fill("#question", " ");
  await generate();
  assert.equal(await textOf("#form-error"), STRINGS.zh["form.no_question"]);
  assert.equal(await page.getAttribute("#question", "aria-invalid"), "true");
  await page.fill("#question", "问");
  await page.fill("#length", "0");
  await generate();
  assert.equal(await textOf("#form-error"), STRINGS.zh["form.bad_length"].replace("{most}", "32768"));
  assert.equal(mock.state.asked.length, 0);
});

test("window, level, inversion, zoom and pan change what is seen and not what is sent", async () => {
  await choose(FILM);
  const plain = await brightness();
  await page.focus(".stage canvas");
  await page.keyboard.press("i");
  const inverted = await brightness();
  assert.ok(Math.abs(plain.mean + inverted.mean - 255) < 1, `${plain.mean} and ${inverted.mean}`);
  await page.keyboard.press("i");
  const box = await page.locator(".stage canvas").boundingBox();
  const middle = [box.x + box.width / 2, box.y + box.height / 2];
  await page.mouse.move(...middle);
  await page.mouse.down();
  await page.mouse.move(middle[0] + 60, middle[1] - 80, { steps: 4 });
  await page.mouse.up();
  assert.match(await textOf(".reading"), /W 315 {2}L 88 {2}100%/);
  assert.ok((await brightness()).mean > plain.mean + 10, "a drag upwards brightens");
  await page.locator(".slide input").first().fill("120");
  assert.match(await textOf(".reading"), /W 120/);
  await page.mouse.wheel(0, -400);
  await page.waitForFunction(() => /18\d%/.test(document.querySelector(".reading").textContent));
  assert.ok((await brightness()).count > plain.count, "the film fills more of the stage");
  await page.dblclick(".stage canvas");
  assert.match(await textOf(".reading"), /W 255 {2}L 128 {2}100%/);
  assert.deepEqual(await brightness(), plain);
  await page.keyboard.press("i");
  await generate();
  await finished();
  const sent = mock.state.asked[0].messages[0].content[0].image_url.url.split(",")[1];
  assert.ok(Buffer.from(sent, "base64").equals(await readFile(FILM)));
});

test("DICOM is shown by the server's preview, or as a tile, and sent as it is", async () => {
  await choose(DICOM);
  assert.deepEqual(mock.state.previewed, [DICOM.buffer.length]);
  assert.match(await textOf(".corner-facts"), /DICOM/);
  mock.state.preview = "missing";
  await page.click("#clear-films");
  await choose(DICOM);
  assert.equal(await textOf(".stage-message p"), STRINGS.zh["film.no_preview"]);
  await generate();
  await finished();
  const { url } = mock.state.asked[0].messages[0].content[0].image_url;
  assert.equal(url, `data:application/dicom;base64,${DICOM.buffer.toString("base64")}`);
});

test("a format is known by its bytes, whatever the file is called", async () => {
  const made = await page.evaluate(async () => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 9, height: 7 });
    const bytes = async (type) => {
      const blob = await new Promise((resolve) => canvas.toBlob(resolve, type));
      return [...new Uint8Array(await blob.arrayBuffer())];
    };
    return { jpeg: await bytes("image/jpeg"), webp: await bytes("image/webp") };
  });
  // One white pixel: file header, BITMAPINFOHEADER, a row padded to four bytes.
  const bmp = Buffer.alloc(58, 0);
  bmp.write("BM");
  for (const [at, value] of [
    [2, 58],
    [10, 54],
    [14, 40],
    [18, 1],
    [22, 1],
  ])
    bmp.writeUInt32LE(value, at);
  bmp.writeUInt16LE(1, 26);
  bmp.writeUInt16LE(24, 28);
  bmp.fill(255, 54, 57);
  const tiff = Buffer.from("49492a0008000000", "hex");
  const files = { jpeg: Buffer.from(made.jpeg), webp: Buffer.from(made.webp), bmp, tiff };
  const unnamed = Object.values(files).map((buffer, index) => ({
    name: `film${index}`,
    mimeType: "",
    buffer,
  }));
  await choose(...unnamed);
  const shown = await page.locator(".corner-facts").allInnerTexts();
  assert.deepEqual(
    shown.map((text) => text.split(" ")[0]),
    ["JPEG", "WebP", "BMP", "TIFF"],
  );
  assert.match(shown[2], /1 × 1$/);
  assert.deepEqual(mock.state.previewed, [tiff.length], "only the TIFF needs the server");
  await page.check("[value=together]");
  await generate();
  await finished();
  const types = mock.state.asked[0].messages[0].content
    .slice(0, 4)
    .map((part) => part.image_url.url.split(";")[0]);
  assert.deepEqual(types, ["data:image/jpeg", "data:image/webp", "data:image/bmp", "data:image/tiff"]);
});

test("a broken file is told and not sent", async () => {
  mock.state.preview = "refused";
  const words = { name: "notes.txt", mimeType: "text/plain", buffer: Buffer.from("no film") };
  await choose(BROKEN, words);
  const told = await page.locator(".stage-message > p:first-of-type").allInnerTexts();
  assert.deepEqual(told, [STRINGS.zh["film.broken"], STRINGS.zh["film.unknown"]]);
  await picture("broken");
  await generate();
  assert.equal(await textOf("#form-error"), STRINGS.zh["form.no_usable"]);
  assert.equal(mock.state.asked.length, 0);
});

test("films side by side have a report each, or one for all", async () => {
  await choose(await film("a.png"), await film("b.png"), await film("c.png"));
  await generate();
  await finished(3);
  assert.equal(mock.state.asked.length, 3);
  assert.equal(await page.locator(".card .report-text").count(), 3);
  await page.locator(".ask-one").nth(1).click();
  await finished(4);
  assert.equal(await page.locator(".card").nth(1).locator(".run").count(), 2);
  await page.check("[value=together]");
  await generate();
  await page.waitForSelector("#joint .run-facts:not([hidden])");
  const { content } = mock.state.asked[4].messages[0];
  assert.deepEqual(
    content.map((part) => part.type),
    ["image_url", "image_url", "image_url", "text"],
  );
  await picture("joint");
});

test("paste and drop bring films", async () => {
  const bytes = [...(await readFile(FILM))];
  for (const [kind, type] of [
    ["paste", "ClipboardEvent"],
    ["drop", "DragEvent"],
  ]) {
    await page.evaluate(
      ([kind, type, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], `${kind}.png`, { type: "image/png" }));
        const carried = kind === "paste" ? { clipboardData: data } : { dataTransfer: data };
        document.body.dispatchEvent(
          new globalThis[type](kind, { bubbles: true, cancelable: true, ...carried }),
        );
      },
      [kind, type, bytes],
    );
  }
  await page.waitForFunction(() => document.querySelectorAll(".film-tools:not([hidden])").length === 2);
  assert.deepEqual(await page.locator(".film-name").allInnerTexts(), ["paste.png", "drop.png"]);
});

test("stopping closes the connection and keeps what came, marked as incomplete", async () => {
  mock.state.delay = 30;
  await choose(FILM);
  await generate();
  await page.waitForFunction(() => document.querySelector(".report-text").textContent.length > 6);
  await page.keyboard.press("Escape");
  await page.waitForFunction(
    (text) => document.querySelector(".run-status").textContent === text,
    STRINGS.zh["run.stopped"],
  );
  const kept = await textOf(".report-text");
  assert.ok(REPORT.startsWith(kept) && kept.length < REPORT.length);
  await page.waitForTimeout(200);
  assert.equal(mock.state.hungUp, 1);
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
  await page.getByRole("button", { name: "复制" }).click();
  await page.waitForFunction(() => document.querySelector(".told").textContent !== "");
  const copied = await page.evaluate(() => navigator.clipboard.readText());
  assert.equal(copied, `${kept}\n\n[${STRINGS.zh["finish.cancelled"]}]`);
  assert.ok(await page.isVisible(".run > .tool"), "it can be tried again");
});

test("a full queue is tried again", async () => {
  mock.state.busy = 1;
  await choose(FILM);
  await generate();
  await page.waitForFunction(() =>
    /服务器队列已满，\d+ 秒后自动重试（第 1\/6 次）/.test(document.querySelector(".run-status").textContent),
  );
  await picture("queue");
  await page.getByRole("button", { name: STRINGS.zh["run.now"] }).click();
  await finished();
});

test("a server that has no room for the moment is tried again, with its own words", async () => {
  await choose(FILM);
  for (const [status, key] of [
    [{ code: 503, message: "too many", name: "too_many_bodies", retry: "1" }, "run.crowded"],
    [{ code: 503, message: "the server is stopping", retry: "1" }, "run.stopping"],
  ]) {
    mock.state.status = status;
    await generate();
    const opening = STRINGS.zh[key].split("，")[0];
    await page.waitForFunction(
      (text) => document.querySelector(".run-status").textContent.startsWith(text),
      opening,
    );
    await page.getByRole("button", { name: STRINGS.zh["run.now"] }).click();
    await finished();
    await page.getByRole("button", { name: STRINGS.zh["run.remove"] }).first().click();
  }
});

test("an answer that went round in circles is told as that, in exports too", async () => {
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
  Object.assign(mock.state, { finish: "length", stop: "repetition", report: "双肺清晰。".repeat(9) });
  await choose(FILM);
  await generate();
  await finished();
  assert.equal(await textOf(".run-status"), STRINGS.zh["finish.repetition"]);
  await picture("repetition");
  await page.getByRole("button", { name: "复制" }).click();
  await page.waitForFunction(() => document.querySelector(".told").textContent !== "");
  const copied = await page.evaluate(() => navigator.clipboard.readText());
  assert.ok(copied.endsWith(`[${STRINGS.zh["finish.repetition"]}]`), copied);
  const [file] = await Promise.all([
    page.waitForEvent("download"),
    page.getByRole("button", { name: "JSON" }).click(),
  ]);
  const record = JSON.parse(await readFile(await file.path(), "utf8"));
  assert.deepEqual([record.finish_reason, record.stop_reason], ["length", "repetition"]);
});

test("a broken connection is told above the report, and in the head of the page", async () => {
  mock.state.report = REPORT.repeat(12);
  mock.state.cutAfter = 500;
  mock.state.delay = 1;
  await choose(FILM);
  await generate();
  await page.waitForFunction(() => document.querySelector(".report-text").textContent.length > 900);
  await mock.close();
  await page.waitForSelector(".run .error:not([hidden])");
  const top = (selector) => page.locator(selector).first().evaluate((e) => e.getBoundingClientRect().top);
  assert.ok((await top(".run .error")) < (await top(".report-text")));
  await page.waitForSelector('#ready[data-state="unreachable"]');
  await picture("broken-connection");
  await restartMock();
});

test("probabilities of findings stand under the report, conflicts first, in the page's language", async () => {
  await choose(FILM);
  await generate();
  await page.waitForSelector(".run-facts:not([hidden])");
  assert.equal("findings" in mock.state.asked[0], false, "nobody asked for them");
  assert.equal(await page.locator(".findings:not([hidden])").count(), 0);
  await page.evaluate(() => (document.getElementById("options").open = true));
  await page.check("#findings");
  await generate();
  await page.waitForSelector(".findings:not([hidden])");
  assert.equal(mock.state.asked[1].findings, true);
  const rows = page.locator(".findings > .findings-scroll tbody tr");
  const names = await rows.locator("th .name").allInnerTexts();
  assert.deepEqual(names, ["气胸", "胸腔积液", "实变", "肺结节或肿块", "肺水肿"]);
  const first = await rows.first().innerText();
  assert.ok(first.includes("91.0 %") && first.includes(STRINGS.zh["findings.conflict"]), first);
  assert.ok((await rows.nth(1).innerText()).includes("> 99.9 %"));
  assert.ok((await rows.nth(3).innerText()).includes(STRINGS.zh["findings.undecided"]));
  assert.ok((await page.locator(".findings summary").innerText()).includes("3"));
  await accessible("findings");
  await picture("findings");
  await page.click("#language");
  assert.ok((await rows.first().innerText()).includes(STRINGS.en["findings.conflict"]));
  assert.equal(await rows.first().locator("th .name").innerText(), "pneumothorax");
  await picture("findings-english");
  await page.setViewportSize({ width: 390, height: 844 });
  await page.locator(".findings").first().scrollIntoViewIfNeeded();
  await accessible("findings on a phone");
  await picture("findings-phone-english");
  await page.click("#language");
  await picture("findings-phone");

  // Without a calibration it is said, with the server's reason, and nothing is decided.
  mock.state.findings = {
    ...mock.state.findings,
    calibrated: false,
    uncalibrated_because: "there is no calibration.json beside the model or adapter",
    target_error: null,
    classes: {
      pneumothorax: { ...mock.state.findings.classes.pneumothorax, decision: "undecided", conflict: false },
    },
  };
  await page.setViewportSize({ width: 1280, height: 900 });
  await generate();
  await page.waitForSelector(".findings-note.uncalibrated");
  assert.ok((await textOf(".findings-note.uncalibrated")).includes("calibration.json"));
  await accessible("findings without a calibration");
  await picture("findings-uncalibrated");
});

test("remarks on the films stand above the report and go with it", async () => {
  mock.state.remarks = [
    { image: 2, code: "not_a_chest", text: "its body part is HIP" },
    { image: 1, code: "of_a_later_version", text: "words of the server" },
  ];
  await choose(await film("张三_男_1985_ID00123.png"), await film("b.png"));
  await page.check("[value=together]");
  await generate();
  await page.waitForSelector("#joint .run-facts:not([hidden])");
  const told = await page.locator(".remarks li").allInnerTexts();
  assert.deepEqual(told, [`影像 2 ${STRINGS.zh["remark.not_a_chest"]}`, "影像 1 words of the server"]);
  const top = (selector) => page.locator(selector).first().evaluate((e) => e.getBoundingClientRect().top);
  assert.ok((await top(".remarks")) < (await top("#joint .report-text")));
  assert.deepEqual(await page.locator(".run-films li").allInnerTexts(), [
    "影像 1：张三_男_1985_ID00123.png",
    "影像 2：b.png",
  ]);
  assert.deepEqual(await page.locator(".film-number").allInnerTexts(), ["影像 1", "影像 2"]);
  await accessible("remarks");
  await picture("remarks");
  await page.click("#language");
  assert.equal(await textOf(".remarks li"), `Film 2 ${STRINGS.en["remark.not_a_chest"]}`);
  await picture("remarks-english");
  const [file] = await Promise.all([
    page.waitForEvent("download"),
    page.getByRole("button", { name: "Markdown" }).click(),
  ]);
  const markdown = await readFile(await file.path(), "utf8");
  assert.ok(markdown.includes(`Film 2: ${STRINGS.en["remark.not_a_chest"]}`), markdown);
});

test("the server's limits are told before anything is sent", async () => {
  mock.state.limits = {
    max_images: 2,
    max_image_pixels: 16000,
    max_body_bytes: 4 << 20,
    max_new_tokens: 50,
  };
  await page.reload();
  await page.waitForSelector("#pick-limits:not([hidden])");
  assert.match(await textOf("#pick-limits"), /最多 2 张；.*0 百万像素；.*3\.0 MB/);
  // 128 × 128 pixels.
  await choose(FILM);
  assert.match(await textOf(".stage-message p"), /128 × 128 像素/);
  mock.state.limits.max_image_pixels = 64e6;
  await page.reload();
  await page.waitForSelector("#pick-limits:not([hidden])");
  await choose(await film("a.png"), await film("b.png"), await film("c.png"));
  await page.check("[value=together]");
  await generate();
  assert.match(await textOf("#form-error"), /最大长度须为 1 到 50/);
  await page.fill("#length", "50");
  await generate();
  assert.match(await textOf("#form-error"), /选了 3 张影像；此服务器一次最多合写 2 张/);
  await picture("limits");
  assert.equal(mock.state.asked.length, 0);
});

test("where many may use a machine nothing is kept, and names can be left out", async () => {
  mock.state.limits = { page_history: false };
  await page.reload();
  await page.waitForFunction(() => !document.querySelector("#history-on").checked);
  await choose(await film("张三_男_1985.png"));
  await generate();
  await finished();
  await page.click("#open-history");
  await page.waitForSelector("#history-none:not([hidden])");
  await page.check("#history-on");
  await page.check("#history-hash");
  await page.keyboard.press("Escape");
  await page.reload();
  await choose(await film("张三_男_1985.png"));
  await generate();
  await finished();
  await page.click("#open-history");
  await page.waitForSelector(".history li");
  assert.match(await textOf(".history strong"), /^film-[0-9a-f]{12}$/);
  const kept = await page.evaluate(
    () =>
      new Promise((resolve) => {
        indexedDB.open("xray-reports").onsuccess = ({ target }) => {
          const all = target.result.transaction("reports").objectStore("reports").getAll();
          all.onsuccess = () => resolve(JSON.stringify(all.result));
        };
      }),
  );
  assert.ok(!kept.includes("张三"));
});

test("errors are told plainly", async () => {
  await choose(FILM);
  for (const [code, key] of [
    [413, "too_large"],
    [400, "refused"],
    [404, "missing"],
    [504, "deadline"],
    [500, "server"],
  ]) {
    mock.state.status = { code, message: `said with ${code}` };
    await generate();
    await page.waitForSelector(".run .error:not([hidden])");
    assert.equal(await textOf(".run .error p"), STRINGS.zh[`error.${key}`]);
    assert.equal(await textOf(".run .error .detail"), `${code} · said with ${code}`);
    await page.getByRole("button", { name: STRINGS.zh["run.remove"] }).first().click();
  }
  mock.state.cutAfter = 9;
  await generate();
  await page.waitForSelector(".run .error:not([hidden])");
  assert.equal(await textOf(".run .error p"), STRINGS.zh["error.broken"]);
  await picture("error");
  mock.state.cutAfter = null;
  mock.state.failAfter = 5;
  await page.click(".run > .tool");
  await page.waitForFunction(
    (text) => document.querySelector(".run .error p").textContent === text,
    STRINGS.zh["error.server"],
  );
  assert.equal(await textOf(".run .error p:nth-child(2)"), STRINGS.zh["error.incomplete"]);
  // In the middle of a stream a deadline has no status of its own.
  mock.state.failure = { message: "too late", type: "timeout_error", code: "deadline" };
  await page.click(".run > .tool");
  await page.waitForFunction(
    (text) => document.querySelector(".run .error p").textContent === text,
    STRINGS.zh["error.deadline"],
  );
  assert.equal(await textOf(".run .error .detail"), "too late");
  mock.state.failAfter = null;
  mock.state.finish = "length";
  await page.click(".run > .tool");
  await finished();
  assert.equal(await textOf(".run-status"), STRINGS.zh["finish.length"]);
  assert.ok(!(await page.isVisible(".run .error")));
});

test("a server that is away, or not ready, is told", async () => {
  mock.state.ready = false;
  await page.reload();
  await page.waitForFunction(
    (text) => document.querySelector("#ready-text").textContent === text,
    STRINGS.zh["ready.not_ready"],
  );
  await choose(FILM);
  await mock.close();
  await generate();
  await page.waitForSelector(".run .error:not([hidden])");
  assert.equal(await textOf(".run .error p"), STRINGS.zh["error.network"]);
  await restartMock();
});

test("a key is asked for, checked, kept for the tab and forgotten", async () => {
  mock.state.key = "open sesame";
  await reopen();
  await page.waitForSelector("#key-dialog[open]");
  await page.fill("#key", "wrong");
  await page.keyboard.press("Enter");
  await page.waitForFunction(
    (text) => document.querySelector("#key-wrong").textContent === text,
    STRINGS.zh["key.wrong"],
  );
  await page.fill("#key", "open sesame");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelectorAll("#model option").length === 2);
  await page.reload();
  await page.waitForFunction(() => document.querySelectorAll("#model option").length === 2);
  assert.ok(!(await page.isVisible("#key-dialog")));
  const stored = await page.evaluate(() => JSON.stringify(localStorage));
  assert.ok(!stored.includes("sesame"), "never in what outlives the tab");
  await page.click("#forget-key");
  await choose(FILM);
  await generate();
  await page.waitForSelector("#key-dialog[open]");
  await page.click("#key-cancel");
  await page.waitForSelector(".run .error:not([hidden])");
  assert.equal(await textOf(".run .error p"), STRINGS.zh["error.key"]);
});

test("copy, Markdown and JSON hold the report", async () => {
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
  await choose(await film("胸片 1.png"));
  await generate();
  await finished();
  await page.getByRole("button", { name: "复制" }).click();
  await page.waitForFunction(
    (text) => document.querySelector(".told").textContent === text,
    STRINGS.zh["run.copied"],
  );
  assert.equal(await page.evaluate(() => navigator.clipboard.readText()), REPORT);
  const download = async (name) => {
    const [file] = await Promise.all([
      page.waitForEvent("download"),
      page.getByRole("button", { name }).click(),
    ]);
    return [file.suggestedFilename(), await readFile(await file.path(), "utf8")];
  };
  const [markdownName, markdown] = await download("Markdown");
  assert.match(markdownName, /^report-胸片_1-\d{8}T\d{4}\.md$/);
  assert.ok(markdown.includes(REPORT) && markdown.includes(STRINGS.zh["notice.short"]));
  const record = JSON.parse((await download("JSON"))[1]);
  assert.equal(record.report, REPORT);
  assert.deepEqual([record.films[0].width, record.films[0].height], [128, 128]);
  assert.match(record.films[0].sha256, /^[0-9a-f]{64}$/);
  assert.deepEqual(record.parameters, { max_tokens: 1024, temperature: 0, seed: null });
});

test("paper gets the film, the report and the notice, and nothing else", async () => {
  await choose(FILM);
  await generate();
  await finished();
  await page.evaluate(() => {
    globalThis.print = () => dispatchEvent(new Event("beforeprint"));
  });
  await page.getByRole("button", { name: "打印" }).click();
  await page.waitForSelector(".sheet", { state: "attached" });
  await page.emulateMedia({ media: "print" });
  assert.ok(await page.isVisible(".sheet img"));
  assert.equal(await page.locator(".sheet-report").textContent(), REPORT);
  assert.equal(await textOf(".sheet-notice"), STRINGS.zh["notice.long"]);
  assert.ok(!(await page.isVisible("main")) && !(await page.isVisible(".bar")));
  await picture("print");
  await page.evaluate(() => dispatchEvent(new Event("afterprint")));
  assert.equal(await page.locator(".sheet").count(), 0);
});

test("the history stays in the browser and can be cleared, or not kept", async () => {
  await choose(FILM);
  await generate();
  await finished();
  await page.reload();
  await page.click("#open-history");
  await page.waitForSelector(".history li");
  assert.match(await page.locator(".history img").getAttribute("src"), /^data:image\/jpeg/);
  await page.click(".history summary");
  assert.equal(await page.locator(".history .report-text").textContent(), REPORT);
  await accessible("history");
  await picture("history");
  await page.click("#history-clear");
  assert.equal(await page.locator(".history li").count(), 1, "one press deletes nothing");
  await page.click("#history-clear");
  await page.waitForSelector(".history li", { state: "detached" });
  await page.uncheck("#history-on");
  await page.keyboard.press("Escape");
  await choose(FILM);
  await generate();
  await finished();
  await page.click("#open-history");
  await page.waitForSelector("#history-none:not([hidden])");
});

test("the language changes everywhere, reports under way included", async () => {
  mock.state.delay = 25;
  await choose(await film("a.png"), BROKEN);
  await generate();
  await page.waitForSelector(".active");
  await page.click("#language");
  assert.equal(await page.getAttribute("html", "lang"), "en");
  assert.equal(await textOf("h1"), STRINGS.en.title);
  assert.equal(await page.inputValue("#question"), PROMPTS[0][0], "the question stays Chinese");
  const shown = await page.evaluate(() => {
    const copy = document.body.cloneNode(true);
    for (const part of copy.querySelectorAll(
      '[lang="zh-CN"], .run-question, noscript, #question, #live, #film-keys',
    ))
      part.remove();
    return (
      copy.textContent +
      [...copy.querySelectorAll("[aria-label], [title]")].map((e) => `${e.ariaLabel} ${e.title}`).join(" ")
    );
  });
  assert.deepEqual(shown.match(/\p{Script=Han}+/gu), null);
  await page.reload();
  assert.equal(await textOf("h1"), STRINGS.en.title);
});

test("the theme follows the system until one is chosen", async () => {
  const ground = () => page.evaluate(() => getComputedStyle(document.body.parentElement).backgroundColor);
  const light = await ground();
  await page.emulateMedia({ colorScheme: "dark" });
  const dark = await ground();
  assert.notEqual(light, dark);
  await page.click("#theme");
  assert.equal(await ground(), light);
  await page.reload();
  assert.equal(await ground(), light, "remembered");
  await page.click("#theme");
  assert.equal(await ground(), dark);
});
