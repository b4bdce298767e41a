// Tokens coloured by alpha, and what is known of each; for the page /mixing and a run's report.
const $ = (id) => document.getElementById(id);
const SERIES = [
  ["alpha", "α"], ["teacher_logprob", "log p, teacher"], ["student_logprob", "log p, student"],
  ["mixture_logprob", "log p, mixture"], ["kl_to_student", "KL to student"], ["kl_to_teacher", "KL to teacher"],
  ["ess_ratio", "ESS ratio"],
];
const known = (value) => value !== null && value !== undefined;
const fixed = (value, digits = 3) => (known(value) ? value.toFixed(digits).replace("-", "−") : "–");

// What models write is put in a page with textContent alone, so that it is never markup.
function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// The token number `place` of a box that `explain` was called for; `rows` of its tip are [label, text].
function colouredToken(piece, place, alpha, rows) {
  const token = element("span", "token", piece);
  if (known(alpha)) token.style.backgroundColor = colour(alpha);
  token.tabIndex = place ? -1 : 0;
  token.setAttribute("role", "img");
  token.setAttribute("aria-label", `${piece || "token"}, alpha ${fixed(alpha, 2)}`);
  token.rows = rows;
  return token;
}

function colour(alpha) {
  const side = Math.max(-1, Math.min(1, 2 * alpha - 1)); // -1 the student's, 1 the teacher's
  const strength = Math.sqrt(Math.abs(side)) * 0.62; // most alphas lie near 1/2; the root keeps them apart
  return `hsla(var(${side < 0 ? "--student" : "--teacher"}), ${strength.toFixed(3)})`;
}

function rowsOf(token) {
  const table = element("table");
  for (const [label, text] of token.rows) {
    const row = table.insertRow();
    row.append(element("th", "", label));
    row.insertCell().textContent = text;
  }
  return table;
}

// `token.picture()` makes what is shown of a token, where a page has more to say than rows.
const explained = (token) => token.rows || token.picture;

function showTip(token) {
  const tip = $("tip");
  tip.replaceChildren(token.picture ? token.picture() : rowsOf(token));
  tip.hidden = false;
  const box = token.getClientRects()[0] || token.getBoundingClientRect(); // a token may be broken over two lines
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 12);
  const below = box.bottom + tip.offsetHeight + 14 < innerHeight;
  tip.style.left = `${Math.max(8, left) + scrollX}px`;
  tip.style.top = `${(below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + scrollY}px`;
}
const hideTip = () => { $("tip").hidden = true; };

// Tips for the tokens in `area`: at the mouse, and at the keyboard's focus, which is one stop for Tab and goes with the arrows.
function explain(area) {
  for (const type of ["mouseover", "focusin", "click"]) { // a tap is a click, with the focus or without
    area.addEventListener(type, (event) => explained(event.target) && showTip(event.target));
  }
  area.addEventListener("focusout", hideTip);
  area.addEventListener("mouseout", () => { // back to the token with the keyboard's focus, if there is one
    if (explained(document.activeElement)) showTip(document.activeElement);
    else hideTip();
  });
  area.addEventListener("keydown", (event) => {
    if (!explained(event.target)) return;
    const all = [...event.target.parentElement.children];
    const place = all.indexOf(event.target);
    const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: all.length - 1 }[event.key];
    if (next === undefined || !all[next]) return;
    event.target.tabIndex = -1; // Tab comes back to where the reader left off
    all[next].tabIndex = 0;
    all[next].focus();
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
}
