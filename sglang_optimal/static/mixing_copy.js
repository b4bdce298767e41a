// A sample as something to take along: a curl command, a Python program, a run's file. An API key is never in it.
const KEY = "SGLANG_API_KEY";

// A string that JSON, YAML and Python read alike: what YAML forbids or breaks lines at is escaped.
const quoted = (text) => JSON.stringify(text).replace(/[\u007f-\u009f\u2028\u2029\ufeff\ufffe\uffff]/g,
  (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
const forShell = (text) => `'${text.replace(/'/g, "'\\''")}'`;

function asCurl(order) {
  return [
    `curl ${forShell(`${order.server}/generate`)} -H 'Content-Type: application/json'`,
    ...(order.key ? [`  -H "Authorization: Bearer $${KEY}"`] : []),
    `  -d ${forShell(JSON.stringify(plainBody(order), null, 2))}`,
  ].join(" \\\n") + "\n";
}

function inPython(value, indent = "") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "string") return quoted(value);
  if (typeof value !== "object") return String(value);
  const deeper = indent + "    ";
  const inside = Array.isArray(value)
    ? value.map((item) => `${deeper}${inPython(item, deeper)},\n`)
    : Object.entries(value).filter(([, item]) => item !== undefined)
      .map(([name, item]) => `${deeper}${quoted(name)}: ${inPython(item, deeper)},\n`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return `${open}\n${inside.join("")}${indent}${close}`;
}

function asPython(order) {
  const headers = order.key ? `headers={"Authorization": "Bearer " + os.environ["${KEY}"]}, ` : "";
  return `${order.key ? "import os\n\n" : ""}import requests

body = ${inPython(plainBody(order))}
response = requests.post(${quoted(`${order.server}/generate`)}, json=body, ${headers}timeout=600)
if not response.ok:
    raise SystemExit(response.text)
answer = response.json()
print(answer["text"])
for name in ("alpha", "kl_to_student", "student_logprob"):
    values = answer["meta_info"][name]
    print(name, sum(values) / len(values))
`;
}

// What a template says by itself must not be Jinja's: {{, {% and {# are written as texts.
const asTemplate = (text) => quoted(text.replace(/\{[{%#]+/g, (braces) => `{{ "${braces}" }}`));

function asYaml(order, match) {
  const { templates, fields } = order;
  const uses = (name) => [...`${templates.system}\n${templates.teacher}\n${templates.student}`.matchAll(FIELD)].some((found) => found[2] === name);
  const final = uses("final");
  const row = final ? fields : { problem: fields.problem, answer: fields.answer };
  const sampling = { n: order.temperature > 0 ? 4 : 1, temperature: order.temperature, max_new_tokens: order.tokens };
  const lines = (values, indent) => Object.entries(values).filter(([, value]) => value !== undefined)
    .map(([name, value]) => `${indent}${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`);
  const teacher = templates.system
    ? ["      teacher:", `        system: ${asTemplate(templates.system)}`, `        user: ${asTemplate(templates.teacher)}`]
    : [`      teacher: ${asTemplate(templates.teacher)}`];
  const answer = { numeric: ["  - {type: answer, match: numeric}"], contains: ["  - {type: answer, match: contains, ignore_case: true}"] };
  return [
    "# python -m sglang_optimal.distill run run.yaml",
    "# problems.jsonl has one problem a line; this one is:",
    `# {${Object.entries(row).map(([name, value]) => `${quoted(name)}: ${quoted(value)}`).join(", ")}}`,
    "data:",
    "  path: problems.jsonl",
    `  privileged: [answer${final ? ", final" : ""}]`,
    "contexts:",
    `  student: ${asTemplate(templates.student)}`,
    "  strategies:",
    `    - name: ${order.strategy}`,
    ...teacher,
    "sampling:",
    ...lines(sampling, "  "),
    "mixing:",
    ...lines(order.alpha, "  "),
    "filters:",
    "  - {type: finish}",
    ...(answer[match] || []),
    "client:",
    `  endpoints: [${quoted(order.server)}]`,
    ...(order.key ? [`  api_key_env: ${KEY}`] : []),
    "output:",
    "  dir: runs/mixing",
  ].join("\n") + "\n";
}

const COPIES = {
  curl: ["curl", "The same request in a shell.", asCurl],
  python: ["Python", "The same request with the package requests.", asPython],
  yaml: ["YAML", "A run with these contexts and this mixture over your own problems. Save it as run.yaml.", asYaml],
};

function showCopy(kind, card) {
  const [label, use, make] = COPIES[kind];
  $("copy-title").textContent = `${card.order.setting.label} as ${label}`;
  $("copy-use").textContent = use + (card.order.key ? ` The API key is read from ${KEY}.` : "");
  $("copy-text").textContent = make(card.order, card.match);
  $("copy-done").textContent = "";
  $("copy").showModal();
}

$("copy-close").addEventListener("click", () => $("copy").close());
$("copy-go").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("copy-text").textContent); // only on localhost and over https
    $("copy-done").textContent = "copied";
  } catch {
    getSelection().selectAllChildren($("copy-text"));
    $("copy-done").textContent = document.execCommand("copy") ? "copied" : "selected: copy it with Ctrl+C";
  }
});
