const $ = (id) => document.getElementById(id);
const SERIES = [
  ["alpha", "α"], ["teacher_logprob", "log p, teacher"], ["student_logprob", "log p, student"],
  ["mixture_logprob", "log p, mixture"], ["kl_to_student", "KL to student"], ["kl_to_teacher", "KL to teacher"],
  ["ess_ratio", "ESS ratio"],
];
const fixed = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−"));

// The background of a token.
function colour(alpha) {
  const side = Math.max(-1, Math.min(1, 2 * alpha - 1)); // -1 the student's, 1 the teacher's
  const strength = Math.sqrt(Math.abs(side)) * 0.62; // most alphas lie near 1/2; the root keeps them apart
  return `hsla(var(${side < 0 ? "--student" : "--teacher"}), ${strength.toFixed(3)})`;
}

// What is known of a token: the pairs of label and text in its `values`. What models write is put in with textContent
// alone, so that it is never markup.
function showTip(token) {
  const table = document.createElement("table");
  for (const [label, value] of token.values) {
    const row = table.insertRow();
    const head = document.createElement("th");
    head.textContent = label;
    row.append(head);
    row.insertCell().textContent = value;
  }
  const tip = $("tip");
  tip.replaceChildren(table);
  tip.hidden = false;
  const box = token.getClientRects()[0] || token.getBoundingClientRect(); // a token may be broken over two lines
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 12);
  const below = box.bottom + tip.offsetHeight + 14 < innerHeight;
  tip.style.left = `${Math.max(8, left) + scrollX}px`;
  tip.style.top = `${(below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + scrollY}px`;
}
const hideTip = () => { $("tip").hidden = true; };
function showTipsOf(container) {
  for (const type of ["mouseover", "focusin"]) {
    container.addEventListener(type, (event) => event.target.values && showTip(event.target));
  }
  container.addEventListener("focusout", hideTip);
  container.addEventListener("mouseout", () => { // back to the token with the keyboard's focus, if there is one
    if (document.activeElement.values) showTip(document.activeElement);
    else hideTip();
  });
}
document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
