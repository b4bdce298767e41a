// One setting's sample: its text as it comes, figures, how it ended, and whether it is right.
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

function makeCard(order) {
  const { id, label, what } = order.setting;
  const box = element("section", "card sample");
  box.id = id;
  const title = element("h2", "", label);
  title.append(element("small", "", what || order.alpha.alpha_method));
  const header = element("header");
  header.append(title);
  const marks = element("div", "marks");
  marks.append(element("span", "mark verdict"), element("span", "ending", "waiting"));
  const error = element("div", "error");
  error.setAttribute("role", "alert");
  const text = element("div", "text");
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `${label}: tokens; left and right arrow keys step through them`);
  const footer = element("footer", "", "copy as ");
  footer.hidden = true;
  const card = { order, box, text, meta: {}, said: "", match: null };
  for (const kind of Object.keys(COPIES)) {
    const button = element("button", kind, COPIES[kind][0]);
    button.type = "button";
    button.addEventListener("click", () => showCopy(kind, card));
    footer.append(button);
  }
  box.append(header, marks, element("dl", "figures"), error, text, footer);
  return card;
}

const part = (card, name) => card.box.querySelector("." + name);

async function sample(card, signal) {
  if (signal.aborted) return end(card, "stopped by you");
  part(card, "ending").textContent = "sampling";
  try {
    for await (const event of events(card.order, signal)) take(card, event);
    await ended(card, signal);
  } catch (error) {
    if (error.name === "AbortError") return end(card, "stopped by you");
    part(card, "error").textContent = error.message;
    end(card, card.meta.alpha ? "broken off" : "");
  }
}

function take(card, event) {
  card.meta = joined(card.meta, event.meta_info);
  card.said = (card.meta.pieces ? card.said : "") + (event.text || "");
  addTokens(card);
  showFigures(card);
}

function addTokens(card) {
  const { meta, text } = card;
  const count = Math.min(meta.output_token_logprobs.length, meta.alpha.length);
  for (let i = text.childElementCount; i < count; i++) {
    const token = tokenOf(card, i);
    const matched = meta.finish_reason && meta.finish_reason.matched; // the id of the token that ended the text
    if (i === count - 1 && matched === token.facts.id) token.classList.add("end");
    text.append(token);
  }
}

function showFigures(card) {
  const { meta } = card;
  const figures = [
    ["KL to student", fixed(mean(meta.kl_to_student))], ["student log p", fixed(mean(meta.student_logprob), 2)],
    ["mean α", fixed(mean(meta.alpha))], ["tokens", String(meta.alpha.length)],
  ].map(([label, value]) => {
    const figure = element("div");
    figure.append(element("dt", "", label), element("dd", "", value));
    return figure;
  });
  part(card, "figures").replaceChildren(...figures);
}

function end(card, how, className = "ending") {
  part(card, "ending").className = className;
  part(card, "ending").textContent = how;
  card.box.querySelector("footer").hidden = !card.meta.alpha;
}

const ENDINGS = { stop: ["ended by itself", "ending"], length: ["stopped at the token limit", "ending mark cut"] };

async function ended(card, signal) {
  const reason = card.meta.finish_reason || {};
  end(card, ...(ENDINGS[reason.type] || [reason.message || "broken off", "ending"]));
  const tops = SIDES.flatMap((side) => ((card.meta.top_k[side] || {}).ids || []).flat());
  await Promise.all([judge(card, signal), learnWords(card.order, tops).catch(() => {})]);
}

async function judge(card, signal) {
  const mark = part(card, "verdict");
  let verdict;
  try {
    verdict = await answerOf(card.order, "/mixing/verdict", { text: card.said, answer: card.order.fields.answer }, signal);
  } catch (error) {
    mark.textContent = `not judged: ${error.message}`;
    return;
  }
  card.match = verdict.match;
  const { said, expected } = verdict;
  const words = {
    right: `✓ right${said ? `: ${said}` : ""}`, wrong: said ? `✗ wrong: ${said}, not ${expected}` : "✗ wrong", none: "– no answer found",
    unjudged: "– not judged: the answer has no number and no few words",
  };
  mark.textContent = words[verdict.verdict];
  mark.classList.add(verdict.verdict);
  $("compared").textContent = COMPARED[verdict.match] || "";
}

const COMPARED = {
  numeric: "Right: the last number of the text is the last number of the answer (a run's filter {type: answer, match: numeric}).",
  contains: "Right: the answer stands in the text (a run's filter {type: answer, match: contains, ignore_case: true}).",
};
