// The server's API: models, readiness, previews and streamed answers, with one kind of error.

const KEY = "xray-api-key";

/**
 * A request that did not end well. `kind` is one of `key`, `busy`, `crowded`, `stopping`, `deadline`,
 * `too_large`, `refused`, `missing`, `server`, `network`, `broken`, `cancelled`; `message` is what the
 * server said, perhaps empty; `retryAfter` is in seconds.
 */
export class ApiError extends Error {
  constructor(kind, { message = "", status = 0, retryAfter = 0 } = {}) {
    super(message);
    this.kind = kind;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The kind of an error by the server's own code and type, and by the status where it names none. */
function kindOf(status, { code = null, type = null } = {}) {
  const codes = { queue_full: "busy", too_many_bodies: "crowded", deadline: "deadline" };
  if (code in codes) return codes[code];
  const types = { timeout_error: "deadline", service_unavailable_error: "stopping" };
  if (type in types) return types[type];
  const kinds = { 401: "key", 403: "key", 404: "missing", 413: "too_large", 429: "busy" };
  if (status in kinds) return kinds[status];
  if (status === 503) return "stopping";
  if (status === 504 || status === 408) return "deadline";
  return status >= 500 ? "server" : "refused";
}

/** The error of an answer that is no success. */
async function errorOf(response) {
  let message = "";
  let said = {};
  try {
    const text = await response.text();
    try {
      said = JSON.parse(text)?.error ?? {};
      message = said.message ?? "";
    } catch {
      // A proxy's page of markup says nothing to a reader.
      message = text.startsWith("<") ? "" : text.slice(0, 300);
    }
  } catch {
    // The status alone has to do.
  }
  const retryAfter = Number(response.headers.get("retry-after")) || 0;
  return new ApiError(kindOf(response.status, said), { message, status: response.status, retryAfter });
}

/** Asks the user for a key; set by the page. Resolves to a key, or to null if there will be none. */
let askForKey = async () => null;
let asking = null;

/** Sets how the user is asked for a key: `(wasWrong) => Promise<string | null>`. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** Whether a key is kept for this tab. */
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** Forgets the key. */
export const forgetKey = () => sessionStorage.removeItem(KEY);

/** Sends with the key; after a 401 the user is asked, once for all waiting requests. */
export async function send(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = new Headers(options.headers);
    if (key !== null) headers.set("authorization", `Bearer ${key}`);
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (cause) {
      if (options.signal?.aborted) throw new ApiError("cancelled");
      throw new ApiError("network", { message: String(cause?.message ?? "") });
    }
    if (response.status !== 401) {
      if (!response.ok) throw await errorOf(response);
      return response;
    }
    // Another request may have been given a key while this one was under way.
    if (sessionStorage.getItem(KEY) === key) {
      asking ??= askForKey(key !== null).finally(() => (asking = null));
      const given = await asking;
      if (given === null) {
        forgetKey();
        throw await errorOf(response);
      }
      sessionStorage.setItem(KEY, given);
    }
    if (options.signal?.aborted) throw new ApiError("cancelled");
  }
}

/** `{ name, remarks }` of the models, the first being the server's own; remarks say how it was loaded. */
export async function models() {
  const { data } = await (await send("/v1/models")).json();
  return data.map(({ id, remarks }) => ({ name: id, remarks: remarks ?? [] }));
}

/** What the server takes, and how it is set up for the page; an empty object where it does not say. */
export async function limits() {
  try {
    return await (await send("/v1/limits")).json();
  } catch {
    return {};
  }
}

/** `ready`, `not_ready` (loading, or shutting down) or `unreachable`. */
export async function readiness() {
  try {
    const response = await fetch("/readyz", { cache: "no-store" });
    return response.ok ? "ready" : "not_ready";
  } catch {
    return "unreachable";
  }
}

/** The film as a PNG that a browser can show, made by the server; it does not keep the film. */
export async function preview(blob, mime) {
  const options = { method: "POST", headers: { "content-type": mime }, body: blob };
  return (await send("/v1/images/preview", options)).blob();
}

/** The `data` of each event of a stream. */
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      held += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = held.split(/\r\n|\n|\r(?!$)/);
      held = lines.pop();
      for (const line of lines) {
        if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Asks for a report and gives `{ content }`, `{ reasoning }`, `{ remarks }`, `{ findings }`,
 * `{ finish, stop }` and `{ usage }` as they come. `stop` says why an answer was cut off, where the server knows more than
 * `finish`; remarks are `{ image, code, text }`, counted from 1.
 *
 * `images` are data: URLs of the original files. Throws an `ApiError`; one of kind `broken` if the
 * stream ends before the server said that the answer is whole.
 */
export async function* chat(
  { model, images, question, maxTokens, temperature, seed, findings = false },
  signal,
) {
  const pictures = images.map((url) => ({ type: "image_url", image_url: { url } }));
  const body = {
    messages: [{ role: "user", content: [...pictures, { type: "text", text: question }] }],
    max_tokens: maxTokens,
    temperature,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (model) body.model = model;
  if (seed !== null) body.seed = seed;
  if (findings) body.findings = true;
  const response = await send("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream" },
    body: JSON.stringify(body),
    signal,
  });

  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) {
        // The status was sent long before, and was a good one: there is none to tell.
        throw new ApiError(kindOf(500, chunk.error), { message: chunk.error.message ?? "" });
      }
      const choice = chunk.choices?.[0];
      if (chunk.remarks?.length > 0) yield { remarks: chunk.remarks };
      if (choice?.delta?.reasoning_content) yield { reasoning: choice.delta.reasoning_content };
      if (choice?.delta?.content) yield { content: choice.delta.content };
      if (choice?.findings) yield { findings: choice.findings };
      if (choice?.finish_reason) {
        finished = true;
        yield { finish: choice.finish_reason, stop: choice.stop_reason ?? null };
      }
      if (chunk.usage) yield { usage: chunk.usage };
    }
  } catch (cause) {
    if (signal?.aborted) throw new ApiError("cancelled");
    if (cause instanceof ApiError) throw cause;
    throw new ApiError("broken", { message: String(cause?.message ?? "") });
  }
  if (signal?.aborted) throw new ApiError("cancelled");
  if (!finished) throw new ApiError("broken");
}
