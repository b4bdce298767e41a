// What is asked of the server, and how its answers come in.
const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));

// {name} as in a run's templates: in one pass, so that a problem that contains "{answer}" stays what it is. After a LaTeX
// command (\boxed{final}) the braces belong to it.
const FIELD = /(\\[A-Za-z]+)?(?<![{%#])\{(problem|answer|final)\}(?!\})/g;
const fill = (template, fields) =>
  template.replace(FIELD, (_, command, name) => (command ? `${command}{${fields[name]}}` : fields[name]));

// The last number of an answer, or all of it.
const finalOf = (answer) => (answer.match(/-?\d(?:[\d.,]*\d)?/g) || [answer.trim()]).pop();

const turn = (role, content) => ({ role, content });

// Everything that one sample depends on: kept with it, since the form may change afterwards.
function orderOf(setting) {
  const fields = { problem: $("problem").value, answer: $("answer").value, final: finalOf($("answer").value) };
  const system = $("teacher-system").value;
  const templates = { system, teacher: $("teacher-template").value, student: $("student-template").value };
  return {
    setting, fields, templates, strategy: chosenStrategy(),
    alpha: setting.alpha || ownAlpha(),
    temperature: number("temperature"), tokens: number("tokens"),
    server: $("server").value.replace(/\/+$/, ""), key: $("key").value,
    teacher: [...(system ? [turn("system", fill(system, fields))] : []), turn("user", fill(templates.teacher, fields))],
    student: [turn("user", fill(templates.student, fields))],
  };
}

function ownAlpha() {
  const method = $("method").value;
  if (method === "fixed") return { alpha_method: method, fixed_alpha: number("fixed") };
  const alpha = { alpha_method: method, alpha_min: number("alpha-min"), alpha_max: number("alpha-max") };
  return method.startsWith("kl_budget") ? { ...alpha, [method]: number("budget") } : alpha;
}

// The request as a person would write it; the page asks for more of every token, and for a stream.
function plainBody(order) {
  return {
    sampling_params: {
      temperature: order.temperature,
      max_new_tokens: order.tokens,
      custom_params: {
        teacher_messages: order.teacher, student_messages: order.student, return_mixing_info: true, ...order.alpha,
      },
    },
  };
}

function requestBody(order) {
  const { sampling_params } = plainBody(order);
  const custom_params = { ...sampling_params.custom_params, return_top_k: 5, top_k_of: SIDES };
  // Each event has everything so far: of a long text not every token is one.
  const stream_interval = Math.max(1, Math.ceil((order.tokens || 128) / 64));
  return {
    sampling_params: { ...sampling_params, stream_interval, custom_params },
    return_logprob: true, return_text_in_logprobs: true, stream: true,
  };
}

function post(order, path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (order.key) headers.Authorization = "Bearer " + order.key;
  return fetch(order.server + path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function answerOf(order, path, body, signal) {
  const response = await post(order, path, body, signal);
  if (!response.ok) throw new Error(await refusal(response));
  return response.json();
}

async function* events(order, signal) {
  const response = await post(order, "/generate", requestBody(order), signal);
  if (!response.ok) throw new Error(await refusal(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message || JSON.stringify(event.error));
      yield event;
    }
  }
}

async function refusal(response) {
  const text = await response.text();
  try {
    const body = JSON.parse(text);
    return (body.error && (body.error.message || body.error)) || body.message || text;
  } catch {
    return `${response.status} ${response.statusText} ${text}`;
  }
}

// Everything so far. A server with --incremental-streaming-output sends only what is new; nothing has been drawn yet where
// a request ends before its first token.
function joined(before, meta) {
  const lists = ["output_token_logprobs", ...SERIES.map(([name]) => name)];
  const pieces = (meta.alpha || []).length < meta.completion_tokens;
  const both = (old, more) => [...(pieces ? old || [] : []), ...(more || [])];
  const known = Object.fromEntries(lists.map((name) => [name, both(before[name], meta[name])]));
  const top_k = {};
  for (const side of SIDES) {
    const [old, more] = [before, meta].map((part) => (part.top_k && part.top_k[side]) || {});
    const names = Object.keys({ ...(pieces ? old : {}), ...more });
    top_k[side] = Object.fromEntries(names.map((name) => [name, both(old[name], more[name])]));
  }
  return { ...meta, ...known, top_k, pieces };
}

// At most `most` at once: a browser keeps six connections to a server, and one is for what is asked beside the streams.
async function together(jobs, most = 5) {
  const waiting = [...jobs];
  const worker = async () => { while (waiting.length) await waiting.shift()(); };
  await Promise.all(Array.from({ length: most }, worker));
}
