// The page for work with studies: who is here, the list or one study, keys, help.

import { forgetKey, hasKey, limits, onKeyNeeded, send } from "../api.js";
import { adopt, currentLanguage, el, hush, say, setLanguage, t } from "../dom.js";
import "./words.js";
import { List } from "./list.js";
import { StudyView } from "./study.js";

const SETTINGS = "xray-settings";
const $ = (id) => document.getElementById(id);

/** The language chosen on either page. */
function settings() {
  try {
    return JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
  } catch {
    return {};
  }
}

function keep(changes) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify({ ...settings(), ...changes }));
  } catch {
    // A private window keeps nothing.
  }
}

function showLanguage(language) {
  setLanguage(language);
  document.title = t("work.page_title");
  $("language").textContent = language === "zh" ? "English" : "中文";
  $("language").lang = language === "zh" ? "en" : "zh-CN";
  $("language").title = t("language.label");
}

/** The dialog for a key: resolves to it, or to `null`. */
function askKey(wasWrong) {
  return new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key").value = "";
    if (wasWrong) say($("key-wrong"), "key.wrong");
    else hush($("key-wrong"));
    let given = null;
    $("key-form").onsubmit = () => (given = $("key").value.trim());
    $("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => resolve(given === "" ? null : given);
    dialog.showModal();
  });
}

/** Keys of the help: title, then `[keys, text]`. */
const KEYS = [
  ["keys.list", [["J K ↑ ↓", "keys.rows"], ["Enter", "keys.open"], ["/", "keys.search"], ["U", "list.urgent_first"], ["?", "keys.help"]]],
  [
    "keys.study",
    [
      ["Esc", "study.back"], ["N", "study.next"], ["W", "tool.width"], ["H", "tool.pan"], ["[ ]  , .", "keys.levels"], ["+ −", "tool.larger"],
      ["1", "tool.true_size"], ["0", "tool.fit"], ["R", "tool.turn"], ["I", "tool.invert"], ["M", "tool.measure"], ["G", "tool.magnify"],
      ["L", "tool.link"], ["V", "tool.prior"],
    ],
  ],
  ["keys.report", [["E", "report.edit"], ["Ctrl S", "report.save"], ["S  Ctrl Enter", "keys.sign"]]],
];

function fillHelp() {
  const part = ([title, keys]) => [
    el("h3", {}, t(title)),
    el("dl", { class: "keys" }, ...keys.map(([key, text]) => el("div", {}, el("dt", {}, el("kbd", {}, key)), el("dd", {}, t(text))))),
  ];
  $("help-keys").replaceChildren(...KEYS.flatMap(part));
}

async function start() {
  adopt(document);
  showLanguage(settings().language ?? "zh");
  onKeyNeeded(askKey);
  $("forget-key").addEventListener("click", () => {
    forgetKey();
    location.reload();
  });
  const account = await (await send("/v1/account")).json();
  const exports = (await limits()).exports ?? ["docx"];
  $("forget-key").hidden = !hasKey();
  const who = () => {
    const role = t(`role.${account.role}`);
    $("who").textContent = account.name === null ? role : t("work.who", { name: account.name, role });
  };
  who();

  const open = (id) => (location.hash = id);
  const list = new List(open);
  const leaves = () => !view.unsaved || confirm(t("report.unsaved"));
  const on = {
    back: () => leaves() && open(""),
    next: (step) => {
      const id = list.after(view.id, step);
      if (leaves()) open(id ?? "");
    },
  };
  const view = new StudyView($("study"), account, exports, on);

  const route = async () => {
    const id = location.hash.slice(1);
    if (/^[0-9a-f]{32}$/.test(id)) {
      list.hide();
      await view.open(id);
    } else {
      view.close();
      await list.show();
    }
  };
  addEventListener("hashchange", route);
  addEventListener("beforeunload", (event) => view.unsaved && event.preventDefault());

  $("language").addEventListener("click", () => {
    const language = currentLanguage() === "zh" ? "en" : "zh";
    keep({ language });
    showLanguage(language);
    who();
    list.draw();
    view.redraw();
  });
  const help = () => {
    fillHelp();
    $("help-dialog").showModal();
  };
  $("open-help").addEventListener("click", help);
  $("help-close").addEventListener("click", () => $("help-dialog").close());

  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.isComposing) return;
    const command = event.ctrlKey || event.metaKey;
    if (command && ["s", "Enter"].includes(event.key) && view.id !== null) {
      event.preventDefault();
      view.command(event.key);
      return;
    }
    if (command || event.altKey) return;
    const typing = event.target.closest?.("input, textarea, select");
    if (typing) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "?") {
      event.preventDefault();
      help();
    } else if (view.id === null ? list.key(event) : view.key(event)) {
      event.preventDefault();
    }
  });
  await route();
}

start().catch((cause) => {
  say($("list-error"), "error.work", { reason: cause.message || cause.kind || "" });
});
