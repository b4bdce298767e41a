"""Settings: their one declaration, the YAML file, the command line, and what is refused before a model is loaded."""

from __future__ import annotations

import inspect
import json
import logging
import math
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_optimal import OptimalSampler, launch_server, mixed_gen
from sglang_optimal.config import (
    ALPHA_KEYS,
    ALPHA_METHODS,
    METHOD_OF_NUMBER,
    SETTINGS,
    AlphaSettings,
    MixingConfig,
    load_yaml,
)
from sglang_optimal.distill.config import Mixing
from sglang_optimal.mixing import AlphaMethod
from sglang_optimal.runtime import launch


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """SGLang's parser gives the root logger a handler on this test's stderr, which is closed afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


# -- one declaration a setting ---------------------------------------------------------------------------------------


def test_every_surface_is_made_of_the_declaration():
    flags = {option.dest: option for option in launch_server.mixing_parser()._actions}
    assert set(flags) == {*SETTINGS, "config"}
    for name, field in SETTINGS.items():
        assert field.description, name
        said = " ".join(field.description.split()).replace("``", "")
        assert flags[name].help.endswith(said)
    assert set(Mixing.model_fields) == set(SETTINGS)
    for call, names in (
        (OptimalSampler.__init__, set(SETTINGS) - {"student_model_path", "plain_requests"}),
        (OptimalSampler.generate, set(ALPHA_KEYS)),
        (OptimalSampler.async_generate, set(ALPHA_KEYS)),
        (mixed_gen, set(ALPHA_KEYS)),
    ):
        assert names == set(inspect.signature(call).parameters) & set(SETTINGS)


def test_the_base_file_has_every_key():
    """In base.yaml, with its value or commented out."""
    text = (Path(__file__).parents[1] / "configs" / "base.yaml").read_text()
    section = text.partition("\nmixing:\n")[2].partition("\nserver:")[0]
    assert re.findall(r"^  (?:# )?(\w+):", section, re.MULTILINE) == list(SETTINGS)


# -- AlphaSettings ---------------------------------------------------------------------------------------------------


def test_method_names_are_those_of_the_mixing_package():
    assert tuple(method.name.lower() for method in AlphaMethod) == ALPHA_METHODS


@pytest.mark.parametrize(
    "values,message",
    [
        ({"alpha_method": "entropie"}, "alpha_method: 'entropie' is not one of.*Did you mean 'entropy'"),
        ({"alpha_method": "xyz"}, "alpha_method: 'xyz' is not one of kl_symmetry, "),
        ({"alpha_method": 3}, "alpha_method: 3 is not one of"),
        ({"alpha_min": "0.2"}, "alpha_min: must be a finite number, got '0.2'"),
        ({"alpha_min": True}, "alpha_min: must be a finite number, got True"),
        ({"alpha_max": math.nan}, "alpha_max: must be a finite number"),
        ({"alpha_max": 10**400}, "alpha_max: must be a finite number"),
        ({"alpha_min": None}, "alpha_min: must be a finite number"),
        ({"alpha_method": "fixed", "fixed_alpha": math.inf}, "fixed_alpha: must be a finite number"),
        ({"alpha_min": -0.1}, "alpha_min, alpha_max: must lie in"),
        ({"alpha_max": 1.1}, "alpha_min, alpha_max: must lie in.*use fixed_alpha"),
        ({"alpha_min": 0.7, "alpha_max": 0.6}, "alpha_min: 0.7 is greater than alpha_max 0.6"),
        ({"alpha_method": "fixed"}, "fixed_alpha: required"),
        ({"fixed_alpha": 0.5}, "fixed_alpha: only read when alpha_method is 'fixed', not 'kl_symmetry'"),
        ({"alpha_method": "kl_budget"}, "kl_budget: required when alpha_method is 'kl_budget'"),
        ({"alpha_method": "kl_budget_teacher"}, "kl_budget_teacher: required when"),
        ({"kl_budget": 0.5}, "kl_budget: only read when alpha_method is 'kl_budget', not 'kl_symmetry'"),
        ({"alpha_method": "kl_budget", "kl_budget_teacher": 0.5}, "kl_budget: required when"),
        (
            {"alpha_method": "kl_budget", "kl_budget": -1e-9},
            "kl_budget: must be a finite number, 0 or more, got -1e-09",
        ),
        ({"kl_budget": math.inf}, "kl_budget: must be a finite number, 0 or more, got inf"),
        ({"kl_budget_teacher": math.nan}, "kl_budget_teacher: must be a finite number, 0 or more"),
        ({"kl_budget": "0.1"}, "kl_budget: must be a finite number, 0 or more, got '0.1'"),
        ({"kl_budget": 0.5, "kl_budget_teacher": 0.5}, "kl_budget, kl_budget_teacher: give only one of them"),
        ({"kl_budget": 0.5, "fixed_alpha": 0.5}, "fixed_alpha, kl_budget: give only one of them"),
    ],
)
def test_alpha_settings_refuse(values, message):
    with pytest.raises(ValueError, match=message):
        AlphaSettings(**values)


def test_updated():
    base = AlphaSettings(alpha_min=0.1)
    assert base.updated({}) == base
    assert base.updated({"alpha_min": None, "alpha_max": 0.5}) == AlphaSettings(alpha_min=0.1, alpha_max=0.5)
    guided = base.updated({"fixed_alpha": 1.5})
    assert (guided.alpha_method, guided.fixed_alpha, guided.alpha_min) == ("fixed", 1.5, 0.1)
    assert guided.updated({"alpha_method": "entropy"}) == AlphaSettings(alpha_method="entropy", alpha_min=0.1)
    assert guided.updated({"alpha_method": "fixed"}) == guided
    assert guided.updated({"fixed_alpha": -0.5}).fixed_alpha == -0.5
    with pytest.raises(ValueError, match="fixed_alpha: only read"):
        base.updated({"alpha_method": "entropy", "fixed_alpha": 0.5})
    with pytest.raises(ValueError, match="alpha_min: 0.1 is greater than alpha_max 0.05"):
        base.updated({"alpha_max": 0.05})


def test_updated_with_numbers():
    """A number brings its method with it, and goes with its method; whatever the default was."""
    numbers = {
        "fixed": {"fixed_alpha": 1.5},
        "kl_budget": {"kl_budget": 0.0},
        "kl_budget_teacher": {"kl_budget_teacher": 2},
    }
    assert {name: method for method, own in numbers.items() for name in own} == METHOD_OF_NUMBER
    for method, own in numbers.items():
        base = AlphaSettings(alpha_max=0.5).updated(own)
        assert base == AlphaSettings(alpha_method=method, alpha_max=0.5, **own)
        assert base.updated({"alpha_method": method}) == base
        assert base.updated({"alpha_method": "kl_symmetry"}) == AlphaSettings(alpha_max=0.5)
        for other, value in numbers.items():
            assert base.updated(value) == AlphaSettings(alpha_method=other, alpha_max=0.5, **value)
            if other != method:
                with pytest.raises(ValueError, match=f"{next(iter(value))}: required"):
                    base.updated({"alpha_method": other})
                with pytest.raises(ValueError, match="give only one of them"):
                    base.updated({**own, **value})
            with pytest.raises(ValueError, match="only read when"):
                base.updated({"alpha_method": "entropy", **value})
    assert AlphaSettings().budget is None
    assert AlphaSettings(alpha_method="kl_budget", kl_budget=0.0).budget == 0.0
    assert AlphaSettings(alpha_method="kl_budget_teacher", kl_budget_teacher=2).budget == 2.0


UNIT = st.floats(0, 1)


@given(UNIT, UNIT, UNIT, UNIT)
def test_updated_is_valid_or_refused(low, high, new_low, new_high):
    """No update gives bounds that are out of order, whatever it starts from."""
    base = AlphaSettings(alpha_min=min(low, high), alpha_max=max(low, high))
    try:
        settings = base.updated({"alpha_min": new_low, "alpha_max": new_high})
    except ValueError:
        assert new_low > new_high
    else:
        assert (settings.alpha_min, settings.alpha_max) == (new_low, new_high)


# -- MixingConfig ----------------------------------------------------------------------------------------------------


def test_from_dict():
    values = {"student_model_path": "s", "student_max_total_tokens": 100, "alpha_max": 0.4, "student_revision": None}
    config = MixingConfig.from_dict(values)
    assert config == MixingConfig(
        student_model_path="s", student_max_total_tokens=100, alpha=AlphaSettings(alpha_max=0.4)
    )
    assert MixingConfig.from_dict({}) == MixingConfig()
    assert MixingConfig.from_dict({"fixed_alpha": 1.2}).alpha == AlphaSettings(alpha_method="fixed", fixed_alpha=1.2)


@pytest.mark.parametrize(
    "values,message",
    [
        ({"student_modelpath": "s"}, "mixing: unknown key 'student_modelpath'. Did you mean 'student_model_path'?"),
        ({"zzz": 1}, "mixing: unknown key 'zzz'. Known: alpha_max, "),
        ({7: 1}, "mixing: unknown key 7"),
        ({"student_model_path": ""}, "student_model_path: must be a non-empty string"),
        ({"student_model_path": 5}, "student_model_path: must be a non-empty string, got 5"),
        ({"student_model_path": "s", "student_revision": 1234567}, "student_revision: must be a non-empty string"),
        ({"student_revision": "main"}, "student_revision: has no effect without student_model_path"),
        ({"student_max_total_tokens": 10}, "student_max_total_tokens: has no effect without student_model_path"),
        ({"student_model_path": "s", "student_max_total_tokens": 0}, "student_max_total_tokens: must be a positive"),
        ({"student_model_path": "s", "student_max_total_tokens": 2.5}, "student_max_total_tokens: must be a positive"),
        ({"student_model_path": "s", "student_max_total_tokens": True}, "student_max_total_tokens: must be a positive"),
        ({"student_model_path": "s", "student_weights": "both"}, "student_weights: 'both' is not one of auto, shared"),
        ({"alpha_min": 2}, "alpha_min, alpha_max: must lie in"),
    ],
)
def test_from_dict_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        MixingConfig.from_dict(values)


def test_the_student_s_revision_is_its_own():
    def revision(**values):
        return MixingConfig.from_dict(values).resolved("t", "v2").student_revision

    assert revision() == "v2"
    assert revision(student_model_path="t", student_weights="separate") == "v2"
    assert revision(student_model_path="t", student_revision="old") == "old"
    assert revision(student_model_path="s") is None  # the hub's main one, and not the teacher's


@pytest.mark.parametrize(
    "values,shared",
    [
        ({"student_model_path": "t"}, True),
        ({"student_model_path": "t", "student_revision": "main"}, True),
        ({"student_model_path": "t", "student_revision": "old"}, False),
        ({"student_model_path": "s"}, False),
        ({"student_model_path": "t", "student_weights": "shared"}, True),
        ({"student_model_path": "t", "student_weights": "separate"}, False),
        ({"student_model_path": "t", "student_max_total_tokens": 100}, False),
        ({}, True),
        ({"student_weights": "separate"}, False),
        ({"student_weights": "none"}, False),
    ],
    ids=str,
)
def test_weights_are_shared_when_both_are_one_model(values, shared):
    assert MixingConfig.from_dict(values).resolved("t", "main").shared_weights is shared


@pytest.mark.parametrize(
    "values,message",
    [
        ({"student_model_path": "s", "student_weights": "shared"}, "student_weights: 'shared' needs the teacher's own"),
        (
            {"student_model_path": "t", "student_weights": "shared", "student_max_total_tokens": 9},
            "student_max_total_tokens: a student with shared weights has no pool",
        ),
    ],
)
def test_weights_that_cannot_be_shared(values, message):
    with pytest.raises(ValueError, match=message):
        MixingConfig.from_dict(values).resolved("t", None)


# -- the YAML file ---------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "server.yaml"
        path.write_text(text)
        return path

    return write


def test_load_yaml(write):
    path = write("mixing:\n  student_model_path: s\n  alpha_max: 0.3\nserver:\n  tp_size: 2\n")
    assert load_yaml(path) == ({"student_model_path": "s", "alpha_max": 0.3}, {"tp_size": 2})


@pytest.mark.parametrize("text", ["", "# nothing\n", "mixing:\n", "mixing:\nserver: {}\n"])
def test_load_yaml_of_nothing(write, text):
    assert load_yaml(write(text)) == ({}, {})


@pytest.mark.parametrize(
    "text,message",
    [
        ("mixing: {alpha_min: 0.1", "(?s)server.yaml is not valid YAML: .*line 1"),
        ("- mixing", "server.yaml must hold a mapping with the sections 'mixing' and 'server'"),
        ("[]", "must hold a mapping"),
        ("mixng: {}", "server.yaml: unknown key 'mixng'. Did you mean 'mixing'?"),
        (
            "model_path: m",
            "server.yaml: unknown key 'model_path'. Known: client, contexts",
        ),
        ("mixing: [alpha_min]", "server.yaml: section 'mixing' must be a mapping"),
        ("server: false", "server.yaml: section 'server' must be a mapping"),
        ("mixing: {alpha_mn: 0.1}", "server.yaml: mixing: unknown key 'alpha_mn'. Did you mean 'alpha_min'?"),
    ],
)
def test_load_yaml_refuses(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_yaml(write(text))


def test_load_yaml_of_no_file(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ValueError, match="--config: no such file: "):
            load_yaml(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01\xff")
    with pytest.raises(ValueError, match="--config: cannot read .*binary.yaml"):
        load_yaml(tmp_path / "binary.yaml")


# -- the command line and the file together --------------------------------------------------------------------------

MODEL = ["--model-path", "the-teacher"]
STUDENT = [*MODEL, "--student-model-path", "the-student"]


def test_flags_alone():
    server_args, config = launch_server.parse([*STUDENT, "--fixed-alpha", "-0.3", "--mem-fraction-static", "0.5"])
    assert config == MixingConfig(
        student_model_path="the-student", alpha=AlphaSettings(alpha_method="fixed", fixed_alpha=-0.3)
    )
    assert (server_args.model_path, server_args.mem_fraction_static) == ("the-teacher", 0.5)
    assert (server_args.sampling_backend, server_args.radix_cache_backend) == ("optimal", "optimal")


def test_without_a_path_the_student_is_the_teacher():
    server_args, config = launch_server.parse(MODEL)
    assert config == MixingConfig(student_model_path="the-teacher", shared_weights=True)
    assert (server_args.sampling_backend, server_args.radix_cache_backend) == ("optimal", "optimal")


def test_without_a_student_the_server_is_stock():
    server_args, config = launch_server.parse([*MODEL, "--student-weights", "none"])
    assert config == MixingConfig(student_weights="none")
    assert (server_args.sampling_backend, server_args.radix_cache_backend) == (None, None)


def test_flags_win_over_the_file(write):
    path = write(
        "mixing: {student_model_path: s, alpha_method: entropy, alpha_max: 0.3, student_max_total_tokens: 50}\n"
        "server: {model_path: m, max_running_requests: 8, tp_size: 2, dtype: float16, port: 1234, gc_threshold: [1, 2]}"
    )
    argv = ["--student-model-path", "s2", "--alpha-max", "0.6", "--max-running-requests=9", "--gc-threshold", "7"]
    # SGLang's field tp_size has another flag, and the flag an alias.
    server_args, config = launch_server.parse([*argv, "--tensor-parallel-size", "1", "--config", str(path)])
    assert config == MixingConfig(
        student_model_path="s2", student_max_total_tokens=50, alpha=AlphaSettings(alpha_method="entropy", alpha_max=0.6)
    )
    assert (server_args.model_path, server_args.dtype, server_args.port) == ("m", "float16", 1234)
    assert (server_args.max_running_requests, server_args.tp_size, server_args.gc_threshold) == (9, 1, [7])
    # Where the flag stands makes no difference, nor how it is written.
    assert launch_server.parse([f"--config={path}", *argv])[1] == config


@pytest.mark.parametrize(
    "mixing,argv,alpha",
    [
        ("alpha_method: entropy", ["--fixed-alpha", "1.5"], AlphaSettings(alpha_method="fixed", fixed_alpha=1.5)),
        ("fixed_alpha: 1.5", ["--alpha-method", "entropy"], AlphaSettings(alpha_method="entropy")),
        ("alpha_method: fixed", ["--fixed-alpha", "1.5"], AlphaSettings(alpha_method="fixed", fixed_alpha=1.5)),
        ("fixed_alpha: 1.5", ["--fixed-alpha", "0"], AlphaSettings(alpha_method="fixed", fixed_alpha=0.0)),
        ("alpha_max: 0.5", ["--alpha-max", "0"], AlphaSettings(alpha_max=0.0)),
        ("kl_budget: 0.5", ["--kl-budget", "0"], AlphaSettings(alpha_method="kl_budget", kl_budget=0.0)),
        ("kl_budget: 0.5", ["--fixed-alpha", "0"], AlphaSettings(alpha_method="fixed", fixed_alpha=0.0)),
        ("kl_budget: 0.5", ["--alpha-method", "kl_symmetry"], AlphaSettings()),
        (
            "fixed_alpha: 1.5",
            ["--kl-budget-teacher", "0.2"],
            AlphaSettings(alpha_method="kl_budget_teacher", kl_budget_teacher=0.2),
        ),
    ],
)
def test_method_flags_over_the_file(write, mixing, argv, alpha):
    assert launch_server.parse([*STUDENT, "--config", str(write(f"mixing: {{{mixing}}}")), *argv])[1].alpha == alpha


def test_alpha_defaults_in_a_file_need_no_student(write):
    """One file serves the baseline without a student too."""
    argv = [*MODEL, "--student-weights", "none", "--config", str(write("mixing: {alpha_max: 0.3}"))]
    _, config = launch_server.parse(argv)
    assert config == MixingConfig(student_weights="none", alpha=AlphaSettings(alpha_max=0.3))


def test_config_of_sglang_is_not_ours(write, tmp_path):
    """SGLang has a --config too: a flat file. It reads neither our file nor its own through ours."""
    flat = tmp_path / "flat.yaml"
    flat.write_text("model-path: m\n")
    with pytest.raises(
        ValueError,
        match="unknown key 'model-path'. Known: client, contexts",
    ):
        launch_server.parse(["--config", str(flat)])
    with pytest.raises(ValueError, match="server: unknown key 'config'"):
        launch_server.parse([*MODEL, "--config", str(write(f"server: {{config: {flat}}}"))])


# -- _as_flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values,flags",
    [
        ({}, []),
        ({"port": 3000, "host": "::1"}, ["--port=3000", "--host=::1"]),
        ({"mem_fraction_static": 0.5}, ["--mem-fraction-static=0.5"]),
        ({"max-total-tokens": "2k"}, ["--max-total-tokens=2k"]),
        ({"model": "m"}, ["--model-path=m"]),
        ({"fp8_gemm_runner_backend": "auto"}, ["--fp8-gemm-backend=auto"]),  # a field with another flag
        ({"api_key": "-starts with a dash"}, ["--api-key=-starts with a dash"]),
        ({"port": None, "skip_tokenizer_init": None}, []),
        ({"skip_tokenizer_init": True, "disable_radix_cache": False}, ["--skip-tokenizer-init"]),
        ({"disable_cuda_graph": True, "enable_dp_attention": False}, ["--disable-cuda-graph"]),
        ({"dllm_fdfo": False, "mm_enable_dp_encoder": True}, ["--no-dllm-fdfo", "--mm-enable-dp-encoder"]),
        ({"gc_threshold": [700, 10, 10]}, ["--gc-threshold", "700", "10", "10"]),
        ({"gc_threshold": 700}, ["--gc-threshold=700"]),
        ({"gc_threshold": [], "lora_target_modules": []}, ["--lora-target-modules"]),
        ({"preferred_sampling_params": {"top_p": 0.5}}, ['--preferred-sampling-params={"top_p": 0.5}']),
        ({"preferred_sampling_params": '{"top_p": 0.5}'}, ['--preferred-sampling-params={"top_p": 0.5}']),
        ({"json_model_override_args": {"a": [1, True]}}, ['--json-model-override-args={"a": [1, true]}']),
        ({"forward_hooks": [{"name": "h"}]}, ['--forward-hooks=[{"name": "h"}]']),
        (
            {"lora_paths": ["a=b", {"lora_name": "n", "lora_path": "p"}]},
            ["--lora-paths", "a=b", '{"lora_name": "n", "lora_path": "p"}'],
        ),
        ({"model_checksum": True}, ["--model-checksum"]),
    ],
)
def test_as_flags(values, flags):
    assert launch_server._as_flags(values) == flags


@pytest.mark.parametrize(
    "values,message",
    [
        ({"mem_fraction_statc": 0.5}, "server: unknown key 'mem_fraction_statc'. Did you mean 'mem_fraction_static'?"),
        ({"qqq": 1}, r"server: unknown key 'qqq'\.$"),
        ({3: 1}, "server: unknown key '3'"),
        ({"help": True}, "server: unknown key 'help'"),
        ({"no_dllm_fdfo": True}, "server: unknown key 'no_dllm_fdfo'"),
        ({"student_model_path": "s"}, "server: 'student_model_path' belongs in the section 'mixing'"),
        ({"alpha-min": 0.5}, "server: 'alpha_min' belongs in the section 'mixing'"),
        ({"skip_tokenizer_init": "yes"}, "server: skip_tokenizer_init: must be true or false, got 'yes'"),
        ({"skip_tokenizer_init": 1}, "server: skip_tokenizer_init: must be true or false, got 1"),
        ({"enable_multimodal": False}, "server: enable_multimodal: SGLang decides unless it is true"),
        ({"port": "http"}, "server: argument --port: invalid int value: 'http'"),
        ({"port": [1, 2]}, "server: argument --port: invalid int value"),
        ({"port": True}, "server: argument --port: invalid int value: 'true'"),
        ({"dtype": "float17"}, "server: argument --dtype: invalid choice: 'float17'"),
        ({"preferred_sampling_params": "{"}, "server: argument --preferred-sampling-params: invalid"),
    ],
)
def test_as_flags_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        launch_server._as_flags(values)


def test_structured_values_arrive(write):
    values = {
        "preferred_sampling_params": {"top_p": 0.5, "stop": ["a b", "-c"]},
        "served_model_name": "two words",
        "enable_multimodal": None,
        "disable_radix_cache": True,
        "uvicorn_access_log_exclude_prefixes": ["/health", "/metrics"],
    }
    server_args, _ = launch_server.parse([*MODEL, "--config", str(write(json.dumps({"server": values})))])
    assert {name: getattr(server_args, name) for name in values} == values


# -- exit status -----------------------------------------------------------------------------------------------------


def refused(argv, capfd) -> str:
    """What main prints when it returns 2."""
    assert launch_server.main(argv) == 2
    before, mark, message = capfd.readouterr().err.rpartition("sglang_optimal.launch_server: error: ")
    assert mark and "Traceback" not in before + message
    return message


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--alpha-method", "kl"], "alpha_method: 'kl' is not one of kl_symmetry, {} Set by {}--alpha-method."),
        (["--alpha-min", "0.8", "--alpha-max", "0.2"], "alpha_min: 0.8 is greater than {}--alpha-min, --alpha-max."),
        (["--alpha-max", "1.5"], "alpha_min, alpha_max: must lie in [0, 1]{}--alpha-max."),
        (["--fixed-alpha", "nan"], "fixed_alpha: must be a finite number{}--fixed-alpha."),
        (["--kl-budget", "-1"], "kl_budget: must be a finite number, 0 or more, got -1{}--kl-budget."),
        (
            ["--kl-budget", "1", "--kl-budget-teacher", "1"],
            "kl_budget, kl_budget_teacher: give only one of them{}--kl-b",
        ),
        (["--student-max-total-tokens", "-4"], "student_max_total_tokens: must be a positive integer, got -4"),
        (["--config", "/no/such.yaml"], "--config: no such file: /no/such.yaml"),
        (["--dwdp-size", "16"], "--dwdp-size: only 1 is supported beside a student, got 16"),
        (["--pp-size", "2"], "--pp-size: only 1 is supported beside a student, got 2"),
        (["--pipeline-parallel-size", "2"], "--pp-size: only 1"),
        (["--attn-dp-size", "2"], "--attn-dp-size: only 1"),
        (["--tokenizer-worker-num", "2"], "--tokenizer-worker-num: only 1"),
        (
            ["--enable-mixed-chunk"],
            "--enable-mixed-chunk: mixing prefill and decode rows in one batch is not supported",
        ),
        (["--speculative-algorithm", "EAGLE"], "--speculative-algorithm: speculative decoding is not supported"),
        (["--dp-size", "2", "--enable-dp-attention"], "--enable-dp-attention: data-parallel attention is not"),
        (["--enable-lora"], "--enable-lora: LoRA adapters"),
        (["--lora-paths", "a=b"], "--lora-paths: LoRA adapters"),
        (["--enable-hierarchical-cache"], "--enable-hierarchical-cache: the hierarchical cache"),
        (["--enable-lmcache"], "--enable-lmcache: LMCache"),
        (["--encoder-only"], "--encoder-only: a front end other than the HTTP server"),
        (["--disaggregation-mode", "prefill"], "--disaggregation-mode: PD disaggregation"),
        (["--sampling-backend", "pytorch"], "--sampling-backend: must stay unset or 'optimal'{}got 'pytorch'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_flags(argv, message, capfd):
    error = refused([*STUDENT, *argv], capfd)
    position = 0
    for part in message.split("{}"):
        assert part in error[position:], error
        position = error.index(part, position) + len(part)


def test_refused_server_key_in_the_file(write, capfd):
    path = write("server: {max_runing_requests: 4}")
    assert "server: unknown key 'max_runing_requests'. Did you mean 'max_running_requests'?" in refused(
        [*STUDENT, "--config", str(path)], capfd
    )
    path = write("mixing: {alpha_min: 0.5}\nserver: {dwdp_size: 2}")
    assert "--dwdp-size: only 1" in refused([*STUDENT, "--config", str(path)], capfd)
    error = refused([*STUDENT, "--config", str(path), "--alpha-max", "0.2"], capfd)
    assert "alpha_min: 0.5 is greater than alpha_max 0.2" in error
    assert "--alpha-max" in error and str(path) in error


def test_refused_mixing_flag_without_a_student(capfd):
    error = refused([*MODEL, "--student-weights", "none", "--alpha-min", "0.2", "--alpha-method", "entropy"], capfd)
    assert "--alpha-method, --alpha-min: no effect with student_weights 'none'" in error
    assert "student_weights: 'none' does not go with" in refused([*STUDENT, "--student-weights", "none"], capfd)
    assert "student_revision: has no effect without student_model_path" in refused(
        [*MODEL, "--student-revision", "main"], capfd
    )


def test_what_argparse_refuses(capfd):
    for argv in (
        [*STUDENT, "--alpha-min", "low"],
        [*STUDENT, "--alpha-minimum", "0.1"],
        [*STUDENT, "--student", "s"],  # no abbreviations of ours
        [*STUDENT, "--config"],
        [],
    ):
        with pytest.raises(SystemExit) as end:
            launch_server.main(argv)
        assert end.value.code == 2, argv
    assert "--model-path" in capfd.readouterr().err


def test_help_shows_both_sets_of_flags(capfd):
    with pytest.raises(SystemExit) as end:
        launch_server.main(["--help"])
    assert end.value.code == 0
    printed = capfd.readouterr().out
    for text in ("--student-model-path", "--fixed-alpha", "sections 'mixing' and 'server'", "--mem-fraction-static"):
        assert text in printed


# -- models ----------------------------------------------------------------------------------------------------------


def test_missing_student(tiny_pair, tmp_path, capfd):
    teacher = ["--model-path", str(tiny_pair[0])]
    (tmp_path / "empty").mkdir()
    for path in ("/no/such/model", str(tmp_path / "empty")):
        error = refused([*teacher, "--student-model-path", path], capfd)
        assert f"--student-model-path: no model at {path}" in error


def test_missing_teacher(tiny_pair, tmp_path, capfd):
    student = ["--student-model-path", str(tiny_pair[1])]
    for argv in (student, []):
        assert "--model-path: no model at /no/such/model" in refused(["--model-path", "/no/such/model", *argv], capfd)
    error = refused(["--model-path", str(tmp_path), *student], capfd)
    assert f"--model-path: cannot load a tokenizer from {tmp_path}" in error


@pytest.fixture(scope="module")
def other_tokenizer(tiny_pair, tmp_path_factory):
    """A student whose tokenizer has two tokens the other way round."""
    folder = tmp_path_factory.mktemp("other") / "student"
    shutil.copytree(tiny_pair[1], folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_tokenizers_that_disagree(tiny_pair, other_tokenizer, capfd):
    error = refused(["--model-path", str(tiny_pair[0]), "--student-model-path", str(other_tokenizer)], capfd)
    assert "--student-model-path: the student's tokenizer disagrees with the teacher's" in error
    assert "2 ids mean different tokens: id 19 is 'a'" in error


def test_what_sglang_resolves_is_checked_too(tiny_pair):
    """A setting that the user did not ask for."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    argv = ["--model-path", str(tiny_pair[0]), "--student-model-path", str(tiny_pair[1])]
    server_args, config = launch_server.parse(argv)
    launch.resolve(server_args, config)
    assert resolving_view(server_args).tokenizer_worker_num == 1

    server_args, config = launch_server.parse(argv)
    declare_resolution(server_args, "test", tokenizer_worker_num=2)
    with pytest.raises(ValueError, match="--tokenizer-worker-num: only 1 is supported.*got 2.*SGLang chose this"):
        launch.resolve(server_args, config)

    server_args, config = launch_server.parse(["--model-path", str(tiny_pair[0] / "nothing")])
    with pytest.raises(ValueError, match="nothing"):
        launch.resolve(server_args, config)


def test_exit_status_of_the_command():
    command = [sys.executable, "-m", "sglang_optimal.launch_server", *STUDENT, "--alpha-min", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("sglang_optimal.launch_server: error: alpha_min, alpha_max: must")
    assert done.stdout == ""


def test_lora_student():
    config = MixingConfig.from_dict({"student_lora_path": "some/adapter"}).resolved("teacher", None)
    assert config.shared_weights and config.student_model_path == "teacher"
    with pytest.raises(ValueError, match="student_lora_path: does not go with student_weights 'separate'"):
        MixingConfig.from_dict({"student_lora_path": "some/adapter", "student_weights": "separate"})
    with pytest.raises(ValueError, match="student_lora_path: the adapter runs on the teacher's weights"):
        MixingConfig.from_dict({"student_lora_path": "some/adapter", "student_model_path": "other"}).resolved("t", None)


def test_lora_student_in_server_arguments(tiny_pair, lora_adapter):
    from sglang_optimal.runtime import plugin
    from sglang_optimal.runtime.launch import checked_server_args

    plugin.prepare()

    teacher, adapter = str(tiny_pair[0]), str(lora_adapter[0])
    config = MixingConfig.from_dict({"student_lora_path": adapter})
    args, _ = checked_server_args(teacher, config, {"random_seed": 1}, "test")
    assert [one["lora_path"] for one in args.lora_paths] == [adapter] and args.enable_lora
    with pytest.raises(ValueError, match="--lora-paths: no other adapter"):
        checked_server_args(teacher, config, {"lora_paths": ["x=y"]}, "test")
    with pytest.raises(ValueError, match="--student-lora-path: no adapter at .*adapter_config.json"):
        checked_server_args(teacher, MixingConfig.from_dict({"student_lora_path": teacher}), {}, "test")
    with pytest.raises(ValueError, match="--enable-lora: LoRA adapters is not supported beside a student"):
        checked_server_args(teacher, MixingConfig.from_dict({}), {"enable_lora": True}, "test")


# -- self-check ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written,wanted", [("on", "on"), ("off", "off"), ("'on'", "on"), ("true", "on"), ("false", "off")]
)
def test_self_check_in_yaml(tmp_path, written, wanted):
    """YAML reads on and off as true and false."""
    path = tmp_path / "c.yaml"
    path.write_text(f"mixing:\n  mixing_self_check: {written}\n")
    assert MixingConfig.from_dict(load_yaml(path)[0]).mixing_self_check == wanted


def test_self_check_is_on_where_there_is_an_accelerator():
    assert [MixingConfig().checks_itself(accelerator) for accelerator in (True, False)] == [True, False]
    for value in ("on", "off"):
        config = MixingConfig.from_dict({"mixing_self_check": value})
        assert [config.checks_itself(accelerator) for accelerator in (True, False)] == [value == "on"] * 2
    with pytest.raises(ValueError, match="mixing_self_check: 'yes' is not one of on, off"):
        MixingConfig.from_dict({"mixing_self_check": "yes"})


def test_only_a_scheduler_that_left_with_status_2_is_a_failed_self_check():
    died = "Rank 0 scheduler died during initialization (exit code: {})."
    with pytest.raises(launch.SelfCheckFailed), launch.starting():
        raise RuntimeError(died.format(2))
    for error in (RuntimeError(died.format(-9)), ValueError("exit code: 2")):
        with pytest.raises(type(error), match="exit code") as caught, launch.starting():
            raise error
        assert caught.value is error


@pytest.mark.parametrize("status,raised", [(2, launch.SelfCheckFailed), (-9, RuntimeError)])
def test_a_start_that_fails_ends_the_engine_s_processes_and_no_other(status, raised):
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    context = multiprocessing.get_context("spawn")
    earlier = context.Process(target=time.sleep, args=(60,))
    earlier.start()
    another = None
    try:
        with pytest.raises(raised), launch.starting():
            another = subprocess.Popen(sleep)
            detokenizer = context.Process(target=time.sleep, args=(60,))
            detokenizer.start()
            raise RuntimeError(f"Rank 0 scheduler died during initialization (exit code: {status}).")
        detokenizer.join(10)
        assert detokenizer.exitcode == -signal.SIGKILL
        assert another.poll() is None and earlier.is_alive()
    finally:
        earlier.kill()
        if another is not None:
            another.kill()
            another.wait()
