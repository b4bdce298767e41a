// One token: its colour, and the picture of what teacher, student and mixture wanted in its place.
const SIDES = ["teacher", "student", "mixture"];

function percent(p) {
  if (!(p > 0)) return "0 %";
  if (p < 0.0001) return "<0.01 %";
  if (p < 0.0995) return `${Number((100 * p).toPrecision(p < 0.01 ? 1 : 2))} %`;
  return p > 0.995 && p < 1 ? ">99 %" : `${Math.round(100 * p)} %`;
}
const share = (logprob) => (known(logprob) ? Math.exp(logprob) : 0); // null is −∞

// -- the words of token ids, which the server is asked for ------------------------------------------------------------

const words = new Map(); // "server id" → text
const wordOf = (order, id) => words.get(`${order.server} ${id}`);

async function learnWords(order, ids) {
  const unknown = [...new Set(ids)].filter((id) => wordOf(order, id) === undefined);
  if (!unknown.length) return false;
  const body = { tokens: unknown.map((id) => [id]), skip_special_tokens: false };
  const { text } = await answerOf(order, "/detokenize", body);
  unknown.forEach((id, i) => words.set(`${order.server} ${id}`, text[i]));
  return true;
}

// Blanks that can be seen; a token that is a part of a character has no text of its own.
function shownWord(text, id) {
  if (!text || text.includes("\ufffd")) return `#${id}`;
  return text.replace(/^ +| +$/g, (run) => "␣".repeat(run.length)).replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

// -- its picture ------------------------------------------------------------------------------------------------------

// [{id, teacher, student, mixture}] (probabilities): the five most likely of each side, the mixture's first, and what was
// drawn. `drawn`: {id, teacher, student, mixture} (log-probabilities).
function candidates(top_k, place, drawn) {
  const found = new Map();
  for (const side of SIDES) {
    const of = top_k[side];
    ((of && of.ids && of.ids[place]) || []).forEach((id, i) => {
      found.set(id, { id, ...Object.fromEntries(SIDES.map((name) => [name, share(of[`${name}_logprobs`][place][i])])) });
    });
  }
  if (!found.has(drawn.id)) found.set(drawn.id, { id: drawn.id, ...Object.fromEntries(SIDES.map((name) => [name, share(drawn[name])])) });
  return [...found.values()].sort((a, b) => b.mixture - a.mixture || b.teacher + b.student - a.teacher - a.student);
}

function inWords(drawn) {
  return `The teacher wanted it: ${percent(share(drawn.teacher))}, the student ${percent(share(drawn.student))}; `
    + `the mixture drew it with ${percent(share(drawn.mixture))}.`;
}

function picture(card, place) {
  const { meta, order } = card;
  const facts = factsOf(meta, place);
  const rows = candidates(meta.top_k, place, facts);
  const box = element("div");
  const line = element("p");
  line.append(element("strong", "", shownWord(facts.piece, facts.id)), ` ${inWords(facts)}`);
  box.append(line, barsOf(rows, facts.id, (id) => shownWord(id === facts.id ? facts.piece : wordOf(order, id), id)));
  box.append(element("p", "note", `α ${fixed(facts.alpha)} · KL to the student ${fixed(facts.kl)}, to the teacher `
    + `${fixed(facts.klTeacher)} nats · ESS ratio ${fixed(facts.ess, 2)}`));
  return box;
}

function barsOf(rows, drawn, word) {
  const table = element("table", "bars");
  const head = table.createTHead().insertRow();
  for (const name of ["", ...SIDES]) head.append(element("th", name, name));
  const body = table.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    line.className = row.id === drawn ? "drawn" : "";
    line.append(element("th", "", `${row.id === drawn ? "▸" : " "}${word(row.id)}`));
    for (const side of SIDES) line.insertCell().append(barOf(side, row[side]));
  }
  const last = body.insertRow(); // what is beyond the lists
  last.className = "outside";
  last.append(element("th", "", " others"));
  for (const side of SIDES) {
    last.insertCell().append(barOf(side, Math.max(0, 1 - rows.reduce((sum, row) => sum + row[side], 0))));
  }
  return table;
}

function barOf(side, p) {
  const cell = element("div", `cell ${side}`);
  const bar = element("b");
  bar.style.width = `${(p * 50).toFixed(1)}%`;
  cell.append(bar, element("span", "", percent(p < 1e-6 ? 0 : p)));
  return cell;
}

// -- in the text ------------------------------------------------------------------------------------------------------

function factsOf(meta, i) {
  const [, id, piece] = meta.output_token_logprobs[i];
  return {
    id, piece, alpha: meta.alpha[i], teacher: meta.teacher_logprob[i], student: meta.student_logprob[i], mixture: meta.mixture_logprob[i],
    kl: meta.kl_to_student[i], klTeacher: meta.kl_to_teacher[i], ess: meta.ess_ratio[i],
  };
}

function tokenOf(card, i) {
  const facts = factsOf(card.meta, i);
  const token = element("span", "token", facts.piece);
  if (/^\n*$/.test(facts.piece)) token.dataset.mark = facts.piece ? "↵" : "·"; // something to point at
  token.facts = facts;
  token.style.backgroundColor = colourOf(facts, $("colour").value);
  token.tabIndex = i ? -1 : 0;
  token.setAttribute("role", "img");
  token.setAttribute("aria-label", `${(facts.piece || "").trim() || "token"}: teacher ${percent(share(facts.teacher))}, `
    + `student ${percent(share(facts.student))}`);
  token.picture = () => {
    const ids = SIDES.flatMap((side) => (card.meta.top_k[side].ids || [])[i] || []);
    learnWords(card.order, ids).then((more) => more && !$("tip").hidden && $("tip").of === token && showTip(token), () => {});
    $("tip").of = token;
    return picture(card, i);
  };
  return token;
}
