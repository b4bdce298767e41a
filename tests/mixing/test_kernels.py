"""The fused implementations beside plain PyTorch: layouts, dtypes, threads; the GPU kernel in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_optimal.mixing import ALPHA_METHODS, AlphaParams, Mixture, mix

FIELDS = ("logits", "alpha", "kl_to_student", "kl_to_teacher", "teacher_log_z", "student_log_z", "mixture_log_z")
ROWS = 14
DISJOINT = 5
STUDENT_BAD, TEACHER_BAD = [4, 10, 12, 13], [8, 9, 11]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows(width=5001, dtype=torch.float32):
    """Ordinary rows, and special ones: masked, equal, nothing in common, NaN (one, all), infinity, nearly disjoint."""
    generator = torch.Generator().manual_seed(0)
    teacher = 3.0 * torch.randn(ROWS, width, generator=generator)
    student = 0.6 * teacher + 1.5 * torch.randn(ROWS, width, generator=generator)
    teacher[1, ::3], student[1, ::5] = -torch.inf, -torch.inf
    student[2] = teacher[2]
    teacher[3] = -torch.inf
    student[4, 5] = torch.nan
    teacher[5], student[5] = 0.0, 0.0
    teacher[5, 1], student[5, 2] = 500.0, 500.0
    teacher[6, ::2], student[6, 1::2] = -torch.inf, -torch.inf
    teacher[8, 7] = torch.nan
    teacher[9, 8] = torch.inf
    student[10, 9] = torch.inf
    teacher[[11, 13]], student[[12, 13]] = torch.nan, torch.nan
    temperatures = torch.tensor([1.0, 0.3, 1.0, 0.7, 1.0, 1.0, 0.9, 2.0, 1.0, 1.0, 1.0, 1.0, 0.8, 1.0])
    return teacher.to(dtype), student.to(dtype), temperatures


def assert_same(got, expected, ess_ratio=True):
    common = [0, 1, 2, 5, 7]  # one model's log normaliser means nothing where nothing is common, or beside a NaN
    bad = STUDENT_BAD + TEACHER_BAD
    good = [row for row in range(ROWS) if row not in bad]
    for name in (*FIELDS, "ess_ratio") if ess_ratio else FIELDS:
        a, b = getattr(got, name), getattr(expected, name)
        rows = common if name in ("teacher_log_z", "student_log_z") else good
        for row in rows:
            # A small KL of nearly disjoint models is a difference of hundreds of nats.
            near = {"rtol": 1e-3, "atol": 5e-4} if row == DISJOINT else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(a[row], b[row], **near, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    for mixture in (got, expected):
        # What the engine tells the user by (`MixingHostOutput`): there is no mixture, and whose fault it is.
        assert mixture.kl_to_student[bad].isnan().all() and mixture.kl_to_teacher[bad].isnan().all()
        assert mixture.student_log_z[STUDENT_BAD].isnan().all()
        assert mixture.student_log_z[TEACHER_BAD].isfinite().all() and mixture.teacher_log_z[TEACHER_BAD].isnan().all()
        assert mixture.kl_to_student[3] == mixture.kl_to_teacher[3] == torch.inf


def wide_case():
    """Views into wider buffers, as when one vocabulary is padded, and one that is not contiguous in the vocabulary."""
    teacher, student, temperatures = rows(width=1000)
    wide = torch.full((ROWS, 1100), torch.nan)
    wide[:, :1000] = teacher
    out = torch.full((ROWS, 1050), 7.0)[:, :1000]
    return (wide[:, :1000], student.t().contiguous().t(), temperatures, AlphaParams.uniform(ROWS)), {"out": out}


def method_case(method, dtype):
    params = AlphaParams.uniform(ROWS, method, alpha_min=0.1, alpha_max=0.9, fixed_alpha=1.7, kl_budget=0.3)
    return (*rows(dtype=dtype), params), {"ess_ratio": True}


def budget_case(first, budget):
    """Both budgets by turns, without bounds."""
    methods = [("kl_budget", "kl_budget_teacher")[(first + row) % 2] for row in range(ROWS)]
    lists = methods, [0.0] * ROWS, [1.0] * ROWS, [0.5] * ROWS
    return (*rows(width=3000), AlphaParams.from_lists(*lists, kl_budget=[budget] * ROWS)), {}


BUDGETS = [(first, budget) for first in (0, 1) for budget in (0.0, 0.01, 1.0, 5.0, 1e30)]
METHOD_CASES = [(m, d) for m in ALPHA_METHODS for d in DTYPES]
# What differs by dtype is how a row is read; the interpreter takes seconds for each case.
SLOW_CASES = [(m, d) for m, d in METHOD_CASES if d is not torch.float32 and m != "kl_symmetry"]
CASES = {case: method_case(*case) for case in METHOD_CASES} | {"wide": wide_case()}
CASES |= {case: budget_case(*case) for case in BUDGETS}


def interpret(names, folder) -> dict:
    """What the GPU kernel gives for these of CASES, in Triton's interpreter."""
    torch.save([CASES[name] for name in names], folder / "cases.pt")
    command = [
        sys.executable,
        str(Path(__file__).with_name("interpret.py")),
        folder / "cases.pt",
        folder / "results.pt",
    ]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True, timeout=300)
    results = torch.load(folder / "results.pt")
    return {name: Mixture(**fields) for name, fields in zip(names, results, strict=True)}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return interpret([name for name in CASES if name not in SLOW_CASES], tmp_path_factory.mktemp("interpreted"))


@pytest.mark.parametrize("method,dtype", METHOD_CASES)
def test_every_method_and_special_row(interpreted, method, dtype):
    args, kwargs = CASES[method, dtype]
    expected = mix(*args, **kwargs, implementation="torch")
    if (method, dtype) not in SLOW_CASES:
        assert_same(interpreted[method, dtype], expected)
    assert_same(mix(*args, **kwargs, implementation="numba"), expected)


@pytest.mark.slow
def test_the_gpu_kernel_of_every_other_dtype(tmp_path):
    for name, got in interpret(SLOW_CASES, tmp_path).items():
        args, kwargs = CASES[name]
        assert_same(got, mix(*args, **kwargs, implementation="torch"))


@pytest.mark.parametrize("case", BUDGETS, ids=str)
def test_budgets_from_nothing_to_everything(interpreted, case):
    args, kwargs = CASES[case]
    expected = mix(*args, **kwargs, implementation="torch")
    good = [row for row in range(ROWS) if row not in STUDENT_BAD + TEACHER_BAD]
    alpha = expected.alpha[good]
    at_an_end = case[1] in (0.0, 1e30)
    assert ((alpha > 0.0) & (alpha < 1.0)).any() != at_an_end
    for got in (interpreted[case], mix(*args, **kwargs, implementation="numba")):
        assert_same(got, expected, ess_ratio=False)
        if at_an_end:
            assert torch.equal(got.alpha[good], alpha)  # exactly


def test_padded_and_strided_logits(interpreted):
    """What lies beyond the row is neither read nor written."""
    (teacher, student, *rest), kwargs = CASES["wide"]
    expected = mix(teacher.clone(), student.clone(), *rest, implementation="torch")
    assert_same(interpreted["wide"], expected, ess_ratio=False)
    assert_same(mix(teacher, student, *rest, **kwargs, implementation="numba"), expected, ess_ratio=False)
    beyond = kwargs["out"].as_strided((ROWS, 50), (1050, 1), 1000)
    assert torch.all(beyond == 7.0)
    beyond = interpreted["wide"].logits.as_strided((ROWS, 50), (1050, 1), 1000)
    assert torch.all(beyond == 7.0)
    with pytest.raises(ValueError, match="out"):
        mix(teacher, student, *rest, out=torch.empty(1000, ROWS).t(), implementation="numba")


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_the_result(threads):
    teacher, student, temperatures = rows()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = mix(teacher, student, temperatures, AlphaParams.uniform(ROWS))
    finally:
        torch.set_num_threads(before)
    one_by_one = [
        mix(teacher[i : i + 1], student[i : i + 1], temperatures[i : i + 1], AlphaParams.uniform(1))
        for i in range(ROWS)
    ]
    torch.testing.assert_close(got.alpha, torch.cat([m.alpha for m in one_by_one]), equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(got.logits, torch.cat([m.logits for m in one_by_one]), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["torch", "numba"])
def test_no_rows(kind):
    m = mix(torch.empty(0, 10), torch.empty(0, 10), torch.empty(0), AlphaParams.uniform(0), implementation=kind)
    assert m.logits.shape == (0, 10) and m.alpha.shape == (0,)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gpu_kernel_compiles(capability, dtype):
    """For real cards, without one: Triton's compiler and the assembler accept it, and it has no local arrays."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from sglang_optimal.mixing import fused_gpu as kernel

    settings = ("temperatures", "alpha_mins", "alpha_maxs", "fixed_alphas", "kl_budgets")
    pointers = {name: "*fp32" for name in ("out", "stats", *settings)}
    pointers |= {"teacher": f"*{dtype}", "student": f"*{dtype}", "methods": "*i64"}
    constants = {"STATISTICS": kernel.STATS, "WANT_ESS": True, **kernel.SHAPE.options(2 if dtype == "bf16" else 4)}
    warps = constants.pop("num_warps")
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel._mix_row.arg_names
    }
    source = ASTSource(fn=kernel._mix_row, signature=signature, constexprs=constants)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"]
    assert ".local" not in compiled.asm["ptx"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs the compiled kernel, which needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ALPHA_METHODS)
def test_gpu_kernel_on_a_gpu(method, dtype):
    teacher, student, temperatures = (t.cuda() for t in rows(width=151_936, dtype=dtype))
    params = AlphaParams.uniform(ROWS, method, fixed_alpha=1.7, kl_budget=0.3, device="cuda")
    got = mix(teacher, student, temperatures, params, ess_ratio=True, implementation="triton")
    assert_same(got, mix(teacher, student, temperatures, params, ess_ratio=True, implementation="torch"))
