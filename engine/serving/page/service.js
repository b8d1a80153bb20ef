// Calls of the service. Every address is relative, so that it also works behind a proxy that adds a path.

let storage = null; // of this tab; null where the browser's settings block it
try {
  storage = sessionStorage;
} catch { /* the token is kept until the page is left */ }
let kept = storage?.getItem("token") ?? null;

/** The token that is sent, or null. */
export const token = {
  get: () => kept,
  set(value) {
    kept = value;
    if (value === null) storage?.removeItem("token");
    else storage?.setItem("token", value);
  },
};

/** An error of the service; `param` names the argument that it is about. */
export class Failure extends Error {
  constructor({ message, param }, status) {
    super(message);
    Object.assign(this, { param: param ?? "", status });
  }
}

/** A response of status 200; raises Failure, and AbortError where `options` has a signal. */
export async function call(path, options = {}) {
  const headers = { ...options.headers, ...(kept && { Authorization: `Bearer ${kept}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure({ message: "The server does not answer. Check that it runs, then try again." });
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new Failure(answer?.error ?? { message: `The server answered with status ${response.status}.` }, response.status);
}

/** Events {event, data} of a stream of server-sent events, which EventSource cannot read since it cannot POST. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true }; // the connection broke
    });
    if (done) return;
    pending += value.replaceAll("\r", "");
    const blocks = pending.split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").map((line) => line.match(/^(event|data): ?(.*)$/)).filter(Boolean);
      const data = lines.filter((line) => line[1] === "data").map((line) => line[2]).join("\n");
      if (data === "[DONE]") return;
      if (data) yield { event: lines.find((line) => line[1] === "event")?.[2], data: JSON.parse(data) };
    }
  }
}

const vocabulary = new Map(); // answers of the service, by prefix

/** For a service that may have another model now. */
export const forgetWords = () => vocabulary.clear();

/** Words of the model's vocabulary that begin with `prefix`, that word itself first: a promise. */
export function wordsFrom(prefix) {
  const key = prefix.toLowerCase();
  if (!vocabulary.has(key)) {
    const query = new URLSearchParams({ prefix: key, limit: 8 });
    const answer = call(`v1/vocabulary?${query}`).then((response) => response.json()).then(({ words }) => words);
    vocabulary.set(key, answer);
    answer.catch(() => vocabulary.delete(key));
  }
  return vocabulary.get(key);
}
