// Calls to the server that this page came from. Where it wants a token, the browser has asked for it.

const HEADERS = { "content-type": "application/json" };

export class RefusedError extends Error {}

async function refuse(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // It has said nothing that could be shown.
  }
  throw new RefusedError(message);
}

export async function getJson(path, signal) {
  const response = await fetch(path, { signal, cache: "no-store" });
  if (!response.ok) await refuse(response);
  return response.json();
}

// The chunks of a streamed answer, one after the other. Aborting the signal withdraws the request.
export async function* stream(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: HEADERS, body: JSON.stringify(body), signal });
  if (!response.ok) await refuse(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const content = line.slice(5).trim();
      if (content === "[DONE]") continue;
      const chunk = JSON.parse(content);
      if (chunk.error) throw new RefusedError(chunk.error.message);
      yield chunk;
    }
  }
}
