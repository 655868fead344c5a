// A stand-in for the server: the page's files, and as much of the API as the page uses, with answers
// made up here. Nothing it says comes from a model.
//
// By itself, to look at the page: `node tests/page/mock.mjs [PORT]`.

import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";

const ROOT = new URL("../../", import.meta.url);
const PAGE = new URL("src/serve/page/", ROOT);
const FILM = new URL("data/sample/demo.png", ROOT);

/** What the page has to live with; `require-trusted-types-for` forbids every way text becomes markup. */
export const POLICY = [
  "default-src 'none'",
  "script-src 'self'",
  "style-src 'self'",
  "img-src 'self' data: blob:",
  "connect-src 'self'",
  "base-uri 'none'",
  "form-action 'none'",
  "frame-ancestors 'none'",
  "require-trusted-types-for 'script'",
].join("; ");

const TYPES = { html: "text/html", js: "text/javascript", css: "text/css" };

const one = (chinese, probability, decision, in_report, conflict = false) => ({
  probability,
  logit: 1,
  decision,
  in_report,
  conflict,
  chinese,
});

/** As the server sends them where a request asks for `findings`. */
const FINDINGS = {
  calibrated: true,
  uncalibrated_because: null,
  target_error: 0.05,
  rules: "hospital",
  classes: {
    cardiomegaly: one("心影增大", 0.012, "absent", "absent"),
    consolidation: one("实变", 0.97, "present", "present"),
    pleural_effusion: one("胸腔积液", 0.999_7, "present", "present"),
    pneumothorax: one("气胸", 0.91, "present", "not_mentioned", true),
    lung_lesion: one("肺结节或肿块", 0.38, "undecided", "not_mentioned"),
    enlarged_cardiomediastinum: one("纵隔增宽", 0.000_3, "absent", "not_mentioned"),
    edema: one("肺水肿", 0.02, "absent", "uncertain"),
    fracture: one("骨折", 0.03, "absent", "not_mentioned"),
  },
};

export const REPORT =
  "影像所见：胸廓对称，气管居中。双肺纹理清晰，左侧中肺野可见片状密度增高影，边界模糊。" +
  "左侧肋膈角变钝。心影大小、形态正常，主动脉无迂曲。双侧膈面光整，骨质未见明显异常。\n\n" +
  "影像诊断：\n1. 左侧中肺野实变，考虑炎性病变。\n2. 左侧少量胸腔积液。\n建议结合临床，治疗后复查。";
export const THOUGHTS =
  "先看投照条件：后前位，吸气充分，无明显旋转。\n再看肺野：右肺清晰；左侧中肺野密度增高，血管纹理被遮盖，" +
  "边界不清，更像实变而不是肿块。\n左侧肋膈角不锐利，可能有少量积液。\n心胸比例约 0.45，不大。";

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function bodyOf(request) {
  const pieces = [];
  for await (const piece of request) pieces.push(piece);
  return Buffer.concat(pieces);
}

/**
 * Starts the mock on loopback. The returned `state` may be changed at any time:
 * `models`, `loadRemarks` (lists by model), `key` (or null), `preview` (`png`, `missing`, `refused`), `ready`, `report`, `thinking`,
 * `delay` (milliseconds between pieces), `busy` (how many requests are refused with 429),
 * `status` (of the next answer alone, or null: `{ code, message, name, retry }`), `limits` (or null),
 * `remarks`, `stop` (reason, or null), `cutAfter` (pieces until the connection breaks, or
 * null), `failAfter` (pieces until an error event), `finish`. It collects `asked` (bodies),
 * `previewed` (byte counts) and `hungUp` (how many clients went away before the end).
 */
export async function startMock(port = 0) {
  const state = {
    models: ["xray-8b", "xray-8b-thinking"],
    loadRemarks: {},
    key: null,
    preview: "png",
    ready: true,
    report: REPORT,
    thinking: false,
    delay: 4,
    busy: 0,
    status: null,
    cutAfter: null,
    failAfter: null,
    finish: "stop",
    stop: null,
    remarks: [],
    findings: FINDINGS,
    limits: null,
    failure: { message: "the request failed inside the server", type: "server_error", code: null },
    asked: [],
    previewed: [],
    hungUp: 0,
  };

  const fail = (response, status, message, headers = {}, code = null) => {
    response.writeHead(status, { "content-type": "application/json", ...headers });
    response.end(JSON.stringify({ error: { message, type: "mock", param: null, code } }));
  };

  async function chat(request, response) {
    const body = JSON.parse(await bodyOf(request));
    if (state.busy > 0) {
      state.busy -= 1;
      return fail(response, 429, "64 requests are waiting; try again later", { "retry-after": "1" });
    }
    if (state.status !== null) {
      const { code, message, name, retry } = state.status;
      state.status = null;
      return fail(response, code, message, retry ? { "retry-after": retry } : {}, name);
    }
    state.asked.push(body);
    response.writeHead(200, { "content-type": "text/event-stream", "cache-control": "no-store" });
    let ended = false;
    response.on("close", () => (state.hungUp += ended ? 0 : 1));
    const send = (data) =>
      response.write(`data: ${typeof data === "string" ? data : JSON.stringify(data)}\n\n`);
    const chunk = (delta, finish_reason = null) => ({
      id: "chatcmpl-1",
      object: "chat.completion.chunk",
      model: body.model,
      choices: [{ index: 0, delta, finish_reason }],
    });
    const first = { ...chunk({ role: "assistant" }), remarks: state.remarks };
    const inTwos = (text) => text.match(/[\s\S]{1,2}/g) ?? [];
    const pieces = [{ role: "assistant" }];
    if (state.thinking) pieces.push(...inTwos(THOUGHTS).map((text) => ({ reasoning_content: text })));
    pieces.push(...inTwos(state.report).map((text) => ({ content: text })));
    for (const [index, delta] of pieces.entries()) {
      if (response.destroyed) return;
      if (index === state.cutAfter) return response.destroy();
      if (index === state.failAfter) {
        ended = true;
        send({ error: state.failure });
        return response.end();
      }
      // Once in two pieces, so that a reader meets events cut anywhere.
      const text = `data: ${JSON.stringify(index === 0 ? first : chunk(delta))}\n\n`;
      const cut = Math.floor(text.length / 2);
      response.write(Buffer.from(text).subarray(0, cut));
      await pause(state.delay);
      response.write(Buffer.from(text).subarray(cut));
    }
    ended = true;
    const last = { ...chunk({}, state.finish), remarks: state.remarks };
    if (state.stop !== null) last.choices[0].stop_reason = state.stop;
    if (body.findings) last.choices[0].findings = state.findings;
    send(last);
    if (body.stream_options?.include_usage) {
      const completion_tokens = pieces.length;
      const usage = { prompt_tokens: 312, completion_tokens, total_tokens: 312 + completion_tokens };
      send({ ...chunk({}), choices: [], usage });
    }
    send("[DONE]");
    response.end();
  }

  async function previewed(request, response) {
    const body = await bodyOf(request);
    if (state.preview === "missing") return fail(response, 404, "no such path");
    if (state.preview === "refused") return fail(response, 400, "the DICOM file ends before its pixels");
    state.previewed.push(body.length);
    response.writeHead(200, { "content-type": "image/png" });
    response.end(await readFile(FILM));
  }

  async function file(path, response) {
    const name = path === "/" ? "index.html" : path.slice(1);
    if (!/^[a-z]+\.(html|js|css)$/.test(name)) return fail(response, 404, "no such path");
    const content = await readFile(new URL(name, PAGE)).catch(() => null);
    if (content === null) return fail(response, 404, "no such path");
    response.writeHead(200, {
      "content-type": `${TYPES[name.split(".")[1]]}; charset=utf-8`,
      "content-security-policy": POLICY,
      "x-content-type-options": "nosniff",
    });
    response.end(content);
  }

  const server = createServer((request, response) => {
    const { pathname } = new URL(request.url, "http://mock");
    const answer = async () => {
      if (pathname === "/readyz") return response.writeHead(state.ready ? 200 : 503).end();
      if (pathname.startsWith("/v1/") && state.key !== null) {
        if (request.headers.authorization !== `Bearer ${state.key}`) {
          request.resume();
          return fail(response, 401, "a key is needed", { "www-authenticate": "Bearer" });
        }
      }
      if (pathname === "/v1/models") {
        response.writeHead(200, { "content-type": "application/json" });
        const data = state.models.map((id) => ({ id, object: "model", remarks: state.loadRemarks[id] ?? [] }));
        return response.end(JSON.stringify({ object: "list", data }));
      }
      if (pathname === "/v1/limits" && state.limits !== null) {
        response.writeHead(200, { "content-type": "application/json" });
        return response.end(JSON.stringify(state.limits));
      }
      if (pathname === "/v1/chat/completions" && request.method === "POST") return chat(request, response);
      if (pathname === "/v1/images/preview" && request.method === "POST") return previewed(request, response);
      return file(pathname, response);
    };
    answer().catch((cause) => fail(response, 500, String(cause)));
  });
  await new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  const close = () => new Promise((resolve) => (server.closeAllConnections(), server.close(resolve)));
  return { state, close, url: `http://127.0.0.1:${server.address().port}/` };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { state, url } = await startMock(Number(process.argv[2] ?? 7861));
  state.thinking = true;
  state.delay = 25;
  console.log(`the page with made-up answers: ${url}`);
}
