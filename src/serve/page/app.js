// The page: films on a desk, a question, reports, and what is kept in the browser.

import { forgetKey, hasKey, limits, models, onKeyNeeded, readiness } from "./api.js";
import { adopt, announce, currentLanguage, el, hush, say, setLanguage, sizeText, t } from "./dom.js";
import { fillPaper } from "./export.js";
import { Film, largestFile, limitFilms } from "./film.js";
import * as history from "./history.js";
import { Run } from "./run.js";
import { PROMPTS } from "./strings.js";

const SETTINGS = "xray-settings";
const READY_MILLISECONDS = 15_000;
const AWAY_MILLISECONDS = 3_000;

const $ = (id) => document.getElementById(id);
const films = [];
let numbered = 0;
/** What the server takes, as it says at `/v1/limits`. */
let most = {};
const runs = new Set();

// ---- settings -------------------------------------------------------------------------------

const settings = {
  language: "zh",
  theme: null,
  model: null,
  question: PROMPTS[0][0],
  length: 1024,
  temperature: 0,
  seed: "",
  findings: false,
  together: false,
  /** Whether reports are kept in this browser; `null` until its user says so. */
  keepsReports: null,
  hashNames: false,
};

/** Where nothing was chosen, a machine that many may use keeps nothing. */
function keepsReports() {
  const own = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  return settings.keepsReports ?? most.page_history ?? own;
}

function readSettings() {
  try {
    const kept = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
    for (const key of Object.keys(settings)) if (key in kept) settings[key] = kept[key];
  } catch {
    // Damaged, or not allowed: the defaults do.
  }
}

function keepSettings() {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // A private window keeps nothing.
  }
}

const systemDark = matchMedia("(prefers-color-scheme: dark)");

function showTheme() {
  const dark = settings.theme === null ? systemDark.matches : settings.theme === "dark";
  if (settings.theme === null) delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = settings.theme;
  const other = dark ? "light" : "dark";
  say($("theme"), `theme.${other}`);
  say($("theme"), `theme.label.${other}`, {}, "title");
  $("theme").onclick = () => {
    // The system's own choice is followed again, not fixed.
    settings.theme = (other === "dark") === systemDark.matches ? null : other;
    keepSettings();
    showTheme();
  };
}

function showLanguage() {
  setLanguage(settings.language);
  document.title = t("page.title");
  $("language").textContent = settings.language === "zh" ? "English" : "中文";
  $("language").lang = settings.language === "zh" ? "en" : "zh-CN";
  $("language").title = t("language.label");
  for (const [index, option] of [...$("preset").options].entries()) {
    if (index < PROMPTS.length) {
      const [chinese, english] = PROMPTS[index];
      option.textContent = settings.language === "zh" ? chinese : english;
    }
  }
}

// ---- the question ---------------------------------------------------------------------------

function fillForm() {
  for (const [chinese] of PROMPTS) $("preset").append(el("option", { value: chinese }, chinese));
  $("preset").append(el("option", { value: "", t: "preset.own" }));
  $("question").value = settings.question;
  $("length").value = settings.length;
  $("temperature").value = settings.temperature;
  $("seed").value = settings.seed;
  $("findings").checked = settings.findings;
  $("history-on").checked = keepsReports();
  $("history-hash").checked = settings.hashNames;
  document.querySelector(`[name=mode][value=${settings.together ? "together" : "each"}]`).checked = true;
  $("options").open = matchMedia("(min-width: 900px)").matches;
  formChanged();
}

function formChanged() {
  const question = $("question").value;
  $("preset").value = PROMPTS.some(([chinese]) => chinese === question) ? question : "";
  $("temperature-out").textContent = Number($("temperature").value).toFixed(2);
  settings.question = question;
  settings.length = $("length").value;
  settings.temperature = Number($("temperature").value);
  settings.seed = $("seed").value;
  settings.findings = $("findings").checked;
  settings.together = document.querySelector("[name=mode]:checked").value === "together";
  settings.hashNames = $("history-hash").checked;
  if ($("model").value !== "") settings.model = $("model").value;
  keepSettings();
  showDesk();
}

/** The request's settings, or `null` after telling what is wrong. */
function checkedForm() {
  const whole = (text, least, most) => /^\d+$/.test(text) && Number(text) >= least && Number(text) <= most;
  const wrong = (key, field, values = {}) => {
    say($("form-error"), key, values);
    field.setAttribute("aria-invalid", "true");
    if ($("options").contains(field)) $("options").open = true;
    field.focus();
    return null;
  };
  hush($("form-error"));
  for (const field of [$("question"), $("length"), $("seed")]) field.removeAttribute("aria-invalid");
  if (films.length === 0) return wrong("form.no_film", $("choose"));
  const question = $("question").value.trim();
  if (question === "") return wrong("form.no_question", $("question"));
  const longest = most.max_new_tokens ?? 32768;
  if (!whole($("length").value, 1, longest)) {
    return wrong("form.bad_length", $("length"), { most: longest });
  }
  const seed = $("seed").value;
  if ($("seed").validity.badInput || (seed !== "" && !whole(seed, 0, 2 ** 32 - 1))) {
    return wrong("form.bad_seed", $("seed"));
  }
  return {
    question,
    model: $("model").value || null,
    maxTokens: Number($("length").value),
    temperature: Number($("temperature").value),
    seed: seed === "" ? null : Number(seed),
    findings: settings.findings,
    hashNames: settings.hashNames,
  };
}

// ---- the desk -------------------------------------------------------------------------------

function showDesk() {
  const usable = films.filter((film) => film.usable).length;
  const together = settings.together && films.length > 1;
  const jointRuns = $("joint-runs").childElementCount;
  $("empty").hidden = films.length > 0 || jointRuns > 0;
  $("desk-inner").hidden = !$("empty").hidden;
  $("mode").hidden = films.length < 2;
  $("clear-films").hidden = films.length === 0;
  $("joint").hidden = !together && jointRuns === 0;
  $("joint-empty").hidden = jointRuns > 0;
  $("desk-inner").classList.toggle("together", !$("joint").hidden);
  $("cards").dataset.count = films.length;
  for (const film of films) {
    const any = film.reports.childElementCount > 0;
    film.empty.hidden = any || film.state === "unusable";
    film.element.classList.toggle("bare", together && !any);
    film.setAlone(films.length === 1);
  }
  if (usable > 1) say($("generate"), together ? "go.joint" : "go.many", { count: usable });
  else say($("generate"), "go");
  $("stop-all").hidden = ![...runs].some((run) => run.active);
}

async function addFiles(files) {
  // Numbers stay with their films as long as there are any.
  if (films.length === 0) numbered = 0;
  const on = { remove: removeFilm, ask: (film) => askAbout([film]) };
  const added = [...files].map((file) => new Film(file, (numbered += 1), on));
  if (added.length === 0) return;
  hush($("form-error"));
  films.push(...added);
  $("cards").append(...added.map((film) => film.element));
  showDesk();
  announce(t("film.added", { count: added.length }));
  // One after the other: decoded films are large.
  for (const film of added) {
    await film.read();
    showDesk();
  }
}

function removeFilm(film) {
  for (const run of runs) {
    if (run.films.length === 1 && run.films[0] === film) {
      run.stop();
      runs.delete(run);
    }
  }
  const at = films.indexOf(film);
  films.splice(at, 1);
  film.element.remove();
  announce(t("film.removed", { name: film.name }));
  showDesk();
  (films[Math.min(at, films.length - 1)]?.element ?? $("choose")).focus();
}

// ---- asking ---------------------------------------------------------------------------------

const onRun = {
  ended(run) {
    showDesk();
    if (run.record !== null && keepsReports()) history.keep(run.record).catch(() => {});
  },
  // The state in the head is asked for anew at once, and often until the server is back.
  lost: () => showReadiness(),
  print: (run) => printRuns([run]),
  remove(run) {
    runs.delete(run);
    run.element.remove();
    showDesk();
  },
};

function newRun(about, form, place) {
  const run = new Run(about, form, onRun);
  runs.add(run);
  place.prepend(run.element);
  run.start();
  return run;
}

function askAbout(chosen) {
  const form = checkedForm();
  if (form === null) return;
  const usable = chosen.filter((film) => film.usable);
  const reading = chosen.some((film) => film.state === "reading");
  if (reading || usable.length === 0) {
    say($("form-error"), reading ? "form.reading" : "form.no_usable");
    return;
  }
  const joint = settings.together && chosen.length > 1;
  if (joint && most.max_images && usable.length > most.max_images) {
    say($("form-error"), "form.too_many", { count: usable.length, most: most.max_images });
    return;
  }
  const bytes = usable.reduce((sum, film) => sum + film.file.size, 0);
  if (joint && most.max_body_bytes && bytes > largestFile(most.max_body_bytes)) {
    say($("form-error"), "form.too_large", { most: sizeText(largestFile(most.max_body_bytes)) });
    return;
  }
  const started = joint
    ? [newRun(usable, form, $("joint-runs"))]
    : usable.map((film) => newRun([film], form, film.reports));
  showDesk();
  // On a phone the report is below the question.
  const { top } = started[0].element.getBoundingClientRect();
  if (top > innerHeight - 120) started[0].element.scrollIntoView({ block: "center" });
}

function stopAll() {
  for (const run of runs) run.stop();
}

// ---- print ----------------------------------------------------------------------------------

const finished = () => [...runs].filter((run) => run.record !== null);
const paperOf = (run) => [run.record, run.films.map((film) => film.picture).filter(Boolean)];
let chosenForPrint = false;

async function printRuns(chosen) {
  await fillPaper(chosen.map(paperOf));
  chosenForPrint = true;
  print();
}

addEventListener("beforeprint", () => {
  if (!chosenForPrint) fillPaper(finished().map(paperOf));
  document.documentElement.classList.toggle("with-paper", $("paper").childElementCount > 0);
});
addEventListener("afterprint", () => {
  chosenForPrint = false;
  $("paper").replaceChildren();
  document.documentElement.classList.remove("with-paper");
});

// ---- server: key, models, readiness ---------------------------------------------------------

onKeyNeeded((wasWrong) => {
  if (wasWrong) say($("key-wrong"), "key.wrong");
  else hush($("key-wrong"));
  $("key").value = "";
  $("key-dialog").showModal();
  return new Promise((resolve) => {
    $("key-dialog").returnValue = "";
    $("key-dialog").onclose = () => {
      const given = $("key-dialog").returnValue === "given" ? $("key").value.trim() : "";
      $("key").value = "";
      resolve(given === "" ? null : given);
      setTimeout(showKey);
    };
  });
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key-dialog").close("given");
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close(""));

function showKey() {
  $("forget-key").hidden = !hasKey();
}
$("forget-key").addEventListener("click", () => {
  forgetKey();
  showKey();
  $("language").focus();
});

let modelsKnown = false;

async function showModels() {
  try {
    const all = await models();
    const names = all.map(({ name }) => name);
    modelsKnown = true;
    showLoadRemarks(all);
    await showLimits();
    $("model").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(settings.model)) $("model").value = settings.model;
    $("model").disabled = names.length < 2;
  } catch {
    $("model").replaceChildren(el("option", { value: "", t: "model.none" }));
    $("model").disabled = true;
  }
  showKey();
}

/** How each model was loaded, in the help dialog. */
function showLoadRemarks(all) {
  const entry = ({ name, remarks }) =>
    el(
      "div",
      {},
      el("dt", {}, name),
      ...(remarks.length > 0
        ? remarks.map((remark) => el("dd", { lang: "en" }, remark))
        : [el("dd", { t: "help.as_published" })]),
    );
  $("help-models").replaceChildren(...all.map(entry));
  $("help-models-part").hidden = all.length === 0;
}

/** Says what the server takes before anything is sent. */
async function showLimits() {
  most = await limits();
  limitFilms(most);
  $("open-worklist").hidden = !most.studies;
  if (most.max_images && most.max_image_pixels && most.max_body_bytes) {
    say($("pick-limits"), "pick.limits", {
      images: most.max_images,
      megapixels: Math.round(most.max_image_pixels / 1e5) / 10,
      size: sizeText(largestFile(most.max_body_bytes)),
    });
    $("pick-limits").hidden = false;
  }
  if (most.max_new_tokens) $("length").max = most.max_new_tokens;
  $("history-on").checked = keepsReports();
}

async function showReadiness() {
  if (document.hidden) return;
  const state = await readiness();
  if ($("ready").dataset.state !== state) {
    $("ready").dataset.state = state;
    say($("ready-text"), `ready.${state}`);
  }
  // The list could not be had before; now it may. A refused key is not asked for over and over.
  if (state === "ready" && !modelsKnown && !wasRefused) {
    wasRefused = true;
    await showModels();
  }
  if (state !== "ready") wasRefused = false;
  clearTimeout(again);
  again = setTimeout(showReadiness, state === "ready" ? READY_MILLISECONDS : AWAY_MILLISECONDS);
}
let again = null;
let wasRefused = false;

// ---- wiring ---------------------------------------------------------------------------------

const choose = () => $("files").click();
$("choose").addEventListener("click", choose);
$("empty").addEventListener("click", choose);
$("files").addEventListener("change", () => {
  addFiles($("files").files);
  // The same file may be chosen again.
  $("files").value = "";
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length > 0) {
    event.preventDefault();
    addFiles(event.clipboardData.files);
  }
});
let dragDepth = 0;
const dragsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
const veil = (depth) => {
  dragDepth = Math.max(0, depth);
  $("veil").hidden = dragDepth === 0;
};
addEventListener("dragenter", (event) => dragsFiles(event) && veil(dragDepth + 1));
addEventListener("dragleave", (event) => dragsFiles(event) && veil(dragDepth - 1));
addEventListener("dragover", (event) => dragsFiles(event) && event.preventDefault());
addEventListener("drop", (event) => {
  if (!dragsFiles(event)) return;
  event.preventDefault();
  veil(0);
  addFiles(event.dataTransfer.files);
});

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  askAbout(films);
});
$("ask").addEventListener("input", formChanged);
$("preset").addEventListener("input", (event) => {
  event.stopPropagation();
  if ($("preset").value !== "") $("question").value = $("preset").value;
  else $("question").focus();
  formChanged();
});
$("history-on").addEventListener("change", () => {
  settings.keepsReports = $("history-on").checked;
  keepSettings();
});
$("history-hash").addEventListener("change", formChanged);
$("stop-all").addEventListener("click", stopAll);
$("clear-films").addEventListener("click", () => {
  for (const film of [...films]) removeFilm(film);
});
document.addEventListener("film-read", showDesk);
$("language").addEventListener("click", () => {
  settings.language = currentLanguage() === "zh" ? "en" : "zh";
  keepSettings();
  showLanguage();
  for (const run of runs) run.showFindings();
});
systemDark.addEventListener("change", showTheme);
$("open-history").addEventListener("click", async () => {
  await history.show();
  $("history-dialog").showModal();
});
$("open-help").addEventListener("click", () => $("help-dialog").showModal());
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector("[data-close]")?.addEventListener("click", () => dialog.close());
  // A click beside the dialog closes it; the key is not thrown away so lightly.
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog && dialog.id !== "key-dialog") dialog.close();
  });
}
document.addEventListener("keydown", (event) => {
  // Esc and Enter of an input method are not ours.
  if (event.isComposing) return;
  const open = document.querySelector("dialog[open]") !== null;
  if (event.key === "Escape" && !open && !document.fullscreenElement) stopAll();
  if (!(event.ctrlKey || event.metaKey) || event.altKey || open) return;
  const actions = {
    Enter: () => $("ask").requestSubmit(),
    o: choose,
    "/": () => $("help-dialog").showModal(),
  };
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action === undefined || event.shiftKey) return;
  event.preventDefault();
  action();
});
// Reports that are under way would be lost.
addEventListener("beforeunload", (event) => {
  if ([...runs].some((run) => run.active)) event.preventDefault();
});
document.addEventListener("visibilitychange", showReadiness);

readSettings();
adopt(document);
fillForm();
showLanguage();
showTheme();
showReadiness();
