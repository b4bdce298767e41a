// The page: examples, strategies, settings, and one run of all that is chosen.
let running = null; // the AbortController of all streams
let cards = [];

$("server").value = location.protocol.startsWith("http") ? location.origin : "http://127.0.0.1:30000";

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// -- the form ---------------------------------------------------------------------------------------------------------

function choice(type, name, value, label, checked) {
  const box = element("label", "", label);
  const input = element("input");
  Object.assign(input, { type, name, value, checked });
  box.append(input);
  return box;
}

for (const [i, example] of EXAMPLES.entries()) {
  const chip = element("button", "chip", example.label);
  chip.type = "button";
  chip.addEventListener("click", () => {
    showExample(i);
    run();
  });
  $("examples").append(chip);
}
for (const [name, { label }] of Object.entries(STRATEGIES)) $("strategies").append(choice("radio", "strategy", name, label, false));
$("strategies").append(choice("radio", "strategy", "own", "own wording", false));
for (const { id, label, what, on } of SETTINGS) {
  const box = choice("checkbox", "setting", id, label, Boolean(on));
  box.title = what || "the method, bounds and number under the settings below";
  $("settings").append(box);
}
for (const [name, { label }] of Object.entries(COLOURS)) $("colour").append(Object.assign(element("option", "", label), { value: name }));

const chosenStrategy = () => document.querySelector("[name=strategy]:checked").value;
const choose = (name) => { document.querySelector(`[name=strategy][value=${name}]`).checked = true; };

function writeStrategy(name) {
  choose(name);
  if (name === "own") return;
  $("teacher-template").value = STRATEGIES[name].teacher;
  $("teacher-system").value = STRATEGIES[name].system || "";
}

function pressExample(index) {
  [...$("examples").querySelectorAll("button")].forEach((chip, i) => chip.setAttribute("aria-pressed", String(i === index)));
  $("look").textContent = index < 0 ? "" : `What to look at: ${EXAMPLES[index].look}`;
}

function showExample(index) {
  const { problem, answer, strategy } = EXAMPLES[index];
  $("problem").value = problem;
  $("answer").value = answer;
  writeStrategy(strategy);
  pressExample(index);
}

function checkLeak() {
  const seen = [...$("student-template").value.matchAll(FIELD)].some((found) => found[2] !== "problem");
  $("leak").textContent = seen ? "The student sees the answer." : "";
}
function showNumbers() {
  const isFixed = $("method").value === "fixed";
  $("fixed").disabled = !isFixed;
  $("budget").disabled = !$("method").value.startsWith("kl_budget");
  $("alpha-min").disabled = $("alpha-max").disabled = isFixed;
}
$("strategies").addEventListener("change", () => writeStrategy(chosenStrategy()));
for (const id of ["teacher-template", "teacher-system"]) $(id).addEventListener("input", () => choose("own"));
for (const id of ["problem", "answer"]) $(id).addEventListener("input", () => pressExample(-1));
for (const id of ["method", "fixed", "budget", "alpha-min", "alpha-max"]) { // who fills it in wants to see it
  $(id).addEventListener("change", () => { document.querySelector("[name=setting][value=own]").checked = true; });
}
$("student-template").addEventListener("input", checkLeak);
$("method").addEventListener("change", showNumbers);

function showColours() {
  const { full, unit, ends } = COLOURS[$("colour").value];
  const most = unit ? `${full}+ ${unit}, ` : "";
  $("legend-student").textContent = most + ends[0];
  $("legend-teacher").textContent = most + ends[1];
  for (const token of $("results").querySelectorAll(".token")) token.style.backgroundColor = colourOf(token.facts, $("colour").value);
}
$("colour").addEventListener("change", showColours);

// -- a run ------------------------------------------------------------------------------------------------------------

async function run() {
  if (running) running.abort();
  const chosen = SETTINGS.filter(({ id }) => document.querySelector(`[name=setting][value=${id}]`).checked);
  if (!chosen.length) return say("Choose at least one mixture to sample.", true);
  const own = new AbortController();
  running = own;
  busy(true);
  say("");
  hideTip();
  $("compared").textContent = "";
  cards = chosen.map((setting) => makeCard(orderOf(setting)));
  $("results").replaceChildren(...cards.map((card) => card.box));
  const started = performance.now();
  await together(cards.map((card) => () => sample(card, own.signal)));
  if (running !== own) return; // another has begun
  running = null;
  busy(false);
  const tokens = cards.reduce((sum, card) => sum + (card.meta.alpha || []).length, 0);
  if (tokens) say(`${tokens} tokens, ${(tokens * 1000 / (performance.now() - started)).toFixed(1)} a second`);
}

function busy(yes) {
  $("go").disabled = yes;
  $("stop").disabled = !yes;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("stop").addEventListener("click", () => running && running.abort());

// The first example, once for a tab: a page that is loaded again and again must not ask for more and more.
async function firstRun() {
  const once = "mixing-first-run";
  if (!location.protocol.startsWith("http") || sessionStorage.getItem(once)) return say("Choose an example, or press Sample.");
  busy(true);
  say("asking whether the server is ready");
  const health = await fetch("/health").catch((error) => ({ ok: false, status: error.message }));
  busy(false);
  if (!health.ok) return say(`The server is not ready (${health.status}). Press Sample when it is.`, true);
  sessionStorage.setItem(once, "done");
  await run();
}

explain($("results"));
showExample(0);
showNumbers();
checkLeak();
showColours();
firstRun();
