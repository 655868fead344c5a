// Reports of this browser: text and a thumbnail each, in IndexedDB. Nothing of it is on the server.

import { announce, el, icon, say, t, timeText } from "./dom.js";
import { copy, download, ended, filmLabel, plain, remarkText } from "./export.js";

const $ = (id) => document.getElementById(id);
const NAME = "xray-reports";
const STORE = "reports";

/** More are dropped, oldest first. */
const MOST = 200;

let opened = null;

function promise(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function store(mode) {
  return (await open()).transaction(STORE, mode).objectStore(STORE);
}

/** All records, newest first. Rejects where the browser keeps nothing, in some private windows. */
export async function all() {
  const records = await promise((await store("readonly")).getAll());
  return records.sort((one, other) => other.created - one.created);
}

/** Keeps a record; `id` is its key, `created` in milliseconds. */
export async function keep(record) {
  await promise((await store("readwrite")).put(record));
  const tooMany = (await all()).slice(MOST);
  for (const { id } of tooMany) await remove(id);
}

/** Forgets one. */
export async function remove(id) {
  await promise((await store("readwrite")).delete(id));
}

/** Forgets all. */
export async function clear() {
  await promise((await store("readwrite")).clear());
}

function historyItem(record) {
  const names = record.films.map((film) => filmLabel(film, record.films.length === 1)).join("、");
  const notes = (record.remarks ?? []).map((remark) =>
    el("p", { class: "history-remark" }, remarkText(remark, record.films)),
  );
  const forget = async () => {
    await remove(record.id);
    await show();
    $("history-title").focus();
  };
  const action = (key, onclick) => el("button", { type: "button", class: "plain", t: key, onclick });
  const report = record.report.trim();
  const opening = report.length > 60 ? `${report.slice(0, 60)}…` : report;
  const thumbnails = record.thumbnails.map((src) =>
    src === null ? el("span", { class: "no-thumb" }, icon("file")) : el("img", { src, alt: "" }),
  );
  return el(
    "li",
    {},
    el("div", { class: "thumbs" }, ...thumbnails),
    el(
      "div",
      { class: "history-text" },
      el(
        "p",
        { class: "history-head" },
        el("strong", {}, names),
        ` ${timeText(record.created)} · ${record.model ?? "–"}`,
      ),
      el("p", { class: "history-question" }, record.question),
      ...notes,
      record.finish_reason === "stop"
        ? null
        : el("p", { class: "history-remark" }, t(...ended(record.finish_reason, record.stop_reason))),
      el(
        "details",
        {},
        el(
          "summary",
          {},
          el("span", { class: "opening", lang: "zh-CN" }, opening),
          el("span", { class: "more", t: "history.more" }),
        ),
        el("p", { class: "report-text", lang: "zh-CN" }, report),
      ),
      el(
        "div",
        { class: "run-actions" },
        action("run.copy", () => copy(plain(record)).then(() => announce(t("run.copied")))),
        action("run.markdown", () => download(record, "md")),
        action("run.json", () => download(record, "json")),
        action("history.delete", forget),
      ),
    ),
  );
}

/** Fills the dialog of earlier reports. */
export async function show() {
  let records = [];
  say($("history-none"), "history.none");
  try {
    records = await all();
  } catch {
    say($("history-none"), "history.unavailable");
  }
  $("history-none").hidden = records.length > 0;
  $("history-clear").hidden = records.length === 0;
  say($("history-clear"), "history.clear");
  $("history-list").replaceChildren(...records.map(historyItem));
}

let sure = false;
$("history-clear").addEventListener("click", async () => {
  if (!sure) {
    sure = true;
    say($("history-clear"), "history.sure");
    setTimeout(() => {
      sure = false;
      say($("history-clear"), "history.clear");
    }, 4000);
    return;
  }
  sure = false;
  await clear();
  await show();
  announce(t("history.cleared"));
});
