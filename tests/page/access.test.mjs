// The page for those who hear it, press keys, need contrast or hold a phone.

import assert from "node:assert/strict";
import { test } from "node:test";

import { BROKEN, FILM, accessible, choose, film, finished } from "./harness.mjs";
import { generate, mock, page, picture, reopen } from "./harness.mjs";
import { REPORT } from "./mock.mjs";

test("screen readers hear whole sentences, not tokens", async () => {
  mock.state.delay = 12;
  await page.evaluate(() => {
    globalThis.heard = [];
    const live = document.getElementById("live");
    new MutationObserver(() => heard.push(live.textContent)).observe(live, { childList: true });
  });
  await choose(FILM);
  await generate();
  await finished();
  await page.waitForFunction(
    () => heard.join("").includes("报告完成") || heard.join("").includes("完成。"),
    null,
    { timeout: 8000 },
  );
  const heard = await page.evaluate(() => globalThis.heard);
  assert.ok(heard.length <= 5, `${heard.length} announcements`);
  const all = heard.join("").replace(/\s/g, "");
  assert.ok(all.includes(REPORT.replace(/\s/g, "")), all);
});

test("everything can be reached and done with the keyboard", async () => {
  await choose(FILM);
  await page.focus("body");
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.className), "skip");
  await page.keyboard.press("Enter");
  await page.keyboard.press("Control+Enter");
  await finished();
  await page.keyboard.press("Control+/");
  await page.waitForSelector("#help-dialog[open]");
  await page.keyboard.press("Escape");
  const order = [];
  await page.evaluate(() => document.querySelector("#choose").focus());
  for (let step = 0; step < 40; step += 1) {
    const visible = await page.evaluate(() => {
      const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
      return outlineStyle !== "none" && parseFloat(outlineWidth) >= 1;
    });
    const name = await page.evaluate(
      () => document.activeElement.id || document.activeElement.className || document.activeElement.tagName,
    );
    if (name === "BODY") break;
    if (step > 0) assert.ok(visible, `focus cannot be seen on ${name}`);
    order.push(name);
    await page.keyboard.press("Tab");
  }
  const at = (name) => order.indexOf(name);
  assert.ok(at("choose") < at("question") && at("question") < at("generate"), order.join(" "));
  assert.ok(
    at("generate") < order.indexOf("CANVAS") && order.indexOf("CANVAS") < order.lastIndexOf("tool wide"),
    order.join(" "),
  );
});

for (const colorScheme of ["light", "dark"]) {
  test(`axe finds nothing, ${colorScheme}`, async () => {
    await reopen({ colorScheme });
    await accessible("empty");
    mock.state.thinking = true;
    mock.state.preview = "refused";
    await choose(await film("a.png"), BROKEN);
    mock.state.cutAfter = 90;
    await generate();
    await page.waitForSelector(".run .error:not([hidden])");
    await accessible("error");
    mock.state.cutAfter = null;
    mock.state.finish = "length";
    await page.click(".run > .tool");
    await finished();
    await page.click(".thinking summary");
    await accessible("report");
    await picture(`films-${colorScheme}`);
    await page.click("#open-help");
    await accessible("help");
  });
}

test("a phone shows everything in one column", async () => {
  const phone = {
    viewport: { width: 360, height: 740 },
    isMobile: true,
    hasTouch: true,
    deviceScaleFactor: 2,
  };
  await reopen(phone);
  await choose(FILM);
  await generate();
  await finished();
  const { width, right } = await page.evaluate(() => ({
    width: document.documentElement.scrollWidth,
    right: Math.max(
      ...[...document.querySelectorAll("button, input, select, canvas")].map(
        (e) => e.getBoundingClientRect().right,
      ),
    ),
  }));
  assert.equal(width, 360);
  assert.ok(right <= 360, `something ends at ${right}`);
  assert.ok(
    await page.locator(".run").evaluate((run) => run.getBoundingClientRect().top < innerHeight),
    "the report is in sight",
  );
  await accessible("phone");
  await picture("phone");
});
