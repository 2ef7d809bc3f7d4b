// Requests to the server that gave the page. Errors become one line each.

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message.replace(/\s+/g, " ").slice(0, 500));
    this.status = status;
  }
}

const KEY = "hyaena.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

// Send a request; give the response. `path` is relative, so that the server may stand behind a prefix.
export async function call(path, body, signal) {
  const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not an answer of ours: the status must do */ }
  const wait = response.headers.get("Retry-After");
  if (wait) message += `; try again in about ${wait} s`;
  throw new ServerError(message, response.status);
}

// The events of a stream, parsed, up to [DONE].
export async function* stream(path, body, signal) {
  const response = await call(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection to the server was lost. What was written so far is kept.");
    }
    if (chunk.done) throw new ServerError("The answer ended early. What was written so far is kept.");
    const events = (rest + chunk.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new ServerError(value.error.message);
      yield value;
    }
  }
}
