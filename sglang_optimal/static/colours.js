// What a token's colour says: how much (`amount`, 0 to `full` in `unit`, linear: where nothing is, nothing is coloured), and
// for whom (`side`: negative for the student, blue; positive for the teacher, orange).
const pull = (token) => token.teacher - token.student;
const COLOURS = {
  kl: { label: "KL to the student", full: 1, unit: "nat", amount: (token) => token.kl, side: pull,
    ends: ["the student's word", "the teacher's word"] },
  surprise: { label: "surprise for the student", full: 5, unit: "nats", amount: (token) => -token.student, side: pull,
    ends: ["more the student's", "more the teacher's"] },
  pull: { label: "who wanted it: log p teacher − student", full: 3, unit: "nats", amount: (token) => Math.abs(pull(token)), side: pull,
    ends: ["the student", "the teacher"] },
  alpha: { label: "α", full: 0.5, unit: "", amount: (token) => Math.abs(token.alpha - 0.5), side: (token) => token.alpha - 0.5,
    ends: ["α 0", "α 1"] },
};

// {alpha, kl, teacher, student}: alpha, KL(q‖student) and both models' log-probabilities of a token, in nats.
function colourOf(token, name) {
  const { amount, full, side } = COLOURS[name];
  const strength = Math.min(1, Math.max(0, amount(token) / full)) * 0.62;
  if (!(strength > 0)) return "transparent"; // a value that is not there is NaN
  return `hsla(var(${side(token) < 0 ? "--student" : "--teacher"}), ${strength.toFixed(3)})`;
}
