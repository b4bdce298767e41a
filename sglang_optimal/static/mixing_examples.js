// What the page opens with: problems to try, ways to tell the teacher the answer, mixtures to compare.
const QUESTION = "Answer this question: {problem}";
const STRATEGIES = {
  copy: { label: "copy the answer", teacher: `${QUESTION}\n\nCopy this answer: {answer}` },
  hint: { label: "as a hint", teacher: `${QUESTION}\n\nHint: {answer}` },
  final: { label: "the final answer", teacher: `${QUESTION}\n\nThe answer is {final}.` },
  system: { label: "in the system message", system: "The solution of the next question: {answer}", teacher: QUESTION },
};

const EXAMPLES = [
  { label: "A train, 3 hours", strategy: "copy",
    problem: "A train travels 60 kilometers in one hour. How many kilometers does it travel in 3 hours?",
    answer: "The train travels 60 kilometers in each of 3 hours, so it travels 60 * 3 = 180 kilometers. The answer is 180.",
    look: "where a text is coloured, the teacher moved it away from what the student would write. Point at such a token to see what each of them wanted." },
  { label: "12 pencils", strategy: "hint",
    problem: "Maya has 12 pencils. She gives 5 pencils to her brother. How many pencils does she have left?",
    answer: "Maya starts with 12 pencils and gives away 5, so she has 12 - 5 = 7 pencils left. The answer is 7.",
    look: "what most needs the teacher: is it the numbers of the sum, or only the first words of the text?" },
  { label: "Oranges", strategy: "final",
    problem: "Oranges cost $3 per bag. Tom buys 6 bags of oranges. How much does he pay?",
    answer: "Each bag costs 3 dollars and Tom buys 6 bags, so he pays 3 * 6 = 18 dollars. The answer is 18.",
    look: "the teacher knows the number alone. Does the mixture work it out, or jump to it?" },
  { label: "Two steps", strategy: "copy",
    problem: "A farmer has 7 boxes of 8 eggs and 5 loose eggs. How many eggs does he have?",
    answer: "7 boxes of 8 eggs are 7 * 8 = 56 eggs. With the 5 loose ones there are 56 + 5 = 61 eggs. The answer is 61.",
    look: "a right last number under a wrong sum: colour by surprise, and see where the text leaps." },
  { label: "A fact", strategy: "system",
    problem: "What is the capital of Australia?", answer: "Canberra.",
    look: "one word decides. Its bars show what each of the two wanted there, and what α made of it." },
];

// In the order of the dial. `alpha`: the request's fields; null: those under "own".
const BOUNDS = { alpha_min: 0, alpha_max: 1 };
const fixedAlpha = (value) => ({ alpha_method: "fixed", fixed_alpha: value });
const budget = (nats) => ({ alpha_method: "kl_budget", kl_budget: nats, ...BOUNDS });
const SETTINGS = [
  { id: "student", label: "α 0", what: "student alone", alpha: fixedAlpha(0), on: true },
  { id: "alpha-25", label: "α 0.25", what: "nearer the student", alpha: fixedAlpha(0.25) },
  { id: "alpha-50", label: "α 0.5", what: "half and half", alpha: fixedAlpha(0.5) },
  { id: "mixture", label: "kl_symmetry", what: "equally far from both", alpha: { alpha_method: "kl_symmetry", ...BOUNDS }, on: true },
  { id: "alpha-75", label: "α 0.75", what: "nearer the teacher", alpha: fixedAlpha(0.75) },
  { id: "teacher", label: "α 1", what: "teacher alone", alpha: fixedAlpha(1), on: true },
  { id: "budget-002", label: "KL ≤ 0.02", what: "nats from the student", alpha: budget(0.02) },
  { id: "budget-01", label: "KL ≤ 0.1", what: "nats from the student", alpha: budget(0.1) },
  { id: "budget-05", label: "KL ≤ 0.5", what: "nats from the student", alpha: budget(0.5) },
  { id: "own", label: "own", what: "", alpha: null },
];
