// The page in Chromium against the real server: XRAY_SERVER names a program other than
// target/release/xray-qwen3vl.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import { after, before, test } from "node:test";

import { BROKEN, ROOT, choose, film, finished, generate, page, picture, textOf, visit } from "./harness.mjs";

const PROGRAM = process.env.XRAY_SERVER ?? `${ROOT}target/release/xray-qwen3vl`;
let server, address;

before(async () => {
  server = spawn(PROGRAM, ["serve", "--device", "cpu", "--port", "0"], { stdio: ["ignore", "ignore", "pipe"] });
  for await (const line of createInterface({ input: server.stderr })) {
    address = line.match(/` at (http:\S+),/)?.[1];
    if (address) break;
  }
  server.stderr.resume();
  assert.ok(address, "the server did not start");
});
after(() => server?.kill());

test("a film is uploaded and its report streams in; a second question follows", async () => {
  await visit(address);
  await choose(await film("film.png"));
  await generate();
  await finished();
  const first = await page.locator(".report-text").first().textContent();
  assert.match(first, /。$/);
  await picture("server-report");
  await page.fill("#question", "有胸腔积液吗？");
  await generate();
  await finished(2);
  assert.match(await textOf(".run-facts"), /token/);
  await picture("server-second-question");
});

test("the language is switched", async () => {
  await visit(address);
  await page.click("#language");
  assert.equal(await textOf("#generate"), "Write report");
  await picture("server-english");
});

test("a broken file is told", async () => {
  await visit(address);
  await choose(BROKEN);
  assert.ok((await page.locator(".unusable").count()) > 0);
  await picture("server-broken");
});
